//! Appending new tokens to a KV cache, keys and queries rotated on the way.

use cuda::kernels::attention as kernels;
use cuda::launch::{Device, Function};
use cuda::memory::{View, ViewMut};
use cuda::params::AppendParams;
use cuda::storage::Storage;

pub use cuda::kernels::attention::AppendTables;

use super::cache::{CacheLayout, to_u32};
use crate::rope::{RopeConfig, RopeLayout};
use crate::{DType, Error, HeadShape};

/// `page_shift` of a cache that is one run of slots.
const UNPAGED: u32 = 62;

/// What an append is for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AppendConfig {
    /// Heads and sizes.
    pub shape: HeadShape,
    /// Tokens of every run; those with a negative slot are skipped.
    pub tokens: usize,
    /// Rotation: the layout, the channels that rotate (a multiple of 16), and the positions in the tables.
    pub rotary: Option<(RopeLayout, usize, usize)>,
    /// Whether queries are rotated in place too.
    pub with_queries: bool,
    /// Elements from token to token of the new queries, keys and values, multiples of 8: the width of a fused projection, or
    /// `heads · dim`.
    pub strides: [usize; 3],
    /// Where keys and values go.
    pub cache: CacheLayout,
}

impl AppendConfig {
    /// An append of packed keys and values (and queries) that rotates as `rope` says, with tables of `positions`.
    pub fn packed(
        shape: HeadShape,
        tokens: usize,
        rope: Option<(&RopeConfig, usize)>,
        with_queries: bool,
        cache: CacheLayout,
    ) -> Self {
        AppendConfig {
            shape,
            tokens,
            rotary: rope.map(|(rope, positions)| (rope.layout, rope.rotary_dim, positions)),
            with_queries,
            strides: [
                shape.q_heads() * shape.qk_dim(),
                shape.kv_heads() * shape.qk_dim(),
                shape.kv_heads() * shape.v_dim(),
            ],
            cache,
        }
    }
}

/// Grid and parameters of an append. It needs no workspace.
#[derive(Debug, Clone)]
pub struct AppendPlan {
    config: AppendConfig,
    rotary: kernels::Rotary,
    params: AppendParams,
}

impl AppendPlan {
    /// Plans appends. Needs no device.
    ///
    /// # Errors
    /// [`Error::Argument`] for a shape, rotation, stride or cache that the kernel does not support.
    pub fn new(config: AppendConfig) -> Result<Self, Error> {
        let shape = config.shape;
        let cache = config.cache.params(1)?;
        let (rotary, rotary_dim, positions) = match config.rotary {
            None => (kernels::Rotary::None, 0, 0),
            Some((layout, rotary_dim, positions)) => {
                if rotary_dim == 0 || !rotary_dim.is_multiple_of(16) || rotary_dim > shape.qk_dim() {
                    let expected = format!("a multiple of 16 up to {}", shape.qk_dim());
                    return Err(Error::argument("rotary", expected, rotary_dim));
                }
                let rotary = match layout {
                    RopeLayout::HalfSplit => kernels::Rotary::HalfSplit,
                    RopeLayout::Interleaved => kernels::Rotary::Interleaved,
                };
                (rotary, rotary_dim, positions)
            }
        };
        let widths = [
            shape.q_heads().saturating_mul(shape.qk_dim()),
            shape.kv_heads().saturating_mul(shape.qk_dim()),
            shape.kv_heads().saturating_mul(shape.v_dim()),
        ];
        for (stride, width) in config.strides.into_iter().zip(widths) {
            if stride < width || !stride.is_multiple_of(8) {
                return Err(Error::argument(
                    "strides",
                    format!("multiples of 8, at least {width}"),
                    format!("{:?}", config.strides),
                ));
            }
        }
        // A slot names one place for all heads, so each head needs vectors of its own there.
        if let CacheLayout::Paged { per_head: true, .. } = config.cache {
            return Err(Error::argument("cache", "one block table for all heads", "one per KV head"));
        }
        for (argument, head_stride, dim) in
            [("k", cache.k[2], shape.qk_dim()), ("v", cache.v[2], shape.v_dim())]
        {
            if shape.kv_heads() > 1 && head_stride.unsigned_abs() < dim as u64 {
                let expected = format!("heads at least {dim} elements apart");
                return Err(Error::argument(argument, expected, head_stride));
            }
        }
        let num_slots = match config.cache {
            CacheLayout::Paged { page_size, pages, .. } => to_u32("pages", pages)? as i64 * page_size as i64,
            CacheLayout::Contiguous { tokens, .. } => i64::from(to_u32("tokens", tokens)?),
        };
        let params = AppendParams {
            k_page_stride: cache.k[0],
            k_token_stride: cache.k[1],
            k_head_stride: cache.k[2],
            v_page_stride: cache.v[0],
            v_token_stride: cache.v[1],
            v_head_stride: cache.v[2],
            q_new_stride: config.strides[0] as i64,
            k_new_stride: config.strides[1] as i64,
            v_new_stride: config.strides[2] as i64,
            num_slots,
            tokens: to_u32("tokens", config.tokens)?,
            q_heads: if config.with_queries { to_u32("q_heads", shape.q_heads())? } else { 0 },
            kv_heads: to_u32("kv_heads", shape.kv_heads())?,
            rotary_dim: rotary_dim as u32,
            positions: if rotary_dim == 0 { 1 } else { to_u32("positions", positions)? },
            page_shift: if cache.paged { cache.page_shift } else { UNPAGED },
        };
        Ok(Self { config, rotary, params })
    }

    /// Bytes that a run of all its tokens reads and writes.
    pub fn bytes_moved(&self, dtype: DType) -> u64 {
        let shape = self.config.shape;
        let queries = if self.config.with_queries { shape.q_heads() * shape.qk_dim() } else { 0 };
        let keys_values = shape.kv_heads() * (shape.qk_dim() + shape.v_dim());
        (2 * self.config.tokens * (queries + keys_values) * dtype.size()) as u64
    }
}

/// A prepared append. `E` is the storage type of q, K and V.
#[derive(Debug, Clone)]
pub struct Append<F, E> {
    plan: AppendPlan,
    kernel: kernels::Append<F, E>,
}

/// Arguments of [`Append::run`].
#[derive(Debug)]
pub struct AppendArgs<'a, E> {
    /// Queries `[tokens, q_heads, qk_dim]`, rotated in place, where the plan asks for them. A view that may be written overlaps
    /// no other: slices of one fused projection serve as keys and values while queries lie elsewhere or are not asked for.
    pub q_new: Option<ViewMut<'a, E>>,
    /// New keys `[tokens, kv_heads, qk_dim]`.
    pub k_new: &'a View<'a, E>,
    /// New values `[tokens, kv_heads, v_dim]`.
    pub v_new: &'a View<'a, E>,
    /// [`Rope::cos`](crate::rope::Rope::cos), [`Rope::sin`](crate::rope::Rope::sin) and each token's position, where the plan
    /// rotates.
    pub tables: Option<AppendTables<'a>>,
    /// Slot of each token `[tokens]`: page · page size + place in the page. A token with a negative slot is skipped: nothing is
    /// written for it, and its query is not rotated. No two tokens of a run have the same slot: nobody checks it, and what the
    /// slot then holds is a mixture of both.
    pub slot: &'a View<'a, i64>,
    /// Keys of the cache.
    pub k: ViewMut<'a, E>,
    /// Values of the cache.
    pub v: ViewMut<'a, E>,
    /// Status word: [`FaultCode::BadIndex`](crate::FaultCode::BadIndex) with the token whose slot or position is out of
    /// range; it is skipped like one with a negative slot.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function, E: Storage> Append<F, E> {
    /// Compiles and loads. May block.
    ///
    /// # Errors
    /// [`Error::Cuda`] when the kernel cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &AppendPlan) -> Result<Self, Error> {
        let shape = plan.config.shape;
        let kernel = kernels::Append::prepare(device, (shape.qk_dim(), shape.v_dim()), plan.rotary)?;
        Ok(Self { plan: plan.clone(), kernel })
    }

    /// Enqueues the append and returns.
    ///
    /// # Errors
    /// [`Error::Cuda`] names an argument that does not fit.
    pub fn run(&self, queue: &F::Queue, args: AppendArgs<'_, E>) -> Result<(), Error> {
        let args = kernels::AppendArgs {
            params: &self.plan.params,
            q_new: args.q_new,
            k_new: args.k_new,
            v_new: args.v_new,
            tables: args.tables,
            slot: args.slot,
            k: args.k,
            v: args.v,
            status: args.status,
            programmatic: false,
        };
        Ok(self.kernel.launch(queue, args)?)
    }
}
