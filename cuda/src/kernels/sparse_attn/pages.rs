//! Open pages: new tokens, closing, and write-back: `sparse_append`, `sparse_close` and `sparse_flush`.

use super::{COUNTS, MAX_BUCKETS, MAX_SLOTS, check_rows, check_sizes, product};
use crate::Error;
use crate::launch::{Arg, Device, Function, LaunchConfig};
use crate::memory::{View, ViewMut};
use crate::params::{SparseAppendParams, SparseCloseParams, SparseFlushParams};
use crate::table::Instance;

/// `sparse_append`: writes new tokens to open pages.
#[derive(Debug, Clone)]
pub struct Append<F> {
    function: F,
}

/// Arguments of [`Append`].
#[derive(Debug)]
pub struct AppendArgs<'a> {
    /// Shape.
    pub params: &'a SparseAppendParams,
    /// New keys `[requests, tokens, kv_heads, k_bytes]`, 16-byte aligned.
    pub k_new: &'a View<'a, u8>,
    /// New values `[requests, tokens, kv_heads, v_bytes]`, 16-byte aligned.
    pub v_new: &'a View<'a, u8>,
    /// Tokens of each request, the new ones included `[requests]`.
    pub kv_len: &'a View<'a, u32>,
    /// How many of the new tokens of each request exist `[requests]`; all, or as many as `kv_len` has, if absent.
    pub new_len: Option<&'a View<'a, u32>>,
    /// Tokens in closed pages `[requests · kv_heads]`.
    pub closed: &'a View<'a, u32>,
    /// Run of each open page `[requests · kv_heads, max_open]`.
    pub open_table: &'a View<'a, u32>,
    /// Device memory `[num_runs, K | V]` as bytes, 16-byte aligned.
    pub runs: ViewMut<'a, u8>,
    /// Status word.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function> Append<F> {
    /// Compiles and loads the kernel.
    pub fn prepare<D: Device<Function = F>>(device: &D) -> Result<Self, Error> {
        Ok(Self { function: device.load(&Instance::new("sparse_append", &[])?)? })
    }

    /// Enqueues one append.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is out of range, too short, misaligned or in the wrong space.
    pub fn launch(&self, queue: &F::Queue, mut args: AppendArgs<'_>) -> Result<(), Error> {
        const KERNEL: &str = "sparse_append";
        let params = args.params;
        let SparseAppendParams { requests, tokens, kv_heads, k_bytes, v_bytes, max_open, .. } = *params;
        check_sizes(
            KERNEL,
            &[
                ("requests", requests),
                ("tokens", tokens),
                ("kv_heads", kv_heads),
                ("k_bytes", k_bytes),
                ("v_bytes", v_bytes),
                ("max_open", max_open),
                ("num_runs", params.num_runs),
            ],
        )?;
        for (argument, bytes) in [("k_bytes", k_bytes), ("v_bytes", v_bytes)] {
            if !bytes.is_multiple_of(16) || bytes > 1 << 12 {
                return Err(Error::argument(KERNEL, argument, "a multiple of 16 up to 4096", bytes));
            }
        }
        if params.page_shift > 16 || product(&[requests, tokens, kv_heads]) > 1 << 30 {
            let found = format_args!("{requests} requests of {tokens} tokens and {kv_heads} heads");
            return Err(Error::argument(KERNEL, "tokens", "at most 2³⁰ vectors", found));
        }
        let vectors = product(&[requests, tokens, kv_heads]);
        args.k_new.check(KERNEL, "k_new", vectors.saturating_mul(k_bytes as usize), 16)?;
        args.v_new.check(KERNEL, "v_new", vectors.saturating_mul(v_bytes as usize), 16)?;
        args.kv_len.check(KERNEL, "kv_len", requests as usize, 4)?;
        if let Some(new_len) = args.new_len {
            new_len.check(KERNEL, "new_len", requests as usize, 4)?;
        }
        args.closed.check(KERNEL, "closed", product(&[requests, kv_heads]), 4)?;
        args.open_table.check(KERNEL, "open_table", product(&[requests, kv_heads, max_open]), 4)?;
        let run = ((k_bytes + v_bytes) as usize) << params.page_shift;
        args.runs.check(KERNEL, "runs", (params.num_runs as usize).saturating_mul(run), 16)?;
        args.status.check(KERNEL, "status", 1, 8)?;

        let config = LaunchConfig::new(requests * tokens, 128);
        let kernel_args = [
            Arg::read("k_new", args.k_new),
            Arg::read("v_new", args.v_new),
            Arg::read("kv_len", args.kv_len),
            Arg::read_optional("new_len", args.new_len),
            Arg::read("closed", args.closed),
            Arg::read("open_table", args.open_table),
            Arg::write("runs", &mut args.runs),
            Arg::write("status", &mut args.status),
            Arg::value("params", params),
        ];
        // SAFETY: the arguments are the kernel's parameters in order and type, and the checks above made every buffer as long as
        // its index range; lengths and runs, which lie in device memory, are checked by the kernel.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }
}

/// `sparse_close`: closes open pages that fill whole partitions.
#[derive(Debug, Clone)]
pub struct Close<F> {
    function: F,
}

/// Arguments of [`Close`].
#[derive(Debug)]
pub struct CloseArgs<'a> {
    /// Shape and rule.
    pub params: &'a SparseCloseParams,
    /// Tokens of each request `[rows / kv_heads]`.
    pub kv_len: &'a View<'a, u32>,
    /// Host page of each page of a request `[rows / kv_heads, max_pages]`.
    pub host_table: &'a View<'a, u32>,
    /// Out: a [`SparseRow`](crate::params::SparseRow) each `[rows]`.
    pub rows: ViewMut<'a, u32>,
    /// Tokens in closed pages `[rows]`; updated.
    pub closed: ViewMut<'a, u32>,
    /// Closed partitions `[rows]`; updated.
    pub partitions: ViewMut<'a, u32>,
    /// How often the row's index has changed `[rows]`; updated.
    pub epoch: ViewMut<'a, u32>,
    /// Page of each slot `[rows, slots]`; updated.
    pub owners: ViewMut<'a, u32>,
    /// Age of each slot `[rows, slots]`; updated.
    pub ages: ViewMut<'a, u8>,
    /// Not 0 for slots whose page is not in host memory yet `[rows, slots]`; updated.
    pub dirty: ViewMut<'a, u8>,
    /// Run of each slot `[rows, slots]`; updated.
    pub slot_table: ViewMut<'a, u32>,
    /// Run of each open page `[rows, max_open]`; updated.
    pub open_table: ViewMut<'a, u32>,
    /// Out: pages that were closed `[rows, max_closing, 4]`, as [`SparseClosing`](crate::params::SparseClosing), and how many
    /// `[rows]`.
    pub closing: (ViewMut<'a, u32>, ViewMut<'a, u32>),
    /// Counts `[rows, 8]`; added to.
    pub counts: ViewMut<'a, u64>,
    /// Status word.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function> Close<F> {
    /// Compiles and loads the kernel.
    pub fn prepare<D: Device<Function = F>>(device: &D) -> Result<Self, Error> {
        Ok(Self { function: device.load(&Instance::new("sparse_close", &[])?)? })
    }

    /// Enqueues one closing.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is out of range, too short, misaligned or in the wrong space.
    pub fn launch(&self, queue: &F::Queue, mut args: CloseArgs<'_>) -> Result<(), Error> {
        const KERNEL: &str = "sparse_close";
        let params = args.params;
        let SparseCloseParams { rows, kv_heads, slots, max_open, max_closing, .. } = *params;
        check_sizes(
            KERNEL,
            &[
                ("rows", rows),
                ("kv_heads", kv_heads),
                ("slots", slots),
                ("max_open", max_open),
                ("max_pages", params.max_pages),
                ("max_closing", max_closing),
                ("partition_pages", params.partition_pages),
                ("buckets", params.buckets),
                ("host_pages", params.host_pages),
                ("num_runs", params.num_runs),
            ],
        )?;
        check_rows(KERNEL, rows, kv_heads)?;
        for (argument, value, most) in
            [("slots", slots, MAX_SLOTS as u32), ("buckets", params.buckets, MAX_BUCKETS as u32)]
        {
            if value > most {
                return Err(Error::argument(KERNEL, argument, format_args!("at most {most}"), value));
            }
        }
        if params.page_shift > 16
            || (u64::from(params.partition_pages.max(max_open)) << params.page_shift) > 1 << 30
        {
            let found = format_args!("{max_open} pages of 2^{} tokens", params.page_shift);
            return Err(Error::argument(KERNEL, "max_open", "at most 2³⁰ open tokens", found));
        }
        let (all, per_slot) = (rows as usize, product(&[rows, slots]));
        args.kv_len.check(KERNEL, "kv_len", (rows / kv_heads) as usize, 4)?;
        args.host_table.check(KERNEL, "host_table", product(&[rows / kv_heads, params.max_pages]), 4)?;
        args.rows.check(KERNEL, "rows", all, 4)?;
        args.closed.check(KERNEL, "closed", all, 4)?;
        args.partitions.check(KERNEL, "partitions", all, 4)?;
        args.epoch.check(KERNEL, "epoch", all, 4)?;
        args.owners.check(KERNEL, "owners", per_slot, 4)?;
        args.ages.check(KERNEL, "ages", per_slot, 1)?;
        args.dirty.check(KERNEL, "dirty", per_slot, 1)?;
        args.slot_table.check(KERNEL, "slot_table", per_slot, 4)?;
        args.open_table.check(KERNEL, "open_table", product(&[rows, max_open]), 4)?;
        args.closing.0.check(KERNEL, "closing", product(&[rows, max_closing, 4]), 4)?;
        args.closing.1.check(KERNEL, "num_closing", all, 4)?;
        args.counts.check(KERNEL, "counts", all.saturating_mul(COUNTS), 8)?;
        args.status.check(KERNEL, "status", 1, 8)?;

        let config = LaunchConfig::new(rows, 128).shared(5 * 4);
        let kernel_args = [
            Arg::read("kv_len", args.kv_len),
            Arg::read("host_table", args.host_table),
            Arg::write("rows", &mut args.rows),
            Arg::write("closed", &mut args.closed),
            Arg::write("partitions", &mut args.partitions),
            Arg::write("epoch", &mut args.epoch),
            Arg::write("owners", &mut args.owners),
            Arg::write("ages", &mut args.ages),
            Arg::write("dirty", &mut args.dirty),
            Arg::write("slot_table", &mut args.slot_table),
            Arg::write("open_table", &mut args.open_table),
            Arg::write("closing", &mut args.closing.0),
            Arg::write("num_closing", &mut args.closing.1),
            Arg::write("counts", &mut args.counts),
            Arg::write("status", &mut args.status),
            Arg::value("params", params),
        ];
        // SAFETY: the arguments are the kernel's parameters in order and type, the checks above made every buffer as long as its
        // index range, and the shared memory is the kernel's `Shared`; lengths in device memory are checked by the kernel.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }
}

/// `sparse_flush`: writes closed pages back to host memory.
#[derive(Debug, Clone)]
pub struct Flush<F> {
    function: F,
}

/// Arguments of [`Flush`].
#[derive(Debug)]
pub struct FlushArgs<'a> {
    /// Pools and tables.
    pub params: &'a SparseFlushParams,
    /// Blocks of 8 warps, each with 2 KiB in flight.
    pub blocks: u32,
    /// Closed pages `[rows, max_closing, 4]`, as [`SparseClosing`](crate::params::SparseClosing).
    pub closing: &'a View<'a, u32>,
    /// Closed pages of each row `[rows]`.
    pub num_closing: &'a View<'a, u32>,
    /// Host page of each page of a request `[rows / kv_heads, max_pages]`.
    pub host_table: &'a View<'a, u32>,
    /// Device memory `[num_runs, run_bytes]`, 16-byte aligned.
    pub device: &'a View<'a, u8>,
    /// Host memory `[host_pages, kv_heads, run_bytes]`, mapped, 16-byte aligned; memory of the device is refused.
    pub host: ViewMut<'a, u8>,
    /// Not 0 for slots whose page is not in host memory yet `[rows, slots]`; updated.
    pub dirty: ViewMut<'a, u8>,
    /// Counts `[rows, 8]`; added to.
    pub counts: ViewMut<'a, u64>,
    /// Status word.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function> Flush<F> {
    /// Compiles and loads the kernel.
    pub fn prepare<D: Device<Function = F>>(device: &D) -> Result<Self, Error> {
        Ok(Self { function: device.load(&Instance::new("sparse_flush", &[])?)? })
    }

    /// Enqueues one write-back.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is out of range, too short, misaligned or in the wrong space.
    pub fn launch(&self, queue: &F::Queue, mut args: FlushArgs<'_>) -> Result<(), Error> {
        const KERNEL: &str = "sparse_flush";
        let params = args.params;
        let SparseFlushParams { rows, kv_heads, max_closing, slots, max_pages, run_bytes, .. } = *params;
        check_sizes(
            KERNEL,
            &[
                ("rows", rows),
                ("kv_heads", kv_heads),
                ("max_closing", max_closing),
                ("slots", slots),
                ("max_pages", max_pages),
                ("host_pages", params.host_pages),
                ("num_runs", params.num_runs),
                ("run_bytes", run_bytes),
                ("blocks", args.blocks),
            ],
        )?;
        check_rows(KERNEL, rows, kv_heads)?;
        // Items of the list, and the next one of a warp behind its end, must fit 32 bits.
        if product(&[rows, max_closing]) > 1 << 30 || args.blocks > 1 << 27 {
            let found = format_args!("{rows} rows of {max_closing}, {} blocks", args.blocks);
            return Err(Error::argument(KERNEL, "max_closing", "at most 2³⁰ pages, 2²⁷ blocks", found));
        }
        if !run_bytes.is_multiple_of(16) {
            return Err(Error::argument(KERNEL, "run_bytes", "a multiple of 16", run_bytes));
        }
        args.closing.check(KERNEL, "closing", product(&[rows, max_closing, 4]), 4)?;
        args.num_closing.check(KERNEL, "num_closing", rows as usize, 4)?;
        args.host_table.check(KERNEL, "host_table", product(&[rows / kv_heads, max_pages]), 4)?;
        args.device.check(KERNEL, "device", product(&[params.num_runs, run_bytes]), 16)?;
        args.host.check(KERNEL, "host", product(&[params.host_pages, kv_heads, run_bytes]), 16)?;
        args.host.check_in_host_memory(KERNEL, "host")?;
        args.dirty.check(KERNEL, "dirty", product(&[rows, slots]), 1)?;
        args.counts.check(KERNEL, "counts", (rows as usize).saturating_mul(COUNTS), 8)?;
        args.status.check(KERNEL, "status", 1, 8)?;

        let config = LaunchConfig::new(args.blocks, 256);
        let kernel_args = [
            Arg::read("closing", args.closing),
            Arg::read("num_closing", args.num_closing),
            Arg::read("host_table", args.host_table),
            Arg::read("device", args.device),
            Arg::write("host", &mut args.host),
            Arg::write("dirty", &mut args.dirty),
            Arg::write("counts", &mut args.counts),
            Arg::write("status", &mut args.status),
            Arg::value("params", params),
        ];
        // SAFETY: the arguments are the kernel's parameters in order and type, and the checks above made every buffer as long as
        // its index range; counts, pages, runs and slots, which lie in device memory, are checked by the kernel.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }
}
