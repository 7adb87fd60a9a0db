//! A decoding step on the device: append → close → select → resolve → gather → attend.
//!
//! The decisions are those of [`Cache`](crate::Cache), slot by slot and age by age. Lengths, partitions, budgets and epochs live in
//! device memory and every shape is fixed, so one captured step serves a whole generation, whatever its requests do:
//!
//! 1. new tokens join the open pages; what fills a partition is closed, summarised, and written back on the side queue;
//! 2. meanwhile the summaries are scored and pages selected;
//! 3. the selection gets slots, once what was closed is safe in host memory;
//! 4. misses are gathered on the side queue while hits and open pages are attended;
//! 5. the misses are attended, and both parts merged by LSE, which is exact.
//!
//! A request that fits the budget has closed nothing: its open pages are all of its tokens in order, and attention over them gives
//! the bits of the dense kernel split in the same way (with fixed splits whatever the others do, with balanced ones where all of
//! the batch fit). Places of the batch without a request have length 0, whatever their tables hold; they touch nothing, and get 0 and
//! −inf. So does a row at fault.

use attention::AttentionSpec;
use attention::gpu::Splits;
use cuda::fork::Fork;
use cuda::launch::{Device, Function};
use cuda::memory::{View, ViewMut};
use cuda::params::SPARSE_ROW_IDLE;
use cuda::storage::Storage;
use cuda::workspace::{Carver, Layout, Region};

use super::{
    Append, AppendArgs, Attend, AttendArgs, AttendConfig, AttendPlan, Close, CloseArgs, Extent, Flush,
    FlushArgs, Gather, GatherArgs, GatherConfig, GatherPlan, List, Lists, ListsArgs, Output, PagesConfig,
    PagesPlan, Resolve, ResolveArgs, ResolveConfig, ResolvePlan, Select, SelectArgs, SelectConfig,
    SelectPlan, SummariseArgs,
};
use crate::Error;
use crate::config::{Algorithm, Plan};
use crate::metadata::NONE;

/// What steps are for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepConfig {
    /// Sizes; see [`Extent::of`].
    pub extent: Extent,
    /// Most new tokens of a request in one [`Step::prompt`].
    pub prompt_tokens: usize,
    /// How the keys of a row are split over blocks.
    pub splits: Splits,
    /// Blocks of a gather or write-back, see [`GatherConfig::blocks`]; [`calibrate`](super::calibrate) finds the number.
    pub link_blocks: usize,
    /// SMs of the device.
    pub sm_count: u32,
}

/// A checked step.
#[derive(Debug, Clone)]
pub struct StepPlan {
    config: StepConfig,
    attend: AttendPlan,
    select: SelectPlan,
    resolve: ResolvePlan,
    gather: GatherPlan,
    pages: PagesPlan,
    prompt: PagesPlan,
    work: Work,
}

/// Buffers of a step.
#[derive(Debug, Clone)]
struct Work {
    layout: Layout,
    aggregated: Region<f32>,
    selected: Region<u32>,
    selected_epoch: Region<u32>,
    slot_of: Region<u32>,
    misses: Region<u32>,
    num_misses: Region<u32>,
    closing: Region<u32>,
    num_closing: Region<u32>,
    partial: Region<f32>,
    partial_lse: Region<f32>,
    select: Region<u8>,
    lists: Region<u8>,
    attend: Region<u8>,
}

/// The tables of all rows, on the host: what a step starts from, or what was read back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tables {
    /// Page of each slot `[rows, slots]`, [`NONE`] for a free one.
    pub owners: Vec<u32>,
    /// Age of each slot `[rows, slots]`.
    pub ages: Vec<u8>,
    /// Not 0 for slots whose page is not in host memory yet `[rows, slots]`.
    pub dirty: Vec<u8>,
    /// Run of each slot `[rows, slots]`.
    pub slot_table: Vec<u32>,
    /// Run of each open page `[rows, max_open]`.
    pub open_table: Vec<u32>,
    /// Tokens in closed pages `[rows]`.
    pub closed: Vec<u32>,
    /// Closed partitions `[rows]`.
    pub partitions: Vec<u32>,
    /// How often the row's index has changed `[rows]`.
    pub epoch: Vec<u32>,
    /// Counts `[rows, 8]`, as [`SparseCounts`](cuda::params::SparseCounts).
    pub counts: Vec<u64>,
    /// A [`SparseRow`](cuda::params::SparseRow) each `[rows]`, as the last step found it.
    pub rows: Vec<u32>,
}

impl StepPlan {
    /// Plans the steps of one layer of `plan`. Needs no device.
    ///
    /// # Errors
    /// [`Error::Argument`] for an algorithm without training-free summaries, whose scores [`Choose`](super::Choose) takes, and for
    /// sizes that do not fit; [`Error::Cuda`] for a shape that no kernel is written for.
    pub fn new(plan: &Plan, layer: usize, config: StepConfig) -> Result<Self, Error> {
        let layers = plan.layers().len();
        let Some(AttentionSpec { score, .. }) = plan.layers().get(layer).copied() else {
            return Err(Error::argument("layer", format!("below {layers}"), layer));
        };
        let Algorithm::Pages { scorer, chunk } = plan.config().algorithm else {
            return Err(Error::argument("algorithm", "chunks with training-free summaries", "another"));
        };
        let dense_tokens = plan.dense_tokens(layer);
        if dense_tokens == usize::MAX {
            return Err(Error::argument("layer", "one that selects", "one that is dense at any context"));
        }
        let extent = config.extent;
        extent.check()?;
        if (extent.page, extent.shape) != (*plan.page(), plan.layers()[layer].shape) {
            let expected = format!("the plan's {:?} and {}", plan.page(), plan.layers()[layer].shape);
            return Err(Error::argument(
                "extent",
                expected,
                format!("{:?} and {}", extent.page, extent.shape),
            ));
        }
        let open_tokens = extent.max_open * extent.page.tokens();
        if config.prompt_tokens > open_tokens {
            let expected = format!("at most the {open_tokens} tokens of max_open pages");
            return Err(Error::argument("prompt_tokens", expected, config.prompt_tokens));
        }
        let partition_pages = chunk / extent.page.tokens();
        let max_closing = extent.max_open / partition_pages * partition_pages;
        let resolve_config = ResolveConfig {
            rows: extent.rows(),
            max_selected: extent.max_selected,
            slots: extent.slots,
            buckets: plan.config().buckets,
        };
        let pages = PagesConfig {
            extent,
            tokens: 1,
            partition_pages,
            dense_tokens,
            buckets: plan.config().buckets,
            max_closing,
            bulk: true,
            blocks: config.link_blocks,
        };
        let attend = AttendPlan::new(AttendConfig {
            extent,
            score,
            splits: config.splits,
            sm_count: config.sm_count,
        })?;
        let select = SelectPlan::new(SelectConfig {
            extent,
            scorer,
            partition_pages,
            rule: plan.rule(layer),
            max_closing,
            sm_count: config.sm_count,
        })?;
        let work = Work::new(&extent, max_closing, &select, &attend)?;
        Ok(StepPlan {
            config,
            resolve: ResolvePlan::new(resolve_config)?,
            gather: GatherPlan::new(GatherConfig {
                resolve: resolve_config,
                kv_heads: extent.shape.kv_heads(),
                page: extent.page,
                max_pages: extent.max_pages,
                host_pages: extent.host_pages,
                device_pages: extent.runs,
                blocks: config.link_blocks,
            })?,
            pages: PagesPlan::new(pages)?,
            prompt: PagesPlan::new(PagesConfig { tokens: config.prompt_tokens, ..pages })?,
            attend,
            select,
            work,
        })
    }

    /// What the steps are for.
    pub fn config(&self) -> &StepConfig {
        &self.config
    }

    /// Selection as a step plans it.
    pub fn select(&self) -> &SelectPlan {
        &self.select
    }

    /// Layout of the workspace that every call uses, zeroed before the first; layers on one queue share it.
    pub fn workspace(&self) -> &Layout {
        &self.work.layout
    }

    /// Elements of the summaries `[rows, max_partitions, vectors, qk_dim]`; they need not be initialised.
    pub fn summary_elements(&self) -> usize {
        self.select.summary_elements()
    }

    /// Bytes that a step reads of device memory when rows have so many partitions, read so many pages, and miss none.
    pub fn bytes_moved(&self, partitions: usize, pages: usize) -> u64 {
        let rows = self.config.extent.rows();
        self.select.bytes_moved(rows * partitions)
            + self.attend.bytes_moved(rows * pages)
            + self.resolve.bytes_moved()
    }

    /// Tables without a page. Row r has runs [r·(slots + max_open), (r + 1)·(slots + max_open)): its slots', then its open pages'.
    /// Any other distribution of runs serves as well, each to one place.
    pub fn tables(&self) -> Tables {
        let Extent { slots, max_open, .. } = self.config.extent;
        let rows = self.config.extent.rows();
        let runs = |first: usize, count: usize| {
            (0..rows)
                .flat_map(|row| (0..count).map(move |i| (row * (slots + max_open) + first + i) as u32))
                .collect()
        };
        Tables {
            owners: vec![NONE; rows * slots],
            ages: vec![0; rows * slots],
            dirty: vec![0; rows * slots],
            slot_table: runs(0, slots),
            open_table: runs(slots, max_open),
            closed: vec![0; rows],
            partitions: vec![0; rows],
            epoch: vec![0; rows],
            counts: vec![0; rows * cuda::kernels::sparse_attn::COUNTS],
            rows: vec![SPARSE_ROW_IDLE; rows],
        }
    }
}

impl Tables {
    /// Says what is wrong with the tables, if anything is: every page of a row in one slot, every run in one place, and no page
    /// that does not exist.
    pub fn check(&self, extent: &Extent) -> Option<String> {
        let (rows, slots) = (extent.rows(), extent.slots);
        let per_slot = [self.owners.len(), self.ages.len(), self.dirty.len(), self.slot_table.len()];
        let per_row = [self.closed.len(), self.partitions.len(), self.epoch.len(), self.rows.len()];
        let fits = slots > 0
            && per_slot == [rows * slots; 4]
            && per_row == [rows; 4]
            && self.open_table.len() == rows * extent.max_open;
        if !fits {
            return Some(format!("tables of other sizes than {rows} rows of {slots} slots"));
        }
        let mut runs: Vec<u32> = self.slot_table.iter().chain(&self.open_table).copied().collect();
        runs.sort_unstable();
        if let Some(pair) = runs.windows(2).find(|pair| pair[0] == pair[1]) {
            return Some(format!("run {} is in two places", pair[0]));
        }
        if let Some(&run) = runs.last().filter(|&&run| run as usize >= extent.runs) {
            return Some(format!("run {run} of {}", extent.runs));
        }
        for (row, owners) in self.owners.chunks_exact(extent.slots).enumerate() {
            let pages = self.closed[row] as usize / extent.page.tokens();
            let mut sorted: Vec<u32> = owners.iter().copied().filter(|&page| page != NONE).collect();
            sorted.sort_unstable();
            if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
                return Some(format!("row {row}: page {} has two slots", pair[0]));
            }
            if let Some(&page) = sorted.last().filter(|&&page| page as usize >= pages) {
                return Some(format!("row {row}: page {page} of {pages}"));
            }
        }
        None
    }
}

impl Work {
    fn new(
        extent: &Extent,
        max_closing: usize,
        select: &SelectPlan,
        attend: &AttendPlan,
    ) -> Result<Self, Error> {
        let (rows, heads) = (extent.rows(), extent.heads());
        let mut layout = Layout::new();
        Ok(Work {
            aggregated: layout.scratch(rows * select.max_partitions())?,
            selected: layout.scratch(rows * extent.max_selected)?,
            selected_epoch: layout.scratch(rows)?,
            slot_of: layout.scratch(rows * extent.max_selected)?,
            misses: layout.scratch(rows * extent.max_selected * 4)?,
            num_misses: layout.scratch(rows)?,
            closing: layout.scratch(rows * max_closing * 4)?,
            num_closing: layout.scratch(rows)?,
            partial: layout.scratch(heads * extent.shape.v_dim())?,
            partial_lse: layout.scratch(heads)?,
            select: layout.nest(select.workspace())?,
            lists: layout.nest(attend.list_workspace())?,
            attend: layout.nest(attend.workspace())?,
            layout,
        })
    }
}

/// The tables of one layer on the device, as [`Tables`] describes them, and its summaries. Whoever changes them between steps
/// keeps to what [`Tables::check`] asks for.
#[derive(Debug)]
pub struct State<'a, E> {
    /// Page of each slot `[rows, slots]`.
    pub owners: ViewMut<'a, u32>,
    /// Age of each slot `[rows, slots]`.
    pub ages: ViewMut<'a, u8>,
    /// Pages in flight `[rows, slots]`.
    pub dirty: ViewMut<'a, u8>,
    /// Run of each slot `[rows, slots]`.
    pub slot_table: ViewMut<'a, u32>,
    /// Run of each open page `[rows, max_open]`.
    pub open_table: ViewMut<'a, u32>,
    /// Tokens in closed pages `[rows]`.
    pub closed: ViewMut<'a, u32>,
    /// Closed partitions `[rows]`.
    pub partitions: ViewMut<'a, u32>,
    /// How often the row's index has changed `[rows]`.
    pub epoch: ViewMut<'a, u32>,
    /// Counts `[rows, 8]`; copy them whenever you like, [`Counters::of_device`](crate::Counters::of_device) reads them.
    pub counts: ViewMut<'a, u64>,
    /// Summaries `[rows, max_partitions, vectors, qk_dim]`, 16-byte aligned.
    pub summaries: ViewMut<'a, E>,
    /// A [`SparseRow`](cuda::params::SparseRow) each `[rows]`: written by a step for its kernels, and for prefetches after it.
    pub rows: ViewMut<'a, u32>,
}

/// The two memories of one layer.
#[derive(Debug)]
pub struct Memories<'a, E> {
    /// Device memory `[runs, K|V, tokens, dim]`, 16-byte aligned.
    pub runs: ViewMut<'a, E>,
    /// Host memory `[host_pages, kv_heads, K|V, tokens, dim]` as bytes, mapped, 16-byte aligned.
    pub host: ViewMut<'a, u8>,
    /// Host page of each page of a request `[requests, max_pages]`.
    pub host_table: &'a View<'a, u32>,
}

/// Tokens that join the open pages.
#[derive(Debug, Clone, Copy)]
pub struct NewTokens<'a, E> {
    /// Keys after RoPE `[requests, tokens, kv_heads, qk_dim]`, with one token in a step and the plan's `prompt_tokens` in a prompt.
    pub k: &'a View<'a, E>,
    /// Values `[requests, tokens, kv_heads, v_dim]`.
    pub v: &'a View<'a, E>,
    /// Tokens of each request, the new ones included `[requests]`; 0 where there is no request.
    pub kv_len: &'a View<'a, u32>,
    /// How many of the new tokens of each request exist, the last ones `[requests]`: 0 for one that goes on decoding beside
    /// another's prompt. All, or as many as `kv_len` has, if absent.
    pub new_len: Option<&'a View<'a, u32>>,
}

/// Arguments of [`Step::prompt`].
#[derive(Debug)]
pub struct PromptArgs<'a, E> {
    /// New tokens.
    pub new: NewTokens<'a, E>,
    /// Tables.
    pub state: State<'a, E>,
    /// Keys and values.
    pub memories: Memories<'a, E>,
    /// Status word.
    pub status: ViewMut<'a, u64>,
}

/// Arguments of [`Step::run`].
#[derive(Debug)]
pub struct StepArgs<'a, E> {
    /// Queries after RoPE `[requests, q_heads, qk_dim]`.
    pub q: &'a View<'a, E>,
    /// The token.
    pub new: NewTokens<'a, E>,
    /// Pages that each row may read `[rows]`, kept ones included, at most the plan's.
    pub budget: &'a View<'a, u32>,
    /// Tables.
    pub state: State<'a, E>,
    /// Keys and values.
    pub memories: Memories<'a, E>,
    /// Outputs `[requests, q_heads, v_dim]`.
    pub out: ViewMut<'a, E>,
    /// Log-sum-exps `[requests, q_heads]`, natural log.
    pub lse: ViewMut<'a, f32>,
    /// Status word: the first fault of any of the step's kernels, with the row (of new tokens: the request). A row at fault reads
    /// nothing and gets 0 and −inf; the others are right.
    pub status: ViewMut<'a, u64>,
}

/// Arguments of [`Step::prefetch`].
#[derive(Debug)]
pub struct PrefetchArgs<'a, E> {
    /// Queries that say what will be needed `[requests, q_heads, qk_dim]`.
    pub q: &'a View<'a, E>,
    /// Pages that each row may fetch `[rows]`.
    pub budget: &'a View<'a, u32>,
    /// Tables of the layer to fetch for.
    pub state: State<'a, E>,
    /// Its keys and values.
    pub memories: Memories<'a, E>,
    /// Status word.
    pub status: ViewMut<'a, u64>,
}

/// Prepared steps. `E` is the storage type of queries, keys, values and outputs.
#[derive(Debug, Clone)]
pub struct Step<F, E> {
    plan: StepPlan,
    append: Append<F>,
    append_prompt: Append<F>,
    close: Close<F>,
    flush: Flush<F>,
    select: Select<F, E>,
    resolve: Resolve<F>,
    lists: Lists<F>,
    gather: Gather<F>,
    attend: Attend<F, E>,
}

/// A view for reading of memory that is written elsewhere in the step.
fn read<'a, T: bytemuck::Pod>(view: &'a ViewMut<'_, T>) -> Result<View<'a, T>, Error> {
    Ok(view.part(0..view.len())?)
}

/// The bytes of a view.
fn bytes<'a, T: bytemuck::Pod>(view: &'a View<'_, T>) -> Result<View<'a, u8>, Error> {
    Ok(view.part(0..view.len())?.cast())
}

impl<F: Function, E: Storage> Step<F, E> {
    /// Compiles and loads. May block.
    ///
    /// # Errors
    /// [`Error::Argument`] for a device that the plan was not made for, or another element type; [`Error::Cuda`] when a kernel
    /// cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &StepPlan) -> Result<Self, Error> {
        Ok(Step {
            append: Append::prepare(device, &plan.pages)?,
            append_prompt: Append::prepare(device, &plan.prompt)?,
            close: Close::prepare(device, &plan.pages)?,
            flush: Flush::prepare(device, &plan.pages)?,
            select: Select::prepare(device, &plan.select)?,
            resolve: Resolve::prepare(device, &plan.resolve)?,
            lists: Lists::prepare(device, &plan.attend)?,
            gather: Gather::prepare(device, &plan.gather)?,
            attend: Attend::prepare(device, &plan.attend)?,
            plan: plan.clone(),
        })
    }

    /// Enqueues the tokens of prompts, which the caller attends to densely by themselves: they join the open pages, and where
    /// the context is too long for the budget, whole partitions are closed, summarised and written to host memory; the last of them
    /// also stay in the free slots.
    ///
    /// # Errors
    /// [`Error::Cuda`] names an argument or workspace that does not fit.
    pub fn prompt(
        &self,
        queue: &F::Queue,
        mut args: PromptArgs<'_, E>,
        workspace: ViewMut<'_, u8>,
    ) -> Result<(), Error> {
        let work = &self.plan.work;
        let carver = Carver::new("sparse_step", workspace, &work.layout)?;
        let (mut closing, mut num_closing) = (carver.take(work.closing)?, carver.take(work.num_closing)?);
        self.check(&args.state, &args.memories, &args.new, self.plan.config.prompt_tokens)?;
        args.status.check("sparse_step", "status", 1, 8)?;
        let (state, memories, status) = (&mut args.state, &mut args.memories, &mut args.status);
        let append = &self.append_prompt;
        self.close_new(append, queue, args.new, state, memories, [&mut closing, &mut num_closing], status)?;
        self.flush.run(
            queue,
            FlushArgs {
                closing: [&read(&closing)?, &read(&num_closing)?],
                host_table: memories.host_table,
                device: &read(&memories.runs)?.cast(),
                host: memories.host.reborrow(),
                dirty: state.dirty.reborrow(),
                counts: state.counts.reborrow(),
                status: status.reborrow(),
            },
        )
    }

    /// Enqueues a step and returns. `side` is another queue of the same device, or `queue` itself: what crosses the link goes
    /// there, and is joined again.
    ///
    /// # Errors
    /// [`Error::Cuda`] names an argument or workspace that does not fit.
    pub fn run(
        &self,
        queue: &F::Queue,
        side: &F::Queue,
        mut args: StepArgs<'_, E>,
        workspace: ViewMut<'_, u8>,
    ) -> Result<(), Error> {
        let work = &self.plan.work;
        let carver = Carver::new("sparse_step", workspace, &work.layout)?;
        let mut aggregated = carver.take(work.aggregated)?;
        let mut selected = carver.take(work.selected)?;
        let mut selected_epoch = carver.take(work.selected_epoch)?;
        let mut slot_of = carver.take(work.slot_of)?;
        let mut misses = carver.take(work.misses)?;
        let mut num_misses = carver.take(work.num_misses)?;
        let mut closing = carver.take(work.closing)?;
        let mut num_closing = carver.take(work.num_closing)?;
        let mut partial = carver.take(work.partial)?;
        let mut partial_lse = carver.take(work.partial_lse)?;
        let mut select_workspace = carver.take(work.select)?;
        let lists_workspace = carver.take(work.lists)?;
        let mut attend_workspace = carver.take(work.attend)?;
        // Everything before anything is enqueued: half a step would leave pages closed that nobody wrote back.
        self.check(&args.state, &args.memories, &args.new, 1)?;
        let extent = self.plan.config.extent;
        args.q.check("sparse_step", "q", extent.heads() * extent.shape.qk_dim(), 16)?;
        args.budget.check("sparse_step", "budget", extent.rows(), 4)?;
        args.out.check("sparse_step", "out", extent.heads() * extent.shape.v_dim(), 8)?;
        args.lse.check("sparse_step", "lse", extent.heads(), 4)?;
        args.status.check("sparse_step", "status", 1, 8)?;
        let (state, memories, status) = (&mut args.state, &mut args.memories, &mut args.status);

        let lists = [&mut closing, &mut num_closing];
        self.close_new(&self.append, queue, args.new, state, memories, lists, status)?;

        // Write-back runs beside the selection.
        let fork = Fork::new(queue, side)?;
        {
            let (closing, num_closing) = (read(&closing)?, read(&num_closing)?);
            let runs = read(&memories.runs)?.cast();
            // SAFETY: before the join the main queue only scores and selects, which reads queries, summaries, partitions and epochs and
            // writes the selection: nothing of this, apart from the status word, which both change by atomics.
            let views = unsafe { fork.views() };
            let flush = FlushArgs {
                closing: [&views.view(&closing)?, &views.view(&num_closing)?],
                host_table: &views.view(memories.host_table)?,
                device: &views.view(&runs)?,
                host: views.view_mut(&mut memories.host)?,
                dirty: views.view_mut(&mut state.dirty)?,
                counts: views.view_mut(&mut state.counts)?,
                status: views.view_mut(status)?,
            };
            self.flush.run(fork.side(), flush)?;
        }
        self.select.run(
            queue,
            SelectArgs {
                q: args.q,
                summaries: &read(&state.summaries)?,
                num_partitions: &read(&state.partitions)?,
                budget: args.budget,
                rows: Some(state.rows.reborrow()),
                epoch: Some((&read(&state.epoch)?, selected_epoch.reborrow())),
                aggregated: aggregated.reborrow(),
                selected: selected.reborrow(),
                status: status.reborrow(),
            },
            select_workspace.reborrow(),
        )?;
        fork.join()?;

        let (selected, selected_epoch) = (read(&selected)?, read(&selected_epoch)?);
        self.resolve.run(
            queue,
            ResolveArgs {
                selected: &selected,
                rows: Some(state.rows.reborrow()),
                epochs: Some([&selected_epoch, &read(&state.epoch)?]),
                prefetch: false,
                owners: state.owners.reborrow(),
                ages: state.ages.reborrow(),
                dirty: &read(&state.dirty)?,
                slot_of: slot_of.reborrow(),
                misses: misses.reborrow(),
                num_misses: num_misses.reborrow(),
                counts: state.counts.reborrow(),
                status: status.reborrow(),
            },
        )?;
        let (misses, num_misses) = (read(&misses)?, read(&num_misses)?);
        let listed = self.lists.run(
            queue,
            ListsArgs {
                selected: &selected,
                resolved: [&read(&slot_of)?, &misses, &num_misses],
                slot_table: &read(&state.slot_table)?,
                open_table: &read(&state.open_table)?,
                host_table: memories.host_table,
                rows: Some(&read(&state.rows)?),
                page_len: None,
                kv_len: args.new.kv_len,
                closed: &read(&state.closed)?,
                status: status.reborrow(),
            },
            lists_workspace,
        )?;

        // Misses are fetched beside the attention of hits.
        let fork = Fork::new(queue, side)?;
        {
            let (slot_table, host) = (read(&state.slot_table)?, read(&memories.host)?);
            // SAFETY: before the join the main queue only attends the hits, which reads queries and lists, and runs of hits and open
            // pages; the gather writes runs of misses, which lie in other slots, and owners, which attention does not read.
            let views = unsafe { fork.views() };
            let gather = GatherArgs {
                misses: &views.view(&misses)?,
                num_misses: &views.view(&num_misses)?,
                host_table: &views.view(memories.host_table)?,
                slot_table: &views.view(&slot_table)?,
                host: &views.view(&host)?,
                device: views.view_mut(&mut memories.runs)?.cast(),
                owners: views.view_mut(&mut state.owners)?,
                status: views.view_mut(status)?,
            };
            self.gather.run(fork.side(), gather)?;
        }
        let runs = read(&memories.runs)?;
        self.attend.run(
            queue,
            AttendArgs {
                q: args.q,
                runs: &runs,
                list: List::Hits,
                prior: None,
                out: Output::Partial(partial.reborrow()),
                lse: partial_lse.reborrow(),
            },
            &listed,
            attend_workspace.reborrow(),
        )?;
        fork.join()?;
        self.attend.run(
            queue,
            AttendArgs {
                q: args.q,
                runs: &runs,
                list: List::Misses,
                prior: Some([&read(&partial)?, &read(&partial_lse)?]),
                out: Output::Final(args.out),
                lse: args.lse,
            },
            &listed,
            attend_workspace,
        )
    }

    /// Enqueues the fetch of pages ahead of the step that will select them: for the next layer, by what this layer's query says of
    /// it. Whoever wants it beside other work enqueues it between a fork and its join, with a workspace of its own; that layer's next
    /// step comes after the join. Rows take part that did in that layer's last step.
    ///
    /// # Errors
    /// [`Error::Cuda`] names an argument or workspace that does not fit.
    pub fn prefetch(
        &self,
        queue: &F::Queue,
        mut args: PrefetchArgs<'_, E>,
        workspace: ViewMut<'_, u8>,
    ) -> Result<(), Error> {
        let work = &self.plan.work;
        let carver = Carver::new("sparse_step", workspace, &work.layout)?;
        let mut aggregated = carver.take(work.aggregated)?;
        let mut selected = carver.take(work.selected)?;
        let mut selected_epoch = carver.take(work.selected_epoch)?;
        let mut slot_of = carver.take(work.slot_of)?;
        let mut misses = carver.take(work.misses)?;
        let mut num_misses = carver.take(work.num_misses)?;
        let select_workspace = carver.take(work.select)?;
        let (state, memories) = (&mut args.state, &mut args.memories);
        self.select.run(
            queue,
            SelectArgs {
                q: args.q,
                summaries: &read(&state.summaries)?,
                num_partitions: &read(&state.partitions)?,
                budget: args.budget,
                rows: Some(state.rows.reborrow()),
                epoch: Some((&read(&state.epoch)?, selected_epoch.reborrow())),
                aggregated: aggregated.reborrow(),
                selected: selected.reborrow(),
                status: args.status.reborrow(),
            },
            select_workspace,
        )?;
        self.resolve.run(
            queue,
            ResolveArgs {
                selected: &read(&selected)?,
                rows: Some(state.rows.reborrow()),
                epochs: Some([&read(&selected_epoch)?, &read(&state.epoch)?]),
                prefetch: true,
                owners: state.owners.reborrow(),
                ages: state.ages.reborrow(),
                dirty: &read(&state.dirty)?,
                slot_of: slot_of.reborrow(),
                misses: misses.reborrow(),
                num_misses: num_misses.reborrow(),
                counts: state.counts.reborrow(),
                status: args.status.reborrow(),
            },
        )?;
        self.gather.run(
            queue,
            GatherArgs {
                misses: &read(&misses)?,
                num_misses: &read(&num_misses)?,
                host_table: memories.host_table,
                slot_table: &read(&state.slot_table)?,
                host: &read(&memories.host)?,
                device: memories.runs.reborrow().cast(),
                owners: state.owners.reborrow(),
                status: args.status,
            },
        )
    }

    /// Checks the buffers that all calls share.
    fn check(
        &self,
        state: &State<'_, E>,
        memories: &Memories<'_, E>,
        new: &NewTokens<'_, E>,
        tokens: usize,
    ) -> Result<(), Error> {
        const STEP: &str = "sparse_step";
        let extent = self.plan.config.extent;
        let (rows, page) = (extent.rows(), &extent.page);
        let vectors = rows * tokens;
        new.k.check(STEP, "k", vectors * page.qk_dim(), 16)?;
        new.v.check(STEP, "v", vectors * page.v_dim(), 16)?;
        new.kv_len.check(STEP, "kv_len", extent.requests, 4)?;
        if let Some(new_len) = new.new_len {
            new_len.check(STEP, "new_len", extent.requests, 4)?;
        }
        self.check_tables(state)?;
        memories.runs.check(STEP, "runs", extent.runs * page.elements(), 16)?;
        memories.host.check(STEP, "host", extent.host_pages * extent.shape.kv_heads() * page.bytes(), 16)?;
        memories.host_table.check(STEP, "host_table", extent.requests * extent.max_pages, 4)?;
        Ok(())
    }

    /// Checks the tables of a layer.
    fn check_tables(&self, state: &State<'_, E>) -> Result<(), Error> {
        const STEP: &str = "sparse_step";
        let extent = self.plan.config.extent;
        let rows = extent.rows();
        for (argument, view) in [("owners", &state.owners), ("slot_table", &state.slot_table)] {
            view.check(STEP, argument, rows * extent.slots, 4)?;
        }
        for (argument, view) in [("ages", &state.ages), ("dirty", &state.dirty)] {
            view.check(STEP, argument, rows * extent.slots, 1)?;
        }
        for (argument, view) in [
            ("closed", &state.closed),
            ("partitions", &state.partitions),
            ("epoch", &state.epoch),
            ("rows", &state.rows),
        ] {
            view.check(STEP, argument, rows, 4)?;
        }
        state.open_table.check(STEP, "open_table", rows * extent.max_open, 4)?;
        state.counts.check(STEP, "counts", rows * cuda::kernels::sparse_attn::COUNTS, 8)?;
        state.summaries.check(STEP, "summaries", self.plan.summary_elements(), 16)?;
        Ok(())
    }

    /// New tokens join the open pages, and what fills partitions is closed and summarised.
    #[expect(clippy::too_many_arguments, reason = "the parts of a step that this changes")]
    fn close_new(
        &self,
        append: &Append<F>,
        queue: &F::Queue,
        new: NewTokens<'_, E>,
        state: &mut State<'_, E>,
        memories: &mut Memories<'_, E>,
        [closing, num_closing]: [&mut ViewMut<'_, u32>; 2],
        status: &mut ViewMut<'_, u64>,
    ) -> Result<(), Error> {
        append.run(
            queue,
            AppendArgs {
                k_new: &bytes(new.k)?,
                v_new: &bytes(new.v)?,
                kv_len: new.kv_len,
                new_len: new.new_len,
                closed: &read(&state.closed)?,
                open_table: &read(&state.open_table)?,
                runs: memories.runs.reborrow().cast(),
                status: status.reborrow(),
            },
        )?;
        self.close.run(
            queue,
            CloseArgs {
                kv_len: new.kv_len,
                host_table: memories.host_table,
                rows: state.rows.reborrow(),
                closed: state.closed.reborrow(),
                partitions: state.partitions.reborrow(),
                epoch: state.epoch.reborrow(),
                owners: state.owners.reborrow(),
                ages: state.ages.reborrow(),
                dirty: state.dirty.reborrow(),
                slot_table: state.slot_table.reborrow(),
                open_table: state.open_table.reborrow(),
                closing: closing.reborrow(),
                num_closing: num_closing.reborrow(),
                counts: state.counts.reborrow(),
                status: status.reborrow(),
            },
        )?;
        self.select.summarise(
            queue,
            SummariseArgs {
                closing: [&read(closing)?, &read(num_closing)?],
                runs: &read(&memories.runs)?,
                summaries: state.summaries.reborrow(),
                status: status.reborrow(),
            },
        )
    }
}
