//! What each way of compressing costs the bundled model, at equal bytes: a table, not a timing.
//!
//! `cargo run --release -p longkv-engine --example kv_compress_accuracy [-- FILE]` calibrates on the bundled calibration text and
//! evaluates on the held-out text, decoding token by token through the compressed cache; FILE takes the reports as JSON. Takes a few
//! minutes.

use std::path::Path;

use kv_compress::CompressionPlan;
use kv_compress::projection::Projection;
use longkv_engine::compress::{Allocation, Compressor, Target};
use longkv_engine::eval::{Report, Windows, evaluate};
use longkv_engine::{Model, Session, ranks};

const CONTEXT: usize = 512;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("model");
    let tokens = |name: &str| -> std::io::Result<Vec<u32>> {
        Ok(std::fs::read(folder.join(name))?.into_iter().map(u32::from).collect())
    };
    let (calibration, heldout) = (tokens("calibration.txt")?, tokens("heldout.txt")?);
    let model = Model::load(&folder, &"dense".parse()?)?;
    let compressor = Compressor::new(&model, &calibration, CONTEXT, |_, _| {})?;
    let files = tempfile::tempdir()?;
    let windows = Windows::new(CONTEXT, CONTEXT / 4, 8)?;
    let mut reports: Vec<Report> = Vec::new();
    let mut score = |kv: &str, name: &str| -> Result<(), Box<dyn std::error::Error>> {
        let mut session = Session::new(&model, &kv.parse()?, Box::new(ranks::Single), CONTEXT)?;
        let report = evaluate(&mut session, name, &heldout, windows, |_, _| {})?;
        // Where the bundled model lies is nobody's business but this machine's.
        let report = Report { model: "engine/model".to_string(), ..report };
        let (bytes, nll) = (report.kv_bytes_per_token, report.nll_per_token);
        let dense = reports.first().map_or(nll, |dense| dense.nll_per_token);
        println!("{name:<40} {bytes:>12.0} {nll:>10.4} {:>+8.2}%", 100.0 * (nll / dense - 1.0));
        reports.push(report);
        Ok(())
    };
    println!("{:<40} {:>12} {:>10} {:>9}", "share, projection, ranks", "bytes/token", "nll/token", "Δ");
    score("dense", "dense")?;
    for ratio in [0.5, 0.375] {
        for (projection, allocation) in [
            (Projection::Optimal, Allocation::Adaptive),
            (Projection::Optimal, Allocation::Profile),
            (Projection::Optimal, Allocation::Uniform),
            (Projection::JointSvd, Allocation::Adaptive),
            (Projection::JointSvd, Allocation::Uniform),
            (Projection::KeyOnly, Allocation::Adaptive),
            (Projection::KeyOnly, Allocation::Uniform),
            (Projection::Optimal, Allocation::LayerThreshold),
        ] {
            let plan: CompressionPlan = compressor.plan(projection, allocation, Target::Ratio(ratio))?;
            let file = files.path().join("plan.safetensors");
            std::fs::write(&file, plan.to_bytes()?)?;
            let name = format!("fdc {ratio}: {projection}, {}", format!("{allocation:?}").to_lowercase());
            score(&format!("fdc:{}", file.display()), &name)?;
        }
    }
    if let Some(path) = std::env::args_os().nth(1) {
        std::fs::write(path, serde_json::to_string_pretty(&reports)? + "\n")?;
    }
    Ok(())
}
