//! Summaries of partitions: what selection reads instead of keys (operation *Index* of SPIN's Table 1).
//!
//! | module | partitions | summary of one |
//! |---|---|---|
//! | [`pages`] | chunks of whole pages | minimum and maximum (Quest), cuboid (ArkVale), mean and deviation, mean (ShadowKV) |
//! | [`clusters`] | clusters of any size (RetroInfer) | centroid, sum of values, size |
//! | [`gate`] | blocks (SeerAttention-R) | gated pool of the keys before RoPE |
//!
//! An index belongs to one KV head of one layer of one request and stays on the device. It is built when tokens are closed:
//! then their order is fixed, pages are written, and nothing of it changes again.

pub mod clusters;
pub mod gate;
pub mod pages;

use std::fmt::Debug;

use crate::Error;

/// Tokens of one KV head on their way into pages.
#[derive(Debug, Clone, Copy)]
pub struct Closing<'a> {
    /// Keys after RoPE `[tokens, qk_dim]`, as stored.
    pub k: &'a [f32],
    /// Keys before RoPE `[tokens, qk_dim]`; only where [`Index::wants_unrotated`].
    pub k_unrotated: Option<&'a [f32]>,
    /// Values `[tokens, v_dim]`, as stored.
    pub v: &'a [f32],
    /// Position of the first token; the others follow.
    pub position: usize,
}

/// How closed tokens lie in pages.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Arrangement {
    /// The tokens in the order in which they are stored, each once; numbers count from the first closed token.
    pub order: Vec<u32>,
    /// Tokens of each new partition, in the order of storage.
    pub sizes: Vec<usize>,
}

/// The query heads of one KV head, at one token.
#[derive(Debug, Clone, Copy)]
pub struct GroupQuery<'a> {
    /// Queries after RoPE `[group, qk_dim]`.
    pub q: &'a [f32],
    /// Queries before RoPE `[group, qk_dim]`; only where [`Index::wants_unrotated`].
    pub q_unrotated: Option<&'a [f32]>,
    /// Position of the token.
    pub position: usize,
}

/// What stands for a partition that is not read (RetroInfer's estimation zone).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate<'a> {
    /// Mean key `[qk_dim]`.
    pub centroid: &'a [f32],
    /// Sum of the values `[v_dim]`.
    pub value_sum: &'a [f32],
    /// Tokens.
    pub tokens: usize,
}

/// The summaries of one KV head.
pub trait Index: Debug + Send {
    /// Arranges tokens into partitions and summarises them.
    ///
    /// # Errors
    /// [`Error::Argument`] when shapes do not fit.
    fn close(&mut self, tokens: &Closing<'_>) -> Result<Arrangement, Error>;

    /// Partitions summarised.
    fn partitions(&self) -> usize;

    /// Writes the scores of all partitions, before scale and softmax: `[rows, partitions]`, a row per query head, or one
    /// row for the group where the algorithm pools its queries.
    ///
    /// # Errors
    /// [`Error::Argument`] when shapes do not fit.
    fn score(&self, query: &GroupQuery<'_>, scores: &mut Vec<f32>) -> Result<(), Error>;

    /// What can stand for a partition; `None` where the algorithm has nothing.
    fn estimate(&self, partition: usize) -> Option<Estimate<'_>> {
        let _ = partition;
        None
    }

    /// Whether keys and queries before RoPE are needed.
    fn wants_unrotated(&self) -> bool {
        false
    }

    /// Bytes on the device, at the width in which summaries are stored there.
    fn bytes(&self) -> usize;

    /// A copy for a request that goes on from here.
    fn fork(&self) -> Box<dyn Index>;
}

/// Dot product in f64.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}
