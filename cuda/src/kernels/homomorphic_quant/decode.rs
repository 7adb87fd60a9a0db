//! Attention on quantized pages: `hack_decode_plan`, `hack_decode` and `hack_dequant_decode`.

use std::marker::PhantomData;

use crate::Error;
use crate::kernels::split::{Partials, check_blocks, check_soft_cap};
use crate::launch::{Arg, Device, Function, LaunchConfig};
use crate::memory::{View, ViewMut};
use crate::params::HackDecodeParams;
use crate::storage::Storage;
use crate::table::Instance;

use super::{PackedSegment, elements, larger, pool_bytes};

const THREADS: u32 = 128;
const WARPS: usize = 4;

/// Query columns that one block of [`Decode`] serves, for `column_tiles` warps to a team.
pub const fn columns(column_tiles: usize) -> usize {
    8 * column_tiles
}

/// Checks what the kernels read from [`HackDecodeParams`], as their launches do; everything else follows from buffers and strides.
///
/// # Errors
/// [`Error::Argument`] names a size or count that the kernels do not support.
pub fn check_params(kernel: &str, params: &HackDecodeParams) -> Result<(), Error> {
    let at_least_1 = [
        ("batch", params.batch),
        ("q_len", params.q_len),
        ("kv_heads", params.kv_heads),
        ("group", params.group),
        ("column_blocks", params.column_blocks),
        ("partition", params.partition),
        ("unit_pages", params.unit_pages),
        ("min_units", params.min_units),
    ];
    for (argument, value) in at_least_1 {
        if value == 0 {
            return Err(Error::argument(kernel, argument, "at least 1", value));
        }
    }
    // Token numbers, columns and sums of units are 32-bit on the device.
    let queries = u64::from(params.q_len) * u64::from(params.group);
    for (argument, value) in [
        ("q_len", queries),
        ("window", u64::from(params.window)),
        ("sinks", u64::from(params.sinks)),
        ("max_kv_len", u64::from(params.max_kv_len)),
        ("max_kv_len", u64::from(params.batch) * u64::from(params.max_kv_len / params.partition + 1)),
    ] {
        if value > i32::MAX as u64 {
            return Err(Error::argument(kernel, argument, format_args!("at most {}", i32::MAX), value));
        }
    }
    if params.window_sinks > params.sinks {
        return Err(Error::argument(
            kernel,
            "window_sinks",
            format_args!("at most {} sinks", params.sinks),
            params.window_sinks,
        ));
    }
    Ok(())
}

/// Pages of each sequence, for all kernels of a step.
#[derive(Debug, Clone, Copy)]
pub struct SideArgs<'a> {
    /// Pages of closed blocks `[batch, max_pages]`, by the stride of the parameters.
    pub block_table: &'a View<'a, u32>,
    /// Page of each sequence's sinks `[batch]`.
    pub sink_page: &'a View<'a, u32>,
    /// Page of each sequence's open block `[batch]`.
    pub open_page: &'a View<'a, u32>,
}

impl SideArgs<'_> {
    pub(super) fn check(&self, kernel: &str, params: &HackDecodeParams) -> Result<(), Error> {
        let table = pool_bytes(params.batch, params.table_batch_stride, params.max_pages as usize);
        self.block_table.check(kernel, "block_table", table, 4)?;
        self.sink_page.check(kernel, "sink_page", params.batch as usize, 4)?;
        self.open_page.check(kernel, "open_page", params.batch as usize, 4)
    }
}

/// `hack_decode_plan`: checks lengths, page ids and places on the device and sums up the work of a step.
#[derive(Debug, Clone)]
pub struct DecodePlan<F> {
    function: F,
}

/// Arguments of [`DecodePlan`].
#[derive(Debug)]
pub struct DecodePlanArgs<'a> {
    /// Shape, layout and split; all kernels of a step get the same.
    pub params: &'a HackDecodeParams,
    /// Tokens of each sequence `[batch]`, the step's own included.
    pub kv_len: &'a View<'a, u32>,
    /// Where they lie.
    pub places: SideArgs<'a>,
    /// Out: `kv_len`, or 0 for a sequence that cannot be read `[batch]`.
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
        Ok(Self { function: device.load(&Instance::new("hack_decode_plan", &[])?)? })
    }

    /// Enqueues the plan of one step.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short, misaligned or in the wrong space.
    pub fn launch(&self, queue: &F::Queue, mut args: DecodePlanArgs<'_>) -> Result<(), Error> {
        const KERNEL: &str = "hack_decode_plan";
        let params = args.params;
        check_params(KERNEL, params)?;
        let batch = params.batch as usize;
        args.places.check(KERNEL, params)?;
        args.kv_len.check(KERNEL, "kv_len", batch, 4)?;
        args.valid_len.check(KERNEL, "valid_len", batch, 4)?;
        args.first_unit.check(KERNEL, "first_unit", batch + 1, 4)?;
        args.arrivals.check(KERNEL, "arrivals", 1, 4)?;
        args.status.check(KERNEL, "status", 1, 8)?;

        let shared = (WARPS + 2) * size_of::<u32>();
        let config = LaunchConfig::new(params.batch, THREADS).shared(shared as u32);
        let kernel_args = [
            Arg::read("kv_len", args.kv_len),
            Arg::read("block_table", args.places.block_table),
            Arg::read("sink_page", args.places.sink_page),
            Arg::read("open_page", args.places.open_page),
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

/// What a kernel does with the codes of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Method {
    /// `hack_decode`: integer products with 8-bit queries and probabilities.
    Codes,
    /// `hack_dequant_decode`: 16-bit products of what the codes stand for.
    Dequantize,
}

impl Method {
    /// Name of the kernel.
    pub const fn kernel(self) -> &'static str {
        match self {
            Method::Codes => "hack_decode",
            Method::Dequantize => "hack_dequant_decode",
        }
    }
}

/// What a [`Decode`] kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DecodeVariant {
    /// Which of the two kernels.
    pub method: Method,
    /// Bits of key codes.
    pub k_bits: usize,
    /// Bits of value codes.
    pub v_bits: usize,
    /// Tokens of a block.
    pub partition: usize,
    /// Channels of q and K.
    pub qk_dim: usize,
    /// Channels of V and the output.
    pub v_dim: usize,
    /// Warps that share pages, eight query columns each: 1, 2 or 4.
    pub column_tiles: usize,
    /// Whether scores are soft-capped.
    pub soft_cap: bool,
}

impl DecodeVariant {
    /// One (page, KV head).
    pub const fn segment(&self) -> PackedSegment {
        PackedSegment::new(self.k_bits, self.v_bits, self.partition, self.qk_dim, self.v_dim)
    }

    /// Dynamic shared memory of a block, in bytes: the queries, a ring per team, and the tail.
    pub const fn shared_bytes(&self) -> usize {
        let (columns, teams) = (columns(self.column_tiles), WARPS / self.column_tiles);
        // The tail: a plan, a unit, maxima and sums, an item and a flag.
        columns * self.qk_dim * 2 + teams * self.ring_bytes() + 32 + 8 + teams * columns * 8 + 52 + 4
    }

    /// Blocks that share an SM of a data-centre GPU: as many as its registers hold, by the kernel's launch bounds (`BLOCKS_PER_SM` of
    /// tile/hack_attention.cuh), and its shared memory.
    pub const fn blocks_per_sm(&self) -> u32 {
        let short = self.qk_dim <= 128 && self.v_dim <= 128 && self.partition <= 64;
        let few = self.column_tiles == 1 && !self.soft_cap && self.k_bits < 8 && self.v_bits < 8;
        let by_registers = if short && few { 3 } else { 2 };
        let by_shared = crate::kernels::fitting_blocks(self.shared_bytes());
        if by_shared < by_registers { by_shared } else { by_registers }
    }

    /// The ring of a team, in bytes.
    pub(super) const fn ring_bytes(&self) -> usize {
        let segment = self.segment();
        let slot = larger(segment.keys.largest(), segment.values.largest());
        let fit = self.column_tiles * 16 * 1024 / slot;
        let slots = if fit > 8 { 8 } else { larger(fit, 3) };
        // A ring also holds 16 vectors in 16 bits, and at the end the team's state.
        let other = larger(16 * (self.qk_dim + self.v_dim) * 2, columns(self.column_tiles) * self.v_dim * 4);
        larger(slots * slot, other).next_multiple_of(128)
    }
}

/// `hack_decode` or `hack_dequant_decode`: attention over a quantized cache. `E` is the storage type of q, of 16-bit tokens and of the output.
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
    pub params: &'a HackDecodeParams,
    /// Blocks to launch; the work is split over at most as many.
    pub blocks: u32,
    /// Queries `[batch, q_len, q_heads, qk_dim]`, 16-byte aligned.
    pub q: &'a View<'a, E>,
    /// The pool of packed pages, 16-byte aligned.
    pub pages: &'a View<'a, u8>,
    /// The pool of sinks `[num_sink_pages, kv_heads, sinks · (qk_dim + v_dim)]`, 16-byte aligned.
    pub sink_pool: &'a View<'a, E>,
    /// The pool of open blocks `[num_open_pages, kv_heads, partition · (qk_dim + v_dim)]`, 16-byte aligned.
    pub open_pool: &'a View<'a, E>,
    /// Where the sequences lie.
    pub places: SideArgs<'a>,
    /// From [`DecodePlan`] `[batch]`.
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

/// Slots of partial states that the kernels can write: two per block, or one per unit where parts are fixed.
pub fn part_slots(params: &HackDecodeParams, blocks: u32) -> usize {
    if params.fixed_parts == 0 {
        return 2 * blocks as usize;
    }
    let pages = (params.max_kv_len / params.partition.max(1)) as usize;
    let units = 1 + pages.div_ceil(params.unit_pages.max(1) as usize);
    elements(&[units, params.batch as usize, params.kv_heads as usize, params.column_blocks as usize])
}

impl<F: Function, E: Storage> Decode<F, E> {
    /// Compiles and loads the kernel for `variant`.
    pub fn prepare<D: Device<Function = F>>(device: &D, variant: DecodeVariant) -> Result<Self, Error> {
        let instance = Instance::new(
            variant.method.kernel(),
            &[
                ("K_BITS", variant.k_bits as i64),
                ("V_BITS", variant.v_bits as i64),
                ("PARTITION", variant.partition as i64),
                ("QK_DIM", variant.qk_dim as i64),
                ("V_DIM", variant.v_dim as i64),
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
    /// [`Error::Argument`] names an argument that is too short, misaligned or in the wrong space.
    ///
    /// # Safety
    /// When the kernel runs, `valid_len` and `first_unit` are as a [`DecodePlan`] launch with the same `params` left them.
    /// Block table and places may have changed since: the kernel stays within the pools whatever they hold.
    pub unsafe fn launch(&self, queue: &F::Queue, mut args: DecodeArgs<'_, E>) -> Result<(), Error> {
        let params = args.params;
        let DecodeVariant { method, partition, qk_dim, v_dim, column_tiles, soft_cap, .. } = self.variant;
        let kernel = method.kernel();
        check_params(kernel, params)?;
        let columns = columns(column_tiles);
        let queries = params.q_len as usize * params.group as usize;
        for (argument, expected, found) in [
            ("column_blocks", queries.div_ceil(columns), params.column_blocks),
            ("partition", partition, params.partition),
        ] {
            if found as usize != expected {
                return Err(Error::argument(kernel, argument, expected, found));
            }
        }
        check_soft_cap(kernel, soft_cap, params.soft_cap)?;
        check_blocks(kernel, args.blocks)?;

        let (batch, heads) = (params.batch as usize, params.kv_heads as usize);
        let rows = elements(&[batch, queries, heads]);
        let slots = part_slots(params, args.blocks);
        let items = elements(&[batch, heads, params.column_blocks as usize]);
        args.q.check(kernel, "q", elements(&[rows, qk_dim]), 16)?;
        let page = elements(&[heads, self.variant.segment().bytes()]);
        if params.page_stride % 16 != 0 || params.page_stride < page as i64 {
            let expected = format!("a multiple of 16, at least {page}");
            return Err(Error::argument(kernel, "page_stride", expected, params.page_stride));
        }
        args.pages.check(kernel, "pages", pool_bytes(params.num_pages, params.page_stride, page), 16)?;
        let side = |pages: u32, tokens: usize| elements(&[pages as usize, heads, tokens, qk_dim + v_dim]);
        let sinks = side(params.num_sink_pages, params.sinks as usize);
        args.sink_pool.check(kernel, "sink_pool", sinks, 16)?;
        args.open_pool.check(kernel, "open_pool", side(params.num_open_pages, partition), 16)?;
        args.places.check(kernel, params)?;
        args.valid_len.check(kernel, "valid_len", batch, 4)?;
        args.first_unit.check(kernel, "first_unit", batch + 1, 4)?;
        args.out.check(kernel, "out", elements(&[rows, v_dim]), 4 * size_of::<E>() as u64)?;
        args.lse.check(kernel, "lse", rows, 4)?;
        let partials = Partials { acc: &args.part_acc, ml: &args.part_ml, arrivals: &args.arrivals };
        partials.check(kernel, [slots, columns, v_dim], items)?;

        let mut config = LaunchConfig::new(args.blocks, THREADS).shared(self.variant.shared_bytes() as u32);
        config.programmatic = args.programmatic;
        let kernel_args = [
            Arg::read("q", args.q),
            Arg::read("pages", args.pages),
            Arg::read("block_table", args.places.block_table),
            Arg::read("sink_pool", args.sink_pool),
            Arg::read("open_pool", args.open_pool),
            Arg::read("sink_page", args.places.sink_page),
            Arg::read("open_page", args.places.open_page),
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
        // as the kernel's index range, and the kernel clamps page ids to their pools; that a plan's length fits the block
        // table is checked by the plan. That `valid_len` and `first_unit` are outputs of `hack_decode_plan` is this function's
        // contract with its caller.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }
}
