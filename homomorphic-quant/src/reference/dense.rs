//! One row of attention over tokens in 16 bits: sinks, open block, and the new tokens of an exact prefill.

use std::ops::Range;

use attention::softmax_state::Raw;
use attention::{KeyRanges, Score};

use crate::cache::Dense;

/// The row's state over the tokens at positions `tokens` of the sequence, as far as `visible` has them. `q` `[qk_dim]`.
pub(super) fn attend(
    q: &[f32],
    part: &Dense,
    v_dim: usize,
    rule: &Score,
    tokens: &Range<usize>,
    visible: &KeyRanges,
) -> Raw<f32> {
    let mut state = Raw::empty(v_dim);
    let mut scores = Vec::new();
    let ranges = || {
        let cut = |range: Range<usize>| range.start.max(tokens.start)..range.end.min(tokens.end);
        visible.iter().map(cut).filter(|range| !range.is_empty())
    };
    for i in ranges().flatten().map(|position| position - tokens.start) {
        scores.push(rule.apply_f32(dot(q, &part.k[i * q.len()..][..q.len()])));
    }
    state.raise(scores.iter().fold(f32::NEG_INFINITY, |max, &x| if max > x { max } else { x }));
    if state.m == f32::NEG_INFINITY {
        return state;
    }
    for (i, score) in ranges().flatten().map(|position| position - tokens.start).zip(scores) {
        let p = (score - state.m).exp();
        state.l += p;
        for (o, v) in state.o.iter_mut().zip(&part.v[i * v_dim..][..v_dim]) {
            *o += p * v;
        }
    }
    state
}

/// Dot product in eight independent lanes, which the compiler turns into vector code.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    for (a, b) in a.chunks_exact(8).zip(b.chunks_exact(8)) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    lanes.iter().sum()
}
