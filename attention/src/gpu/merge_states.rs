//! The merge of partial attention states.

use cuda::kernels::attention::{MergeStates, MergeStatesArgs, MergeStatesLastArriver, MergeStatesScratch};
use cuda::launch::{Device, Function};
use cuda::memory::{View, ViewMut};
use cuda::storage::Storage;
use cuda::workspace::{Carver, Layout, Region};

use crate::{DType, Error};

use super::check_sm_count;

/// States per row up to which one pass of one group of threads is enough.
const SINGLE_PASS_SPLITS: usize = 32;
/// Fewest states that are worth a block of their own.
const MIN_SPLITS_PER_BLOCK: usize = 16;
/// Blocks per SM that the last-arriver kernel aims for.
const BLOCKS_PER_SM: usize = 8;

/// What a merge is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MergeConfig {
    /// Rows of every run.
    pub rows: usize,
    /// Partial states stored per row.
    pub max_splits: usize,
    /// Channels of a state.
    pub v_dim: usize,
    /// SMs of the device.
    pub sm_count: u32,
}

/// A merge of `[rows, max_splits]` partial states: which kernel, with which workspace.
#[derive(Debug, Clone)]
pub struct MergePlan {
    config: MergeConfig,
    layout: Layout,
    split: Option<Split>,
}

/// How the last-arriver kernel splits a row, and its buffers.
#[derive(Debug, Clone, Copy)]
struct Split {
    splits_per_block: usize,
    chunk_acc: Region<f32>,
    chunk_ml: Region<f32>,
    arrivals: Region<u32>,
}

impl MergePlan {
    /// Plans a merge. Needs no device.
    ///
    /// Rows with many states in a batch too small to fill the device are split over blocks; all others take one pass.
    ///
    /// # Errors
    /// [`Error::Argument`] when a size is 0 or past what the kernels index.
    pub fn new(config: MergeConfig) -> Result<Self, Error> {
        let MergeConfig { rows, max_splits, v_dim, sm_count } = config;
        for (argument, value) in
            [("max_splits", max_splits), ("v_dim", v_dim), ("sm_count", sm_count as usize)]
        {
            if value == 0 {
                return Err(Error::argument(argument, "at least 1", value));
            }
        }
        if rows.checked_mul(max_splits).is_none_or(|states| states > i32::MAX as usize) {
            return Err(Error::argument(
                "rows",
                format!("at most {} states", i32::MAX),
                format!("{rows} rows of {max_splits}"),
            ));
        }
        let mut layout = Layout::new();
        let wanted_blocks = sm_count as usize * BLOCKS_PER_SM;
        let split = if max_splits <= SINGLE_PASS_SPLITS || rows >= wanted_blocks {
            None
        } else {
            let chunks = wanted_blocks.div_ceil(rows.max(1)).min(max_splits.div_ceil(MIN_SPLITS_PER_BLOCK));
            let splits_per_block = max_splits.div_ceil(chunks);
            let states = rows * max_splits.div_ceil(splits_per_block);
            Some(Split {
                splits_per_block,
                chunk_acc: layout.scratch(states.saturating_mul(v_dim))?,
                chunk_ml: layout.scratch(states * 2)?,
                arrivals: layout.counters(rows)?,
            })
        };
        Ok(Self { config, layout, split })
    }

    /// Layout of the workspace, which is zeroed before the first run.
    pub fn workspace(&self) -> &Layout {
        &self.layout
    }

    /// Bytes that a run reads and writes when every row has all its states, for an output of `dtype`.
    pub fn bytes_moved(&self, dtype: DType) -> u64 {
        let MergeConfig { rows, max_splits, v_dim, .. } = self.config;
        (rows * max_splits * (v_dim + 1) * 4 + rows * (v_dim * dtype.size() + 4)) as u64
    }

    /// Floating-point operations of a run when every row has all its states: a multiply and an add per channel.
    pub fn flops(&self) -> u64 {
        (2 * self.config.rows * self.config.max_splits * self.config.v_dim) as u64
    }
}

/// A prepared merge. `O` is the storage type of the output.
#[derive(Debug, Clone)]
pub struct Merge<F, O> {
    plan: MergePlan,
    kernel: Kernel<F, O>,
}

#[derive(Debug, Clone)]
enum Kernel<F, O> {
    SinglePass(MergeStates<F, O>),
    LastArriver(MergeStatesLastArriver<F, O>, Split),
}

/// Arguments of [`Merge::run`].
#[derive(Debug)]
pub struct MergeArgs<'a, O> {
    /// Partial outputs `[rows, max_splits, v_dim]`, 16-byte aligned. Those of empty states may hold anything.
    pub partial_out: &'a View<'a, f32>,
    /// Partial log-sum-exps `[rows, max_splits]`, natural log, −inf for an empty state.
    pub partial_lse: &'a View<'a, f32>,
    /// States of each row `[rows]`; `max_splits` in every row if absent.
    pub num_splits: Option<&'a View<'a, u32>>,
    /// Merged outputs `[rows, v_dim]`.
    pub out: ViewMut<'a, O>,
    /// Merged log-sum-exps `[rows]`, natural log.
    pub lse: ViewMut<'a, f32>,
    /// Status word: [`FaultCode::BadSplits`](crate::FaultCode::BadSplits) with the row.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function, O: Storage> Merge<F, O> {
    /// Compiles and loads the plan's kernel. May block.
    ///
    /// # Errors
    /// [`Error::Argument`] for a device that the plan was not made for, [`Error::Cuda`] when the kernel cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &MergePlan) -> Result<Self, Error> {
        check_sm_count(device, plan.config.sm_count)?;
        let kernel = match plan.split {
            None => Kernel::SinglePass(MergeStates::prepare(device, plan.config.v_dim)?),
            Some(split) => {
                Kernel::LastArriver(MergeStatesLastArriver::prepare(device, plan.config.v_dim)?, split)
            }
        };
        Ok(Self { plan: plan.clone(), kernel })
    }

    /// Enqueues the merge and returns.
    ///
    /// # Errors
    /// [`Error::Cuda`] names an argument or workspace that does not fit.
    pub fn run(
        &self,
        queue: &F::Queue,
        args: MergeArgs<'_, O>,
        workspace: ViewMut<'_, u8>,
    ) -> Result<(), Error> {
        let args = MergeStatesArgs {
            rows: self.plan.config.rows,
            max_splits: self.plan.config.max_splits,
            partial_out: args.partial_out,
            partial_lse: args.partial_lse,
            num_splits: args.num_splits,
            out: args.out,
            lse: args.lse,
            status: args.status,
            programmatic: false,
        };
        match &self.kernel {
            Kernel::SinglePass(kernel) => kernel.launch(queue, args)?,
            Kernel::LastArriver(kernel, split) => {
                let carver = Carver::new("merge_states_last_arriver", workspace, &self.plan.layout)?;
                let scratch = MergeStatesScratch {
                    chunk_acc: carver.take(split.chunk_acc)?,
                    chunk_ml: carver.take(split.chunk_ml)?,
                    arrivals: carver.take(split.arrivals)?,
                };
                kernel.launch(queue, args, split.splits_per_block, scratch)?;
            }
        }
        Ok(())
    }
}
