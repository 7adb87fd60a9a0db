//! One step of bucketed LRU for every KV head of a batch.

use cuda::kernels::sparse_attn as kernels;
use cuda::launch::{Device, Function};
use cuda::memory::{View, ViewMut};

use crate::Error;

/// What a step is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResolveConfig {
    /// (Request, KV head) pairs, each with slots of its own.
    pub rows: usize,
    /// Pages that a row may select.
    pub max_selected: usize,
    /// Slots of a row.
    pub slots: usize,
    /// Ages that replacement tells apart.
    pub buckets: u8,
}

/// A checked step.
#[derive(Debug, Clone, Copy)]
pub struct ResolvePlan {
    config: ResolveConfig,
}

impl ResolvePlan {
    /// Plans a step. Needs no device and no workspace.
    ///
    /// # Errors
    /// [`Error::Argument`] when a size is out of the kernel's range, or a selection could be larger than the slots.
    pub fn new(config: ResolveConfig) -> Result<Self, Error> {
        for (argument, value, least, most) in [
            ("rows", config.rows, 1, i32::MAX as usize),
            ("max_selected", config.max_selected, 1, kernels::MAX_SELECTED),
            ("slots", config.slots, 1, kernels::MAX_SLOTS),
            ("buckets", usize::from(config.buckets), 2, kernels::MAX_BUCKETS),
        ] {
            if !(least..=most).contains(&value) {
                return Err(Error::argument(argument, format!("{least} to {most}"), value));
            }
        }
        if config.max_selected > config.slots {
            let expected = format!("at most the {} slots", config.slots);
            return Err(Error::argument("max_selected", expected, config.max_selected));
        }
        Ok(ResolvePlan { config })
    }

    /// What the step is for.
    pub fn config(&self) -> ResolveConfig {
        self.config
    }

    /// Bytes that a run reads and writes when every row selects as much as it may and misses nothing.
    pub fn bytes_moved(&self) -> u64 {
        let ResolveConfig { rows, max_selected, slots, .. } = self.config;
        // Owners, ages twice and written, flags; pages and slots of the selection.
        (rows * (slots * 8 + max_selected * 8)) as u64
    }
}

/// A prepared step: the same decisions as [`BucketedLru::resolve`](crate::BucketedLru::resolve), bit by bit.
#[derive(Debug, Clone)]
pub struct Resolve<F> {
    config: ResolveConfig,
    kernel: kernels::Resolve<F>,
}

/// Arguments of [`Resolve::run`].
#[derive(Debug)]
pub struct ResolveArgs<'a> {
    /// Pages `[rows, max_selected]`, each once in a row; [`NONE`](crate::metadata::NONE) is padding, anywhere.
    pub selected: &'a View<'a, u32>,
    /// A [`SparseRow`](cuda::params::SparseRow) each `[rows]`: others than those that select touch no state, and one at fault
    /// becomes bad. All take part if absent.
    pub rows: Option<ViewMut<'a, u32>>,
    /// State of each row's index that the selection was made for, and the state now, `[rows]` each.
    pub epochs: Option<[&'a View<'a, u32>; 2]>,
    /// Whether pages are fetched ahead between steps, as [`BucketedLru::prefetch`](crate::BucketedLru::prefetch) does: nothing
    /// ages, and pages that find no slot get none.
    pub prefetch: bool,
    /// Page of each slot `[rows, slots]`, [`NONE`](crate::metadata::NONE) for a free one; updated.
    pub owners: ViewMut<'a, u32>,
    /// Age of each slot `[rows, slots]`; updated.
    pub ages: ViewMut<'a, u8>,
    /// Not 0 for slots whose page is not in host memory yet `[rows, slots]`: they keep it.
    pub dirty: &'a View<'a, u8>,
    /// Slot of each selected page `[rows, max_selected]`, [`NONE`](crate::metadata::NONE) for padding; wholly written.
    pub slot_of: ViewMut<'a, u32>,
    /// Pages to fetch `[rows, max_selected, 4]`: place in the selection, page, slot, and the page that lost the slot or
    /// [`NONE`](crate::metadata::NONE); in the order of selection. Only the first `num_misses` of a row are written.
    pub misses: ViewMut<'a, u32>,
    /// Pages to fetch of each row `[rows]`.
    pub num_misses: ViewMut<'a, u32>,
    /// Counts `[rows, 8]`, as [`SparseCounts`](cuda::params::SparseCounts), added to; see
    /// [`Counters::of_device`](crate::Counters::of_device).
    pub counts: ViewMut<'a, u64>,
    /// Status word: [`FaultCode::Stale`](attention::FaultCode::Stale) with a row whose epochs differ,
    /// [`FaultCode::BadIndex`](attention::FaultCode::BadIndex) with one that selects a page twice,
    /// [`FaultCode::BadLength`](attention::FaultCode::BadLength) with one whose pages do not fit the slots that may go. Such a
    /// row keeps its state and gets neither slots nor misses.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function> Resolve<F> {
    /// Compiles and loads the kernel. May block.
    ///
    /// # Errors
    /// [`Error::Cuda`] when it cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &ResolvePlan) -> Result<Self, Error> {
        Ok(Self { config: plan.config, kernel: kernels::Resolve::prepare(device)? })
    }

    /// Enqueues a step and returns.
    ///
    /// # Errors
    /// [`Error::Cuda`] names an argument that does not fit.
    pub fn run(&self, queue: &F::Queue, args: ResolveArgs<'_>) -> Result<(), Error> {
        let ResolveConfig { rows, max_selected, slots, buckets } = self.config;
        let args = kernels::ResolveArgs {
            rows,
            max_selected,
            slots,
            buckets: usize::from(buckets),
            selected: args.selected,
            states: args.rows,
            epochs: args.epochs,
            prefetch: args.prefetch,
            owners: args.owners,
            ages: args.ages,
            dirty: args.dirty,
            slot_of: args.slot_of,
            misses: args.misses,
            num_misses: args.num_misses,
            counts: args.counts,
            status: args.status,
            programmatic: false,
        };
        Ok(self.kernel.launch(queue, args)?)
    }
}
