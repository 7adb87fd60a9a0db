//! `cargo xtask report`: `benches/REPORT.md` with its plots, and the GPU states in README.md, all from `benches/results`.
//!
//! Nothing is claimed that is not in a file there, and nothing there is left out: a peer that won is shown as it won.

mod markdown;
mod readme;
mod svg;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use xtask::results::{self, Ceiling, Figure};

use crate::gpu::ledger::Ledger;
use crate::gpu::record::Measured;
use crate::gpu::status::{self, RowStatus};
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
    files.insert(readme, readme::fill(&text, |group| state(&rows, group))?);
    Ok(files)
}

/// The state of a crate's rows in words, or of all rows. A crate may have no kernels yet; a name that is no folder has none ever.
fn state(rows: &[RowStatus], group: &str) -> Option<String> {
    let normal = |name: &str| name.replace('_', "-");
    let mut wanted =
        rows.iter().filter(|row| group == "all" || normal(row.group) == normal(group)).peekable();
    if wanted.peek().is_none() && workspace().join(group).is_dir() {
        return Some("no kernels yet".to_string());
    }
    let known = group == "all" || wanted.peek().is_some();
    known.then(|| status::summary(wanted))
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
    let mut list: Vec<Accuracy> = files.iter().map(|path| results::read(path)).collect::<Result<_>>()?;
    list.sort_by(|a, b| (&a.model, a.kv != "dense", &a.kv).cmp(&(&b.model, b.kv != "dense", &b.kv)));
    Ok(list)
}
