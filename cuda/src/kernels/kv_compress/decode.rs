//! Split-KV decode attention over a low-rank cache: `fdc_decode`. Its plan is [`DecodePlan`](crate::kernels::attention::DecodePlan).

use std::marker::PhantomData;

use crate::Error;
use crate::kernels::attention::cache::{elements, table_len};
use crate::kernels::split::{Partials, check_soft_cap};
use crate::launch::{Arg, Device, Function, LaunchConfig};
use crate::memory::{View, ViewMut};
use crate::params::{
    FDC_GROUP, FDC_SPLIT_BALANCED, FDC_SPLIT_FIXED, FDC_SPLIT_NONE, FDC_UNIT_GROUPS, FdcDecodeParams,
};
use crate::storage::Storage;
use crate::table::Instance;

use super::heads::{check_heads, check_page, k_channels, pages_len, v_channels};

const KERNEL: &str = "fdc_decode";
const THREADS: u32 = 128;
const WARPS: usize = 4;
const WARP_RING: usize = 16 * 1024;

/// Query columns that one block of [`FdcDecode`] serves, for `column_tiles` tiles of eight.
pub const fn columns(column_tiles: usize) -> usize {
    8 * column_tiles
}

/// What an [`FdcDecode`] kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FdcDecodeVariant {
    /// Channels of a head before the reduction: no rank is above it.
    pub head_dim: usize,
    /// Tiles of eight query columns per block: 1 or 2.
    pub column_tiles: usize,
    /// Whether scores are soft-capped.
    pub soft_cap: bool,
}

impl FdcDecodeVariant {
    /// Dynamic shared memory of a block, in bytes: the queries, four rings and the tail.
    pub const fn shared_bytes(&self) -> usize {
        let columns = columns(self.column_tiles);
        16 * self.head_dim * 2 + WARPS * WARP_RING + (WARPS * columns * 2 + 1) * size_of::<f32>()
    }

    /// Blocks that share an SM of a data-centre GPU: as many as its registers hold, by the kernel's launch bounds, and its shared
    /// memory.
    pub const fn blocks_per_sm(&self) -> u32 {
        let by_registers = if self.column_tiles == 2 && self.soft_cap { 2 } else { 3 };
        let by_shared = crate::kernels::fitting_blocks(self.shared_bytes());
        if by_shared < by_registers { by_shared } else { by_registers }
    }
}

/// `fdc_decode`: attention of a few queries per sequence in the reduced basis of each KV head. `E` is the storage type of
/// queries, cache and outputs.
#[derive(Debug, Clone)]
pub struct FdcDecode<F, E> {
    function: F,
    variant: FdcDecodeVariant,
    _element: PhantomData<E>,
}

/// Arguments of [`FdcDecode`].
#[derive(Debug)]
pub struct FdcDecodeArgs<'a, E> {
    /// Shape, layout and split.
    pub params: &'a FdcDecodeParams,
    /// Blocks to launch; the work is split over at most as many. Not read where the split is [`FDC_SPLIT_NONE`].
    pub blocks: u32,
    /// Projected queries `[batch, q_len, Σ group · r_k]`, 16-byte aligned.
    pub q: &'a View<'a, E>,
    /// The cache's pages, 16-byte aligned.
    pub pages: &'a View<'a, E>,
    /// Page ids, by the table stride of `params`.
    pub block_table: &'a View<'a, u32>,
    /// From [`DecodePlan`](crate::kernels::attention::DecodePlan) `[batch]`.
    pub valid_len: &'a View<'a, u32>,
    /// From [`DecodePlan`](crate::kernels::attention::DecodePlan) with one tile per unit `[batch + 1]`.
    pub first_unit: &'a View<'a, u32>,
    /// Outputs in the reduced basis `[batch, q_len, Σ group · r_v]`, aligned to four elements.
    pub out: ViewMut<'a, E>,
    /// Log-sum-exps `[batch, q_len, q_heads]`, natural log.
    pub lse: ViewMut<'a, f32>,
    /// Partial states, [`part_slots`] × `columns` × `head_dim`, 16-byte aligned; need not be initialised.
    pub part_acc: ViewMut<'a, f32>,
    /// Partial maxima and sums, [`part_slots`] × `columns` × 2; need not be initialised.
    pub part_ml: ViewMut<'a, f32>,
    /// Counters `[batch · kv_heads · column_blocks]`, zero before the first launch.
    pub arrivals: ViewMut<'a, u32>,
    /// Start while the previous kernel of the stream drains.
    pub programmatic: bool,
}

/// Sequences × KV heads × blocks of columns.
fn items(params: &FdcDecodeParams) -> usize {
    elements(&[params.batch as usize, params.heads.count as usize, params.column_blocks as usize])
}

/// Slots of partial states that `fdc_decode` can write: two per block, or one per fixed part, or none.
pub fn part_slots(params: &FdcDecodeParams, blocks: u32) -> usize {
    match params.split {
        FDC_SPLIT_FIXED => elements(&[items(params), params.max_parts as usize]),
        FDC_SPLIT_NONE => 0,
        _ => 2 * blocks as usize,
    }
}

/// Fixed parts of `part_weight` that an item of up to `max_kv_len` keys can have: as many as the widest head.
pub fn max_parts(params: &FdcDecodeParams, max_kv_len: usize) -> u32 {
    let unit = (FDC_GROUP * FDC_UNIT_GROUPS) as usize;
    let groups = max_kv_len.div_ceil(unit).max(1).saturating_mul(FDC_UNIT_GROUPS as usize);
    let count = params.heads.count as usize;
    let blocks = |before: &[u16; 129], head: usize| u32::from(before[head + 1]) - u32::from(before[head]);
    let widest = (0..count)
        .map(|head| blocks(&params.heads.k_before, head) + blocks(&params.heads.v_before, head))
        .max()
        .unwrap_or(1);
    let per_part = (params.part_weight / widest.max(1)).max(1);
    u32::try_from(groups.div_ceil(per_part as usize)).unwrap_or(u32::MAX)
}

impl<F: Function, E: Storage> FdcDecode<F, E> {
    /// Compiles and loads the kernel for `variant`.
    pub fn prepare<D: Device<Function = F>>(device: &D, variant: FdcDecodeVariant) -> Result<Self, Error> {
        let instance = Instance::new(
            KERNEL,
            &[
                ("HEAD_DIM", variant.head_dim as i64),
                ("COLUMN_TILES", variant.column_tiles as i64),
                ("KV_DTYPE", E::DTYPE),
                ("SOFT_CAP", i64::from(variant.soft_cap)),
            ],
        )?;
        Ok(Self { function: device.load(&instance)?, variant, _element: PhantomData })
    }

    /// Enqueues the attention of one layer and step.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short, misaligned, missing or in the wrong space.
    ///
    /// # Safety
    /// When the kernel runs, `valid_len` and `first_unit` are as a launch of
    /// [`DecodePlan`](crate::kernels::attention::DecodePlan) left them, with one tile per unit and the same batch, queries,
    /// window and page table; with fixed parts, of lengths that [`max_parts`] was computed for. The block table may have
    /// changed since: the kernel stays within the pool whatever it holds.
    pub unsafe fn launch(&self, queue: &F::Queue, mut args: FdcDecodeArgs<'_, E>) -> Result<(), Error> {
        let params = args.params;
        let FdcDecodeVariant { head_dim, column_tiles, soft_cap } = self.variant;
        check_heads(KERNEL, &params.heads, head_dim)?;
        let blocks = self.check_split(params, args.blocks)?;
        let columns = columns(column_tiles);
        let queries = params.q_len as usize * params.group as usize;
        if params.column_blocks as usize != queries.div_ceil(columns) {
            let expected = queries.div_ceil(columns);
            return Err(Error::argument(KERNEL, "column_blocks", expected, params.column_blocks));
        }
        check_soft_cap(KERNEL, soft_cap, params.soft_cap)?;
        let page = check_page(KERNEL, &params.heads, params.page_shift, params.page_stride, size_of::<E>())?;
        if params.num_pages == 0 {
            return Err(Error::argument(KERNEL, "num_pages", "at least 1", 0));
        }

        let batch = params.batch as usize;
        let count = params.heads.count as usize;
        let rows = elements(&[batch, queries, count]);
        let slots = part_slots(params, blocks);
        args.q.check(KERNEL, "q", elements(&[batch, queries, k_channels(&params.heads)]), 16)?;
        let pool = pages_len(params.num_pages as usize, params.page_stride, page);
        args.pages.check(KERNEL, "pages", pool, 16)?;
        let table = table_len([0, params.table_batch_stride], 1, params.batch, params.max_pages);
        args.block_table.check(KERNEL, "block_table", table, 4)?;
        args.valid_len.check(KERNEL, "valid_len", batch, 4)?;
        args.first_unit.check(KERNEL, "first_unit", batch + 1, 4)?;
        let out = elements(&[batch, queries, v_channels(&params.heads)]);
        args.out.check(KERNEL, "out", out, 4 * size_of::<E>() as u64)?;
        args.lse.check(KERNEL, "lse", rows, 4)?;
        let partials = Partials { acc: &args.part_acc, ml: &args.part_ml, arrivals: &args.arrivals };
        partials.check(KERNEL, [slots, columns, head_dim], items(params))?;

        let mut config = LaunchConfig::new(blocks, THREADS).shared(self.variant.shared_bytes() as u32);
        config.programmatic = args.programmatic;
        let kernel_args = [
            Arg::read("q", args.q),
            Arg::read("pages", args.pages),
            Arg::read("block_table", args.block_table),
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
        // as the kernel's index range, and the kernel clamps page ids to the pool and lengths to the table. That `valid_len`
        // and `first_unit` are outputs of `decode_plan` is this function's contract with its caller.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }

    /// Checks what the kernel divides by and counts in 32 bits; gives the blocks to launch.
    fn check_split(&self, params: &FdcDecodeParams, blocks: u32) -> Result<u32, Error> {
        for (argument, value) in [
            ("batch", params.batch),
            ("q_len", params.q_len),
            ("group", params.group),
            ("column_blocks", params.column_blocks),
            ("part_weight", params.part_weight),
            ("max_parts", params.max_parts),
            ("min_weight", params.min_weight),
            ("blocks", blocks),
        ] {
            if value == 0 || value > i32::MAX as u32 {
                let expected = format!("1 to {}", i32::MAX);
                return Err(Error::argument(KERNEL, argument, expected, value));
            }
        }
        if params.item_weight > 1 << 16 {
            return Err(Error::argument(KERNEL, "item_weight", "at most 65536", params.item_weight));
        }
        // An item's weights are 32-bit on the device.
        let keys = u64::from(params.max_pages) << params.page_shift.min(20);
        let most = (u64::from(i32::MAX as u32) - (1 << 16)) * u64::from(FDC_GROUP) / (2 * 256 / 16) - 64;
        if keys > most {
            return Err(Error::argument(
                KERNEL,
                "max_pages",
                format_args!("at most {most} tokens in a sequence"),
                keys,
            ));
        }
        match params.split {
            // Places in the line of work times blocks stay within 64 bits.
            FDC_SPLIT_BALANCED | FDC_SPLIT_FIXED if blocks <= 1 << 16 => Ok(blocks),
            FDC_SPLIT_BALANCED | FDC_SPLIT_FIXED => {
                Err(Error::argument(KERNEL, "blocks", "at most 65536", blocks))
            }
            FDC_SPLIT_NONE => {
                u32::try_from(items(params)).ok().filter(|items| *items <= i32::MAX as u32).ok_or_else(|| {
                    Error::argument(
                        KERNEL,
                        "batch",
                        format_args!("at most {} items", i32::MAX),
                        items(params),
                    )
                })
            }
            other => Err(Error::argument(KERNEL, "split", "0 to 2", other)),
        }
    }
}
