//! `cargo xtask gpu-record`: results of a bundle into the ledger.

use std::path::{Path, PathBuf};

pub(crate) use xtask::results::Source;
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
    let mut run: Results = results::read(file)?;
    // A runner that was stopped left them beside its results.
    run.take_lines(file.parent().unwrap_or(Path::new(".")));
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
    let source = run.source();
    let later_than = |known: &Source| source.date >= known.date;
    if !ceilings.is_empty() {
        let path = device.join("ceilings.json");
        if known::<Ceiling>(&path)?.is_none_or(|known| later_than(&known.run)) {
            write(&path, &Measured { run: source.clone(), values: ceilings })?;
        }
    }
    if !figures.is_empty() {
        let path = device.join("figures.json");
        let known = known::<Figure>(&path)?;
        let run = known.as_ref().filter(|known| !later_than(&known.run)).map_or(&source, |known| &known.run);
        let run = run.clone();
        let figures = figures.into_iter().map(|figure| Figure {
            source: figure.source.clone().or_else(|| Some(source.clone())),
            ..figure
        });
        // In the order of their dates, so that a file may be recorded after a later one.
        let date = |figure: &Figure| figure.source.as_ref().map(|source| source.date.clone());
        let mut all: Vec<Figure> = known.into_iter().flat_map(|known| known.values).chain(figures).collect();
        all.sort_by_key(date);
        let mut values = Vec::new();
        all.into_iter().for_each(|figure| Figure::put(&mut values, figure));
        values.sort_by(|a, b| (&a.bench, &a.implementation).cmp(&(&b.bench, &b.implementation)));
        write(&path, &Measured { run, values })?;
    }
    Ok(())
}

/// What is recorded of a device.
fn known<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<Measured<T>>> {
    if path.exists() { results::read(path).map(Some) } else { Ok(None) }
}

/// Values of one device with the latest run that they come from. Figures say themselves where they come from.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Measured<T> {
    pub(crate) run: Source,
    pub(crate) values: Vec<T>,
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

    /// A run of a date and commit with figures by name and time; 0 is a figure without one.
    fn record_run(folder: &Path, (date, commit): (&str, &str), figures: &[(&str, f64)]) -> Measured<Figure> {
        let figures = figures.iter().map(|(bench, median_us)| Figure {
            bench: bench.to_string(),
            median_us: *median_us,
            skipped: (*median_us == 0.0).then(|| "no wheel".to_string()),
            ..Figure::default()
        });
        let part = Part { started: date.to_string(), figures: figures.collect(), ..Part::default() };
        let mut run = run(&[], &[("benches", part)]);
        run.bundle.commit = commit.to_string();
        let file = folder.join("results.json");
        results::write(&file, &run).expect("a writable folder");
        record(&file, &folder.join("ledger"), &folder.join("results")).expect("a run with a GPU");
        results::read(&folder.join("results/made-up-gpu/figures.json")).expect("figures")
    }

    #[test]
    fn every_figure_keeps_the_commit_it_is_of() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let of = |measured: &Measured<Figure>| {
            let figures = measured.values.iter().map(|figure| {
                let source = figure.source.as_ref().expect("it was recorded");
                (figure.bench.clone(), figure.median_us, source.commit.clone())
            });
            (measured.run.commit.clone(), figures.collect::<Vec<_>>())
        };
        let figure = |bench: &str, time: f64, commit: &str| (bench.to_string(), time, commit.to_string());
        record_run(folder.path(), ("2000-01-02", "old"), &[("a", 5.0), ("b", 6.0), ("c", 7.0)]);
        // Later, `a` is measured anew and `b` cannot run: its time stands.
        let later = record_run(folder.path(), ("2000-01-03", "new"), &[("a", 4.0), ("b", 0.0)]);
        let expected = vec![figure("a", 4.0, "new"), figure("b", 6.0, "old"), figure("c", 7.0, "old")];
        assert_eq!(of(&later), ("new".to_string(), expected));
        // A run of before that is recorded after it replaces nothing later.
        let earlier = record_run(folder.path(), ("2000-01-01", "older"), &[("a", 9.0), ("d", 8.0)]);
        let expected = vec![
            figure("a", 4.0, "new"),
            figure("b", 6.0, "old"),
            figure("c", 7.0, "old"),
            figure("d", 8.0, "older"),
        ];
        assert_eq!(of(&earlier), ("new".to_string(), expected));
    }

    #[test]
    fn lines_of_a_runner_that_was_stopped_are_recorded() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let line = "{\"bench\":\"b\",\"implementation\":\"longkv\",\"median_us\":2.5}\n";
        std::fs::write(results::figures_file(folder.path(), "benches"), line).expect("writable");
        let measured = record_run(folder.path(), ("2000-01-02", "c"), &[("a", 5.0)]);
        let benches: Vec<_> = measured.values.iter().map(|figure| figure.bench.as_str()).collect();
        assert_eq!(benches, ["a", "b"]);
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
