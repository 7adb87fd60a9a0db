//! One row of attention: a query head of a token.

use rayon::prelude::*;

use super::Probabilities;
use crate::element::Element;
use crate::softmax_state::Real;
use crate::{AttentionSpec, Fault, KeyRanges, KeyValues, RaggedView};

/// Result of one row.
pub(super) struct Row {
    /// Token in the packed queries.
    pub(super) token: usize,
    /// Query head.
    pub(super) head: usize,
    pub(super) out: Vec<f64>,
    pub(super) lse: f64,
}

/// All rows that read one KV head of one sequence.
pub(super) type Group = Result<Vec<Row>, Fault>;

pub(super) fn group<Q: Element, T: Element>(
    spec: &AttentionSpec,
    q: &RaggedView<'_, Q>,
    kv: &impl KeyValues<T>,
    probabilities: Probabilities,
    (sequence, kv_head): (usize, usize),
    parallel: bool,
) -> Group {
    let tokens = kv.tokens(sequence, kv_head)?;
    // Every storage type is a subset of f32, so this is exact; it is done once for all rows.
    let k: Vec<f32> = tokens.iter().flat_map(|token| token.key.iter().map(|x| x.to_f32())).collect();
    let v: Vec<f32> = tokens.iter().flat_map(|token| token.value.iter().map(|x| x.to_f32())).collect();
    let round = |p: f64| match probabilities {
        Probabilities::Exact => p,
        Probabilities::Rounded => T::from_f64(p).to_f64(),
    };
    let queries = q.tokens_of(sequence);
    let attend = |token: usize, head: usize| {
        let query: Vec<f64> = q.view().vector(token, head).iter().map(|x| x.to_f64()).collect();
        let keys = spec.mask.keys(token - queries.start, queries.len(), tokens.len());
        let (out, lse) = row(spec, &query, &k, &v, &keys, round);
        Row { token, head, out, lse }
    };
    let group = spec.shape.group();
    let first_head = spec.shape.q_heads_of(kv_head).start;
    let at = |i: usize| attend(queries.start + i / group, first_head + i % group);
    let rows = 0..queries.len() * group;
    Ok(if parallel { rows.into_par_iter().map(at).collect() } else { rows.map(at).collect() })
}

/// Softmax-weighted mean of the values of `keys`, and its LSE.
fn row(
    spec: &AttentionSpec,
    q: &[f64],
    k: &[f32],
    v: &[f32],
    keys: &KeyRanges,
    round: impl Fn(f64) -> f64,
) -> (Vec<f64>, f64) {
    let (qk_dim, v_dim) = (spec.shape.qk_dim(), spec.shape.v_dim());
    let mut out = vec![0.0; v_dim];
    let scores: Vec<f64> =
        keys.keys().map(|t| spec.score.apply_f64(dot(q, &k[t * qk_dim..(t + 1) * qk_dim]))).collect();
    let m = scores.iter().fold(f64::NEG_INFINITY, |m, &score| m.max_or_nan(score));
    if m == f64::NEG_INFINITY {
        return (out, m);
    }
    let mut l = 0.0;
    for (t, score) in keys.keys().zip(&scores) {
        let p = (score - m).exp();
        l += p;
        let p = round(p);
        for (o, &x) in out.iter_mut().zip(&v[t * v_dim..(t + 1) * v_dim]) {
            *o += p * f64::from(x);
        }
    }
    for o in &mut out {
        *o /= l;
    }
    (out, m + l.ln())
}

/// Dot product in f64, in eight lanes for speed.
fn dot(a: &[f64], b: &[f32]) -> f64 {
    let mut lanes = [0.0; 8];
    for (a, b) in a.chunks(8).zip(b.chunks(8)) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * f64::from(b);
        }
    }
    lanes.iter().sum()
}
