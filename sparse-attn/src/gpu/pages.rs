//! Open pages on the device: new tokens, closing, and write-back.
//!
//! Tokens of a request lie in open pages until these fill a partition and the context is too long to stay open. A page that is
//! closed keeps its run: it trades it with a slot, or gives it up once its bytes are in host memory.

use cuda::kernels::sparse_attn as kernels;
use cuda::launch::{Device, Function};
use cuda::memory::{View, ViewMut};
use cuda::params::{SparseAppendParams, SparseCloseParams, SparseFlushParams};

use super::extent::{Extent, page_shift, size};
use crate::Error;

/// What open pages are for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PagesConfig {
    /// Sizes.
    pub extent: Extent,
    /// New tokens of each request in a run of [`Append`].
    pub tokens: usize,
    /// Pages of a partition.
    pub partition_pages: usize,
    /// Context up to which everything stays open.
    pub dense_tokens: usize,
    /// Ages that replacement tells apart.
    pub buckets: u8,
    /// Entries of a list of closed pages.
    pub max_closing: usize,
    /// Whether any number of partitions may be closed at once: a prompt, or a context that has just become too long to stay open.
    /// What is closed so must be [flushed](Flush) before the next step. Otherwise only the one that a decoded token fills, which
    /// keeps its slot until it is flushed.
    pub bulk: bool,
    /// Blocks of a write-back: each keeps 16 KiB in flight.
    pub blocks: usize,
}

/// A checked configuration.
#[derive(Debug, Clone, Copy)]
pub struct PagesPlan {
    config: PagesConfig,
    append: SparseAppendParams,
    close: SparseCloseParams,
    flush: SparseFlushParams,
}

impl PagesPlan {
    /// Plans appends, closings and write-backs. Needs no device and no workspace.
    ///
    /// # Errors
    /// [`Error::Argument`] for a size that the kernels do not support, or partitions that fit neither the open pages nor the list.
    pub fn new(config: PagesConfig) -> Result<Self, Error> {
        config.extent.check()?;
        let Extent { requests, page, max_pages, slots, max_open, runs, host_pages, .. } = config.extent;
        let partition = config.partition_pages;
        for (argument, room) in [("max_open", max_open), ("max_closing", config.max_closing)] {
            if room < partition {
                return Err(Error::argument(
                    argument,
                    format!("at least a partition, {partition} pages"),
                    room,
                ));
            }
        }
        if !(2..=kernels::MAX_BUCKETS).contains(&usize::from(config.buckets)) {
            return Err(Error::argument("buckets", format!("2 to {}", kernels::MAX_BUCKETS), config.buckets));
        }
        if slots > kernels::MAX_SLOTS {
            return Err(Error::argument("slots", format!("at most {}", kernels::MAX_SLOTS), slots));
        }
        let dense = u32::try_from(config.dense_tokens).ok().filter(|&dense| dense <= 1 << 30);
        let dense =
            dense.ok_or_else(|| Error::argument("dense_tokens", "at most 2³⁰", config.dense_tokens))?;
        let (rows, kv_heads) =
            (size("requests", config.extent.rows())?, config.extent.shape.kv_heads() as u32);
        let bytes = page.dtype().size();
        let append = SparseAppendParams {
            requests: size("requests", requests)?,
            tokens: size("tokens", config.tokens)?,
            kv_heads,
            k_bytes: size("qk_dim", page.qk_dim() * bytes)?,
            v_bytes: size("v_dim", page.v_dim() * bytes)?,
            page_shift: page_shift(&page),
            max_open: size("max_open", max_open)?,
            num_runs: size("runs", runs)?,
        };
        let close = SparseCloseParams {
            rows,
            kv_heads,
            slots: size("slots", slots)?,
            max_open: append.max_open,
            max_pages: size("max_pages", max_pages)?,
            max_closing: size("max_closing", config.max_closing)?,
            partition_pages: size("partition_pages", partition)?,
            page_shift: append.page_shift,
            dense_tokens: dense,
            buckets: u32::from(config.buckets),
            bulk: u32::from(config.bulk),
            host_pages: size("host_pages", host_pages)?,
            num_runs: append.num_runs,
            _pad: 0,
        };
        let flush = SparseFlushParams {
            rows,
            kv_heads,
            max_closing: close.max_closing,
            slots: close.slots,
            max_pages: close.max_pages,
            host_pages: size("host_pages", host_pages)?,
            num_runs: append.num_runs,
            run_bytes: size("page", page.bytes())?,
        };
        size("blocks", config.blocks.saturating_mul(8))?;
        Ok(PagesPlan { config, append, close, flush })
    }

    /// What the plan is for.
    pub fn config(&self) -> &PagesConfig {
        &self.config
    }
}

/// Prepared appends.
#[derive(Debug, Clone)]
pub struct Append<F> {
    plan: PagesPlan,
    kernel: kernels::Append<F>,
}

/// Arguments of [`Append::run`].
#[derive(Debug)]
pub struct AppendArgs<'a> {
    /// New keys after RoPE `[requests, tokens, kv_heads, qk_dim]`, as bytes.
    pub k_new: &'a View<'a, u8>,
    /// New values `[requests, tokens, kv_heads, v_dim]`, as bytes.
    pub v_new: &'a View<'a, u8>,
    /// Tokens of each request, the new ones included `[requests]`.
    pub kv_len: &'a View<'a, u32>,
    /// How many of the `tokens` of each request exist, the last ones `[requests]`; all, or as many as `kv_len` has, if absent.
    pub new_len: Option<&'a View<'a, u32>>,
    /// Of these, tokens in closed pages `[rows]`.
    pub closed: &'a View<'a, u32>,
    /// Run of each open page `[rows, max_open]`.
    pub open_table: &'a View<'a, u32>,
    /// Device memory `[runs, K|V, tokens, dim]`, as bytes.
    pub runs: ViewMut<'a, u8>,
    /// Status word, with the request: [`FaultCode::BadLength`](attention::FaultCode::BadLength) for a token in a closed page or past
    /// the open ones, [`FaultCode::BadPage`](attention::FaultCode::BadPage) for a run out of range.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function> Append<F> {
    /// Compiles and loads the kernel. May block.
    ///
    /// # Errors
    /// [`Error::Cuda`] when it cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &PagesPlan) -> Result<Self, Error> {
        Ok(Self { plan: *plan, kernel: kernels::Append::prepare(device)? })
    }

    /// Enqueues the append and returns.
    ///
    /// # Errors
    /// [`Error::Cuda`] names an argument that does not fit.
    pub fn run(&self, queue: &F::Queue, args: AppendArgs<'_>) -> Result<(), Error> {
        let args = kernels::AppendArgs {
            params: &self.plan.append,
            k_new: args.k_new,
            v_new: args.v_new,
            kv_len: args.kv_len,
            new_len: args.new_len,
            closed: args.closed,
            open_table: args.open_table,
            runs: args.runs,
            status: args.status,
        };
        Ok(self.kernel.launch(queue, args)?)
    }
}

/// Prepared closing: what [`Cache`](crate::Cache) does when open tokens fill partitions, slot by slot.
#[derive(Debug, Clone)]
pub struct Close<F> {
    plan: PagesPlan,
    kernel: kernels::Close<F>,
}

/// Arguments of [`Close::run`].
#[derive(Debug)]
pub struct CloseArgs<'a> {
    /// Tokens of each request `[requests]`; 0 where there is none, whatever its tables hold.
    pub kv_len: &'a View<'a, u32>,
    /// Host page of each page of a request `[requests, max_pages]`.
    pub host_table: &'a View<'a, u32>,
    /// Out: a [`SparseRow`](cuda::params::SparseRow) each `[rows]`, which tells the step's other kernels who takes part.
    pub rows: ViewMut<'a, u32>,
    /// Tokens in closed pages `[rows]`; updated.
    pub closed: ViewMut<'a, u32>,
    /// Closed partitions `[rows]`; updated.
    pub partitions: ViewMut<'a, u32>,
    /// How often the row's index has changed `[rows]`; updated.
    pub epoch: ViewMut<'a, u32>,
    /// Page of each slot `[rows, slots]`, [`NONE`](crate::metadata::NONE) for a free one; updated.
    pub owners: ViewMut<'a, u32>,
    /// Age of each slot `[rows, slots]`; updated.
    pub ages: ViewMut<'a, u8>,
    /// Not 0 for slots whose page is not in host memory yet `[rows, slots]`; updated.
    pub dirty: ViewMut<'a, u8>,
    /// Run of each slot `[rows, slots]`; updated.
    pub slot_table: ViewMut<'a, u32>,
    /// Run of each open page `[rows, max_open]`; updated.
    pub open_table: ViewMut<'a, u32>,
    /// Out: closed pages in order `[rows, max_closing, 4]`: page, run, and slot and the page that lost it, or
    /// [`NONE`](crate::metadata::NONE).
    pub closing: ViewMut<'a, u32>,
    /// Out: closed pages of each row `[rows]`.
    pub num_closing: ViewMut<'a, u32>,
    /// Counts `[rows, 8]`, as [`SparseCounts`](cuda::params::SparseCounts); added to.
    pub counts: ViewMut<'a, u64>,
    /// Status word: [`FaultCode::BadLength`](attention::FaultCode::BadLength) with a row that has more to close than the plan allows
    /// or the tables hold, or for whose page no slot may go, [`FaultCode::BadPage`](attention::FaultCode::BadPage) with one whose
    /// page has no run or no place in host memory. It keeps its state and is bad.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function> Close<F> {
    /// Compiles and loads the kernel. May block.
    ///
    /// # Errors
    /// [`Error::Cuda`] when it cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &PagesPlan) -> Result<Self, Error> {
        Ok(Self { plan: *plan, kernel: kernels::Close::prepare(device)? })
    }

    /// Enqueues the closing and returns.
    ///
    /// # Errors
    /// [`Error::Cuda`] names an argument that does not fit.
    pub fn run(&self, queue: &F::Queue, args: CloseArgs<'_>) -> Result<(), Error> {
        let args = kernels::CloseArgs {
            params: &self.plan.close,
            kv_len: args.kv_len,
            host_table: args.host_table,
            rows: args.rows,
            closed: args.closed,
            partitions: args.partitions,
            epoch: args.epoch,
            owners: args.owners,
            ages: args.ages,
            dirty: args.dirty,
            slot_table: args.slot_table,
            open_table: args.open_table,
            closing: (args.closing, args.num_closing),
            counts: args.counts,
            status: args.status,
        };
        Ok(self.kernel.launch(queue, args)?)
    }
}

/// Prepared write-back.
#[derive(Debug, Clone)]
pub struct Flush<F> {
    plan: PagesPlan,
    kernel: kernels::Flush<F>,
}

/// Arguments of [`Flush::run`].
#[derive(Debug)]
pub struct FlushArgs<'a> {
    /// Closed pages `[rows, max_closing, 4]` and their number `[rows]`, as [`Close`] leaves them.
    pub closing: [&'a View<'a, u32>; 2],
    /// Host page of each page of a request `[requests, max_pages]`.
    pub host_table: &'a View<'a, u32>,
    /// Device memory `[runs, K|V, tokens, dim]`, as bytes.
    pub device: &'a View<'a, u8>,
    /// Host memory `[host_pages, kv_heads, K|V, tokens, dim]`, as bytes, mapped; memory of the device is
    /// refused.
    pub host: ViewMut<'a, u8>,
    /// Not 0 for slots whose page is not in host memory yet `[rows, slots]`; updated.
    pub dirty: ViewMut<'a, u8>,
    /// Counts `[rows, 8]`; added to.
    pub counts: ViewMut<'a, u64>,
    /// Status word: [`FaultCode::BadPage`](attention::FaultCode::BadPage) with a row whose page has no place in host memory or no run:
    /// it is not written and keeps its slot.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function> Flush<F> {
    /// Compiles and loads the kernel. May block.
    ///
    /// # Errors
    /// [`Error::Cuda`] when it cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &PagesPlan) -> Result<Self, Error> {
        Ok(Self { plan: *plan, kernel: kernels::Flush::prepare(device)? })
    }

    /// Enqueues the write-back and returns.
    ///
    /// # Errors
    /// [`Error::Cuda`] names an argument that does not fit.
    pub fn run(&self, queue: &F::Queue, args: FlushArgs<'_>) -> Result<(), Error> {
        let args = kernels::FlushArgs {
            params: &self.plan.flush,
            blocks: self.plan.config.blocks as u32,
            closing: args.closing[0],
            num_closing: args.closing[1],
            host_table: args.host_table,
            device: args.device,
            host: args.host,
            dirty: args.dirty,
            counts: args.counts,
            status: args.status,
        };
        Ok(self.kernel.launch(queue, args)?)
    }
}
