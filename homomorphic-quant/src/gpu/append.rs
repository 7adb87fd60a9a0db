//! Appending: blocks that close are quantized, other tokens stay in 16 bits.

use cuda::kernels::homomorphic_quant as kernels;
use cuda::launch::{Device, Function};
use cuda::memory::{View, ViewMut};
use cuda::params::HackAppendParams;
use cuda::storage::Storage;

use super::{Places, Pools, check_dims, check_dtype, of_plan, to_u32};
use crate::Error;

/// What an append is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AppendConfig {
    /// The cache.
    pub pools: Pools,
    /// Sequences of every append; those without new tokens have an empty range.
    pub batch: usize,
    /// New tokens of one sequence at most; the grid grows with it.
    pub max_new: usize,
    /// New tokens in all, over the sequences: the rows of `k_new` and `v_new`.
    pub num_new: usize,
    /// Longest sequence.
    pub max_kv_len: usize,
    /// Elements between two tokens of `k_new` and of `v_new`; `None` where they are dense.
    pub strides: Option<[usize; 2]>,
}

/// Grid and variant of an append. It needs no workspace.
#[derive(Debug, Clone)]
pub struct AppendPlan {
    config: AppendConfig,
    variant: kernels::AppendVariant,
    params: HackAppendParams,
}

impl AppendPlan {
    /// Plans appends. Needs no device.
    ///
    /// # Errors
    /// [`Error::Argument`] for a size that the kernel does not support.
    pub fn new(config: AppendConfig) -> Result<Self, Error> {
        for (argument, value) in [("batch", config.batch), ("max_new", config.max_new)] {
            if value == 0 {
                return Err(Error::argument(argument, "at least 1", 0));
            }
        }
        let (pools, geometry) = (config.pools, config.pools.geometry());
        check_dims("hack_append", geometry)?;
        let dense = [pools.kv_heads() * geometry.qk_dim, pools.kv_heads() * geometry.v_dim];
        let [k_stride, v_stride] = config.strides.unwrap_or(dense);
        let counts = pools.counts();
        let params = HackAppendParams {
            k_new_stride: i64::from(to_u32("strides", k_stride)?),
            v_new_stride: i64::from(to_u32("strides", v_stride)?),
            page_stride: i64::from(to_u32("page", pools.page_bytes())?),
            table_batch_stride: counts.max_pages as i64,
            batch: to_u32("batch", config.batch)?,
            kv_heads: to_u32("kv_heads", pools.kv_heads())?,
            num_new: to_u32("num_new", config.num_new)?,
            max_new: to_u32("max_new", config.max_new)?,
            max_kv_len: to_u32("max_kv_len", config.max_kv_len)?,
            sinks: to_u32("sinks", pools.sinks())?,
            max_pages: to_u32("max_pages", counts.max_pages)?,
            num_pages: to_u32("pages", counts.pages)?,
            num_sink_pages: to_u32("sink_pages", counts.sink_pages)?,
            num_open_pages: to_u32("open_pages", counts.open_pages)?,
        };
        let variant = kernels::AppendVariant {
            k_bits: geometry.bits.k.count(),
            v_bits: geometry.bits.v.count(),
            partition: geometry.partition,
            qk_dim: geometry.qk_dim,
            v_dim: geometry.v_dim,
        };
        variant.check_params(&params).map_err(of_plan)?;
        Ok(Self { config, variant, params })
    }

    /// Bytes that an append of `new` tokens moves when it closes as many blocks as they fill: the new vectors, and the pages.
    pub fn bytes_moved(&self, new: usize) -> u64 {
        let geometry = self.config.pools.geometry();
        let vectors = new * self.config.pools.kv_heads() * (geometry.qk_dim + geometry.v_dim) * 2;
        (vectors + new / geometry.partition * self.config.pools.page_bytes()) as u64
    }
}

/// Prepared append. `E` is the cache's 16-bit type.
#[derive(Debug, Clone)]
pub struct Append<F, E> {
    plan: AppendPlan,
    kernel: kernels::Append<F, E>,
}

/// Arguments of [`Append::run`].
#[derive(Debug)]
pub struct AppendArgs<'a, E> {
    /// New keys `[num_new, kv_heads, qk_dim]`, rotated, 16-byte aligned.
    pub k_new: &'a View<'a, E>,
    /// New values `[num_new, kv_heads, v_dim]`, 16-byte aligned.
    pub v_new: &'a View<'a, E>,
    /// Where each sequence's new tokens start `[batch + 1]`.
    pub new_start: &'a View<'a, u32>,
    /// Tokens of each sequence `[batch]`, the new ones included.
    pub kv_len: &'a View<'a, u32>,
    /// Where they lie and go. Entries of the block table are read for the blocks that close.
    pub places: Places<'a>,
    /// Packed pages.
    pub pages: ViewMut<'a, u8>,
    /// Sinks.
    pub sink_pool: ViewMut<'a, E>,
    /// Open blocks. Two sequences of an append never share one.
    pub open_pool: ViewMut<'a, E>,
    /// Status word: [`FaultCode::BadRange`](attention::FaultCode::BadRange) (`new_start`),
    /// [`BadLength`](attention::FaultCode::BadLength), [`BadPage`](attention::FaultCode::BadPage) or
    /// [`BadIndex`](attention::FaultCode::BadIndex) (sink or open page) with the sequence, to which nothing is appended.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function, E: Storage> Append<F, E> {
    /// Compiles and loads. May block.
    ///
    /// # Errors
    /// [`Error::Argument`] when `E` is not the cache's type, [`Error::Cuda`] when the kernel cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &AppendPlan) -> Result<Self, Error> {
        check_dtype::<E>(&plan.config.pools)?;
        Ok(Self { plan: plan.clone(), kernel: kernels::Append::prepare(device, plan.variant)? })
    }

    /// Enqueues one layer's append and returns. It comes before the step's attention, which then sees the token that closes a
    /// block in quantized form.
    ///
    /// # Errors
    /// [`Error::Cuda`] names an argument that does not fit.
    pub fn run(&self, queue: &F::Queue, args: AppendArgs<'_, E>) -> Result<(), Error> {
        let args = kernels::AppendArgs {
            params: &self.plan.params,
            k_new: args.k_new,
            v_new: args.v_new,
            new_start: args.new_start,
            kv_len: args.kv_len,
            block_table: args.places.block_table,
            sink_page: args.places.sink_page,
            open_page: args.places.open_page,
            pages: args.pages,
            sink_pool: args.sink_pool,
            open_pool: args.open_pool,
            status: args.status,
            programmatic: false,
        };
        Ok(self.kernel.launch(queue, args)?)
    }
}
