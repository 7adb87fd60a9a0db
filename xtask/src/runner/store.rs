//! Where results go: the folder that was asked for, and one beside the bundle, where a later call on this machine finds them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use xtask::results::{self, Machine, Manifest, Part, RESULTS, Results};

/// The results so far and the folders that they are written to.
pub(crate) struct Store {
    folders: Vec<PathBuf>,
    results: Mutex<Results>,
}

/// What a call does with results of an earlier one.
pub(crate) enum Earlier<'a> {
    /// Keeps the parts of those in the first of its folders that has some of the same bundle and GPU.
    Keep,
    /// Goes on where the one stopped that left this file.
    GoOn(&'a Path),
}

impl Store {
    /// Opens the folders, which may have results of an earlier call; what there is to say of these.
    pub(crate) fn open(
        folders: Vec<PathBuf>,
        earlier: &Earlier<'_>,
        manifest: &Manifest,
        machine: &Machine,
    ) -> Result<(Self, Vec<String>), String> {
        for folder in &folders {
            std::fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        }
        let read = |path: &Path| {
            let mut found: Results = results::read(path)?;
            // A runner that was stopped left them beside its results.
            found.take_lines(path.parent().unwrap_or(Path::new(".")));
            go_on(found, manifest, machine)
        };
        let loaded = match earlier {
            Earlier::Keep => {
                folders.iter().find_map(|folder| read(&folder.join(RESULTS)).ok()).ok_or_else(String::new)
            }
            Earlier::GoOn(path) => read(path),
        };
        let (results, words) = match (loaded, earlier) {
            (Ok((results, words)), _) => (results, words),
            (Err(_), Earlier::Keep) => (fresh(manifest, machine), Vec::new()),
            // Minutes on a machine are worth more than the word of whoever typed the command.
            (Err(reason), Earlier::GoOn(_)) => {
                (fresh(manifest, machine), vec![format!("--rest: {reason}; beginning anew")])
            }
        };
        let store = Store { folders, results: Mutex::new(results) };
        store.write()?;
        // Their lines are in the results now.
        results::WITH_LINES.iter().for_each(|part| store.forget_lines(part));
        Ok((store, words))
    }

    /// What is known so far.
    pub(crate) fn with<T>(&self, f: impl FnOnce(&mut Results) -> T) -> T {
        f(&mut self.results.lock().expect("no thread panicked"))
    }

    /// Writes a part as it is now.
    pub(crate) fn put(&self, name: &str, part: &Part) -> Result<(), String> {
        self.with(|results| results.parts.insert(name.to_string(), part.clone()));
        self.write()
    }

    /// Writes everything to every folder.
    pub(crate) fn write(&self) -> Result<(), String> {
        self.with(|results| {
            self.folders.iter().try_for_each(|folder| results::write(&folder.join(RESULTS), results))
        })
    }

    /// Removes the lines of a part that its results have.
    pub(crate) fn forget_lines(&self, part: &str) {
        for folder in &self.folders {
            for file in [results::figures_file(folder, part), results::ceilings_file(folder, part)] {
                let _ = std::fs::remove_file(file);
            }
        }
    }
}

fn fresh(manifest: &Manifest, machine: &Machine) -> Results {
    Results {
        schema: results::SCHEMA,
        bundle: manifest.clone(),
        machine: machine.clone(),
        parts: BTreeMap::new(),
    }
}

/// Results that can be gone on with, which are of the same bundle on the same GPU, and what to say of them.
fn go_on(
    mut found: Results,
    manifest: &Manifest,
    machine: &Machine,
) -> Result<(Results, Vec<String>), String> {
    let built = |bundle: &Manifest| format!("a bundle of {}, built {}", bundle.commit, bundle.built);
    let device = |machine: &Machine| machine.device.clone().unwrap_or_else(|| "no GPU".to_string());
    if found.bundle != *manifest {
        return Err(format!("expected {}, found {}", built(manifest), built(&found.bundle)));
    }
    if found.machine.device != machine.device {
        return Err(format!("expected {}, found {}", device(machine), device(&found.machine)));
    }
    let mut words = Vec::new();
    let driver = |machine: &Machine| machine.driver.clone().unwrap_or_else(|| "unknown".to_string());
    let (then, now) = (driver(&found.machine), driver(machine));
    if !then.split(" and ").any(|then| then == now) {
        words.push(format!("another driver than before: {then}, now {now}"));
        // Figures carry their own; of tests it is one of these.
        found.machine.driver = Some(format!("{then} and {now}"));
    }
    Ok((found, words))
}

#[cfg(test)]
mod tests {
    use xtask::results::Figure;

    use super::*;

    fn manifest(built: &str) -> Manifest {
        Manifest {
            schema: results::SCHEMA,
            commit: "c".to_string(),
            built: built.to_string(),
            glibc: String::new(),
            nvrtc: String::new(),
            rows: Vec::new(),
            tests: Vec::new(),
            benches: Vec::new(),
            ceilings: None,
            peers: Vec::new(),
            trainer: None,
        }
    }

    fn machine(device: &str, driver: &str) -> Machine {
        Machine { device: Some(device.to_string()), driver: Some(driver.to_string()), ..Machine::default() }
    }

    /// Results with one part, of a bundle built today on GPU A with driver 1.
    fn earlier() -> Results {
        let mut results = fresh(&manifest("today"), &machine("A", "1"));
        results.parts.insert("tests".to_string(), Part { seconds: 7.0, ..Part::default() });
        results
    }

    #[test]
    fn the_same_bundle_on_the_same_gpu_is_gone_on_with() {
        // (bundle, GPU, driver, whether it goes on, what is said)
        let cases = [
            ("today", "A", "1", true, None),
            ("today", "A", "2", true, Some("another driver than before: 1, now 2")),
            (
                "later",
                "A",
                "1",
                false,
                Some("expected a bundle of c, built later, found a bundle of c, built today; beginning anew"),
            ),
            ("today", "B", "1", false, Some("expected B, found A; beginning anew")),
        ];
        for (built, device, driver, goes_on, said) in cases {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let file = folder.path().join("earlier.json");
            results::write(&file, &earlier()).expect("writable");
            let folders = vec![folder.path().join("out")];
            let rest = Earlier::GoOn(&file);
            let opened = Store::open(folders, &rest, &manifest(built), &machine(device, driver));
            let (store, words) = opened.expect("writable");
            assert_eq!(store.with(|results| results.parts.contains_key("tests")), goes_on, "{words:?}");
            assert_eq!(words.len(), said.iter().len(), "{words:?}");
            for (words, said) in words.iter().zip(said) {
                assert!(words.ends_with(said), "{words}");
            }
        }
    }

    #[test]
    fn a_third_driver_is_named_beside_the_others() {
        let (found, _) = go_on(earlier(), &manifest("today"), &machine("A", "2")).expect("the same GPU");
        assert_eq!(found.machine.driver.as_deref(), Some("1 and 2"));
        let (found, words) = go_on(found, &manifest("today"), &machine("A", "1")).expect("the same GPU");
        assert_eq!((found.machine.driver.as_deref(), words.len()), (Some("1 and 2"), 0));
    }

    #[test]
    fn nothing_to_go_on_with_is_said_and_no_obstacle() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let missing = folder.path().join("no/results.json");
        let folders = vec![folder.path().to_path_buf()];
        let opened = Store::open(folders, &Earlier::GoOn(&missing), &manifest("today"), &machine("A", "1"));
        let (_, words) = opened.expect("writable");
        assert!(words[0].starts_with("--rest: ") && words[0].ends_with("; beginning anew"), "{words:?}");
    }

    #[test]
    fn every_folder_has_the_results_and_lines_are_taken_up() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let folders = ["out", "kept"].map(|name| folder.path().join(name));
        let open = || {
            Store::open(folders.to_vec(), &Earlier::Keep, &manifest("today"), &machine("A", "1"))
                .expect("writable")
                .0
        };
        let store = open();
        store.put("tests", &Part { seconds: 7.0, ..Part::default() }).expect("writable");
        for folder in &folders {
            let found: Results = results::read(&folder.join(RESULTS)).expect("it was written");
            assert_eq!(found.parts["tests"].seconds, 7.0);
        }
        // The runner was stopped while a bench ran.
        let lines = results::figures_file(&folders[0], "benches");
        std::fs::write(&lines, "{\"bench\":\"b\",\"median_us\":2.5}\n").expect("writable");
        // The folder of this call may be a new one: what was kept beside the bundle has all but those lines.
        std::fs::remove_file(folders[0].join(RESULTS)).expect("it was there");
        assert_eq!(open().with(|results| results.parts["tests"].seconds), 7.0);
        std::fs::write(&lines, "{\"bench\":\"b\",\"median_us\":2.5}\n").expect("writable");
        let store = open();
        let figures = store.with(|results| results.parts["benches"].figures.clone());
        let found: Vec<_> = figures.iter().map(|f: &Figure| (f.bench.as_str(), f.median_us)).collect();
        assert_eq!((found, lines.exists()), (vec![("b", 2.5)], false));
        assert_eq!(figures[0].source.as_ref().map(|source| source.commit.as_str()), Some("c"));
        assert_eq!(store.with(|results| results.parts["tests"].seconds), 7.0);
    }
}
