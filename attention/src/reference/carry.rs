//! Attention in pieces: the state of every row is carried from one block of keys to the next.

use super::Output;
use crate::element::Element;
use crate::softmax_state::{Raw, Real};
use crate::{AttentionSpec, Error, HeadShape, HeadsView};

/// Raw states (m, l, O) of a set of rows, kept in `R`: f32 as a ring step or a chunked prefill carries them, f64 for the
/// oracle.
///
/// Tokens carry their positions, so that any placement works: contiguous chunks, zigzag or striped shards, in any order.
#[derive(Debug, Clone, PartialEq)]
pub struct Carry<R> {
    shape: HeadShape,
    tokens: usize,
    /// `[tokens, q_heads]`.
    states: Vec<Raw<R>>,
}

impl<R: Real> Carry<R> {
    /// States of `tokens` tokens that have seen no key.
    pub fn new(shape: HeadShape, tokens: usize) -> Self {
        Carry { shape, tokens, states: vec![Raw::empty(shape.v_dim()); tokens * shape.q_heads()] }
    }

    /// States `[tokens, q_heads]`.
    pub fn states(&self) -> &[Raw<R>] {
        &self.states
    }

    /// Adds the keys of a block that each query sees, one rescaling per row and block.
    ///
    /// `q` `[tokens, q_heads, qk_dim]` at `query_positions` `[tokens]`; `k` `[keys, kv_heads, qk_dim]` and `v` `[keys,
    /// kv_heads, v_dim]` at `key_positions` `[keys]`. Positions count from the start of the whole sequence.
    ///
    /// # Errors
    /// [`Error::Argument`] when a shape does not fit; the states are then unchanged.
    pub fn absorb<Q: Element, T: Element>(
        &mut self,
        spec: &AttentionSpec,
        q: HeadsView<'_, Q>,
        query_positions: &[u64],
        k: HeadsView<'_, T>,
        v: HeadsView<'_, T>,
        key_positions: &[u64],
    ) -> Result<(), Error> {
        spec.mask.check()?;
        if spec.shape != self.shape {
            return Err(Error::argument("spec", self.shape, spec.shape));
        }
        q.check("q", self.shape.q_heads(), self.shape.qk_dim())?;
        k.check("k", self.shape.kv_heads(), self.shape.qk_dim())?;
        v.check("v", self.shape.kv_heads(), self.shape.v_dim())?;
        for (argument, expected, found) in [
            ("q", self.tokens, q.tokens()),
            ("query_positions", self.tokens, query_positions.len()),
            ("v", k.tokens(), v.tokens()),
            ("key_positions", k.tokens(), key_positions.len()),
        ] {
            if expected != found {
                return Err(Error::argument(argument, format!("{expected} tokens"), found));
            }
        }
        let real = |x: f32| R::from_f64(f64::from(x));
        for (i, state) in self.states.iter_mut().enumerate() {
            let (token, head) = (i / self.shape.q_heads(), i % self.shape.q_heads());
            let position = i64::try_from(query_positions[token]).unwrap_or(i64::MAX);
            let kv_head = self.shape.kv_head_of(head);
            let q = q.vector(token, head);
            let mut seen = Vec::new();
            for (t, &key) in key_positions.iter().enumerate() {
                if !spec.mask.sees(position, key) {
                    continue;
                }
                let mut dot = R::ZERO;
                for (q, k) in q.iter().zip(k.vector(t, kv_head)) {
                    dot += real(q.to_f32()) * real(k.to_f32());
                }
                seen.push((t, dot.scored(&spec.score)));
            }
            state.raise(seen.iter().fold(R::NEGATIVE_INFINITY, |m, &(_, score)| m.max_or_nan(score)));
            for (t, score) in seen {
                state.push(score, v.vector(t, kv_head).iter().map(|x| real(x.to_f32())));
            }
        }
        Ok(())
    }

    /// Merges the states of the same rows over other keys.
    ///
    /// # Errors
    /// [`Error::Argument`] when the rows or shapes differ.
    pub fn merge(&mut self, other: &Carry<R>) -> Result<(), Error> {
        if (self.shape, self.tokens) != (other.shape, other.tokens) {
            return Err(Error::argument(
                "other",
                format!("{} tokens of {}", self.tokens, self.shape),
                format!("{} tokens of {}", other.tokens, other.shape),
            ));
        }
        for (state, other) in self.states.iter_mut().zip(&other.states) {
            state.merge(other)?;
        }
        Ok(())
    }

    /// Outputs and LSEs of what was absorbed so far.
    pub fn finish(&self) -> Output {
        let mut output = Output { out: Vec::new(), lse: Vec::new(), faults: Vec::new() };
        for state in &self.states {
            let state = state.normalise();
            output.out.extend(state.out.iter().map(|x| x.to_f64()));
            output.lse.push(state.lse.to_f64());
        }
        output
    }
}
