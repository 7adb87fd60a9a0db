//! Selection: which pages a KV head reads at a step (operation *Select* of SPIN's Table 1).
//!
//! Sinks and recent partitions are always kept; the rest of the budget goes to the best scores, from the best down, while
//! their pages fit. What ranks next may be [estimated](Selection::estimated) instead of read. Selections come in
//! increasing order and say what they were made for, so that one that is out of date is refused.

mod aggregate;
mod top_k;

pub use aggregate::{Aggregation, aggregate};
pub use top_k::{key, ranking, top_k};

use attention::Score;

use crate::Error;
use crate::index::{GroupQuery, Index};
use crate::partition::Partitions;

/// What every head of a layer selects by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SelectRule {
    /// How the query heads of a group agree.
    pub aggregation: Aggregation,
    /// Scale of the softmax under which they agree.
    pub score: Score,
    /// Pages that may be selected, kept ones included.
    pub pages: usize,
    /// First partitions that are always kept.
    pub sinks: usize,
    /// Last partitions that are always kept.
    pub recent: usize,
    /// Share of all partitions that is estimated, after those that are read.
    pub estimate: f64,
}

/// What one KV head selected.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HeadSelection {
    /// Pages to read, in increasing order.
    pub pages: Vec<u32>,
    /// Partitions to estimate, in increasing order; none of them is read.
    pub estimated: Vec<u32>,
}

/// What the KV heads of a layer selected at one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    pub(crate) request: u64,
    pub(crate) layer: usize,
    pub(crate) epoch: u64,
    pub(crate) heads: Vec<HeadSelection>,
}

impl Selection {
    /// The layer it was made for.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// How often the layer's index had changed when it was made.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// What each KV head selected.
    pub fn heads(&self) -> &[HeadSelection] {
        &self.heads
    }

    /// Partitions estimated, of all heads.
    pub fn estimated(&self) -> usize {
        self.heads.iter().map(|head| head.estimated.len()).sum()
    }
}

/// Selects for one KV head.
///
/// # Errors
/// [`Error::Argument`] when the query does not fit the index.
pub fn select(
    index: &dyn Index,
    partitions: &Partitions,
    query: &GroupQuery<'_>,
    rule: &SelectRule,
) -> Result<HeadSelection, Error> {
    let count = partitions.len();
    if index.partitions() != count {
        return Err(Error::argument("partitions", format!("{}, as indexed", index.partitions()), count));
    }
    let mut raw = Vec::new();
    index.score(query, &mut raw)?;
    let mut scores = Vec::new();
    aggregate(rule.aggregation, &rule.score, &raw, count, &mut scores);
    Ok(choose(&scores, partitions, rule))
}

/// Selects by scores `[partitions]`.
pub fn choose(scores: &[f32], partitions: &Partitions, rule: &SelectRule) -> HeadSelection {
    let list = partitions.as_slice();
    let recent = list.len().saturating_sub(rule.recent);
    let kept = |number: usize| number < rule.sinks || number >= recent;
    let mut read: Vec<u32> = (0..list.len() as u32).filter(|&number| kept(number as usize)).collect();
    let used: usize = read.iter().map(|&number| list[number as usize].pages as usize).sum();
    let mut room = rule.pages.saturating_sub(used);
    let mut ranked = ranking(scores).into_iter().filter(|&number| !kept(number as usize)).peekable();
    while let Some(number) = ranked.next_if(|&number| list[number as usize].pages as usize <= room) {
        room -= list[number as usize].pages as usize;
        read.push(number);
    }
    let estimated = (rule.estimate * list.len() as f64).ceil() as usize;
    let mut estimated: Vec<u32> = ranked.take(estimated).collect();
    read.sort_unstable();
    estimated.sort_unstable();
    HeadSelection {
        pages: read.iter().flat_map(|&number| list[number as usize].range()).collect(),
        estimated,
    }
}
