//! The manifest of a bundle and the results of a run, both JSON.

use std::collections::BTreeMap;
use std::path::Path;

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
    /// It was stopped at its limit.
    TimedOut,
    /// It said that it cannot run here; that proves nothing.
    Skipped,
    /// It was not started: the part's time was up.
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
    /// Why there is no time.
    pub skipped: Option<String>,
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
}
