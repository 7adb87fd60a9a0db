//! Selection on the device: summaries of closed chunks, scores, and the pages with the best of them.

use cuda::kernels::sparse_attn as kernels;
use cuda::launch::{Device, Function};
use cuda::memory::{View, ViewMut};
use cuda::params::{
    SPARSE_AVERAGE, SPARSE_CUBOID_MEAN, SPARSE_MAX, SPARSE_MEAN, SPARSE_MEAN_STD, SPARSE_MIN_MAX, SPARSE_RAW,
    SPARSE_SUM, SparseScoreParams, SparseSelectParams, SparseSummariseParams,
};
use cuda::storage::Storage;
use cuda::workspace::{Carver, Layout, Region};

use super::extent::{Extent, count, page_shift, size};
use crate::Error;
use crate::index::pages::Scorer;
use crate::select::{Aggregation, SelectRule};

/// Partitions of a tile of four warps.
const TILE: usize = 64;
/// Blocks of a row of scores: enough of them for every SM, and enough work for each.
const MAX_BLOCKS: usize = 64;

/// What a selection is for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SelectConfig {
    /// Sizes.
    pub extent: Extent,
    /// Summaries and what they are multiplied with.
    pub scorer: Scorer,
    /// Pages of a partition.
    pub partition_pages: usize,
    /// What is kept and how a group agrees. Its `pages` are the most that `budget` may ask for.
    pub rule: SelectRule,
    /// Entries of a list of closed pages.
    pub max_closing: usize,
    /// SMs of the device.
    pub sm_count: u32,
}

/// A checked selection.
#[derive(Debug, Clone)]
pub struct SelectPlan {
    config: SelectConfig,
    row_dim: usize,
    summarise: SparseSummariseParams,
    score: SparseScoreParams,
    select: SparseSelectParams,
    layout: Layout,
    scores: Region<f32>,
    sums: Region<f32>,
}

impl SelectPlan {
    /// Plans selections. Needs no device.
    ///
    /// # Errors
    /// [`Error::Argument`] for a size or rule that the kernels do not support.
    pub fn new(config: SelectConfig) -> Result<Self, Error> {
        config.extent.check()?;
        let Extent { shape, page, max_pages, max_selected, runs, .. } = config.extent;
        if config.extent.rows() > 65535 {
            return Err(Error::argument("requests", "at most 65535 rows", config.extent.rows()));
        }
        if config.rule.estimate != 0.0 {
            let expected = "0: chunks have nothing to be estimated by";
            return Err(Error::argument("estimate", expected, config.rule.estimate));
        }
        if config.rule.pages > max_selected {
            return Err(Error::argument(
                "pages",
                format!("at most max_selected, {max_selected}"),
                config.rule.pages,
            ));
        }
        if config.partition_pages == 0 || !config.max_closing.is_multiple_of(config.partition_pages) {
            let expected = format!("whole partitions of {} pages", config.partition_pages);
            return Err(Error::argument("max_closing", expected, config.max_closing));
        }
        if shape.group() > kernels::MAX_GROUP {
            return Err(Error::argument("group", format!("at most {}", kernels::MAX_GROUP), shape.group()));
        }
        let max_partitions = size("max_pages", max_pages / config.partition_pages)?;
        let rows = size("requests", config.extent.rows())?;
        let (scorer, weight) = match config.scorer {
            Scorer::MinMax => (SPARSE_MIN_MAX, 0.0),
            Scorer::CuboidMean => (SPARSE_CUBOID_MEAN, 0.0),
            Scorer::MeanStd { weight } => (SPARSE_MEAN_STD, weight),
            Scorer::Mean => (SPARSE_MEAN, 0.0),
        };
        // Four blocks fit an SM; more than one tile for each block only where there are many.
        let wanted = (4 * config.sm_count as usize).div_ceil(config.extent.rows());
        let blocks = (max_partitions as usize).div_ceil(TILE).min(wanted).clamp(1, MAX_BLOCKS);
        let (scale, soft_cap) = (config.rule.score.scale(), config.rule.score.soft_cap().unwrap_or(0.0));
        let summarise = SparseSummariseParams {
            rows,
            max_closing: size("max_closing", config.max_closing)?,
            chunk_pages: size("partition_pages", config.partition_pages)?,
            page_shift: page_shift(&page),
            dim: size("qk_dim", shape.qk_dim())?,
            run_elements: size("page", page.elements())?,
            num_runs: size("runs", runs)?,
            max_partitions,
            scorer,
            _pad: 0,
        };
        let score = SparseScoreParams {
            rows,
            group: shape.group() as u32,
            max_partitions,
            scorer,
            blocks: blocks as u32,
            weight,
            scale,
            soft_cap,
        };
        let select = SparseSelectParams {
            estimate: 0.0,
            rows,
            columns: shape.group() as u32,
            max_partitions,
            blocks: blocks as u32,
            max_selected: size("max_selected", max_selected)?,
            max_estimated: 0,
            sinks: count("sinks", config.rule.sinks)?,
            recent: count("recent", config.rule.recent)?,
            partition_pages: summarise.chunk_pages,
            aggregation: match config.rule.aggregation {
                Aggregation::Raw => SPARSE_RAW,
                Aggregation::Max => SPARSE_MAX,
                Aggregation::Mean => SPARSE_AVERAGE,
                Aggregation::Sum => SPARSE_SUM,
            },
            scale,
            soft_cap,
        };
        let mut layout = Layout::new();
        let heads = config.extent.heads();
        let scores = layout.scratch(heads.saturating_mul(max_partitions as usize))?;
        let sums = layout.scratch(heads.saturating_mul(2 * blocks))?;
        let row_dim = config.scorer.vectors() * shape.qk_dim();
        Ok(SelectPlan { config, row_dim, summarise, score, select, layout, scores, sums })
    }

    /// What the selection is for.
    pub fn config(&self) -> &SelectConfig {
        &self.config
    }

    /// Layout of the workspace of [`Select::run`].
    pub fn workspace(&self) -> &Layout {
        &self.layout
    }

    /// Partitions that a row may have.
    pub fn max_partitions(&self) -> usize {
        self.select.max_partitions as usize
    }

    /// Elements of all summaries: `[rows, max_partitions, vectors, qk_dim]`.
    pub fn summary_elements(&self) -> usize {
        self.config.extent.rows() * self.max_partitions() * self.row_dim
    }

    /// Bytes that scores read of so many partitions, of all rows together.
    pub fn bytes_moved(&self, partitions: usize) -> u64 {
        (partitions * self.row_dim * self.config.extent.page.dtype().size()) as u64
    }

    /// Floating-point operations for so many partitions, of all rows together.
    pub fn flops(&self, partitions: usize) -> u64 {
        (2 * partitions * self.row_dim * self.config.extent.shape.group()) as u64
    }
}

/// Prepared selection: the scores of [`PageIndex`](crate::index::pages::PageIndex) up to rounding, and of equal scores the choice of
/// [`choose`](crate::select::choose), page by page. `E` is the storage type of q, K and the summaries.
#[derive(Debug, Clone)]
pub struct Select<F, E> {
    plan: SelectPlan,
    summarise: kernels::Summarise<F, E>,
    score: kernels::Score<F, E>,
    select: kernels::Select<F>,
}

/// Arguments of [`Select::summarise`].
#[derive(Debug)]
pub struct SummariseArgs<'a, E> {
    /// Closed pages `[rows, max_closing, 4]` and their number `[rows]`, as [`Close`](super::Close) leaves them.
    pub closing: [&'a View<'a, u32>; 2],
    /// Device memory `[runs, K|V, tokens, dim]`.
    pub runs: &'a View<'a, E>,
    /// Summaries `[rows, max_partitions, vectors, qk_dim]`; those of the closed partitions are written.
    pub summaries: ViewMut<'a, E>,
    /// Status word: [`FaultCode::BadPage`](attention::FaultCode::BadPage) or
    /// [`BadLength`](attention::FaultCode::BadLength) with a row one of whose partitions is left out.
    pub status: ViewMut<'a, u64>,
}

/// Arguments of [`Select::run`].
#[derive(Debug)]
pub struct SelectArgs<'a, E> {
    /// Queries `[requests, q_heads, qk_dim]`.
    pub q: &'a View<'a, E>,
    /// Summaries `[rows, max_partitions, vectors, qk_dim]`.
    pub summaries: &'a View<'a, E>,
    /// Partitions of each row `[rows]`.
    pub num_partitions: &'a View<'a, u32>,
    /// Pages that a row may select `[rows]`, kept ones included.
    pub budget: &'a View<'a, u32>,
    /// A [`SparseRow`](cuda::params::SparseRow) each `[rows]`: others than those that select get no page, and one at fault becomes
    /// bad. All select if absent.
    pub rows: Option<ViewMut<'a, u32>>,
    /// State of each row's index `[rows]`, and, out, the state that the selection is made for.
    pub epoch: Option<(&'a View<'a, u32>, ViewMut<'a, u32>)>,
    /// Out: the group's scores `[rows, max_partitions]`.
    pub aggregated: ViewMut<'a, f32>,
    /// Out: pages in increasing order `[rows, max_selected]`, then [`NONE`](crate::metadata::NONE).
    pub selected: ViewMut<'a, u32>,
    /// Status word: [`FaultCode::BadLength`](attention::FaultCode::BadLength) with a row of more partitions, budget or kept pages
    /// than there is room for; it selects nothing.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function, E: Storage> Select<F, E> {
    /// Compiles and loads. May block.
    ///
    /// # Errors
    /// [`Error::Argument`] for a device that the plan was not made for, or another element type; [`Error::Cuda`] when a kernel
    /// cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &SelectPlan) -> Result<Self, Error> {
        super::check_device::<D, E>(device, &plan.config.extent.page, plan.config.sm_count)?;
        Ok(Select {
            plan: plan.clone(),
            summarise: kernels::Summarise::prepare(device)?,
            score: kernels::Score::prepare(device, plan.row_dim)?,
            select: kernels::Select::prepare(device)?,
        })
    }

    /// Enqueues the summaries of partitions that were just closed.
    ///
    /// # Errors
    /// [`Error::Cuda`] names an argument that does not fit.
    pub fn summarise(&self, queue: &F::Queue, args: SummariseArgs<'_, E>) -> Result<(), Error> {
        let partitions = self.plan.config.max_closing / self.plan.config.partition_pages;
        let args = kernels::SummariseArgs {
            params: &self.plan.summarise,
            // A warp per partition.
            blocks: partitions.div_ceil(4).min(MAX_BLOCKS) as u32,
            closing: args.closing[0],
            num_closing: args.closing[1],
            runs: args.runs,
            summaries: args.summaries,
            status: args.status,
        };
        Ok(self.summarise.launch(queue, args)?)
    }

    /// Enqueues scores and selection.
    ///
    /// # Errors
    /// [`Error::Cuda`] names an argument or workspace that does not fit.
    pub fn run(
        &self,
        queue: &F::Queue,
        mut args: SelectArgs<'_, E>,
        workspace: ViewMut<'_, u8>,
    ) -> Result<(), Error> {
        let carver = Carver::new("sparse_select", workspace, &self.plan.layout)?;
        let states = args.rows.as_ref().map(|rows| rows.part(0..rows.len())).transpose()?;
        let scored = kernels::ScoreArgs {
            params: &self.plan.score,
            q: args.q,
            summaries: args.summaries,
            num_partitions: args.num_partitions,
            rows: states.as_ref(),
            scores: carver.take(self.plan.scores)?,
            sums: carver.take(self.plan.sums)?,
            status: args.status.reborrow(),
        };
        self.score.launch(queue, scored)?;
        drop(states);
        let workspace = carver.into_workspace();
        let args = kernels::SelectArgs {
            params: &self.plan.select,
            scores: &self.plan.layout.view(self.plan.scores, &workspace)?,
            sums: Some(&self.plan.layout.view(self.plan.sums, &workspace)?),
            num_partitions: args.num_partitions,
            budget: args.budget,
            first_page: None,
            rows: args.rows,
            epoch: args.epoch,
            aggregated: args.aggregated,
            selected: args.selected,
            estimated: None,
            status: args.status,
        };
        Ok(self.select.launch(queue, args)?)
    }
}

/// What a choice by given scores is for: of gates, clusters, or whatever else scores partitions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ChooseConfig {
    /// (Request, KV head) pairs.
    pub rows: usize,
    /// Rows of raw scores to a row; 1 where they are aggregated already.
    pub columns: usize,
    /// Partitions that a row may have.
    pub max_partitions: usize,
    /// Pages of a partition, where all have the same number; else every run is given first pages.
    pub partition_pages: usize,
    /// Pages that a row may select.
    pub max_selected: usize,
    /// Partitions that a row may estimate.
    pub max_estimated: usize,
    /// First and last partitions that are always kept, and the share that is estimated. Scores are compared as they are,
    /// whatever the aggregation: the largest of the columns counts.
    pub rule: SelectRule,
}

/// Prepared choice: [`choose`](crate::select::choose) on the device.
#[derive(Debug, Clone)]
pub struct Choose<F> {
    params: SparseSelectParams,
    kernel: kernels::Select<F>,
}

/// Arguments of [`Choose::run`].
#[derive(Debug)]
pub struct ChooseArgs<'a> {
    /// Scores `[rows, columns, max_partitions]`.
    pub scores: &'a View<'a, f32>,
    /// Partitions of each row `[rows]`.
    pub num_partitions: &'a View<'a, u32>,
    /// Pages that a row may select `[rows]`.
    pub budget: &'a View<'a, u32>,
    /// First page of each partition and the end of the last `[rows, max_partitions + 1]`, for partitions of different sizes.
    pub first_page: Option<&'a View<'a, u32>>,
    /// Out: the largest of the columns `[rows, max_partitions]`.
    pub aggregated: ViewMut<'a, f32>,
    /// Out: pages in increasing order `[rows, max_selected]`, then [`NONE`](crate::metadata::NONE).
    pub selected: ViewMut<'a, u32>,
    /// Out: partitions to estimate `[rows, max_estimated]`, then [`NONE`](crate::metadata::NONE), where some are.
    pub estimated: Option<ViewMut<'a, u32>>,
    /// Status word: as of [`SelectArgs`], and [`FaultCode::BadRange`](attention::FaultCode::BadRange) with a row whose first
    /// pages do not ascend.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function> Choose<F> {
    /// Checks the sizes, compiles and loads. May block.
    ///
    /// # Errors
    /// [`Error::Argument`] for a size out of range, [`Error::Cuda`] when the kernel cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, config: &ChooseConfig) -> Result<Self, Error> {
        let params = SparseSelectParams {
            estimate: config.rule.estimate,
            rows: size("rows", config.rows)?,
            columns: size("columns", config.columns)?,
            max_partitions: size("max_partitions", config.max_partitions)?,
            blocks: 1,
            max_selected: size("max_selected", config.max_selected)?,
            max_estimated: if config.max_estimated == 0 {
                0
            } else {
                size("max_estimated", config.max_estimated)?
            },
            sinks: count("sinks", config.rule.sinks)?,
            recent: count("recent", config.rule.recent)?,
            partition_pages: size("partition_pages", config.partition_pages)?,
            aggregation: SPARSE_RAW,
            scale: config.rule.score.scale(),
            soft_cap: 0.0,
        };
        Ok(Choose { params, kernel: kernels::Select::prepare(device)? })
    }

    /// Enqueues the choice.
    ///
    /// # Errors
    /// [`Error::Cuda`] names an argument that does not fit.
    pub fn run(&self, queue: &F::Queue, args: ChooseArgs<'_>) -> Result<(), Error> {
        let args = kernels::SelectArgs {
            params: &self.params,
            scores: args.scores,
            sums: None,
            num_partitions: args.num_partitions,
            budget: args.budget,
            first_page: args.first_page,
            rows: None,
            epoch: None,
            aggregated: args.aggregated,
            selected: args.selected,
            estimated: args.estimated,
            status: args.status,
        };
        Ok(self.kernel.launch(queue, args)?)
    }
}
