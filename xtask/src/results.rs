//! The manifest of a bundle and the results of a run, both JSON.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Version of both formats.
pub const SCHEMA: u32 = 1;
/// File name of the manifest in its bundle.
pub const MANIFEST: &str = "bundle.json";
/// File name of the results in the output folder.
pub const RESULTS: &str = "results.json";

/// What a bundle holds and which sources it was built from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Commit, with `-dirty` behind it if tracked files differed.
    pub commit: String,
    /// Time of the build, UTC.
    pub built: String,
    /// Oldest glibc that the executables run with, such as `2.34`.
    pub glibc: String,
    /// Version of the NVRTC that made the cubins.
    pub nvrtc: String,
    /// Shipped rows that run on sm_90a.
    pub rows: Vec<RowDigests>,
    /// Executables that have GPU tests.
    pub tests: Vec<Executable>,
    /// Criterion benches.
    pub benches: Vec<Executable>,
    /// The ceilings program.
    pub ceilings: Option<Executable>,
    /// Python programs that time other people's kernels.
    pub peers: Vec<Executable>,
    /// The Python program that trains a model, if the bundle has one.
    #[serde(default)]
    pub trainer: Option<Executable>,
}

/// What a row of the kernel table was when the bundle was built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowDigests {
    /// Label of the instance.
    pub label: String,
    /// The crate that it belongs to.
    pub group: String,
    /// SHA-256 of its sm_90a cubin.
    pub cubin: String,
    /// SHA-256 of the code that launches it.
    pub launch: String,
}

/// A program of a bundle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Executable {
    /// `package/target`.
    pub name: String,
    /// Path in the bundle.
    pub file: String,
}

/// Everything that one machine answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The bundle that ran.
    pub bundle: Manifest,
    /// Where it ran.
    pub machine: Machine,
    /// By name; a part that did not run is absent.
    pub parts: BTreeMap<String, Part>,
}

/// The machine of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Product name of the first GPU; none if there is no usable GPU.
    pub device: Option<String>,
    /// Why there is none.
    pub no_device: Option<String>,
    /// Architecture of the first GPU.
    pub arch: Option<String>,
    /// Streaming multiprocessors of the first GPU.
    pub sm_count: Option<u32>,
    /// Version of the driver package, by `nvidia-smi`.
    pub driver: Option<String>,
    /// CUDA version of the driver.
    pub cuda: Option<String>,
    /// First line of tools that say their version: `nvcc`, `compute-sanitizer`, `python3`.
    pub tools: BTreeMap<String, String>,
    /// Operating system, by `uname -sr`.
    pub system: String,
    /// Clocks and temperature before and after each part, by `nvidia-smi`.
    pub clocks: Vec<String>,
}

/// One part of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// Start, UTC.
    pub started: String,
    /// Wall time.
    pub seconds: f64,
    /// Time after which nothing more was started.
    pub limit_s: u64,
    /// Why the part could not run at all.
    pub skipped: Option<String>,
    /// Tests and programs.
    pub items: Vec<Item>,
    /// What benches and peers measured.
    pub figures: Vec<Figure>,
    /// What the ceilings program measured.
    pub ceilings: Vec<Ceiling>,
}

/// One process of a part.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Item {
    /// Executable, and the test's name behind a space.
    pub name: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Wall time.
    pub seconds: f64,
    /// What it said, unless it passed.
    pub reason: Option<String>,
    /// Kernels that it launched.
    pub launched: Vec<Launch>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It ran and succeeded.
    Passed,
    /// It ran and failed.
    Failed,
    /// It was stopped at its own limit.
    TimedOut,
    /// It said that it cannot run here; that proves nothing.
    Skipped,
    /// The part's time was up before it was started, or before its own limit.
    NotRun,
}

/// A kernel that a process launched: a line of `LONGKV_LAUNCH_LOG`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Launch {
    /// Label of the instance.
    pub label: String,
    /// Architecture that it was compiled for.
    pub arch: String,
    /// SHA-256 of the cubin.
    pub cubin: String,
}

impl Launch {
    /// Reads `LABEL ARCH CUBIN`.
    pub fn parse(line: &str) -> Option<Self> {
        match line.split(' ').collect::<Vec<_>>()[..] {
            [label, arch, cubin] if cubin.len() == 64 => {
                Some(Launch { label: label.into(), arch: arch.into(), cubin: cubin.into() })
            }
            _ => None,
        }
    }
}

/// What a bench or a peer measured, or why it could not: a line of `LONGKV_FIGURES`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Figure {
    /// `crate/kernel/dtype/shape`, the same for every implementation.
    pub bench: String,
    /// `longkv`, or the name of a peer.
    pub implementation: String,
    /// Median device time of one run, in microseconds.
    pub median_us: f64,
    /// 10th percentile.
    pub p10_us: f64,
    /// 90th percentile.
    pub p90_us: f64,
    /// Number of runs.
    pub samples: u64,
    /// Fewest bytes that the problem moves.
    pub bytes: u64,
    /// Floating-point or integer operations that the problem takes.
    pub flops: u64,
    /// Of the bytes, those that cross the link to host memory.
    pub link_bytes: u64,
    /// Read bandwidth measured in the same process, in GB/s.
    pub read_gb_s: Option<f64>,
    /// Rate of bf16 products through `mma.sync` measured in the same process, in TFLOP/s.
    pub bf16_tflops: Option<f64>,
    /// Kernels launched, for our own.
    pub kernels: Vec<Launch>,
    /// What the time covers, where that is not plain.
    pub note: Option<String>,
    /// Why there is no time: it cannot run here.
    pub skipped: Option<String>,
    /// What was wrong when it ran. Beside a time: it failed after that was taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// Where and when it was measured, by the program that collected it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
}

impl Figure {
    /// Whether there is a time.
    pub fn measured(&self) -> bool {
        self.median_us > 0.0
    }

    /// Whether both are of the same bench and implementation.
    pub fn same(&self, other: &Figure) -> bool {
        (&self.bench, &self.implementation) == (&other.bench, &other.implementation)
    }

    /// Puts a later figure in the place of the same in a list. One without a time never replaces a time; a failure is noted there.
    pub fn put(figures: &mut Vec<Figure>, later: Figure) {
        match figures.iter_mut().find(|old| old.same(&later)) {
            None => figures.push(later),
            Some(old) if old.measured() && !later.measured() => {
                old.failed = later.failed.or(old.failed.take());
            }
            Some(old) => *old = later,
        }
    }
}

/// Where and when something was measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Product name of the GPU.
    pub device: String,
    /// Its streaming multiprocessors.
    pub sm_count: Option<u32>,
    /// Version of the driver package.
    pub driver: String,
    /// Commit that the executables were built from.
    pub commit: String,
    /// Date and time, UTC.
    pub date: String,
}

impl Source {
    /// On this machine with executables of this commit.
    pub fn new(machine: &Machine, commit: &str, date: String) -> Self {
        let unknown = || "unknown".to_string();
        Source {
            device: machine.device.clone().unwrap_or_else(unknown),
            sm_count: machine.sm_count,
            driver: machine.driver.clone().unwrap_or_else(unknown),
            commit: commit.to_string(),
            date,
        }
    }
}

/// A limit of the machine.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ceiling {
    /// What was measured.
    pub name: String,
    /// Unit of the values.
    pub unit: String,
    /// Median.
    pub median: f64,
    /// 10th percentile.
    pub p10: f64,
    /// 90th percentile.
    pub p90: f64,
    /// Sizes and counts that it was measured with.
    pub parameters: BTreeMap<String, u64>,
}

impl Ceiling {
    /// Whether both are of the same thing with the same parameters.
    pub fn same(&self, other: &Ceiling) -> bool {
        (&self.name, &self.parameters) == (&other.name, &other.parameters)
    }
}

/// Reads one JSON file.
///
/// # Errors
/// A sentence that names the file.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))
}

/// Writes one JSON file, whole or not at all.
///
/// # Errors
/// A sentence that names the file.
pub fn write<T: Serialize>(path: &Path, value: &T) -> Result<(), String> {
    let mut text = serde_json::to_string_pretty(value).map_err(|error| error.to_string())?;
    text.push('\n');
    let draft = path.with_extension("draft");
    std::fs::write(&draft, text)
        .and_then(|()| std::fs::rename(&draft, path))
        .map_err(|error| format!("{}: {error}", path.display()))
}

/// One value per line of a file; a line that was cut off when its writer was killed is left out. A missing file has none.
pub fn lines<T: DeserializeOwned>(path: &Path) -> Vec<T> {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Where the children of a part write figures as they measure them, in the folder of the results.
pub fn figures_file(folder: &Path, part: &str) -> PathBuf {
    folder.join(format!("{part}-figures.jsonl"))
}

/// Where the children of a part write ceilings as they measure them, in the folder of the results.
pub fn ceilings_file(folder: &Path, part: &str) -> PathBuf {
    folder.join(format!("{part}-ceilings.jsonl"))
}

/// Parts whose children write such lines.
pub const WITH_LINES: [&str; 3] = ["ceilings", "benches", "peers"];

impl Results {
    /// Where and when it ran: its latest part.
    pub fn source(&self) -> Source {
        let date = self.parts.values().map(|part| part.started.clone()).max().unwrap_or_default();
        Source::new(&self.machine, &self.bundle.commit, date)
    }

    /// Takes the lines that lie in the folder of the results because the runner was stopped.
    pub fn take_lines(&mut self, folder: &Path) {
        let source = self.source();
        for name in WITH_LINES {
            let mut part = self.parts.remove(name).unwrap_or_default();
            part.take_lines(folder, name, &source);
            if part != Part::default() {
                self.parts.insert(name.to_string(), part);
            }
        }
    }
}

impl Part {
    /// Takes what children wrote in `folder` and what was not collected, because the runner was stopped before.
    fn take_lines(&mut self, folder: &Path, name: &str, source: &Source) {
        for figure in lines::<Figure>(&figures_file(folder, name)) {
            if !self.figures.iter().any(|known| known.same(&figure)) {
                self.figures.push(Figure { source: Some(source.clone()), ..figure });
            }
        }
        for ceiling in lines::<Ceiling>(&ceilings_file(folder, name)) {
            if !self.ceilings.iter().any(|known| known.same(&ceiling)) {
                self.ceilings.push(ceiling);
            }
        }
    }

    /// Puts a later item in the place of the same. What was not started says nothing anew, and what was cut off nothing against an
    /// outcome: what failed and did not run to its end again has still failed.
    pub fn put(&mut self, later: Item) {
        let ended = |item: &Item| item.outcome != Outcome::NotRun;
        match self.items.iter_mut().find(|old| old.name == later.name) {
            None => self.items.push(later),
            Some(old) if ended(&later) || !ended(old) && later.seconds > 0.0 => *old = later,
            Some(_) => {}
        }
    }
}

/// Names of the GPU tests in the lines of `--list --format terse`: those that end in `gpu`, and where there are several GPUs those that
/// end in `gpus`.
pub fn gpu_tests(list: &[impl AsRef<str>], several: bool) -> Vec<String> {
    let names = list.iter().filter_map(|line| line.as_ref().strip_suffix(": test"));
    let wanted = |name: &&str| {
        name.ends_with("::gpu") || name.ends_with("_gpu") || several && name.ends_with("::gpus")
    };
    names.filter(wanted).map(str::to_string).collect()
}

/// The time now, as `2026-03-01T12:00:00Z`.
pub fn now() -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    utc(since.as_secs())
}

/// Seconds since 1970 as a date and time.
fn utc(seconds: u64) -> String {
    let (time, mut day) = (seconds % 86_400, seconds / 86_400);
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let mut month = 1;
    for days in [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < days {
            break;
        }
        day -= days;
        month += 1;
    }
    let (hour, minute, second) = (time / 3600, time / 60 % 60, time % 60);
    format!("{year}-{month:02}-{:02}T{hour:02}:{minute:02}:{second:02}Z", day + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_calendar_times() {
        let cases = [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_767_225_599, "2025-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ];
        for (seconds, expected) in cases {
            assert_eq!(utc(seconds), expected);
        }
    }

    #[test]
    fn launch_lines_are_read() {
        let digest = "0123456789abcdef".repeat(4);
        let launch = Launch::parse(&format!("decode.v_dim=64 sm_90a {digest}")).expect("a whole line");
        assert_eq!((launch.label.as_str(), launch.arch.as_str()), ("decode.v_dim=64", "sm_90a"));
        assert_eq!(launch.cubin, digest);
        for damaged in ["", "decode sm_90a", "decode sm_90a 0123", "decode sm_90a x y"] {
            assert_eq!(Launch::parse(damaged), None, "{damaged:?}");
        }
    }

    #[test]
    fn gpu_tests_are_told_by_their_names() {
        let mut several = vec![
            "a::gpu: test",
            "a::emulator: test",
            "graph_on_a_gpu: test",
            "b::gpu: benchmark",
            "agpu: test",
        ];
        let list = several.clone();
        assert_eq!(gpu_tests(&list, false), ["a::gpu", "graph_on_a_gpu"]);
        several.push("nccl::gpus: test");
        assert_eq!(gpu_tests(&several, false), gpu_tests(&list, true));
        assert_eq!(gpu_tests(&several, true).last().map(String::as_str), Some("nccl::gpus"));
    }

    #[test]
    fn figures_may_leave_fields_out() {
        let line =
            r#"{"bench":"attention/decode/bf16/1x4096","implementation":"torch-cudnn","skipped":"n/a"}"#;
        let figure: Figure = serde_json::from_str(line).expect("a figure");
        assert_eq!((figure.skipped.as_deref(), figure.kernels.len()), (Some("n/a"), 0));
    }

    #[test]
    fn a_time_is_only_replaced_by_a_time() {
        let figure = |median_us, skipped: Option<&str>, failed: Option<&str>| Figure {
            bench: "b".to_string(),
            median_us,
            skipped: skipped.map(str::to_string),
            failed: failed.map(str::to_string),
            ..Figure::default()
        };
        // (known, later, expected time, whether something is said to have failed)
        let cases = [
            (figure(3.0, None, None), figure(2.0, None, None), 2.0, false),
            (figure(3.0, None, None), figure(0.0, Some("no wheel"), None), 3.0, false),
            (figure(3.0, None, None), figure(0.0, None, Some("wrong result")), 3.0, true),
            (figure(3.0, None, Some("wrong result")), figure(2.0, None, None), 2.0, false),
            (figure(0.0, Some("no wheel"), None), figure(0.0, None, Some("wrong result")), 0.0, true),
            (figure(0.0, None, Some("wrong result")), figure(2.0, None, None), 2.0, false),
        ];
        for (known, later, time, failed) in cases {
            let mut figures = vec![known.clone()];
            Figure::put(&mut figures, later.clone());
            let [found] = &figures[..] else { panic!("{figures:?}") };
            assert_eq!((found.median_us, found.failed.is_some()), (time, failed), "{known:?}, {later:?}");
        }
        let mut figures = vec![figure(3.0, None, None)];
        Figure::put(&mut figures, Figure { implementation: "peer".to_string(), ..Figure::default() });
        assert_eq!(figures.len(), 2);
    }

    #[test]
    fn an_outcome_stands_until_there_is_another() {
        let item = |outcome, seconds| Item {
            name: "t".to_string(),
            outcome,
            seconds,
            reason: None,
            launched: Vec::new(),
        };
        use Outcome::{Failed, NotRun, Passed, Skipped};
        let cases = [
            (item(Failed, 1.0), item(Passed, 2.0), (Passed, 2.0)),
            (item(Passed, 1.0), item(Failed, 2.0), (Failed, 2.0)),
            (item(Failed, 1.0), item(NotRun, 2.0), (Failed, 1.0)),
            (item(Failed, 1.0), item(NotRun, 0.0), (Failed, 1.0)),
            (item(NotRun, 7.0), item(NotRun, 0.0), (NotRun, 7.0)),
            (item(NotRun, 7.0), item(NotRun, 9.0), (NotRun, 9.0)),
            (item(NotRun, 7.0), item(Skipped, 1.0), (Skipped, 1.0)),
        ];
        for (old, new, expected) in cases {
            let mut part = Part { items: vec![old.clone()], ..Part::default() };
            part.put(new.clone());
            let found: Vec<_> = part.items.iter().map(|item| (item.outcome, item.seconds)).collect();
            assert_eq!(found, [expected], "{old:?}, {new:?}");
        }
    }

    #[test]
    fn lines_that_nobody_collected_are_taken_once() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let line = "{\"bench\":\"b\",\"median_us\":2.5}\n{\"bench\":\"c\",\"median_us\":4}\n{\"bench\":\"cut";
        std::fs::write(figures_file(folder.path(), "benches"), line).expect("writable");
        let read = "{\"name\":\"read\",\"median\":4000}\n";
        std::fs::write(ceilings_file(folder.path(), "benches"), read).expect("writable");
        let known = Figure { bench: "b".to_string(), median_us: 2.0, ..Figure::default() };
        let mut part = Part { figures: vec![known], ..Part::default() };
        let source = Source::new(&Machine::default(), "c0ffee", now());
        for _ in 0..2 {
            part.take_lines(folder.path(), "benches", &source);
            let found: Vec<_> = part.figures.iter().map(|f| (f.bench.as_str(), f.median_us)).collect();
            assert_eq!(found, [("b", 2.0), ("c", 4.0)]);
            assert_eq!(part.ceilings.len(), 1);
        }
        assert_eq!(part.figures[1].source, Some(source));
    }
}
