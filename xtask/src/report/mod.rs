//! `cargo xtask report`: `benches/REPORT.md` with its plots, and the GPU states in README.md, all from `benches/results`.
//!
//! Nothing is claimed that is not in a file there, and nothing there is left out: a peer that won is shown as it won.

mod markdown;
mod plots;
mod ratios;
mod readme;
mod svg;
mod targets;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use xtask::results::{self, Ceiling, Figure};

use crate::gpu::ledger::Ledger;
use crate::gpu::record::Measured;
use crate::gpu::status::{self, RowStatus};
use crate::gpu::transports;
use crate::{Result, workspace};

/// What one device measured.
pub(super) struct Device {
    /// Folder in `benches/results`.
    folder: String,
    ceilings: Option<Measured<Ceiling>>,
    figures: Option<Measured<Figure>>,
}

/// What `engine eval --json` wrote, as far as the report shows it.
#[derive(Debug, Clone, serde::Deserialize)]
pub(super) struct Accuracy {
    model: String,
    kv: String,
    context: u64,
    tokens: u64,
    nll_per_token: f64,
    perplexity: f64,
    kv_bytes_per_token: f64,
    dense_kv_bytes_per_token: f64,
}

impl Accuracy {
    /// Dense attention over the same tokens.
    pub(super) fn dense_of<'a>(&self, list: &'a [Accuracy]) -> Option<&'a Accuracy> {
        let same = |other: &&Accuracy| {
            (&other.model, other.context, other.tokens) == (&self.model, self.context, self.tokens)
        };
        list.iter().filter(|other| other.kv == "dense").find(same)
    }
}

pub(crate) fn command(arguments: &[String]) -> Result {
    let check = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => false,
        ["--check"] => true,
        _ => return Err("usage: cargo xtask report [--check]".to_string()),
    };
    let files = generate()?;
    let mut stale = Vec::new();
    for (path, text) in &files {
        if std::fs::read_to_string(path).is_ok_and(|committed| committed == *text) {
            continue;
        }
        if check {
            stale.push(path.display().to_string());
            continue;
        }
        let folder = path.parent().expect("a file has a folder");
        std::fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))?;
        println!("wrote {}", path.display());
    }
    if !stale.is_empty() {
        return Err(format!("stale: {}; run `cargo xtask report`", stale.join(", ")));
    }
    println!("{} files are fresh", files.len());
    Ok(())
}

/// Every generated file with its text.
fn generate() -> Result<BTreeMap<PathBuf, String>> {
    let results = workspace().join("benches/results");
    let rows = status::statuses(&Ledger::load(&Ledger::folder())?)?;
    let devices = devices(&results)?;
    let accuracy = accuracy(&results.join("accuracy"))?;

    let mut files = BTreeMap::new();
    let report = markdown::report(&rows, &devices, &accuracy);
    for (name, text) in report.plots {
        files.insert(results.join(name), text);
    }
    files.insert(workspace().join("benches/REPORT.md"), report.text);
    let readme = workspace().join("README.md");
    let text = std::fs::read_to_string(&readme).map_err(|error| format!("{}: {error}", readme.display()))?;
    let text = readme::fill(&text, "gpu", |group| state(&rows, group))?;
    files.insert(readme, readme::fill(&text, "accuracy", |prefix| costs(&accuracy, prefix))?);
    Ok(files)
}

/// The state of a crate's rows in words, of all rows, or of a transport. A crate may have no kernels yet; a name that is no folder has none ever.
fn state(rows: &[RowStatus], group: &str) -> Option<String> {
    if let Some(name) = group.strip_prefix("transport-") {
        return transports::state(name);
    }
    let normal = |name: &str| name.replace('_', "-");
    let mut wanted =
        rows.iter().filter(|row| group == "all" || normal(row.group) == normal(group)).peekable();
    if wanted.peek().is_none() && workspace().join(group).is_dir() {
        return Some("no kernels yet".to_string());
    }
    let known = group == "all" || wanted.peek().is_some();
    known.then(|| status::summary(wanted))
}

/// What the modes that begin with `prefix` cost, by what was measured over the same tokens as dense: `name +0.1 % nll at 34 % of the
/// bytes`. Plans that are no mode of their own have a space in their name and are left to the report.
fn costs(accuracy: &[Accuracy], prefix: &str) -> Option<String> {
    let cost = |mode: &Accuracy| {
        let dense = mode.dense_of(accuracy)?;
        let nll = 100.0 * (mode.nll_per_token / dense.nll_per_token - 1.0);
        let bytes = 100.0 * mode.kv_bytes_per_token / mode.dense_kv_bytes_per_token;
        Some(format!("`{}` {nll:+.2} % nll at {bytes:.0} % of the bytes", mode.kv))
    };
    let modes = accuracy.iter().filter(|mode| mode.kv.starts_with(prefix) && !mode.kv.contains(' '));
    let costs: Vec<String> = modes.filter_map(cost).collect();
    (!costs.is_empty()).then(|| costs.join(", "))
}

fn devices(results: &Path) -> Result<Vec<Device>> {
    let mut devices = Vec::new();
    for path in std::fs::read_dir(results).into_iter().flatten().flatten().map(|entry| entry.path()) {
        fn optional<T: serde::de::DeserializeOwned>(path: PathBuf) -> Result<Option<T>> {
            if path.exists() { results::read(&path).map(Some) } else { Ok(None) }
        }
        let (ceilings, figures) =
            (optional(path.join("ceilings.json"))?, optional(path.join("figures.json"))?);
        if ceilings.is_some() || figures.is_some() {
            let folder = path.file_name().expect("a folder has a name").to_string_lossy().into_owned();
            devices.push(Device { folder, ceilings, figures });
        }
    }
    devices.sort_by(|a, b| a.folder.cmp(&b.folder));
    Ok(devices)
}

fn accuracy(folder: &Path) -> Result<Vec<Accuracy>> {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> =
        files.filter(|path| path.extension().is_some_and(|extension| extension == "json")).collect();
    files.sort();
    /// A file holds one report, or those of one program.
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Reports {
        One(Accuracy),
        Many(Vec<Accuracy>),
    }
    let mut list = Vec::new();
    for path in files {
        match results::read(&path)? {
            Reports::One(report) => list.push(report),
            Reports::Many(reports) => list.extend(reports),
        }
    }
    let key = |a: &Accuracy| (a.model.clone(), a.context, a.tokens, a.kv != "dense", a.kv.clone());
    list.sort_by_key(key);
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files as `gpu-record` leaves them, with made-up numbers: what is reached, missed and not measured.
    #[test]
    fn a_report_judges_what_files_hold() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/made-up-results");
        let devices = devices(&folder).expect("files that can be read");
        let report = markdown::report(&[], &devices, &[]);
        for row in [
            // 1.08 GB at 4000 GB/s are 270 us of 300.
            "| dense decode, 64 × 4096, 1.1 GB | 90 % | ≥ 85 % | ≥ 92 % | reached |",
            "| dense decode, 128K among 63 × 4096 to uniform of equal bytes | 1.20× | ≤ 1.15× | ≤ 1.05× | **missed** |",
            "| prefill, 16K, full | 600 TFLOP/s | ≥ 500 TFLOP/s | ≥ 650 TFLOP/s | reached |",
            "| prefill, 8K, causal, against cuDNN | 0.90× | ≥ 0.85× | ≥ 1.10× | reached |",
            // 150 MB at 3750 GB/s are 40 us of 50.
            "| append of 8192 tokens, of write bandwidth | 80 % | ≥ 70 % | ≥ 70 % | aim reached |",
            // The better of two paths.
            "| product of 16 tokens, weights in host memory, best path | 98 % | ≥ 90 % | ≥ 97 % | aim reached |",
            "| product of 16 tokens, half of the weights in HBM | 1.05× | ≤ 1.10× | ≤ 1.03× | reached |",
            "| bytes over the link, product of 16 tokens, to the bytes of the weights | 1.00× | 1.00× | 1.00× | aim reached |",
            // Without cuBLAS's time, and where a case failed.
            "| product of 2048 tokens, staged, against the longer of link and cuBLAS | not measured |",
            "| resolve, 2048 of 12,288 slots, 8 heads, a tenth missing | not measured |",
        ] {
            assert!(report.text.contains(row), "{row}\n{}", report.text);
        }
        assert!(report.text.contains("- ours on 8x2048of12288 failed: slots of row 0"), "{}", report.text);
    }
}
