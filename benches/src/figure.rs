//! What is written down of a measurement: medians with 10th and 90th percentiles, one JSON object to a line.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write as _;
use std::sync::OnceLock;

use serde_json::{Value, json};

/// Environment variable that names the file for figures of benches.
pub const FIGURES_VARIABLE: &str = "LONGKV_FIGURES";
/// Environment variable that names the file for ceilings.
pub const CEILINGS_VARIABLE: &str = "LONGKV_CEILINGS";
/// Environment variable that names a file of figures that need no measuring: JSON lines as in [`FIGURES_VARIABLE`]'s.
pub const HAD_VARIABLE: &str = "LONGKV_FIGURES_HAD";
/// The name of our own kernels among the implementations.
pub const OURS: &str = "longkv";

/// Order statistics of some samples.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// The middle.
    pub median: f64,
    /// A tenth of the samples is below.
    pub p10: f64,
    /// A tenth of the samples is above.
    pub p90: f64,
    /// Number of samples.
    pub samples: usize,
}

impl Summary {
    /// Of at least one sample; each percentile is the sample nearest to it.
    pub fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        let at = |part: f64| sorted[(last as f64 * part).round() as usize];
        Some(Summary { median: at(0.5), p10: at(0.1), p90: at(0.9), samples: sorted.len() })
    }

    /// The summary of `f` of every sample, for an `f` that grows or falls throughout, such as a rate of a time.
    pub fn map(self, f: impl Fn(f64) -> f64) -> Self {
        let (a, b) = (f(self.p10), f(self.p90));
        Summary { median: f(self.median), p10: a.min(b), p90: a.max(b), samples: self.samples }
    }
}

/// A limit of the machine as a line.
pub fn ceiling(name: &str, unit: &str, summary: Summary, parameters: &[(&str, u64)]) -> Value {
    let parameters: Value = parameters.iter().map(|(name, value)| (name.to_string(), json!(value))).collect();
    json!({
        "name": name,
        "unit": unit,
        "median": summary.median,
        "p10": summary.p10,
        "p90": summary.p90,
        "parameters": parameters,
    })
}

/// A line that says what was wrong with a bench, and why it has no time.
pub fn failed(bench: &str, reason: &str) -> Value {
    json!({ "bench": bench, "implementation": OURS, "failed": reason })
}

/// Benches of ours that the file named by [`HAD_VARIABLE`] has a line for.
///
/// # Panics
/// When the file cannot be read.
pub fn had() -> &'static BTreeSet<String> {
    static HAD: OnceLock<BTreeSet<String>> = OnceLock::new();
    HAD.get_or_init(|| {
        let Some(path) = std::env::var_os(HAD_VARIABLE).filter(|path| !path.is_empty()) else {
            return BTreeSet::new();
        };
        let text = std::fs::read_to_string(&path);
        ours(&text.unwrap_or_else(|error| panic!("{HAD_VARIABLE}: {}: {error}", path.display())))
    })
}

/// Benches of ours that lines name, with a time or with what went wrong: whoever gives the file knows what need not run again. A line
/// that was cut off does not count.
fn ours(lines: &str) -> BTreeSet<String> {
    let figures = lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let ours = figures.filter(|figure| figure["implementation"] == OURS);
    ours.filter_map(|figure| figure["bench"].as_str().map(str::to_string)).collect()
}

/// Appends a line to the file that an environment variable names, if it names one.
///
/// # Panics
/// When the file cannot be written: a figure that is lost must not go unnoticed.
pub fn append(variable: &str, line: &Value) {
    let Some(path) = std::env::var_os(variable).filter(|path| !path.is_empty()) else { return };
    let written = File::options()
        .append(true)
        .create(true)
        .open(&path)
        .and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()));
    written.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let shuffled: Vec<f64> = (0..=100).map(|i| f64::from(i * 37 % 101)).collect();
        let summary = Summary::of(&shuffled).expect("samples");
        assert_eq!((summary.p10, summary.median, summary.p90, summary.samples), (10.0, 50.0, 90.0, 101));
        let one = Summary::of(&[7.0]).expect("a sample");
        assert_eq!((one.p10, one.median, one.p90), (7.0, 7.0, 7.0));
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn whole_lines_of_ours_are_had() {
        let lines = [
            r#"{"bench":"a","implementation":"longkv","median_us":2.5}"#.to_string(),
            r#"{"bench":"b","implementation":"torch","median_us":2.5}"#.to_string(),
            failed("c", "a fault").to_string(),
            r#"{"bench":"d","implementation":"longkv","med"#.to_string(),
        ];
        assert_eq!(ours(&lines.join("\n")).into_iter().collect::<Vec<_>>(), ["a", "c"]);
    }

    #[test]
    fn rates_turn_percentiles_round() {
        let seconds = Summary { median: 2.0, p10: 1.0, p90: 4.0, samples: 9 };
        let rate = seconds.map(|seconds| 8.0 / seconds);
        assert_eq!((rate.p10, rate.median, rate.p90), (2.0, 4.0, 8.0));
    }

    #[test]
    fn ceilings_are_written_as_they_are_read() {
        let summary = Summary { median: 2.0, p10: 1.0, p90: 3.0, samples: 9 };
        let line = ceiling("read", "GB/s", summary, &[("blocks", 4)]).to_string();
        let expected =
            r#"{"median":2.0,"name":"read","p10":1.0,"p90":3.0,"parameters":{"blocks":4},"unit":"GB/s"}"#;
        assert_eq!(line, expected);
    }
}
