//! Transports in the ledger. They launch no kernel, so what is kept of them is a digest of their sources; a file for each that has run
//! lies in `benches/results/ledger/transports`.

use std::path::{Path, PathBuf};

use cuda::digest::Digest;
use serde::{Deserialize, Serialize};
use xtask::results::{self, Outcome, Results};

use super::ledger::Ledger;
use crate::{Result, workspace};

/// Version of the format.
const SCHEMA: u32 = 1;

/// A transport of device memory.
pub(crate) struct Transport {
    pub(crate) name: &'static str,
    /// What the names of the tests that prove it contain.
    test: &'static str,
    /// What it is made of.
    sources: &'static [&'static str],
    /// What is said of it until it has run.
    never: &'static str,
}

/// Every transport that a GPU has to prove. Those of the host run in CI: threads and modelled delay in `cargo test`, MPI in its own part.
pub(crate) const TRANSPORTS: [Transport; 2] = [
    Transport {
        name: "one-gpu",
        test: "device_transport one_gpu::gpu",
        sources: &["seq-parallel/src/gpu/transport.rs", "seq-parallel/src/gpu/transport_local.rs"],
        never: "never run on a GPU",
    },
    Transport {
        name: "nccl",
        test: "device_transport nccl::gpus",
        sources: &[
            "seq-parallel/src/gpu/transport.rs",
            "seq-parallel/src/gpu/transport_nccl.rs",
            "seq-parallel/src/gpu/transport_nccl_library.rs",
        ],
        never: "never run with more than one rank",
    },
];

/// What is known of one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Entry {
    schema: u32,
    transport: String,
    /// Digest of its sources as they ran.
    sources: String,
    /// Commit that the executables were built from.
    commit: String,
    /// Start of the part that counts, UTC.
    date: String,
    device: String,
    driver: String,
    outcome: Outcome,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    reason: Option<String>,
}

impl Transport {
    fn digest(&self) -> Result<String> {
        let read = |path: &&str| {
            let path = workspace().join(path);
            std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))
        };
        let sources = self.sources.iter().map(read).collect::<Result<Vec<_>>>()?;
        Ok(format!("{}", Digest::of_parts(sources.iter().map(Vec::as_slice))))
    }

    fn file(&self, ledger: &Path) -> PathBuf {
        ledger.join("transports").join(format!("{}.json", self.name))
    }

    /// What the ledger says of it as it is now, and whether that is a proof.
    pub(crate) fn status(&self, ledger: &Path) -> Result<(String, bool)> {
        let file = self.file(ledger);
        if !file.exists() {
            return Ok((self.never.to_string(), false));
        }
        let entry: Entry = results::read(&file)?;
        if entry.schema != SCHEMA || entry.transport != self.name {
            return Err(format!("{}: not schema {SCHEMA} of {}", file.display(), self.name));
        }
        let word = match entry.outcome {
            _ if entry.sources != self.digest()? => "stale",
            Outcome::Passed => "proven",
            Outcome::Failed | Outcome::TimedOut => "failed",
            Outcome::Skipped | Outcome::NotRun => self.never,
        };
        Ok((format!("{word} ({}, {})", entry.device, entry.date), word == "proven"))
    }
}

/// What README.md says of a transport.
pub(crate) fn state(name: &str) -> Option<String> {
    let transport = TRANSPORTS.iter().find(|transport| transport.name == name)?;
    transport.status(&Ledger::folder()).map(|(text, _)| text).ok()
}

/// Adds what a run says of transports; their names. One that was skipped leaves what is known.
pub(crate) fn record(run: &Results, ledger: &Path) -> Result<Vec<&'static str>> {
    let mut recorded = Vec::new();
    for transport in &TRANSPORTS {
        let Some(part) = run.parts.get("tests") else { continue };
        let mut ran = part.items.iter().filter(|item| {
            item.name.ends_with(transport.test) && !matches!(item.outcome, Outcome::Skipped | Outcome::NotRun)
        });
        let Some(item) = ran.next_back() else { continue };
        let entry = Entry {
            schema: SCHEMA,
            transport: transport.name.to_string(),
            sources: transport.digest()?,
            commit: run.bundle.commit.clone(),
            date: part.started.clone(),
            device: run.machine.device.clone().unwrap_or_else(|| "unknown".to_string()),
            driver: run.machine.driver.clone().unwrap_or_else(|| "unknown".to_string()),
            outcome: item.outcome,
            reason: item.reason.clone(),
        };
        let file = transport.file(ledger);
        if let Some(folder) = file.parent() {
            std::fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        }
        results::write(&file, &entry)?;
        recorded.push(transport.name);
    }
    Ok(recorded)
}

#[cfg(test)]
mod tests {
    use xtask::results::{Item, Part};

    use super::super::ledger::tests::run;
    use super::*;

    fn ran(test: &str, outcome: Outcome) -> Results {
        let item = Item {
            name: format!("seq-parallel/{test}"),
            outcome,
            seconds: 1.0,
            reason: (outcome != Outcome::Passed).then(|| "rank 1 is gone".to_string()),
            launched: Vec::new(),
        };
        let part = Part { started: "2000-01-02T03:04:05Z".to_string(), items: vec![item], ..Part::default() };
        run(&[], &[("tests", part)])
    }

    #[test]
    fn only_a_run_proves_a_transport() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let [one_gpu, nccl] = &TRANSPORTS;
        let status = |transport: &Transport| transport.status(folder.path()).expect("a ledger");
        assert_eq!(status(one_gpu), ("never run on a GPU".to_string(), false));
        assert_eq!(status(nccl), ("never run with more than one rank".to_string(), false));

        let skipped = record(&ran(nccl.test, Outcome::Skipped), folder.path()).expect("a run");
        assert!(skipped.is_empty() && !status(nccl).1);
        for (outcome, words, proven) in
            [(Outcome::Failed, "failed (Made-up GPU", false), (Outcome::Passed, "proven (Made-up GPU", true)]
        {
            assert_eq!(record(&ran(nccl.test, outcome), folder.path()), Ok(vec!["nccl"]));
            let (text, is_proven) = status(nccl);
            assert!(text.starts_with(words) && is_proven == proven, "{text}");
        }
        assert!(!status(one_gpu).1, "nothing was said of it");

        // Sources that changed since.
        let file = nccl.file(folder.path());
        let mut entry: Entry = results::read(&file).expect("it was written");
        entry.sources = entry.sources.chars().rev().collect();
        results::write(&file, &entry).expect("the folder is writable");
        assert!(status(nccl).0.starts_with("stale"), "{:?}", status(nccl));
    }

    #[test]
    fn the_tests_that_prove_transports_exist() {
        let path = workspace().join("seq-parallel/tests/device_transport.rs");
        let source = std::fs::read_to_string(path).expect("the target");
        for transport in &TRANSPORTS {
            let name = transport.test.strip_prefix("device_transport ").expect("of this target");
            let (module, test) = name.split_once("::").expect("in a module");
            assert!(source.contains(&format!("mod {module} {{")), "{module}");
            assert!(source.contains(&format!("fn {test}()")), "{test}");
        }
    }
}
