//! The ledger: one JSON file in `benches/results/ledger` for each shipped row of the kernel table that ran on a GPU.
//!
//! A row is *proven* if tests that really launched it passed, and neither its cubin nor its launch code has changed since.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xtask::results::{self, Figure, Outcome, Results, RowDigests};

use crate::{Result, workspace};

/// Version of the format.
const SCHEMA: u32 = 1;

/// What is known of one row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) schema: u32,
    /// The row as it ran.
    #[serde(flatten)]
    pub(crate) row: RowDigests,
    /// Commit that the executables were built from.
    pub(crate) commit: String,
    /// Start of the latest part that counts, UTC.
    pub(crate) date: String,
    pub(crate) device: String,
    pub(crate) driver: String,
    /// Tests that launched the row, by name.
    pub(crate) tests: BTreeMap<String, Verdict>,
    /// Tests that launched the row under each tool of compute-sanitizer, by tool and name.
    pub(crate) sanitizer: BTreeMap<String, BTreeMap<String, Verdict>>,
    /// What benches that launched the row measured.
    pub(crate) figures: Vec<Figure>,
}

/// How a test of a row ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Verdict {
    pub(crate) outcome: Outcome,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) reason: Option<String>,
}

/// What the ledger says of a row as it is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Status {
    Proven,
    Failed,
    Stale,
    NeverRun,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Status::Proven => "proven",
            Status::Failed => "failed",
            Status::Stale => "stale",
            Status::NeverRun => "never run on a GPU",
        })
    }
}

impl Entry {
    /// Every verdict, of tests and sanitizers, with its name.
    fn verdicts(&self) -> impl Iterator<Item = (String, &Verdict)> {
        let tests = self.tests.iter().map(|(name, verdict)| (name.clone(), verdict));
        let sanitizer = self.sanitizer.iter().flat_map(|(tool, tests)| {
            tests.iter().map(move |(name, verdict)| (format!("{tool}: {name}"), verdict))
        });
        tests.chain(sanitizer)
    }

    /// Verdicts that speak against the row.
    pub(crate) fn failures(&self) -> Vec<String> {
        self.verdicts()
            .filter(|(_, verdict)| matches!(verdict.outcome, Outcome::Failed | Outcome::TimedOut))
            .map(|(name, verdict)| match &verdict.reason {
                Some(reason) => format!("{name}: {reason}"),
                None => name,
            })
            .collect()
    }

    /// The row's status if these are its digests now. A sanitizer can fail a row, only a test can prove one.
    pub(crate) fn status(&self, now: &RowDigests) -> Status {
        if self.row != *now {
            Status::Stale
        } else if !self.failures().is_empty() {
            Status::Failed
        } else if self.tests.values().any(|verdict| verdict.outcome == Outcome::Passed) {
            Status::Proven
        } else {
            Status::NeverRun
        }
    }

    /// Adds what another run says of the same row: what the later one says counts. Another cubin, launch code or device starts afresh.
    fn merge(&mut self, other: Entry) {
        // Files of runs may be recorded in any order.
        let (earlier, mut later) =
            if other.date < self.date { (other, self.clone()) } else { (self.clone(), other) };
        if earlier.row == later.row && earlier.device == later.device {
            let Entry { tests, sanitizer, figures, .. } = earlier;
            add(&mut later.tests, tests);
            for (tool, tests) in sanitizer {
                add(later.sanitizer.entry(tool).or_default(), tests);
            }
            let missing = figures.into_iter().filter(|old| !later.figures.iter().any(|new| new.same(old)));
            let missing: Vec<Figure> = missing.collect();
            later.figures.splice(0..0, missing);
        }
        *self = later;
    }
}

/// Adds verdicts of an earlier run to those of a later one. What was left out or cut off then says nothing against what had ended.
fn add(later: &mut BTreeMap<String, Verdict>, earlier: BTreeMap<String, Verdict>) {
    let ended = |verdict: &Verdict| !matches!(verdict.outcome, Outcome::Skipped | Outcome::NotRun);
    for (name, old) in earlier {
        if later.get(&name).is_none_or(|new| ended(&old) && !ended(new)) {
            later.insert(name, old);
        }
    }
}

/// What a run says of each row that it launched with the cubin that its bundle carried.
///
/// A kernel that the machine compiled itself counts if its cubin is the same.
pub(crate) fn entries(run: &Results) -> Result<Vec<Entry>> {
    let machine = &run.machine;
    let Some(device) = machine.device.clone() else {
        let reason = machine.no_device.as_deref().unwrap_or("no reason given");
        return Err(format!("nothing to record: the run had no GPU ({reason})"));
    };
    let driver = machine.driver.clone().unwrap_or_else(|| "unknown".to_string());
    let mut entries = Vec::new();
    for row in &run.bundle.rows {
        let launched = |launches: &[results::Launch]| {
            launches.iter().any(|launch| launch.label == row.label && launch.cubin == row.cubin)
        };
        let mut entry = Entry {
            schema: SCHEMA,
            row: row.clone(),
            commit: run.bundle.commit.clone(),
            date: String::new(),
            device: device.clone(),
            driver: driver.clone(),
            tests: BTreeMap::new(),
            sanitizer: BTreeMap::new(),
            figures: Vec::new(),
        };
        for (name, part) in &run.parts {
            let verdicts: BTreeMap<String, Verdict> = part
                .items
                .iter()
                .filter(|item| is_test(name) && launched(&item.launched))
                .map(|item| {
                    // The same test may run with prebuilt and with freshly compiled kernels.
                    let name = if name == "jit" { format!("jit: {}", item.name) } else { item.name.clone() };
                    (name, Verdict { outcome: item.outcome, reason: item.reason.clone() })
                })
                .collect();
            let figures: Vec<Figure> =
                part.figures.iter().filter(|figure| launched(&figure.kernels)).cloned().collect();
            if verdicts.is_empty() && figures.is_empty() {
                continue;
            }
            entry.date = entry.date.max(part.started.clone());
            match name.strip_prefix("sanitizer-") {
                Some(tool) => entry.sanitizer.entry(tool.to_string()).or_default().extend(verdicts),
                None => entry.tests.extend(verdicts),
            }
            entry.figures.extend(figures);
        }
        if !entry.date.is_empty() {
            entries.push(entry);
        }
    }
    Ok(entries)
}

/// Whether the items of a part are tests, whose outcome judges the kernels that they launched. A bench judges nothing.
fn is_test(part: &str) -> bool {
    matches!(part, "tests" | "jit" | "stress") || part.starts_with("sanitizer-")
}

/// The entries of a folder, by label.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Ledger {
    pub(crate) entries: BTreeMap<String, Entry>,
}

impl Ledger {
    /// Where the committed ledger lies.
    pub(crate) fn folder() -> PathBuf {
        workspace().join("benches/results/ledger")
    }

    /// Reads a folder; one that does not exist is an empty ledger.
    pub(crate) fn load(folder: &Path) -> Result<Self> {
        let mut ledger = Ledger::default();
        let Ok(files) = std::fs::read_dir(folder) else { return Ok(ledger) };
        for path in files.flatten().map(|file| file.path()) {
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let entry: Entry = results::read(&path)?;
            if entry.schema != SCHEMA {
                return Err(format!("{}: schema {}, expected {SCHEMA}", path.display(), entry.schema));
            }
            if path.file_stem().is_none_or(|stem| *stem != *entry.row.label) {
                return Err(format!("{}: holds the row {}", path.display(), entry.row.label));
            }
            ledger.entries.insert(entry.row.label.clone(), entry);
        }
        Ok(ledger)
    }

    /// Adds a run; the labels that it had something to say of.
    pub(crate) fn add(&mut self, run: &Results) -> Result<Vec<String>> {
        let mut labels = Vec::new();
        for entry in entries(run)? {
            let label = entry.row.label.clone();
            match self.entries.get_mut(&label) {
                Some(known) => known.merge(entry),
                None => {
                    self.entries.insert(label.clone(), entry);
                }
            }
            labels.push(label);
        }
        Ok(labels)
    }

    /// Writes these entries.
    pub(crate) fn save(&self, folder: &Path, labels: &[String]) -> Result {
        std::fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        for label in labels {
            results::write(&folder.join(format!("{label}.json")), &self.entries[label])?;
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use xtask::results::{Item, Launch, Machine, Manifest, Part};

    use super::*;

    pub(crate) fn digest(letter: char) -> String {
        letter.to_string().repeat(64)
    }

    fn row(label: &str, cubin: char) -> RowDigests {
        RowDigests {
            label: label.to_string(),
            group: "attention".to_string(),
            cubin: digest(cubin),
            launch: digest('f'),
        }
    }

    fn launch(label: &str, cubin: char) -> Launch {
        Launch { label: label.to_string(), arch: "sm_90a".to_string(), cubin: digest(cubin) }
    }

    fn item(name: &str, outcome: Outcome, launched: &[Launch]) -> Item {
        let reason = (outcome != Outcome::Passed).then(|| "worst element 3".to_string());
        Item { name: name.to_string(), outcome, seconds: 1.0, reason, launched: launched.to_vec() }
    }

    fn part(items: &[Item]) -> Part {
        Part { started: "2000-01-02T03:04:05Z".to_string(), items: items.to_vec(), ..Part::default() }
    }

    /// A made-up run on a made-up GPU.
    pub(crate) fn run(rows: &[RowDigests], parts: &[(&str, Part)]) -> Results {
        Results {
            schema: results::SCHEMA,
            bundle: Manifest {
                schema: results::SCHEMA,
                commit: "c0ffee".to_string(),
                built: String::new(),
                glibc: String::new(),
                nvrtc: "13.0".to_string(),
                rows: rows.to_vec(),
                tests: Vec::new(),
                benches: Vec::new(),
                ceilings: None,
                peers: Vec::new(),
                trainer: None,
            },
            machine: Machine { device: Some("Made-up GPU".to_string()), ..Machine::default() },
            parts: parts.iter().map(|(name, part)| (name.to_string(), part.clone())).collect(),
        }
    }

    #[test]
    fn only_a_passing_test_that_launched_the_very_cubin_proves_a_row() {
        use Outcome::{Failed, NotRun, Passed, Skipped, TimedOut};
        let now = row("k", 'a');
        let ran = [launch("k", 'a')];
        type Case = (&'static str, Vec<(&'static str, Part)>, Status);
        let cases: Vec<Case> = vec![
            ("nothing ran", vec![], Status::NeverRun),
            ("a test passed", vec![("tests", part(&[item("t", Passed, &ran)]))], Status::Proven),
            (
                "a test passed but launched nothing",
                vec![("tests", part(&[item("t", Passed, &[])]))],
                Status::NeverRun,
            ),
            (
                "a test launched another row",
                vec![("tests", part(&[item("t", Passed, &[launch("k2", 'a')])]))],
                Status::NeverRun,
            ),
            (
                "a test launched another cubin",
                vec![("tests", part(&[item("t", Passed, &[launch("k", 'b')])]))],
                Status::NeverRun,
            ),
            (
                "one of two tests failed",
                vec![("tests", part(&[item("t", Passed, &ran), item("u", Failed, &ran)]))],
                Status::Failed,
            ),
            ("a test did not end", vec![("tests", part(&[item("t", TimedOut, &ran)]))], Status::Failed),
            (
                "tests were left out",
                vec![("tests", part(&[item("t", Skipped, &ran), item("u", NotRun, &[])]))],
                Status::NeverRun,
            ),
            (
                "the stress test alone failed",
                vec![
                    ("tests", part(&[item("t", Passed, &ran)])),
                    ("stress", part(&[item("s", Failed, &ran)])),
                ],
                Status::Failed,
            ),
            (
                "a sanitizer found something",
                vec![
                    ("tests", part(&[item("t", Passed, &ran)])),
                    ("sanitizer-racecheck", part(&[item("t", Failed, &ran)])),
                ],
                Status::Failed,
            ),
            (
                "a sanitizer alone proves nothing",
                vec![("sanitizer-memcheck", part(&[item("t", Passed, &ran)]))],
                Status::NeverRun,
            ),
            (
                "a bench alone proves nothing, even if it ends well",
                vec![("benches", part(&[item("b", Passed, &ran)]))],
                Status::NeverRun,
            ),
        ];
        for (name, parts, expected) in cases {
            let mut ledger = Ledger::default();
            ledger.add(&run(std::slice::from_ref(&now), &parts)).expect("a run with a GPU");
            let status = ledger.entries.get("k").map_or(Status::NeverRun, |entry| entry.status(&now));
            assert_eq!(status, expected, "{name}");
        }
    }

    #[test]
    fn a_change_makes_a_proof_stale() {
        let now = row("k", 'a');
        let mut ledger = Ledger::default();
        let passed = part(&[item("t", Outcome::Passed, &[launch("k", 'a')])]);
        ledger.add(&run(std::slice::from_ref(&now), &[("tests", passed)])).expect("a run with a GPU");
        let entry = &ledger.entries["k"];
        assert_eq!(entry.status(&now), Status::Proven);
        assert_eq!(entry.status(&RowDigests { cubin: digest('b'), ..now.clone() }), Status::Stale);
        assert_eq!(entry.status(&RowDigests { launch: digest('b'), ..now }), Status::Stale);
    }

    #[test]
    fn later_runs_add_to_the_same_row_and_replace_a_changed_one() {
        let (old, new) = (row("k", 'a'), row("k", 'b'));
        let test = |name, outcome, cubin| part(&[item(name, outcome, &[launch("k", cubin)])]);
        let figure = |bench: &str, median_us| Figure {
            bench: bench.to_string(),
            median_us,
            kernels: vec![launch("k", 'a')],
            ..Figure::default()
        };
        let mut ledger = Ledger::default();
        let mut add = |row: &RowDigests, name, part| {
            ledger.add(&run(std::slice::from_ref(row), &[(name, part)])).expect("a run with a GPU");
            ledger.entries["k"].clone()
        };
        add(&old, "tests", test("t", Outcome::Failed, 'a'));
        let entry = add(&old, "tests", test("t", Outcome::Passed, 'a'));
        assert_eq!(entry.status(&old), Status::Proven, "the latest outcome of a test counts");
        let entry = add(&old, "tests", test("u", Outcome::Failed, 'a'));
        assert_eq!((entry.tests.len(), entry.status(&old)), (2, Status::Failed));
        assert_eq!(entry.failures(), ["u: worst element 3"]);

        let bench = |figures: &[Figure]| Part { figures: figures.to_vec(), ..part(&[]) };
        add(&old, "benches", bench(&[figure("small", 3.0), figure("large", 9.0)]));
        let entry = add(&old, "benches", bench(&[figure("large", 8.0)]));
        let medians: Vec<f64> = entry.figures.iter().map(|figure| figure.median_us).collect();
        assert_eq!(medians, [3.0, 8.0]);

        let entry = add(&new, "tests", test("t", Outcome::Passed, 'b'));
        assert_eq!((entry.tests.len(), entry.figures.len()), (1, 0), "a new cubin starts afresh");
        assert_eq!(entry.status(&new), Status::Proven);
    }

    #[test]
    fn runs_may_be_recorded_in_any_order_and_a_cut_takes_nothing_back() {
        use Outcome::{Failed, NotRun, Passed};
        let now = row("k", 'a');
        let on = |date: &str, outcome| Part {
            started: date.to_string(),
            ..part(&[item("t", outcome, &[launch("k", 'a')])])
        };
        let (first, second) = ("2000-01-01", "2000-01-02");
        // (recorded first, recorded second, state)
        let cases = [
            (on(first, Failed), on(second, Passed), Status::Proven),
            (on(second, Passed), on(first, Failed), Status::Proven),
            (on(first, Passed), on(second, Failed), Status::Failed),
            (on(second, Failed), on(first, Passed), Status::Failed),
            (on(first, Passed), on(second, NotRun), Status::Proven),
            (on(second, NotRun), on(first, Failed), Status::Failed),
        ];
        for (one, two, expected) in cases {
            let mut ledger = Ledger::default();
            for part in [&one, &two] {
                ledger.add(&run(std::slice::from_ref(&now), &[("tests", part.clone())])).expect("a GPU");
            }
            let entry = &ledger.entries["k"];
            assert_eq!((entry.status(&now), entry.date.as_str()), (expected, second), "{one:?}, {two:?}");
        }
    }

    #[test]
    fn a_run_without_a_gpu_is_refused() {
        let mut without = run(&[row("k", 'a')], &[]);
        without.machine = Machine { no_device: Some("no driver".to_string()), ..Machine::default() };
        let error = Ledger::default().add(&without).expect_err("no GPU");
        assert!(error.contains("no driver"), "{error}");
    }

    #[test]
    fn entries_come_back_from_their_files() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let now = row("k.v_dim=64", 'a');
        let parts = [
            ("tests", part(&[item("t", Outcome::Passed, &[launch("k.v_dim=64", 'a')])])),
            ("sanitizer-memcheck", part(&[item("t", Outcome::Failed, &[launch("k.v_dim=64", 'a')])])),
        ];
        let mut ledger = Ledger::default();
        let labels = ledger.add(&run(&[now], &parts)).expect("a run with a GPU");
        ledger.save(folder.path(), &labels).expect("the folder is writable");
        assert_eq!(Ledger::load(folder.path()).expect("whole files"), ledger);

        let file = folder.path().join("k.v_dim=64.json");
        std::fs::rename(&file, folder.path().join("other.json")).expect("a rename");
        assert!(Ledger::load(folder.path()).expect_err("a file of another row").contains("other.json"));
        assert_eq!(Ledger::load(&folder.path().join("none")).expect("an empty ledger"), Ledger::default());
    }
}
