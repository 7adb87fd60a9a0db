//! Summaries of fixed chunks: two vectors or one per chunk, no training.
//!
//! For a chunk with keys k_t, per channel: minimum m, maximum M, mean μ, standard deviation σ, centre c = (m + M) / 2 and
//! r = mean |c − k|.
//!
//! | scorer | score of a query q | source |
//! |---|---|---|
//! | [`Scorer::MinMax`] | Σᵢ max(qᵢ mᵢ, qᵢ Mᵢ), an upper bound of every q·k_t | Quest, Eq. 2 |
//! | [`Scorer::CuboidMean`] | q·c + abs(q)·r | ArkVale, its "cuboid-mean" |
//! | [`Scorer::MeanStd`] | q·μ + w·abs(q)·σ: one outlier token does not widen it as it does a box | UNIQUE (arXiv 2605.27740) |
//! | [`Scorer::Mean`] | q·μ | ShadowKV's landmarks |

use super::{Arrangement, Closing, GroupQuery, Index, dot};
use crate::Error;
use crate::error::check_len;

/// How a chunk is summarised and scored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scorer {
    /// Minimum and maximum of each channel.
    MinMax,
    /// Centre of the box and mean distance from it.
    CuboidMean,
    /// Mean and standard deviation.
    MeanStd {
        /// How much a deviation counts.
        weight: f32,
    },
    /// Mean.
    Mean,
}

impl Scorer {
    /// The scorers, with the weight that is usual for the deviation.
    pub const ALL: [Scorer; 4] =
        [Scorer::MinMax, Scorer::CuboidMean, Scorer::MeanStd { weight: 0.25 }, Scorer::Mean];

    /// Vectors stored per chunk.
    pub const fn vectors(self) -> usize {
        match self {
            Scorer::Mean => 1,
            _ => 2,
        }
    }

    /// The name as options spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Scorer::MinMax => "minmax",
            Scorer::CuboidMean => "cuboid",
            Scorer::MeanStd { .. } => "meanstd",
            Scorer::Mean => "mean",
        }
    }

    /// Writes the summary of keys `k` `[tokens, dim]`, at least one, as `[vectors, dim]`.
    pub fn summarise(self, k: &[f32], dim: usize, summary: &mut [f32]) {
        let tokens = (k.len() / dim) as f64;
        for channel in 0..dim {
            let column = || k.iter().skip(channel).step_by(dim);
            let mean = column().map(|&x| f64::from(x)).sum::<f64>() / tokens;
            let low = column().copied().fold(f32::INFINITY, f32::min);
            let high = column().copied().fold(f32::NEG_INFINITY, f32::max);
            let (first, second) = match self {
                Scorer::MinMax => (low, high),
                Scorer::CuboidMean => {
                    let centre = (low + high) * 0.5;
                    let spread = column().map(|&x| f64::from((centre - x).abs())).sum::<f64>();
                    (centre, (spread / tokens) as f32)
                }
                Scorer::MeanStd { .. } => {
                    let squares = column().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>();
                    (mean as f32, (squares / tokens).sqrt() as f32)
                }
                Scorer::Mean => (mean as f32, 0.0),
            };
            summary[channel] = first;
            if self.vectors() == 2 {
                summary[dim + channel] = second;
            }
        }
    }

    /// The score of a query `[dim]` against a summary `[vectors, dim]`.
    pub fn score(self, q: &[f32], summary: &[f32]) -> f32 {
        let (first, second) = summary.split_at(q.len());
        let spread = || q.iter().zip(second).map(|(&q, &r)| f64::from(q.abs()) * f64::from(r)).sum::<f64>();
        let score = match self {
            Scorer::MinMax => {
                let larger = |((&q, &low), &high): ((&f32, &f32), &f32)| {
                    (f64::from(q) * f64::from(low)).max(f64::from(q) * f64::from(high))
                };
                q.iter().zip(first).zip(second).map(larger).sum()
            }
            Scorer::CuboidMean => dot(q, first) + spread(),
            Scorer::MeanStd { weight } => dot(q, first) + f64::from(weight) * spread(),
            Scorer::Mean => dot(q, first),
        };
        score as f32
    }
}

/// The chunks of one KV head.
#[derive(Debug, Clone, PartialEq)]
pub struct PageIndex {
    scorer: Scorer,
    tokens: usize,
    dim: usize,
    /// `[chunks, vectors, dim]`.
    summaries: Vec<f32>,
}

impl PageIndex {
    /// No chunk yet; a chunk has `tokens` tokens with keys `[dim]`.
    pub fn new(scorer: Scorer, tokens: usize, dim: usize) -> Self {
        PageIndex { scorer, tokens, dim, summaries: Vec::new() }
    }

    /// Summaries `[chunks, vectors, dim]`.
    pub fn summaries(&self) -> &[f32] {
        &self.summaries
    }
}

impl Index for PageIndex {
    fn close(&mut self, tokens: &Closing<'_>) -> Result<Arrangement, Error> {
        let chunk = self.tokens * self.dim;
        if !tokens.k.len().is_multiple_of(chunk) {
            return Err(Error::argument("k", format!("whole chunks of {chunk} elements"), tokens.k.len()));
        }
        for keys in tokens.k.chunks_exact(chunk) {
            let start = self.summaries.len();
            self.summaries.resize(start + self.scorer.vectors() * self.dim, 0.0);
            self.scorer.summarise(keys, self.dim, &mut self.summaries[start..]);
        }
        let count = tokens.k.len() / self.dim;
        Ok(Arrangement { order: (0..count as u32).collect(), sizes: vec![self.tokens; count / self.tokens] })
    }

    fn partitions(&self) -> usize {
        self.summaries.len() / (self.scorer.vectors() * self.dim)
    }

    fn score(&self, query: &GroupQuery<'_>, scores: &mut Vec<f32>) -> Result<(), Error> {
        check_len("q", query.q.len(), &[query.q.len() / self.dim, self.dim])?;
        scores.clear();
        for q in query.q.chunks_exact(self.dim) {
            let summaries = self.summaries.chunks_exact(self.scorer.vectors() * self.dim);
            scores.extend(summaries.map(|summary| self.scorer.score(q, summary)));
        }
        Ok(())
    }

    fn bytes(&self) -> usize {
        // Stored in 16 bits.
        self.summaries.len() * 2
    }

    fn fork(&self) -> Box<dyn Index> {
        Box::new(self.clone())
    }
}
