//! What all kernels that attend to a quantized cache are told of it and of the queries.

use attention::{HeadShape, Mask, Score};
use cuda::params::HackDecodeParams;

use super::{Pools, to_u32};
use crate::Error;

/// Queries, and what they see.
#[derive(Debug, Clone, Copy)]
pub(super) struct Queried {
    pub(super) shape: HeadShape,
    pub(super) score: Score,
    pub(super) mask: Mask,
    pub(super) batch: usize,
    /// Of one sequence, at most.
    pub(super) q_len: usize,
    pub(super) max_kv_len: usize,
}

/// The parameters, with everything in one part.
///
/// # Errors
/// [`Error::Argument`] for a shape, mask or size that the kernels do not support.
pub(super) fn params(pools: &Pools, queried: &Queried) -> Result<HackDecodeParams, Error> {
    let (shape, geometry, counts) = (queried.shape, pools.geometry(), pools.counts());
    for (argument, value) in [("batch", queried.batch), ("q_len", queried.q_len)] {
        if value == 0 {
            return Err(Error::argument(argument, "at least 1", 0));
        }
    }
    let heads = (shape.kv_heads(), shape.qk_dim(), shape.v_dim());
    let pooled = (pools.kv_heads(), geometry.qk_dim, geometry.v_dim);
    if heads != pooled {
        let text = |(heads, qk, v)| format!("{heads} KV heads of {qk} and {v} channels");
        return Err(Error::argument("shape", text(pooled), text(heads)));
    }
    let (window, window_sinks) = match queried.mask {
        Mask::Causal => (0, 0),
        Mask::SlidingWindow { window, sinks } if window > 0 && sinks <= pools.sinks() => {
            (to_u32("window", window)?, sinks as u32)
        }
        other => {
            let expected =
                format!("causal, or a sliding window with at most {} sinks, the cache's", pools.sinks());
            return Err(Error::argument("mask", expected, format!("{other:?}")));
        }
    };
    to_u32("q_len", queried.q_len.saturating_mul(shape.group()))?;
    Ok(HackDecodeParams {
        page_stride: i64::from(to_u32("page", pools.page_bytes())?),
        table_batch_stride: counts.max_pages as i64,
        batch: to_u32("batch", queried.batch)?,
        q_len: to_u32("q_len", queried.q_len)?,
        kv_heads: to_u32("kv_heads", shape.kv_heads())?,
        group: shape.group() as u32,
        column_blocks: 1,
        partition: geometry.partition as u32,
        sinks: to_u32("sinks", pools.sinks())?,
        max_pages: to_u32("max_pages", counts.max_pages)?,
        num_pages: to_u32("pages", counts.pages)?,
        num_sink_pages: to_u32("sink_pages", counts.sink_pages)?,
        num_open_pages: to_u32("open_pages", counts.open_pages)?,
        max_kv_len: to_u32("max_kv_len", queried.max_kv_len)?,
        window,
        window_sinks,
        unit_pages: 1,
        fixed_parts: 0,
        min_units: 1,
        scale: queried.score.scale(),
        soft_cap: queried.score.soft_cap().unwrap_or(0.0),
        _pad: 0,
    })
}
