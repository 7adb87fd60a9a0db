//! Split-KV decode attention: `decode_plan` and `decode`.

use std::marker::PhantomData;

use crate::Error;
use crate::kernels::split::{Partials, check_blocks, check_soft_cap};
use crate::launch::{Arg, Device, Function, LaunchConfig};
use crate::memory::{View, ViewMut};
use crate::params::{DECODE_TILE, DecodeParams};
use crate::storage::Storage;
use crate::table::Instance;

use super::cache::{CacheExtent, check_cache, check_scale, elements, table_len};

const THREADS: u32 = 128;
const WARPS: usize = 4;
const WARP_RING: usize = 16 * 1024;

/// Query columns that one block of [`Decode`] serves, for `column_tiles` tiles of eight.
pub const fn columns(column_tiles: usize) -> usize {
    8 * column_tiles
}

/// Checks what both kernels read from [`DecodeParams`]; everything else follows from buffers and strides.
fn check_params(kernel: &str, params: &DecodeParams) -> Result<(), Error> {
    let at_least_1 = [
        ("batch", params.batch),
        ("q_len", params.q_len),
        ("kv_heads", params.kv_heads),
        ("group", params.group),
        ("column_blocks", params.column_blocks),
        ("unit_tiles", params.unit_tiles),
        ("min_units", params.min_units),
    ];
    for (argument, value) in at_least_1 {
        if value == 0 {
            return Err(Error::argument(kernel, argument, "at least 1", value));
        }
    }
    // Token numbers and sums of units are 32-bit on the device.
    let tiles = u64::from(params.max_kv_len).div_ceil(u64::from(DECODE_TILE)).max(1);
    for (argument, value) in [("q_len", params.q_len), ("window", params.window)] {
        if value > i32::MAX as u32 {
            return Err(Error::argument(kernel, argument, format_args!("at most {}", i32::MAX), value));
        }
    }
    if u64::from(params.batch) * tiles > i32::MAX as u64 || params.max_kv_len > i32::MAX as u32 {
        return Err(Error::argument(
            kernel,
            "max_kv_len",
            format_args!("at most {} tiles of {DECODE_TILE} tokens over the batch", i32::MAX),
            format_args!("{} tokens in each of {} sequences", params.max_kv_len, params.batch),
        ));
    }
    Ok(())
}

/// What the step's sequences can index, and the length of their block table.
fn extent_of(params: &DecodeParams, paged: bool) -> CacheExtent {
    CacheExtent {
        pages: paged.then_some((params.num_pages, params.page_shift)),
        tokens: params.num_tokens,
        heads: params.kv_heads,
    }
}

fn table_len_of(params: &DecodeParams) -> usize {
    let strides = [params.table_head_stride, params.table_batch_stride];
    table_len(strides, params.kv_heads, params.batch, params.max_pages)
}

/// `decode_plan`: checks lengths and page ids on the device and sums up the work of a step.
#[derive(Debug, Clone)]
pub struct DecodePlan<F> {
    function: F,
}

/// Arguments of [`DecodePlan`].
#[derive(Debug)]
pub struct DecodePlanArgs<'a> {
    /// Shape, layout and split; both kernels of a step get the same.
    pub params: &'a DecodeParams,
    /// Keys of each sequence `[batch]`, the step's own included.
    pub kv_len: &'a View<'a, u32>,
    /// First token of each sequence in a contiguous cache `[batch]`; exactly one of this and `block_table` is given.
    pub kv_start: Option<&'a View<'a, u32>>,
    /// Page ids, by the table strides of `params`.
    pub block_table: Option<&'a View<'a, u32>>,
    /// Out: `kv_len`, or 0 where the sequence cannot be read `[valid_lens]`, see [`valid_lens`].
    pub valid_len: ViewMut<'a, u32>,
    /// Out: units of work per item, summed over the sequences before `[batch + 1]`.
    pub first_unit: ViewMut<'a, u32>,
    /// One counter, zero before the first launch.
    pub arrivals: ViewMut<'a, u32>,
    /// Status word.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function> DecodePlan<F> {
    /// Compiles and loads the kernel.
    pub fn prepare<D: Device<Function = F>>(device: &D) -> Result<Self, Error> {
        Ok(Self { function: device.load(&Instance::new("decode_plan", &[])?)? })
    }

    /// Enqueues the plan of one step.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short, misaligned, missing or in the wrong space.
    pub fn launch(&self, queue: &F::Queue, mut args: DecodePlanArgs<'_>) -> Result<(), Error> {
        const KERNEL: &str = "decode_plan";
        let params = args.params;
        check_params(KERNEL, params)?;
        let batch = params.batch as usize;
        extent_of(params, args.block_table.is_some()).check_places(
            KERNEL,
            args.block_table,
            args.kv_start,
            batch,
            || table_len_of(params),
        )?;
        args.kv_len.check(KERNEL, "kv_len", batch, 4)?;
        args.valid_len.check(KERNEL, "valid_len", valid_lens(params), 4)?;
        args.first_unit.check(KERNEL, "first_unit", batch + 1, 4)?;
        args.arrivals.check(KERNEL, "arrivals", 1, 4)?;
        args.status.check(KERNEL, "status", 1, 8)?;

        let shared = (WARPS + 1) * size_of::<u32>();
        let config = LaunchConfig::new(params.batch, THREADS).shared(shared as u32);
        let kernel_args = [
            Arg::read("kv_len", args.kv_len),
            Arg::read_optional("kv_start", args.kv_start),
            Arg::read_optional("block_table", args.block_table),
            Arg::write("valid_len", &mut args.valid_len),
            Arg::write("first_unit", &mut args.first_unit),
            Arg::write("arrivals", &mut args.arrivals),
            Arg::write("status", &mut args.status),
            Arg::value("params", params),
        ];
        // SAFETY: the arguments are the kernel's parameters in order and type; the checks above made every buffer as long as
        // one block per sequence reads and writes, and the shared memory is the kernel's `Shared`.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }
}

/// What a [`Decode`] kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DecodeVariant {
    /// Channels of q and K.
    pub qk_dim: usize,
    /// Channels of V and the output.
    pub v_dim: usize,
    /// Tiles of eight query columns per block: 1 or 2.
    pub column_tiles: usize,
    /// Whether K and V lie in pages.
    pub paged: bool,
    /// Whether scores are soft-capped.
    pub soft_cap: bool,
}

impl DecodeVariant {
    /// Checks, without a device, what a launch would refuse whatever its buffers.
    ///
    /// # Errors
    /// [`Error::Constant`] for a size that the kernel is not written for, [`Error::Argument`] for parameters out of range.
    pub fn check(&self, params: &DecodeParams) -> Result<(), Error> {
        self.instance(crate::table::dtype::BF16)?;
        check_params("decode", params)?;
        check_scale("decode", params.scale)
    }

    fn instance(&self, dtype: i64) -> Result<Instance, Error> {
        Instance::new(
            "decode",
            &[
                ("QK_DIM", self.qk_dim as i64),
                ("V_DIM", self.v_dim as i64),
                ("COLUMN_TILES", self.column_tiles as i64),
                ("KV_DTYPE", dtype),
                ("PAGED", i64::from(self.paged)),
                ("SOFT_CAP", i64::from(self.soft_cap)),
            ],
        )
    }

    /// Dynamic shared memory of a block, in bytes: the queries, four rings and the tail.
    pub fn shared_bytes(&self) -> usize {
        let columns = columns(self.column_tiles);
        16 * self.qk_dim * 2 + WARPS * WARP_RING + (WARPS * columns * 2 + 1) * size_of::<f32>()
    }
}

/// `decode`: attention of a few queries per sequence over its KV cache. `E` is the storage type of q, K, V and the output.
#[derive(Debug, Clone)]
pub struct Decode<F, E> {
    function: F,
    variant: DecodeVariant,
    _element: PhantomData<E>,
}

/// Arguments of [`Decode`].
#[derive(Debug)]
pub struct DecodeArgs<'a, E> {
    /// Shape, layout and split, the same as given to [`DecodePlan`].
    pub params: &'a DecodeParams,
    /// Blocks to launch; the work is split over at most as many.
    pub blocks: u32,
    /// Queries `[batch, q_len, q_heads, qk_dim]`, 16-byte aligned.
    pub q: &'a View<'a, E>,
    /// Keys, by the strides of `params`, 16-byte aligned.
    pub k: &'a View<'a, E>,
    /// Values, by the strides of `params`, 16-byte aligned.
    pub v: &'a View<'a, E>,
    /// Page ids of a paged cache.
    pub block_table: Option<&'a View<'a, u32>>,
    /// First token of each sequence of a contiguous cache `[batch]`.
    pub kv_start: Option<&'a View<'a, u32>>,
    /// From [`DecodePlan`] `[valid_lens]`, see [`valid_lens`].
    pub valid_len: &'a View<'a, u32>,
    /// From [`DecodePlan`] `[batch + 1]`.
    pub first_unit: &'a View<'a, u32>,
    /// Outputs `[batch, q_len, q_heads, v_dim]`, aligned to four elements.
    pub out: ViewMut<'a, E>,
    /// Log-sum-exps `[batch, q_len, q_heads]`, natural log.
    pub lse: ViewMut<'a, f32>,
    /// Partial states, [`part_slots`] × `columns` × `v_dim`, 16-byte aligned; need not be initialised.
    pub part_acc: ViewMut<'a, f32>,
    /// Partial maxima and sums, [`part_slots`] × `columns` × 2; need not be initialised.
    pub part_ml: ViewMut<'a, f32>,
    /// Counters `[batch · kv_heads · column_blocks]`, zero before the first launch.
    pub arrivals: ViewMut<'a, u32>,
    /// Start while the previous kernel of the stream drains.
    pub programmatic: bool,
}

/// Lengths that `decode_plan` leaves: one per sequence, or one per KV head and sequence where every head has its own table.
pub fn valid_lens(params: &DecodeParams) -> usize {
    let tables = if params.table_head_stride == 0 { 1 } else { params.kv_heads as usize };
    elements(&[tables, params.batch as usize])
}

/// Slots of partial states that `decode` can write: two per block, or one per unit where parts are fixed.
pub fn part_slots(params: &DecodeParams, blocks: u32) -> usize {
    if params.fixed_parts == 0 {
        return 2 * blocks as usize;
    }
    let units = (params.max_kv_len as usize)
        .div_ceil(DECODE_TILE as usize)
        .div_ceil(params.unit_tiles as usize)
        .max(1);
    elements(&[units, params.batch as usize, params.kv_heads as usize, params.column_blocks as usize])
}

impl<F: Function, E: Storage> Decode<F, E> {
    /// Compiles and loads the kernel for `variant`.
    pub fn prepare<D: Device<Function = F>>(device: &D, variant: DecodeVariant) -> Result<Self, Error> {
        let instance = variant.instance(E::DTYPE)?;
        Ok(Self { function: device.load(&instance)?, variant, _element: PhantomData })
    }

    /// Enqueues the attention of one layer and step.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short, misaligned, missing or in the wrong space.
    ///
    /// # Safety
    /// When the kernel runs, `valid_len` and `first_unit` are as a [`DecodePlan`] launch with the same `params` left them.
    /// Block table and starts may have changed since: the kernel stays within the cache whatever they hold.
    pub unsafe fn launch(&self, queue: &F::Queue, mut args: DecodeArgs<'_, E>) -> Result<(), Error> {
        const KERNEL: &str = "decode";
        let params = args.params;
        let DecodeVariant { qk_dim, v_dim, column_tiles, paged, soft_cap } = self.variant;
        check_params(KERNEL, params)?;
        check_scale(KERNEL, params.scale)?;
        let columns = columns(column_tiles);
        let queries = params.q_len as usize * params.group as usize;
        if params.column_blocks as usize != queries.div_ceil(columns) {
            return Err(Error::argument(
                KERNEL,
                "column_blocks",
                queries.div_ceil(columns),
                params.column_blocks,
            ));
        }
        check_soft_cap(KERNEL, soft_cap, params.soft_cap)?;
        check_blocks(KERNEL, args.blocks)?;

        let batch = params.batch as usize;
        let rows = elements(&[batch, queries, params.kv_heads as usize]);
        let slots = part_slots(params, args.blocks);
        let items = elements(&[batch, params.kv_heads as usize, params.column_blocks as usize]);
        args.q.check(KERNEL, "q", elements(&[rows, qk_dim]), 16)?;
        let extent = extent_of(params, paged);
        let k_strides = [params.k_page_stride, params.k_token_stride, params.k_head_stride];
        let v_strides = [params.v_page_stride, params.v_token_stride, params.v_head_stride];
        check_cache(KERNEL, "k", args.k, qk_dim, extent, k_strides)?;
        check_cache(KERNEL, "v", args.v, v_dim, extent, v_strides)?;
        extent.check_places(KERNEL, args.block_table, args.kv_start, batch, || table_len_of(params))?;
        args.valid_len.check(KERNEL, "valid_len", valid_lens(params), 4)?;
        args.first_unit.check(KERNEL, "first_unit", batch + 1, 4)?;
        args.out.check(KERNEL, "out", elements(&[rows, v_dim]), 4 * size_of::<E>() as u64)?;
        args.lse.check(KERNEL, "lse", rows, 4)?;
        let partials = Partials { acc: &args.part_acc, ml: &args.part_ml, arrivals: &args.arrivals };
        partials.check(KERNEL, [slots, columns, v_dim], items)?;

        let mut config = LaunchConfig::new(args.blocks, THREADS).shared(self.variant.shared_bytes() as u32);
        config.programmatic = args.programmatic;
        let kernel_args = [
            Arg::read("q", args.q),
            Arg::read("k", args.k),
            Arg::read("v", args.v),
            Arg::read_optional("block_table", args.block_table),
            Arg::read_optional("kv_start", args.kv_start),
            Arg::read("valid_len", args.valid_len),
            Arg::read("first_unit", args.first_unit),
            Arg::write("out", &mut args.out),
            Arg::write("lse", &mut args.lse),
            Arg::write("part_acc", &mut args.part_acc),
            Arg::write("part_ml", &mut args.part_ml),
            Arg::write("arrivals", &mut args.arrivals),
            Arg::value("params", params),
        ];
        // SAFETY: the arguments are the kernel's parameters in order and type. The checks above made every buffer as long
        // as the kernel's index range, and the kernel clamps page ids to the pool and lengths to the cache. That `valid_len`
        // and `first_unit` are outputs of `decode_plan` is this function's contract with its caller.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }
}
