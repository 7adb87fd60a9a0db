//! From slots to lists of runs, and attention over the lists: `sparse_plan` and `sparse_attend`.

use std::marker::PhantomData;

use super::{check_rows, check_sizes, product};
use crate::Error;
use crate::kernels::split::{Partials, check_blocks, check_soft_cap};
use crate::launch::{Arg, Device, Function, LaunchConfig};
use crate::memory::{View, ViewMut};
use crate::params::{SPARSE_TILE, SparseAttendParams, SparsePlanParams};
use crate::storage::Storage;
use crate::table::Instance;

const THREADS: u32 = 128;
const WARPS: usize = 4;
const WARP_RING: usize = 16 * 1024;

/// `sparse_plan`: lists what attention reads, and sums up the work.
#[derive(Debug, Clone)]
pub struct Plan<F> {
    function: F,
}

/// Arguments of [`Plan`].
#[derive(Debug)]
pub struct PlanArgs<'a> {
    /// Sizes.
    pub params: &'a SparsePlanParams,
    /// Pages `[rows, max_selected]`.
    pub selected: &'a View<'a, u32>,
    /// Slot of each selected page `[rows, max_selected]`.
    pub slot_of: &'a View<'a, u32>,
    /// Pages to fetch `[rows, max_selected, 4]`.
    pub misses: &'a View<'a, u32>,
    /// Pages to fetch of each row `[rows]`.
    pub num_misses: &'a View<'a, u32>,
    /// Run of each slot `[rows, slots]`.
    pub slot_table: &'a View<'a, u32>,
    /// Run of each open page `[rows, max_open]`.
    pub open_table: &'a View<'a, u32>,
    /// Host page of each page of a request `[rows / kv_heads, max_pages]`.
    pub host_table: &'a View<'a, u32>,
    /// A [`SparseRow`](crate::params::SparseRow) each `[rows]`; all rows read if absent.
    pub rows: Option<&'a View<'a, u32>>,
    /// Tokens of each page `[rows, max_pages]`; all are full if absent.
    pub page_len: Option<&'a View<'a, u8>>,
    /// Tokens of each request `[rows / kv_heads]`.
    pub kv_len: &'a View<'a, u32>,
    /// Of these, tokens in closed pages `[rows]`.
    pub closed: &'a View<'a, u32>,
    /// Out: `[rows, max_selected + max_open, 2]`, as [`SparseEntry`](crate::params::SparseEntry), and how many `[rows]`.
    pub hits: (ViewMut<'a, u32>, ViewMut<'a, u32>),
    /// Out: `[rows, max_selected, 2]` and how many `[rows]`.
    pub missed: (ViewMut<'a, u32>, ViewMut<'a, u32>),
    /// Out: units of work of the hits, summed over the rows before `[rows + 1]`.
    pub hit_unit: ViewMut<'a, u32>,
    /// Out: units of work of the misses `[rows + 1]`.
    pub missed_unit: ViewMut<'a, u32>,
    /// One counter, zero before the first launch.
    pub arrivals: ViewMut<'a, u32>,
    /// Status word.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function> Plan<F> {
    /// Compiles and loads the kernel.
    pub fn prepare<D: Device<Function = F>>(device: &D) -> Result<Self, Error> {
        Ok(Self { function: device.load(&Instance::new("sparse_plan", &[])?)? })
    }

    /// Enqueues one plan.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is out of range, too short, misaligned or in the wrong space.
    pub fn launch(&self, queue: &F::Queue, mut args: PlanArgs<'_>) -> Result<(), Error> {
        const KERNEL: &str = "sparse_plan";
        let params = args.params;
        let SparsePlanParams { rows, kv_heads, max_selected, slots, max_open, max_pages, .. } = *params;
        check_sizes(
            KERNEL,
            &[
                ("rows", rows),
                ("kv_heads", kv_heads),
                ("max_selected", max_selected),
                ("slots", slots),
                ("max_open", max_open),
                ("max_pages", max_pages),
                ("num_runs", params.num_runs),
                ("unit_tiles", params.unit_tiles),
                ("host_pages", params.host_pages),
            ],
        )?;
        check_rows(KERNEL, rows, kv_heads)?;
        check_tokens(KERNEL, rows, max_selected + max_open, params.page_shift)?;
        let places = product(&[rows, max_selected]);
        args.selected.check(KERNEL, "selected", places, 4)?;
        args.slot_of.check(KERNEL, "slot_of", places, 4)?;
        args.misses.check(KERNEL, "misses", places.saturating_mul(4), 4)?;
        args.num_misses.check(KERNEL, "num_misses", rows as usize, 4)?;
        args.slot_table.check(KERNEL, "slot_table", product(&[rows, slots]), 4)?;
        args.open_table.check(KERNEL, "open_table", product(&[rows, max_open]), 4)?;
        args.host_table.check(KERNEL, "host_table", product(&[rows / kv_heads, max_pages]), 4)?;
        if let Some(states) = args.rows {
            states.check(KERNEL, "rows", rows as usize, 4)?;
        }
        if let Some(lengths) = args.page_len {
            lengths.check(KERNEL, "page_len", product(&[rows, max_pages]), 1)?;
        }
        args.kv_len.check(KERNEL, "kv_len", (rows / kv_heads) as usize, 4)?;
        args.closed.check(KERNEL, "closed", rows as usize, 4)?;
        args.hits.0.check(KERNEL, "hits", product(&[rows, max_selected + max_open, 2]), 8)?;
        args.hits.1.check(KERNEL, "num_hits", rows as usize, 4)?;
        args.missed.0.check(KERNEL, "missed", product(&[rows, max_selected, 2]), 8)?;
        args.missed.1.check(KERNEL, "num_missed", rows as usize, 4)?;
        args.hit_unit.check(KERNEL, "hit_unit", rows as usize + 1, 4)?;
        args.missed_unit.check(KERNEL, "missed_unit", rows as usize + 1, 4)?;
        args.arrivals.check(KERNEL, "arrivals", 1, 4)?;
        args.status.check(KERNEL, "status", 1, 8)?;

        // The block's counters, and a bit per selected page.
        let shared = (WARPS + 2) * 4 + max_selected.div_ceil(32) as usize * 4;
        let config = LaunchConfig::new(rows, THREADS).shared(shared as u32);
        let kernel_args = [
            Arg::read("selected", args.selected),
            Arg::read("slot_of", args.slot_of),
            Arg::read("misses", args.misses),
            Arg::read("num_misses", args.num_misses),
            Arg::read("slot_table", args.slot_table),
            Arg::read("open_table", args.open_table),
            Arg::read("host_table", args.host_table),
            Arg::read_optional("rows", args.rows),
            Arg::read_optional("page_len", args.page_len),
            Arg::read("kv_len", args.kv_len),
            Arg::read("closed", args.closed),
            Arg::write("hits", &mut args.hits.0),
            Arg::write("num_hits", &mut args.hits.1),
            Arg::write("missed", &mut args.missed.0),
            Arg::write("num_missed", &mut args.missed.1),
            Arg::write("hit_unit", &mut args.hit_unit),
            Arg::write("missed_unit", &mut args.missed_unit),
            Arg::write("arrivals", &mut args.arrivals),
            Arg::write("status", &mut args.status),
            Arg::value("params", params),
        ];
        // SAFETY: the arguments are the kernel's parameters in order and type, the checks above made every buffer as long as its
        // index range, and the shared memory is what the kernel lays out; slots, runs, pages and lengths, which lie in device
        // memory, are checked by the kernel.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }
}

/// Checks that the tokens of a row's list, and the tiles of all rows, fit 32 bits.
fn check_tokens(kernel: &str, rows: u32, entries: u32, page_shift: u32) -> Result<(), Error> {
    let fits = (3..=16).contains(&page_shift)
        && u64::from(entries) << page_shift <= 1 << 30
        && u64::from(rows) * ((u64::from(entries) << page_shift) / u64::from(SPARSE_TILE) + 1) <= 1 << 30;
    if fits {
        return Ok(());
    }
    let expected =
        format_args!("pages of 8 tokens or more, 2³⁰ tokens of a row and 2³⁰ tiles of {SPARSE_TILE}");
    let found = format_args!("{rows} rows of {entries} pages of 2^{page_shift} tokens");
    Err(Error::argument(kernel, "page_shift", expected, found))
}

/// What an [`Attend`] kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AttendVariant {
    /// Channels of q and K.
    pub qk_dim: usize,
    /// Channels of V and the output.
    pub v_dim: usize,
    /// Tiles of eight query columns per block: 1 or 2.
    pub column_tiles: usize,
    /// Whether scores are soft-capped.
    pub soft_cap: bool,
}

impl AttendVariant {
    /// Checks, without a device, what a launch would refuse whatever its buffers.
    ///
    /// # Errors
    /// [`Error::Constant`] for a size that the kernel is not written for, [`Error::Argument`] for parameters out of range.
    pub fn check(&self, params: &SparseAttendParams) -> Result<(), Error> {
        const KERNEL: &str = "sparse_attend";
        self.instance(crate::table::dtype::BF16)?;
        check_sizes(
            KERNEL,
            &[
                ("rows", params.rows),
                ("group", params.group),
                ("max_entries", params.max_entries),
                ("num_runs", params.num_runs),
                ("unit_tiles", params.unit_tiles),
                ("min_units", params.min_units),
            ],
        )?;
        check_tokens(KERNEL, params.rows, params.max_entries, params.page_shift)?;
        if params.group as usize > 8 * self.column_tiles {
            let expected = format_args!("at most {} query heads", 8 * self.column_tiles);
            return Err(Error::argument(KERNEL, "group", expected, params.group));
        }
        if !params.scale.is_finite() || params.scale <= 0.0 {
            return Err(Error::argument(KERNEL, "scale", "a positive number", params.scale));
        }
        check_soft_cap(KERNEL, self.soft_cap, params.soft_cap)
    }

    fn instance(&self, dtype: i64) -> Result<Instance, Error> {
        Instance::new(
            "sparse_attend",
            &[
                ("QK_DIM", self.qk_dim as i64),
                ("V_DIM", self.v_dim as i64),
                ("COLUMN_TILES", self.column_tiles as i64),
                ("KV_DTYPE", dtype),
                ("SOFT_CAP", i64::from(self.soft_cap)),
            ],
        )
    }

    /// Dynamic shared memory of a block, in bytes: the queries, four rings and the tail.
    pub fn shared_bytes(&self) -> usize {
        16 * self.qk_dim * 2 + WARPS * WARP_RING + (WARPS * self.columns() * 2 + 1) * size_of::<f32>()
    }

    /// Query columns of a block.
    pub fn columns(&self) -> usize {
        8 * self.column_tiles
    }
}

/// Slots of partial states that `sparse_attend` can write: two per block, or one per unit where parts are fixed.
pub fn part_slots(params: &SparseAttendParams, blocks: u32) -> usize {
    if params.fixed_parts == 0 {
        return 2 * blocks as usize;
    }
    let tiles = (u64::from(params.max_entries) << params.page_shift).div_ceil(u64::from(SPARSE_TILE));
    let units = tiles.div_ceil(u64::from(params.unit_tiles)).max(1) as usize;
    units.saturating_mul(params.rows as usize)
}

/// `sparse_attend`: attention of one token per request over lists of runs. `E` is the storage type of q, K, V and the output.
#[derive(Debug, Clone)]
pub struct Attend<F, E> {
    function: F,
    variant: AttendVariant,
    _element: PhantomData<E>,
}

/// Arguments of [`Attend`].
#[derive(Debug)]
pub struct AttendArgs<'a, E> {
    /// Shape and split.
    pub params: &'a SparseAttendParams,
    /// Blocks to launch; the work is split over at most as many.
    pub blocks: u32,
    /// Queries `[rows, group, qk_dim]`, 16-byte aligned.
    pub q: &'a View<'a, E>,
    /// Device memory `[num_runs, K | V]`, 16-byte aligned.
    pub runs: &'a View<'a, E>,
    /// From [`Plan`]: `[rows, max_entries, 2]`, as [`SparseEntry`](crate::params::SparseEntry).
    pub entries: &'a View<'a, u32>,
    /// From [`Plan`]: how many entries `[rows]`.
    pub num_entries: &'a View<'a, u32>,
    /// From [`Plan`]: `[rows + 1]`.
    pub first_unit: &'a View<'a, u32>,
    /// States over other keys: out `[rows, group, v_dim]`, 16-byte aligned, and LSE `[rows, group]`.
    pub prior: Option<[&'a View<'a, f32>; 2]>,
    /// Outputs `[rows, group, v_dim]`; exactly one of this and `partial` is given.
    pub out: Option<ViewMut<'a, E>>,
    /// Outputs of a partial state `[rows, group, v_dim]`, 16-byte aligned.
    pub partial: Option<ViewMut<'a, f32>>,
    /// Log-sum-exps `[rows, group]`, natural log.
    pub lse: ViewMut<'a, f32>,
    /// Partial states, [`part_slots`] × columns × `v_dim`, 16-byte aligned; need not be initialised.
    pub part_acc: ViewMut<'a, f32>,
    /// Partial maxima and sums, [`part_slots`] × columns × 2; need not be initialised.
    pub part_ml: ViewMut<'a, f32>,
    /// Counters `[rows]`, zero before the first launch.
    pub arrivals: ViewMut<'a, u32>,
}

impl<F: Function, E: Storage> Attend<F, E> {
    /// Compiles and loads the kernel for `variant`.
    pub fn prepare<D: Device<Function = F>>(device: &D, variant: AttendVariant) -> Result<Self, Error> {
        Ok(Self { function: device.load(&variant.instance(E::DTYPE)?)?, variant, _element: PhantomData })
    }

    /// Enqueues attention over one list.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short, misaligned, missing or in the wrong space.
    ///
    /// # Safety
    /// When the kernel runs, `num_entries` and `first_unit` are as a [`Plan`] launch with the same rows, page size and
    /// `unit_tiles` left them. The entries may have changed since: the kernel stays within the runs whatever they hold.
    pub unsafe fn launch(&self, queue: &F::Queue, mut args: AttendArgs<'_, E>) -> Result<(), Error> {
        const KERNEL: &str = "sparse_attend";
        let params = args.params;
        let AttendVariant { qk_dim, v_dim, .. } = self.variant;
        self.variant.check(params)?;
        check_blocks(KERNEL, args.blocks)?;
        if args.out.is_some() == args.partial.is_some() {
            let found = if args.out.is_some() { "both" } else { "neither" };
            return Err(Error::argument(KERNEL, "out", "one of `out` and `partial`", found));
        }
        let (rows, heads) = (params.rows as usize, product(&[params.rows, params.group]));
        let (slots, columns) = (part_slots(params, args.blocks), self.variant.columns());
        let run = (qk_dim + v_dim) << params.page_shift;
        args.q.check(KERNEL, "q", heads.saturating_mul(qk_dim), 16)?;
        args.runs.check(KERNEL, "runs", (params.num_runs as usize).saturating_mul(run), 16)?;
        args.entries.check(KERNEL, "entries", product(&[params.rows, params.max_entries, 2]), 8)?;
        args.num_entries.check(KERNEL, "num_entries", rows, 4)?;
        args.first_unit.check(KERNEL, "first_unit", rows + 1, 4)?;
        if let Some([out, lse]) = args.prior {
            out.check(KERNEL, "prior_out", heads.saturating_mul(v_dim), 16)?;
            lse.check(KERNEL, "prior_lse", heads, 4)?;
        }
        if let Some(out) = &args.out {
            out.check(KERNEL, "out", heads.saturating_mul(v_dim), 4 * size_of::<E>() as u64)?;
        }
        if let Some(partial) = &args.partial {
            partial.check(KERNEL, "partial", heads.saturating_mul(v_dim), 16)?;
        }
        args.lse.check(KERNEL, "lse", heads, 4)?;
        let partials = Partials { acc: &args.part_acc, ml: &args.part_ml, arrivals: &args.arrivals };
        partials.check(KERNEL, [slots, columns, v_dim], rows)?;

        let config = LaunchConfig::new(args.blocks, THREADS).shared(self.variant.shared_bytes() as u32);
        let kernel_args = [
            Arg::read("q", args.q),
            Arg::read("runs", args.runs),
            Arg::read("entries", args.entries),
            Arg::read("num_entries", args.num_entries),
            Arg::read("first_unit", args.first_unit),
            Arg::read_optional("prior_out", args.prior.map(|prior| prior[0])),
            Arg::read_optional("prior_lse", args.prior.map(|prior| prior[1])),
            Arg::write_optional("out", args.out.as_mut()),
            Arg::write_optional("partial", args.partial.as_mut()),
            Arg::write("lse", &mut args.lse),
            Arg::write("part_acc", &mut args.part_acc),
            Arg::write("part_ml", &mut args.part_ml),
            Arg::write("arrivals", &mut args.arrivals),
            Arg::value("params", params),
        ];
        // SAFETY: the arguments are the kernel's parameters in order and type. The checks above made every buffer as long as
        // the kernel's index range, and the kernel clamps runs to the pool. That `num_entries` and `first_unit` are outputs of
        // `sparse_plan` is this function's contract with its caller.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }
}
