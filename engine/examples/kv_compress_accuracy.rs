//! What each way of compressing costs the bundled model, at equal bytes: a table, not a timing.
//!
//! `cargo run --release -p longkv-engine --example kv_compress_accuracy` calibrates on the bundled calibration text and evaluates
//! on the held-out text, decoding token by token through the compressed cache. Takes a few minutes.

use std::path::Path;

use kv_compress::CompressionPlan;
use kv_compress::projection::Projection;
use longkv_engine::compress::{Allocation, Compressor, Target};
use longkv_engine::eval::{Windows, evaluate};
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
    let windows = Windows::new(CONTEXT, CONTEXT / 4, 4)?;
    let score = |kv: &str| -> Result<(f64, f64), Box<dyn std::error::Error>> {
        let mut session = Session::new(&model, &kv.parse()?, Box::new(ranks::Single), CONTEXT)?;
        let report = evaluate(&mut session, kv, &heldout, windows, |_, _| {})?;
        Ok((report.nll_per_token, report.kv_bytes_per_token))
    };
    let (dense, dense_bytes) = score("dense")?;
    println!("{:<32} {:>12} {:>10} {:>9}", "projection, ranks", "bytes/token", "nll/token", "Δ");
    println!("{:<32} {dense_bytes:>12.0} {dense:>10.4} {:>9}", "dense", "");
    for ratio in [0.75, 0.5, 0.375] {
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
            let (nll, bytes) = score(&format!("fdc:{}", file.display()))?;
            let name = format!("{projection}, {}", format!("{allocation:?}").to_lowercase());
            println!("{name:<32} {bytes:>12.0} {nll:>10.4} {:>+8.2}%", 100.0 * (nll / dense - 1.0));
        }
    }
    Ok(())
}
