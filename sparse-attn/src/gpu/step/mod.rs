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

mod arguments;
mod plan;
mod tables;

use cuda::fork::Fork;
use cuda::launch::{Device, Function};
use cuda::memory::{View, ViewMut};
use cuda::storage::Storage;
use cuda::workspace::Carver;

use super::{
    Append, AppendArgs, Attend, AttendArgs, Close, CloseArgs, Flush, FlushArgs, Gather, GatherArgs, List,
    Lists, ListsArgs, Output, Resolve, ResolveArgs, Select, SelectArgs, SummariseArgs,
};
use crate::Error;

pub use arguments::{Memories, NewTokens, PrefetchArgs, PromptArgs, State, StepArgs};
pub use plan::{StepConfig, StepPlan};
pub use tables::Tables;

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
        memories.host.check_in_host_memory(STEP, "host")?;
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
