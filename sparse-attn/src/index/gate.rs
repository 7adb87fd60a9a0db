//! Gated blocks (SeerAttention-R): a trained gate scores blocks of keys before RoPE.
//!
//! One gate query per KV head and one gate key per block:
//!
//! - Q = RoPE(W_q · [q of every query head of the group]), at the token's position;
//! - K = RoPE(W_k · [max, min, mean of the block's keys]), at the block's first position;
//! - score = Q · K, scaled by the caller with 1 / √d_gate or not at all, since top-k does not care.
//!
//! The weights are trained with the model and are an input here.

use std::sync::Arc;

use attention::rope::Rope;

use super::{Arrangement, Closing, GroupQuery, Index, dot};
use crate::Error;
use crate::error::check_len;

/// The gate of one KV head.
#[derive(Debug)]
pub struct GateWeights {
    w_q: Vec<f32>,
    w_k: Vec<f32>,
    qk_dim: usize,
    group: usize,
    gate_dim: usize,
    rope: Rope,
}

impl GateWeights {
    /// `w_q` `[gate_dim, group · qk_dim]` and `w_k` `[gate_dim, 3 · qk_dim]`, whose columns take max, min and mean in that
    /// order; `rope` rotates gate vectors `[gate_dim]`.
    ///
    /// # Errors
    /// [`Error::Argument`] when a shape does not fit.
    pub fn new(
        w_q: Vec<f32>,
        w_k: Vec<f32>,
        (group, qk_dim, gate_dim): (usize, usize, usize),
        rope: Rope,
    ) -> Result<Self, Error> {
        check_len("w_q", w_q.len(), &[gate_dim, group, qk_dim])?;
        check_len("w_k", w_k.len(), &[gate_dim, 3, qk_dim])?;
        if gate_dim == 0 {
            return Err(Error::argument("gate_dim", "at least 1", 0));
        }
        Ok(GateWeights { w_q, w_k, qk_dim, group, gate_dim, rope })
    }

    fn rotated(&self, mut vector: Vec<f32>, position: usize) -> Result<Vec<f32>, Error> {
        let position = u32::try_from(position)
            .map_err(|_| Error::argument("position", format!("at most {}", u32::MAX), position))?;
        self.rope.apply(&mut vector, 1, &[position])?;
        Ok(vector)
    }

    fn product(&self, weights: &[f32], input: &[f32]) -> Vec<f32> {
        weights.chunks_exact(input.len()).map(|row| dot(row, input) as f32).collect()
    }

    /// The gate key `[gate_dim]` of a block with keys `k` `[tokens, qk_dim]` before RoPE.
    fn key(&self, k: &[f32], position: usize) -> Result<Vec<f32>, Error> {
        let tokens = (k.len() / self.qk_dim) as f64;
        let mut pooled = vec![0.0; 3 * self.qk_dim];
        for channel in 0..self.qk_dim {
            let column = || k.iter().skip(channel).step_by(self.qk_dim).copied();
            pooled[channel] = column().fold(f32::NEG_INFINITY, f32::max);
            pooled[self.qk_dim + channel] = column().fold(f32::INFINITY, f32::min);
            pooled[2 * self.qk_dim + channel] = (column().map(f64::from).sum::<f64>() / tokens) as f32;
        }
        self.rotated(self.product(&self.w_k, &pooled), position)
    }
}

/// The gated blocks of one KV head.
#[derive(Debug, Clone)]
pub struct GateIndex {
    weights: Arc<GateWeights>,
    block: usize,
    /// `[blocks, gate_dim]`.
    keys: Vec<f32>,
}

impl GateIndex {
    /// No block yet; a block has `block` tokens.
    pub fn new(weights: Arc<GateWeights>, block: usize) -> Self {
        GateIndex { weights, block, keys: Vec::new() }
    }
}

impl Index for GateIndex {
    fn close(&mut self, tokens: &Closing<'_>) -> Result<Arrangement, Error> {
        let Some(k) = tokens.k_unrotated else {
            return Err(Error::argument("k_unrotated", "keys before RoPE, for the gate", "none"));
        };
        let (block, count) = (self.block * self.weights.qk_dim, k.len() / self.weights.qk_dim);
        if !k.len().is_multiple_of(block) {
            return Err(Error::argument("k_unrotated", format!("whole blocks of {block} elements"), k.len()));
        }
        let mut keys = Vec::new();
        for (number, k) in k.chunks_exact(block).enumerate() {
            keys.extend(self.weights.key(k, tokens.position + number * self.block)?);
        }
        self.keys.extend(keys);
        Ok(Arrangement { order: (0..count as u32).collect(), sizes: vec![self.block; count / self.block] })
    }

    fn partitions(&self) -> usize {
        self.keys.len() / self.weights.gate_dim
    }

    fn score(&self, query: &GroupQuery<'_>, scores: &mut Vec<f32>) -> Result<(), Error> {
        let weights = &self.weights;
        let Some(q) = query.q_unrotated else {
            return Err(Error::argument("q_unrotated", "queries before RoPE, for the gate", "none"));
        };
        check_len("q_unrotated", q.len(), &[weights.group, weights.qk_dim])?;
        let q = weights.rotated(weights.product(&weights.w_q, q), query.position)?;
        scores.clear();
        scores.extend(self.keys.chunks_exact(weights.gate_dim).map(|key| dot(&q, key) as f32));
        Ok(())
    }

    fn wants_unrotated(&self) -> bool {
        true
    }

    fn bytes(&self) -> usize {
        self.keys.len() * 2
    }

    fn fork(&self) -> Box<dyn Index> {
        Box::new(self.clone())
    }
}
