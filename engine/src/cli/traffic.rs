//! What the weights moved, and what that would take on devices with two memories.

use std::fmt::Write;

use crate::Model;
use hybrid_gemm::traffic::Bytes;

/// A table of the steps so far, with their traffic and predicted times; empty where all weights are in memory.
pub(super) fn report(model: &Model) -> String {
    let steps = model.weight_steps();
    if steps.is_empty() {
        return String::new();
    }
    let mut text = String::from("\nWeights per step, counted:\n");
    for step in &steps {
        let traffic = step.traffic;
        let each = |bytes: u64| Bytes(bytes / step.steps.max(1));
        let _ = writeln!(
            text,
            "  {:>5} tokens × {:<5} link {} in {} tiles, HBM {} of weights, {} of partial sums{}",
            step.tokens,
            step.steps,
            each(traffic.link_bytes),
            traffic.link_tiles / step.steps.max(1),
            each(traffic.hbm_weight_bytes),
            each(traffic.partial_bytes),
            if step.as_predicted { "" } else { " (not as predicted)" },
        );
    }
    let _ = writeln!(text, "Predicted time of these products, in µs:");
    let _ = write!(text, "  {:<14}", "tokens");
    for device in model.weight_devices() {
        let _ = write!(text, "  {:>12}", device.name);
    }
    for step in &steps {
        let _ = write!(text, "\n  {:<14}", step.tokens);
        for device in 0..model.weight_devices().len() {
            let _ = match model.predict_step(device, step.tokens) {
                Some(seconds) => write!(text, "  {:>12.1}", 1e6 * seconds),
                None => write!(text, "  {:>12}", "–"),
            };
        }
    }
    let published = hybrid_gemm::DeviceProfile::all();
    let measured = model.weight_devices().iter().find(|device| !published.contains(device));
    text.push_str("\nPredictions are by the cost model, with published rates of such devices");
    let _ = match measured {
        Some(device) => writeln!(text, "; those of {} were measured.", device.name),
        None => writeln!(text, "; none was measured here."),
    };
    text
}
