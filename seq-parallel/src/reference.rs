//! The oracle: attention over a whole batch in f64, as if there were one rank.

use attention::reference::{self, Probabilities};
use attention::{AttentionSpec, Element, HeadsView, RaggedKv, RaggedView};

use crate::Error;
use crate::placement::Sequence;

/// Attention of the new tokens of every sequence.
///
/// - `q` `[new tokens, q_heads, qk_dim]`, packed by sequence;
/// - `k` `[tokens, kv_heads, qk_dim]`, `v` `[tokens, kv_heads, v_dim]`, packed by sequence, cached tokens before new ones.
///
/// # Errors
/// [`Error::Attention`] when a shape does not fit.
pub fn attend<Q: Element, T: Element>(
    spec: &AttentionSpec,
    sequences: &[Sequence],
    q: &[Q],
    k: &[T],
    v: &[T],
) -> Result<reference::Output, Error> {
    let shape = spec.shape;
    let cu_q = cumulative(sequences.iter().map(|sequence| sequence.new))?;
    let cu_kv = cumulative(sequences.iter().map(Sequence::kv_len))?;
    let (queries, keys) = (cu_q[sequences.len()] as usize, cu_kv[sequences.len()] as usize);
    let q = RaggedView::new(HeadsView::nhd(q, queries, shape.q_heads(), shape.qk_dim())?, &cu_q)?;
    let k = HeadsView::nhd(k, keys, shape.kv_heads(), shape.qk_dim())?;
    let v = HeadsView::nhd(v, keys, shape.kv_heads(), shape.v_dim())?;
    let kv = RaggedKv::new(k, v, &cu_kv)?;
    Ok(reference::prefill_parallel(spec, &q, &kv, Probabilities::Exact)?)
}

fn cumulative(lens: impl Iterator<Item = usize>) -> Result<Vec<u32>, Error> {
    let mut sums = vec![0u32];
    for len in lens {
        let next = u32::try_from(len).ok().and_then(|len| sums[sums.len() - 1].checked_add(len));
        sums.push(next.ok_or_else(|| Error::argument("sequences", "fewer than 2^32 tokens", len))?);
    }
    Ok(sums)
}
