//! `cargo xtask gpu-record`: results of a bundle into the ledger.

use std::path::{Path, PathBuf};

use xtask::results::{self, Ceiling, Figure, Results};

use super::ledger::Ledger;
use super::transports;
use crate::{Result, workspace};

pub(crate) fn command(arguments: &[String]) -> Result {
    if arguments.is_empty() || arguments.iter().any(|argument| argument.starts_with('-')) {
        return Err("usage: cargo xtask gpu-record FILE…".to_string());
    }
    for file in arguments {
        record(Path::new(file), &Ledger::folder(), &workspace().join("benches/results"))?;
    }
    Ok(())
}

/// Adds one file of results to a ledger, its ceilings and figures to the device's folder in `results_folder`.
pub(crate) fn record(file: &Path, ledger_folder: &Path, results_folder: &Path) -> Result {
    let run: Results = results::read(file)?;
    if run.schema != results::SCHEMA {
        return Err(format!("{}: schema {}, expected {}", file.display(), run.schema, results::SCHEMA));
    }
    let mut ledger = Ledger::load(ledger_folder)?;
    let labels = ledger.add(&run).map_err(|error| format!("{}: {error}", file.display()))?;
    ledger.save(ledger_folder, &labels)?;
    let transports = transports::record(&run, ledger_folder)?;
    println!("{}: {} rows, {} transports", file.display(), labels.len(), transports.len());

    let device = results_folder.join(folder_of(run.machine.device.as_deref().unwrap_or("unknown")));
    let ceilings: Vec<Ceiling> = run.parts.values().flat_map(|part| part.ceilings.iter().cloned()).collect();
    let figures: Vec<Figure> = run.parts.values().flat_map(|part| part.figures.iter().cloned()).collect();
    if !ceilings.is_empty() {
        write(&device.join("ceilings.json"), &Measured { run: Source::of(&run), values: ceilings })?;
    }
    if !figures.is_empty() {
        let path = device.join("figures.json");
        let mut known =
            if path.exists() { results::read::<Measured<Figure>>(&path)?.values } else { Vec::new() };
        known.retain(|old| {
            !figures.iter().any(|new| new.bench == old.bench && new.implementation == old.implementation)
        });
        known.extend(figures);
        known.sort_by(|a, b| (&a.bench, &a.implementation).cmp(&(&b.bench, &b.implementation)));
        write(&path, &Measured { run: Source::of(&run), values: known })?;
    }
    Ok(())
}

/// Values of one device with the latest run that they come from.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Measured<T> {
    pub(crate) run: Source,
    pub(crate) values: Vec<T>,
}

/// Which run values come from.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Source {
    pub(crate) device: String,
    pub(crate) sm_count: Option<u32>,
    pub(crate) driver: String,
    pub(crate) commit: String,
    pub(crate) date: String,
}

impl Source {
    fn of(run: &Results) -> Self {
        let machine = &run.machine;
        let unknown = || "unknown".to_string();
        Source {
            device: machine.device.clone().unwrap_or_else(unknown),
            sm_count: machine.sm_count,
            driver: machine.driver.clone().unwrap_or_else(unknown),
            commit: run.bundle.commit.clone(),
            date: run.parts.values().map(|part| part.started.clone()).max().unwrap_or_default(),
        }
    }
}

/// A device's name as a folder: `NVIDIA H200` becomes `nvidia-h200`.
fn folder_of(device: &str) -> PathBuf {
    let words: Vec<String> = device
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(str::to_ascii_lowercase)
        .collect();
    PathBuf::from(words.join("-"))
}

fn write<T: serde::Serialize>(path: &Path, value: &T) -> Result {
    let folder = path.parent().expect("a file has a folder");
    std::fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    results::write(path, value)?;
    println!("wrote {}", path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use xtask::results::Part;

    use super::super::ledger::tests::run;
    use super::*;

    #[test]
    fn ceilings_and_figures_go_to_the_device() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let ceiling = |median| Ceiling { name: "read".to_string(), median, ..Ceiling::default() };
        let figure = |bench: &str, implementation: &str, median_us| Figure {
            bench: bench.to_string(),
            implementation: implementation.to_string(),
            median_us,
            ..Figure::default()
        };
        let record_one = |ceilings: &[Ceiling], figures: &[Figure]| {
            let part = Part { ceilings: ceilings.to_vec(), figures: figures.to_vec(), ..Part::default() };
            let file = folder.path().join("results.json");
            results::write(&file, &run(&[], &[("part", part)])).expect("a writable folder");
            record(&file, &folder.path().join("ledger"), &folder.path().join("results"))
        };
        record_one(&[ceiling(1.0)], &[figure("b", "longkv", 5.0), figure("b", "peer", 6.0)]).expect("first");
        record_one(&[ceiling(2.0)], &[figure("b", "longkv", 4.0), figure("a", "longkv", 1.0)])
            .expect("second");

        let device = folder.path().join("results/made-up-gpu");
        let ceilings: Measured<Ceiling> = results::read(&device.join("ceilings.json")).expect("ceilings");
        assert_eq!(ceilings.values.iter().map(|c| c.median).collect::<Vec<_>>(), [2.0]);
        assert_eq!(ceilings.run.device, "Made-up GPU");
        let figures: Measured<Figure> = results::read(&device.join("figures.json")).expect("figures");
        let found: Vec<_> = figures
            .values
            .iter()
            .map(|f| (f.bench.as_str(), f.implementation.as_str(), f.median_us))
            .collect();
        assert_eq!(found, [("a", "longkv", 1.0), ("b", "longkv", 4.0), ("b", "peer", 6.0)]);
    }

    #[test]
    fn device_names_become_folders() {
        for (name, folder) in
            [("NVIDIA H200", "nvidia-h200"), ("NVIDIA  A100-SXM4/80GB", "nvidia-a100-sxm4-80gb")]
        {
            assert_eq!(folder_of(name), PathBuf::from(folder));
        }
    }
}
