//! `cargo xtask accuracy`: what each compressed cache costs the bundled model, into `benches/results/accuracy`.
//!
//! Every mode of the engine decodes the same held-out text; then every kind of low-rank plan does, at equal bytes.

use std::path::Path;
use std::process::Command;

use crate::{Result, workspace};

/// The engine's KV modes.
const MODES: &[&str] = &["dense", "hack8", "hack4", "hack2", "fdc-0.5", "fdc-auto", "fdc-0.5+hack4"];
/// Windows of 1024 tokens, three quarters of which are scored.
const WINDOWS: &str = "16";

pub(crate) fn command(arguments: &[String]) -> Result {
    if !arguments.is_empty() {
        return Err("usage: cargo xtask accuracy".to_string());
    }
    let folder = Path::new("benches/results/accuracy");
    std::fs::create_dir_all(workspace().join(folder))
        .map_err(|error| format!("{}: {error}", folder.display()))?;
    for mode in MODES {
        let file = folder.join(format!("{mode}.json"));
        let text = "engine/model/heldout.txt";
        let eval =
            ["eval", "--model", "engine/model", "--text", text, "--windows", WINDOWS, "--kv", mode, "--json"];
        engine(&["--bin", "engine", "--"], &eval, &file)?;
    }
    engine(&["--example", "kv_compress_accuracy", "--"], &[], &folder.join("fdc-plans.json"))
}

/// Runs a program of the engine that leaves a file.
fn engine(target: &[&str], arguments: &[&str], file: &Path) -> Result {
    let status = Command::new(env!("CARGO"))
        .current_dir(workspace())
        .args(["run", "--quiet", "--release", "--package", "longkv-engine"])
        .args(target)
        .args(arguments)
        .arg(file)
        .status()
        .map_err(|error| format!("cargo does not start: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("{}: the engine failed", file.display())) }
}
