//! Recorded selections: what replacement policies are compared on.
//!
//! The file format is text, so that a trace can be made by anything:
//!
//! ```text
//! sparse-attn trace 1
//! 0: 3 17 204
//! 1: 3 5 88
//! 0: 3 18 204
//! ```
//!
//! The first line names format and version. Every other line is one step of one stream (a KV head of a layer of a
//! request): the stream's number, a colon, and the pages selected, each once. Lines are in the order of time; empty lines
//! and lines that start with `#` are skipped.

use std::fmt::Write as _;

use crate::Error;
use crate::select::top_k;

/// First line of a trace.
const HEADER: &str = "sparse-attn trace";
/// Version of the format.
pub const VERSION: u32 = 1;

/// The selections of one stream at one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceStep {
    /// The stream.
    pub stream: u32,
    /// Pages selected.
    pub pages: Vec<u32>,
}

/// Selections of any number of streams, in the order of time.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Trace {
    steps: Vec<TraceStep>,
}

impl Trace {
    /// Adds a step.
    pub fn push(&mut self, stream: u32, pages: &[u32]) {
        self.steps.push(TraceStep { stream, pages: pages.to_vec() });
    }

    /// All steps.
    pub fn steps(&self) -> &[TraceStep] {
        &self.steps
    }

    /// Numbers of the streams, in increasing order.
    pub fn streams(&self) -> Vec<u32> {
        let mut streams: Vec<u32> = self.steps.iter().map(|step| step.stream).collect();
        streams.sort_unstable();
        streams.dedup();
        streams
    }

    /// The steps of one stream.
    pub fn stream(&self, stream: u32) -> impl Iterator<Item = &[u32]> + Clone {
        self.steps.iter().filter(move |step| step.stream == stream).map(|step| step.pages.as_slice())
    }

    /// Most pages that a step selects.
    pub fn widest(&self) -> usize {
        self.steps.iter().map(|step| step.pages.len()).max().unwrap_or(0)
    }

    /// The trace as text.
    pub fn to_text(&self) -> String {
        let mut text = format!("{HEADER} {VERSION}\n");
        for step in &self.steps {
            let _ = write!(text, "{}:", step.stream);
            for page in &step.pages {
                let _ = write!(text, " {page}");
            }
            text.push('\n');
        }
        text
    }

    /// Reads what [`to_text`](Self::to_text) wrote.
    ///
    /// # Errors
    /// [`Error::Trace`] for another format or version, a line that is no step, or a page twice in one.
    pub fn from_text(text: &str) -> Result<Self, Error> {
        let fault = |line: usize, expected: &str, found: &str| Error::Trace {
            line,
            expected: expected.to_string(),
            found: format!("{found:?}"),
        };
        let mut lines = text.lines().zip(1..);
        let header = lines.next().map_or("", |(line, _)| line);
        if header.strip_prefix(HEADER).and_then(|version| version.trim().parse().ok()) != Some(VERSION) {
            return Err(fault(1, &format!("{HEADER} {VERSION}"), header));
        }
        let mut trace = Trace::default();
        for (line, number) in lines.filter(|(line, _)| !line.is_empty() && !line.starts_with('#')) {
            let step = || {
                let (stream, pages) = line.split_once(':')?;
                let pages: Option<Vec<u32>> =
                    pages.split_whitespace().map(|page| page.parse().ok()).collect();
                Some(TraceStep { stream: stream.trim().parse().ok()?, pages: pages? })
            };
            let step = step().ok_or_else(|| fault(number, "STREAM: PAGE PAGE …", line))?;
            let mut sorted = step.pages.clone();
            sorted.sort_unstable();
            if sorted.windows(2).any(|pair| pair[0] == pair[1]) {
                return Err(fault(number, "every page once", line));
            }
            trace.steps.push(step);
        }
        Ok(trace)
    }
}

/// Selections of a query that drifts over fixed keys.
///
/// Every page has a random key; the query is a first-order autoregressive process, q ← ρ q + √(1 − ρ²) n, and each step
/// selects the pages with the largest products. Neighbouring queries of real models have cosines of 0.8 to 0.99.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drift {
    /// Pages of the context.
    pub pages: usize,
    /// Pages selected at each step.
    pub selected: usize,
    /// Steps.
    pub steps: usize,
    /// Correlation ρ of one query with the next.
    pub correlation: f64,
    /// Seed of keys and queries.
    pub seed: u64,
}

impl Drift {
    /// Channels of keys and queries.
    const DIM: usize = 64;

    /// The trace, of stream 0.
    pub fn trace(&self) -> Trace {
        let mut rng = fastrand::Rng::with_seed(self.seed);
        // Standard normal, by Box and Muller.
        let mut normal = || {
            let radius = (-2.0 * (1.0 - rng.f64()).ln()).sqrt();
            (radius * (std::f64::consts::TAU * rng.f64()).cos()) as f32
        };
        let keys: Vec<f32> = (0..self.pages * Self::DIM).map(|_| normal()).collect();
        let mut query: Vec<f32> = (0..Self::DIM).map(|_| normal()).collect();
        let (keep, renew) =
            (self.correlation as f32, (1.0 - self.correlation * self.correlation).sqrt() as f32);
        let mut trace = Trace::default();
        for _ in 0..self.steps {
            query.iter_mut().for_each(|q| *q = keep * *q + renew * normal());
            let score = |key: &[f32]| key.iter().zip(&query).map(|(k, q)| k * q).sum::<f32>();
            let scores: Vec<f32> = keys.chunks_exact(Self::DIM).map(score).collect();
            trace.push(0, &top_k(&scores, self.selected));
        }
        trace
    }
}
