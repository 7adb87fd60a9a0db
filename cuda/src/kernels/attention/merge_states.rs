//! The LSE merge of partial attention states: `merge_states` and `merge_states_last_arriver`.

use std::marker::PhantomData;

use crate::Error;
use crate::launch::{Arg, Device, Function, LaunchConfig};
use crate::memory::{View, ViewMut};
use crate::params::MergeStatesParams;
use crate::storage::Storage;
use crate::table::Instance;

use super::cache::elements;

const THREADS: u32 = 128;

/// Arguments of both merge kernels. `O` is the storage type of the output.
#[derive(Debug)]
pub struct MergeStatesArgs<'a, O> {
    /// Rows to merge.
    pub rows: usize,
    /// Partial states stored per row.
    pub max_splits: usize,
    /// Partial outputs `[rows, max_splits, v_dim]`, 16-byte aligned.
    pub partial_out: &'a View<'a, f32>,
    /// Partial log-sum-exps `[rows, max_splits]`, natural log, −inf for an empty state.
    pub partial_lse: &'a View<'a, f32>,
    /// States of each row `[rows]`; `max_splits` in every row if absent.
    pub num_splits: Option<&'a View<'a, u32>>,
    /// Merged outputs `[rows, v_dim]`, aligned to four elements.
    pub out: ViewMut<'a, O>,
    /// Merged log-sum-exps `[rows]`, natural log.
    pub lse: ViewMut<'a, f32>,
    /// Status word: the first fault of any launch that shares it.
    pub status: ViewMut<'a, u64>,
    /// Start while the previous kernel of the stream drains; see
    /// [`LaunchConfig::programmatic`](crate::launch::LaunchConfig).
    pub programmatic: bool,
}

/// Workspace of [`MergeStatesLastArriver`].
#[derive(Debug)]
pub struct MergeStatesScratch<'a> {
    /// Chunk states `[rows, chunks, v_dim]`, 16-byte aligned; need not be initialised.
    pub chunk_acc: ViewMut<'a, f32>,
    /// Chunk maxima and sums `[rows, chunks, 2]`; need not be initialised.
    pub chunk_ml: ViewMut<'a, f32>,
    /// Arrival counters `[rows]`: zero before the first launch, and left zero by every launch.
    pub arrivals: ViewMut<'a, u32>,
}

impl<O: Storage> MergeStatesArgs<'_, O> {
    /// Checks every argument and gives the kernel's parameters.
    fn check(&self, kernel: &str, v_dim: usize, splits_per_block: usize) -> Result<MergeStatesParams, Error> {
        let count = |argument, value: usize| {
            u32::try_from(value)
                .ok()
                .filter(|v| *v <= i32::MAX as u32)
                .ok_or_else(|| Error::argument(kernel, argument, format_args!("at most {}", i32::MAX), value))
        };
        let params = MergeStatesParams {
            rows: count("rows", self.rows)?,
            max_splits: count("max_splits", self.max_splits)?,
            splits_per_block: count("splits_per_block", splits_per_block)?,
            _pad: 0,
        };
        let states = elements(&[self.rows, self.max_splits]);
        self.partial_out.check(kernel, "partial_out", elements(&[states, v_dim]), 16)?;
        self.partial_lse.check(kernel, "partial_lse", states, 4)?;
        if let Some(num_splits) = self.num_splits {
            num_splits.check(kernel, "num_splits", self.rows, 4)?;
        }
        self.out.check(kernel, "out", elements(&[self.rows, v_dim]), 4 * size_of::<O>() as u64)?;
        self.lse.check(kernel, "lse", self.rows, 4)?;
        self.status.check(kernel, "status", 1, 8)?;
        Ok(params)
    }
}

fn instance<O: Storage>(kernel: &'static str, v_dim: usize) -> Result<Instance, Error> {
    Instance::new(kernel, &[("V_DIM", v_dim as i64), ("OUT_DTYPE", O::DTYPE)])
}

/// `merge_states`: one launch, V_DIM/4 threads to a row. Best for up to a few dozen states per row.
#[derive(Debug, Clone)]
pub struct MergeStates<F, O> {
    function: F,
    v_dim: usize,
    _out: PhantomData<O>,
}

impl<F: Function, O: Storage> MergeStates<F, O> {
    /// Compiles and loads the kernel for `v_dim` channels.
    pub fn prepare<D: Device<Function = F>>(device: &D, v_dim: usize) -> Result<Self, Error> {
        let function = device.load(&instance::<O>("merge_states", v_dim)?)?;
        Ok(Self { function, v_dim, _out: PhantomData })
    }

    /// Enqueues the merge.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short, misaligned or in the wrong space.
    pub fn launch(&self, queue: &F::Queue, mut args: MergeStatesArgs<'_, O>) -> Result<(), Error> {
        let params = args.check("merge_states", self.v_dim, 1)?;
        let rows_per_block = THREADS / (self.v_dim as u32 / 4);
        let mut config = LaunchConfig::new(params.rows.div_ceil(rows_per_block), THREADS);
        config.programmatic = args.programmatic;
        let kernel_args = [
            Arg::read("partial_out", args.partial_out),
            Arg::read("partial_lse", args.partial_lse),
            Arg::read_optional("num_splits", args.num_splits),
            Arg::write("out", &mut args.out),
            Arg::write("lse", &mut args.lse),
            Arg::write("status", &mut args.status),
            Arg::value("params", &params),
        ];
        // SAFETY: the arguments are the kernel's parameters in order and type, and `check` made every buffer as long as
        // the kernel's index range for this grid.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }
}

/// `merge_states_last_arriver`: several blocks to a row, the last of which finishes it. For many states per row.
#[derive(Debug, Clone)]
pub struct MergeStatesLastArriver<F, O> {
    function: F,
    v_dim: usize,
    _out: PhantomData<O>,
}

impl<F: Function, O: Storage> MergeStatesLastArriver<F, O> {
    /// Compiles and loads the kernel for `v_dim` channels.
    pub fn prepare<D: Device<Function = F>>(device: &D, v_dim: usize) -> Result<Self, Error> {
        let function = device.load(&instance::<O>("merge_states_last_arriver", v_dim)?)?;
        Ok(Self { function, v_dim, _out: PhantomData })
    }

    /// Enqueues the merge, `splits_per_block` states to a block.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short, misaligned or in the wrong space.
    pub fn launch(
        &self,
        queue: &F::Queue,
        mut args: MergeStatesArgs<'_, O>,
        splits_per_block: usize,
        mut scratch: MergeStatesScratch<'_>,
    ) -> Result<(), Error> {
        const KERNEL: &str = "merge_states_last_arriver";
        if splits_per_block == 0 || args.max_splits == 0 {
            let (argument, found) = if splits_per_block == 0 {
                ("splits_per_block", splits_per_block)
            } else {
                ("max_splits", args.max_splits)
            };
            return Err(Error::argument(KERNEL, argument, "at least 1", found));
        }
        let params = args.check(KERNEL, self.v_dim, splits_per_block)?;
        let chunks = args.max_splits.div_ceil(splits_per_block);
        let blocks = elements(&[args.rows, chunks]);
        let grid =
            u32::try_from(blocks).ok().filter(|blocks| *blocks <= i32::MAX as u32).ok_or_else(|| {
                Error::argument(KERNEL, "rows", format_args!("at most {} blocks", i32::MAX), blocks)
            })?;
        scratch.chunk_acc.check(KERNEL, "chunk_acc", elements(&[blocks, self.v_dim]), 16)?;
        scratch.chunk_ml.check(KERNEL, "chunk_ml", blocks * 2, 4)?;
        scratch.arrivals.check(KERNEL, "arrivals", args.rows, 4)?;

        let groups = THREADS as usize / (self.v_dim / 4);
        let shared_words = groups * self.v_dim + groups * 2 + 1;
        let mut config = LaunchConfig::new(grid, THREADS).shared((shared_words * size_of::<f32>()) as u32);
        config.programmatic = args.programmatic;
        let kernel_args = [
            Arg::read("partial_out", args.partial_out),
            Arg::read("partial_lse", args.partial_lse),
            Arg::read_optional("num_splits", args.num_splits),
            Arg::write("out", &mut args.out),
            Arg::write("lse", &mut args.lse),
            Arg::write("chunk_acc", &mut scratch.chunk_acc),
            Arg::write("chunk_ml", &mut scratch.chunk_ml),
            Arg::write("arrivals", &mut scratch.arrivals),
            Arg::write("status", &mut args.status),
            Arg::value("params", &params),
        ];
        // SAFETY: the arguments are the kernel's parameters in order and type, `check` made every buffer as long as the
        // kernel's index range for this grid, and the shared memory is the kernel's `Shared`.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }
}
