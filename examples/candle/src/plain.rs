//! The same attention in candle's own ops: pages gathered, heads repeated, two matmuls and a softmax, in f32.
//!
//! What the ops of this crate are compared with, and what they save.

use candle_core::{D, DType, Device, Result, Tensor};

use crate::{Attended, AttentionSpec};

/// Attention of `q` `[batch, q_len, q_heads, qk_dim]` over pages `k` and `v` `[pages, page_size, kv_heads, ..]`, with
/// `kv_len` `[batch]` and `block_table` `[batch, max_pages]` as [`PagedDecode::step`](crate::PagedDecode::step) takes them;
/// out and log-sum-exps in f32. Copies the cache, and reads the lengths back from the device.
///
/// # Errors
/// Those of candle's ops. A query that sees no key gives NaN, unless its whole sequence is empty.
pub fn attend(
    spec: &AttentionSpec,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    (kv_len, block_table): (&Tensor, &Tensor),
) -> Result<Attended> {
    let (page_size, shape) = (k.dim(1)?, spec.shape);
    let (_, q_len, q_heads, _) = q.dims4()?;
    let (k, v) = (k.contiguous()?, v.contiguous()?);
    let (mut outs, mut lses) = (Vec::new(), Vec::new());
    for (sequence, &tokens) in kv_len.to_vec1::<u32>()?.iter().enumerate() {
        let tokens = tokens as usize;
        if tokens == 0 {
            outs.push(Tensor::zeros((q_len, q_heads, shape.v_dim()), DType::F32, q.device())?);
            lses.push(Tensor::full(f32::NEG_INFINITY, (q_len, q_heads), q.device())?);
            continue;
        }
        let pages = block_table.get(sequence)?.narrow(0, 0, tokens.div_ceil(page_size))?;
        // [kv_heads, tokens, dim]
        let gather = |cache: &Tensor| {
            let tokens = cache.index_select(&pages, 0)?.flatten(0, 1)?.narrow(0, 0, tokens)?;
            tokens.to_dtype(DType::F32)?.transpose(0, 1)?.contiguous()
        };
        let (keys, values) = (gather(&k)?, gather(&v)?);
        // [kv_heads, group · q_len, dim]: the heads of a group are neighbours.
        let rows = (shape.kv_heads(), shape.group() * q_len, shape.qk_dim());
        let queries = q.get(sequence)?.to_dtype(DType::F32)?.transpose(0, 1)?.contiguous()?.reshape(rows)?;
        let mut scores = (queries.matmul(&keys.t()?)? * f64::from(spec.score.scale()))?;
        if let Some(cap) = spec.score.soft_cap().map(f64::from) {
            scores = ((scores / cap)?.tanh()? * cap)?;
        }
        let scores = scores.reshape((shape.kv_heads(), shape.group(), q_len, tokens))?;
        let scores = scores.broadcast_add(&mask(spec, q_len, tokens, q.device())?)?;
        let max = scores.max_keepdim(D::Minus1)?;
        let weights = scores.broadcast_sub(&max)?.exp()?;
        let sum = weights.sum_keepdim(D::Minus1)?;
        let weights =
            weights.broadcast_div(&sum)?.reshape((shape.kv_heads(), shape.group() * q_len, tokens))?;
        let out = weights.matmul(&values)?.reshape((q_heads, q_len, shape.v_dim()))?;
        outs.push(out.transpose(0, 1)?.contiguous()?);
        lses.push((max + sum.log()?)?.reshape((q_heads, q_len))?.t()?.contiguous()?);
    }
    Ok(Attended { out: Tensor::stack(&outs, 0)?, lse: Tensor::stack(&lses, 0)? })
}

/// 0 where a query sees a key and -inf where it does not `[q_len, tokens]`.
fn mask(spec: &AttentionSpec, q_len: usize, tokens: usize, device: &Device) -> Result<Tensor> {
    let mut mask = Vec::with_capacity(q_len * tokens);
    for query in 0..q_len {
        let seen = spec.mask.keys(query, q_len, tokens);
        mask.extend((0..tokens).map(|key| if seen.contains(key) { 0.0 } else { f32::NEG_INFINITY }));
    }
    Tensor::from_vec(mask, (q_len, tokens), device)
}
