//! The oracle: attention in f64, in plain loops.
//!
//! Inputs are f32, f16 or bf16, everything inside is f64, and outputs stay f64 until [`Output::out_as`] rounds them once.
//! Kernels are held against it, so it has no tiles, no online softmax and no cleverness: for each row it scores the keys
//! that the mask leaves, takes the softmax with the row's true maximum and sums the values.

mod carry;
mod merge_states;
mod row;

use rayon::prelude::*;

pub use carry::Carry;
pub use merge_states::merge_states;

use crate::element::Element;
use crate::{AttentionSpec, Error, Fault, HeadsView, KeyValues, RaggedView};

/// Whether the weights P are rounded before they multiply the values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probabilities {
    /// P stays f64: what attention is.
    Exact,
    /// `exp(score - m)`, with `m` the row's maximum, is rounded to the storage type of the values before PV, and not
    /// rounded in the sum that divides: what tensor-core kernels compute, up to their running maximum.
    Rounded,
}

/// Outputs of the oracle. Rows are (token, query head), tokens in the order of the queries.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    /// Outputs `[tokens, q_heads, v_dim]`; 0 where no key was seen.
    pub out: Vec<f64>,
    /// Log-sum-exps `[tokens, q_heads]`: natural log, scale applied; -inf where no key was seen.
    pub lse: Vec<f64>,
    /// Rows that were skipped, in increasing order, each once.
    pub faults: Vec<Fault>,
}

impl Output {
    /// Outputs rounded once to a storage type `[tokens, q_heads, v_dim]`.
    pub fn out_as<T: Element>(&self) -> Vec<T> {
        self.out.iter().map(|&x| T::from_f64(x)).collect()
    }

    /// Log-sum-exps rounded to f32 `[tokens, q_heads]`.
    pub fn lse_f32(&self) -> Vec<f32> {
        self.lse.iter().map(|&x| x as f32).collect()
    }
}

/// Attention of every query of a batch over its sequence's keys.
///
/// `q` `[tokens, q_heads, qk_dim]` holds the last positions of each sequence. A sequence whose lengths or page ids make no
/// sense gets output 0, LSE -inf and a fault; with a block table per KV head only the query heads of the bad row do.
///
/// # Errors
/// [`Error::Argument`] when shapes or batch sizes do not fit, or the mask is a window of 0 keys.
pub fn prefill<Q: Element, T: Element>(
    spec: &AttentionSpec,
    q: &RaggedView<'_, Q>,
    kv: &impl KeyValues<T>,
    probabilities: Probabilities,
) -> Result<Output, Error> {
    check(spec, q, kv)?;
    let groups = groups(spec, q);
    Ok(assemble(
        spec,
        q,
        groups.into_iter().map(|g| row::group(spec, q, kv, probabilities, g, false)).collect(),
    ))
}

/// [`prefill`] on the current rayon thread pool; bitwise the same.
///
/// # Errors
/// As [`prefill`].
pub fn prefill_parallel<Q: Element, T: Element>(
    spec: &AttentionSpec,
    q: &RaggedView<'_, Q>,
    kv: &impl KeyValues<T>,
    probabilities: Probabilities,
) -> Result<Output, Error> {
    check(spec, q, kv)?;
    let groups = groups(spec, q).into_par_iter();
    Ok(assemble(spec, q, groups.map(|g| row::group(spec, q, kv, probabilities, g, true)).collect()))
}

/// One decoding step: [`prefill`] with one query `q` `[batch, q_heads, qk_dim]` per sequence.
///
/// # Errors
/// As [`prefill`].
pub fn decode<Q: Element, T: Element>(
    spec: &AttentionSpec,
    q: HeadsView<'_, Q>,
    kv: &impl KeyValues<T>,
    probabilities: Probabilities,
) -> Result<Output, Error> {
    prefill(spec, &RaggedView::one_each(q)?, kv, probabilities)
}

/// [`decode`] on the current rayon thread pool; bitwise the same.
///
/// # Errors
/// As [`prefill`].
pub fn decode_parallel<Q: Element, T: Element>(
    spec: &AttentionSpec,
    q: HeadsView<'_, Q>,
    kv: &impl KeyValues<T>,
    probabilities: Probabilities,
) -> Result<Output, Error> {
    prefill_parallel(spec, &RaggedView::one_each(q)?, kv, probabilities)
}

fn check<Q: Element, T>(
    spec: &AttentionSpec,
    q: &RaggedView<'_, Q>,
    kv: &impl KeyValues<T>,
) -> Result<(), Error> {
    spec.mask.check()?;
    q.view().check("q", spec.shape.q_heads(), spec.shape.qk_dim())?;
    kv.check(&spec.shape)?;
    if q.sequences() != kv.sequences() {
        let expected = format!("{} sequences, as the keys", kv.sequences());
        return Err(Error::argument("q", expected, format!("{} sequences", q.sequences())));
    }
    Ok(())
}

/// Every (sequence, KV head).
fn groups<Q>(spec: &AttentionSpec, q: &RaggedView<'_, Q>) -> Vec<(usize, usize)> {
    let kv_heads = spec.shape.kv_heads();
    (0..q.sequences() * kv_heads).map(|i| (i / kv_heads, i % kv_heads)).collect()
}

/// Puts the rows of all groups where they belong.
fn assemble<Q: Element>(spec: &AttentionSpec, q: &RaggedView<'_, Q>, groups: Vec<row::Group>) -> Output {
    let shape = spec.shape;
    let rows = q.view().tokens() * shape.q_heads();
    let mut output = Output {
        out: vec![0.0; rows * shape.v_dim()],
        lse: vec![f64::NEG_INFINITY; rows],
        faults: Vec::new(),
    };
    for group in groups {
        match group {
            Err(fault) => output.faults.push(fault),
            Ok(rows) => {
                for row in rows {
                    let index = row.token * shape.q_heads() + row.head;
                    output.lse[index] = row.lse;
                    output.out[index * shape.v_dim()..(index + 1) * shape.v_dim()].copy_from_slice(&row.out);
                }
            }
        }
    }
    output.faults.sort_unstable_by_key(|fault| (fault.index, fault.code));
    output.faults.dedup();
    output
}
