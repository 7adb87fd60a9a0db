//! Decode attention in the reduced basis: balanced by bytes over heads of any ranks, planned on the device.

use attention::{DType, HeadShape, Mask, Score};
use cuda::kernels::attention as dense;
use cuda::kernels::kv_compress as kernels;
use cuda::launch::{Device, Function};
use cuda::memory::{View, ViewMut};
use cuda::params::{
    DecodeParams, FDC_GROUP, FDC_RANK_STEP, FDC_SPLIT_BALANCED, FDC_SPLIT_FIXED, FDC_SPLIT_NONE,
    FdcDecodeParams,
};
use cuda::storage::Storage;
use cuda::workspace::{Carver, Layout, Region};

use super::{check_sm_count, head_dim, heads, page_shift, to_u32};
use crate::Error;
use crate::cache::PageLayout;

/// Bytes of 16 tokens of 16 channels: the kernel's unit of work.
const WEIGHT_BYTES: usize = (FDC_GROUP * FDC_RANK_STEP) as usize * 2;
/// Work of an item besides its bytes, in weights: the start and end of an item cost about as much as 8 KB of keys.
const ITEM_WEIGHT: u32 = 16;
/// Work below which a block's range is not split further, in weights: a part costs a partial state and a share of the merge.
const MIN_WEIGHT: u32 = 128;

/// How the keys of a sequence are split over blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Splits {
    /// Every block gets the same number of bytes, to 16 tokens: fastest. Results of a sequence depend, in the last bits, on
    /// the lengths of the others.
    Balanced,
    /// Parts of this many bytes of keys and values, rounded down to 16 tokens of the head, whatever else is in the batch:
    /// results are batch-invariant.
    Fixed {
        /// Bytes per part, at least 1024.
        bytes: usize,
    },
    /// One block for every sequence and KV head, as kernels without balancing have it. A baseline for benches.
    OneBlockPerHead,
}

/// What a decode step of one layer is for.
#[derive(Debug, Clone, PartialEq)]
pub struct DecodeConfig {
    /// Heads and sizes, before the reduction. Keys and values have one dimension.
    pub shape: HeadShape,
    /// Where keys and values lie, and their ranks.
    pub layout: PageLayout,
    /// Pages in the pool.
    pub pages: usize,
    /// Entries of the block table per sequence.
    pub max_pages: usize,
    /// Scale and soft-cap. The scale is that of the full head dimension, whatever the ranks.
    pub score: Score,
    /// [`Mask::Causal`], or [`Mask::SlidingWindow`] without sinks.
    pub mask: Mask,
    /// Sequences of every step; empty ones have length 0.
    pub batch: usize,
    /// Queries per sequence, 1 to 8, aligned to the end of its keys.
    pub q_len: usize,
    /// Longest sequence.
    pub max_kv_len: usize,
    /// How keys are split over blocks.
    pub splits: Splits,
    /// SMs of the device.
    pub sm_count: u32,
}

/// Grid, variant and workspace of a decode step of one layer.
#[derive(Debug, Clone)]
pub struct DecodePlan {
    config: DecodeConfig,
    variant: kernels::FdcDecodeVariant,
    params: FdcDecodeParams,
    blocks: u32,
    step: StepPlan,
    layer: LayerBuffers,
}

/// What the layers of a step have in common, whatever their ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
struct StepShape {
    batch: u32,
    q_len: u32,
    page_shift: u32,
    max_pages: u32,
    num_pages: u32,
    max_kv_len: u32,
    window: u32,
}

/// Buffers that one step's plan writes and all its layers read.
#[derive(Debug, Clone)]
struct StepPlan {
    shape: StepShape,
    layout: Layout,
    valid_len: Region<u32>,
    first_unit: Region<u32>,
    arrivals: Region<u32>,
}

/// Buffers that every layer uses anew.
#[derive(Debug, Clone)]
struct LayerBuffers {
    layout: Layout,
    part_acc: Region<f32>,
    part_ml: Region<f32>,
    arrivals: Region<u32>,
}

impl DecodePlan {
    /// Plans decode steps of one layer. Needs no device.
    ///
    /// # Errors
    /// [`Error::Argument`] for a shape, mask, cache or size that the kernels do not support.
    pub fn new(config: DecodeConfig) -> Result<Self, Error> {
        let shape = config.shape;
        let head_dim = head_dim("fdc_decode", shape)?;
        if !(1..=8).contains(&config.q_len) {
            return Err(Error::argument("q_len", "1 to 8 queries", config.q_len));
        }
        let at_least_1 = [
            ("batch", config.batch),
            ("pages", config.pages),
            ("max_pages", config.max_pages),
            ("sm_count", config.sm_count as usize),
        ];
        for (argument, value) in at_least_1 {
            if value == 0 {
                return Err(Error::argument(argument, "at least 1", 0));
            }
        }
        let window = match config.mask {
            Mask::Causal => 0,
            Mask::SlidingWindow { window: 0, .. } => {
                return Err(Error::argument("mask", "a window of at least 1 key", 0));
            }
            Mask::SlidingWindow { window, sinks: 0 } => to_u32("window", window)?,
            other => {
                let expected = "causal, or a sliding window without sinks";
                return Err(Error::argument("mask", expected, format!("{other:?}")));
            }
        };
        let (split, part_weight) = match config.splits {
            Splits::Balanced => (FDC_SPLIT_BALANCED, 1),
            Splits::OneBlockPerHead => (FDC_SPLIT_NONE, 1),
            Splits::Fixed { bytes } if bytes >= 2 * WEIGHT_BYTES => {
                (FDC_SPLIT_FIXED, to_u32("splits", bytes / WEIGHT_BYTES)?)
            }
            Splits::Fixed { bytes } => {
                return Err(Error::argument("splits", format!("at least {} bytes", 2 * WEIGHT_BYTES), bytes));
            }
        };
        let step = StepPlan::new(StepShape {
            batch: to_u32("batch", config.batch)?,
            q_len: config.q_len as u32,
            page_shift: page_shift(&config.layout),
            max_pages: to_u32("max_pages", config.max_pages)?,
            num_pages: to_u32("pages", config.pages)?,
            max_kv_len: to_u32("max_kv_len", config.max_kv_len)?,
            window,
        })?;

        let queries = config.q_len * shape.group();
        let column_tiles = if queries <= 8 { 1 } else { 2 };
        let mut params = FdcDecodeParams {
            page_stride: config.layout.page_elements() as i64,
            table_batch_stride: i64::from(step.shape.max_pages),
            batch: step.shape.batch,
            q_len: step.shape.q_len,
            group: to_u32("q_heads", shape.group())?,
            column_blocks: queries.div_ceil(kernels::columns(column_tiles)) as u32,
            page_shift: step.shape.page_shift,
            max_pages: step.shape.max_pages,
            num_pages: step.shape.num_pages,
            window,
            split,
            part_weight,
            max_parts: 1,
            item_weight: ITEM_WEIGHT,
            min_weight: MIN_WEIGHT,
            scale: config.score.scale(),
            soft_cap: config.score.soft_cap().unwrap_or(0.0),
            padding: 0,
            heads: heads(shape, config.layout.ranks())?,
        };
        if split == FDC_SPLIT_FIXED {
            params.max_parts = kernels::max_parts(&params, config.max_kv_len);
        }
        let variant =
            kernels::FdcDecodeVariant { head_dim, column_tiles, soft_cap: config.score.soft_cap().is_some() };

        let per_sm = variant.blocks_per_sm();
        let blocks = config.sm_count.checked_mul(per_sm).filter(|blocks| *blocks <= 1 << 16);
        let blocks = blocks.ok_or_else(|| {
            Error::argument("sm_count", format!("at most {}", (1 << 16) / per_sm), config.sm_count)
        })?;
        let columns = kernels::columns(column_tiles);
        let slots = kernels::part_slots(&params, blocks).saturating_mul(columns);
        let items =
            config.batch.saturating_mul(shape.kv_heads()).saturating_mul(params.column_blocks as usize);
        let mut layer = Layout::new();
        let layer = LayerBuffers {
            part_acc: layer.scratch(slots.saturating_mul(head_dim))?,
            part_ml: layer.scratch(slots.saturating_mul(2))?,
            arrivals: layer.counters(items)?,
            layout: layer,
        };
        Ok(Self { config, variant, params, blocks, step, layer })
    }

    /// Layout of the workspace that [`DecodeStep::run`] fills once per step, zeroed before the first step.
    pub fn step_workspace(&self) -> &Layout {
        &self.step.layout
    }

    /// Layout of the workspace that every [`Decode::run`] uses, zeroed before the first; layers on one stream share the
    /// largest of theirs.
    pub fn workspace(&self) -> &Layout {
        &self.layer.layout
    }

    /// Bytes of keys and values that the layer reads for sequences of these lengths, each once.
    pub fn bytes_moved(&self, kv_lens: &[usize], dtype: DType) -> u64 {
        let per_token = self.config.layout.ranks().elements() * dtype.size();
        let visible = |len: usize| match self.config.mask {
            Mask::SlidingWindow { window, .. } => len.min(window + self.config.q_len - 1),
            _ => len,
        };
        kv_lens.iter().map(|len| (visible(*len) * per_token) as u64).sum()
    }

    /// Floating-point operations of the layer for sequences of these lengths: q̃K̃ᵀ and PṼ, without the mask's savings.
    pub fn flops(&self, kv_lens: &[usize]) -> u64 {
        let per_key =
            2 * self.config.q_len * self.config.shape.group() * self.config.layout.ranks().elements();
        kv_lens.iter().map(|len| (len * per_key) as u64).sum()
    }
}

impl StepPlan {
    fn new(shape: StepShape) -> Result<Self, Error> {
        let mut layout = Layout::new();
        Ok(StepPlan {
            shape,
            valid_len: layout.scratch(shape.batch as usize)?,
            first_unit: layout.scratch(shape.batch as usize + 1)?,
            arrivals: layout.counters(1)?,
            layout,
        })
    }

    /// The step as the dense kernels' plan takes it: it checks lengths and pages and sums up tiles, for any ranks.
    fn params(&self) -> DecodeParams {
        DecodeParams {
            table_batch_stride: i64::from(self.shape.max_pages),
            batch: self.shape.batch,
            q_len: self.shape.q_len,
            kv_heads: 1,
            group: 1,
            column_blocks: 1,
            page_shift: self.shape.page_shift,
            max_pages: self.shape.max_pages,
            num_pages: self.shape.num_pages,
            max_kv_len: self.shape.max_kv_len,
            window: self.shape.window,
            unit_tiles: 1,
            min_units: 1,
            ..bytemuck::Zeroable::zeroed()
        }
    }
}

/// The prepared device-side plan of a step.
#[derive(Debug, Clone)]
pub struct DecodeStep<F> {
    step: StepPlan,
    kernel: dense::DecodePlan<F>,
}

/// Arguments of [`DecodeStep::run`].
#[derive(Debug)]
pub struct DecodeStepArgs<'a> {
    /// Keys of each sequence `[batch]`, the step's own included.
    pub kv_len: &'a View<'a, u32>,
    /// Page ids `[batch, max_pages]`.
    pub block_table: &'a View<'a, u32>,
    /// Status word: [`FaultCode::BadLength`](attention::FaultCode::BadLength) or
    /// [`BadPage`](attention::FaultCode::BadPage) with the sequence, all of whose heads then give 0 and −inf.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function> DecodeStep<F> {
    /// Compiles and loads. May block.
    ///
    /// # Errors
    /// [`Error::Argument`] for a device that the plan was not made for, [`Error::Cuda`] when the kernel cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &DecodePlan) -> Result<Self, Error> {
        check_sm_count(device, plan.config.sm_count)?;
        Ok(Self { step: plan.step.clone(), kernel: dense::DecodePlan::prepare(device)? })
    }

    /// Enqueues the plan of one step and returns it; it serves every layer of the step whose plan has the same batch,
    /// lengths, mask and page table, whatever its ranks.
    ///
    /// # Errors
    /// [`Error::Cuda`] names an argument or workspace that does not fit.
    pub fn run<'w>(
        &self,
        queue: &F::Queue,
        args: DecodeStepArgs<'_>,
        step_workspace: ViewMut<'w, u8>,
    ) -> Result<PlannedStep<'w>, Error> {
        let step = &self.step;
        let carver = Carver::new("decode_plan", step_workspace, &step.layout)?;
        let args = dense::DecodePlanArgs {
            params: &step.params(),
            kv_len: args.kv_len,
            kv_start: None,
            block_table: Some(args.block_table),
            valid_len: carver.take(step.valid_len)?,
            first_unit: carver.take(step.first_unit)?,
            arrivals: carver.take(step.arrivals)?,
            status: args.status,
        };
        self.kernel.launch(queue, args)?;
        Ok(PlannedStep { shape: step.shape, workspace: carver.into_workspace() })
    }
}

/// A step that [`DecodeStep::run`] has planned on a queue: what its layers need to know.
///
/// It holds the step's workspace, so that nobody else writes what the kernels trust.
#[derive(Debug)]
pub struct PlannedStep<'w> {
    shape: StepShape,
    workspace: ViewMut<'w, u8>,
}

/// Prepared decode attention of a layer. `E` is the storage type of queries, cache and outputs.
#[derive(Debug, Clone)]
pub struct Decode<F, E> {
    plan: DecodePlan,
    kernel: kernels::FdcDecode<F, E>,
}

/// Arguments of [`Decode::run`].
#[derive(Debug)]
pub struct DecodeArgs<'a, E> {
    /// Projected queries `[batch, q_len, Σ group · r_k]`, KV head after KV head `[group, r_k]`.
    pub q: &'a View<'a, E>,
    /// The cache's pages `[pages, page_elements]`.
    pub pages: &'a View<'a, E>,
    /// Page ids `[batch, max_pages]`.
    pub block_table: &'a View<'a, u32>,
    /// Outputs in the reduced basis of the values `[batch, q_len, Σ group · r_v]`, KV head after KV head `[group, r_v]`.
    pub out: ViewMut<'a, E>,
    /// Log-sum-exps `[batch, q_len, q_heads]`, natural log.
    pub lse: ViewMut<'a, f32>,
}

impl<F: Function, E: Storage> Decode<F, E> {
    /// Compiles and loads. May block.
    ///
    /// # Errors
    /// [`Error::Argument`] for a device that the plan was not made for, [`Error::Cuda`] when the kernel cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &DecodePlan) -> Result<Self, Error> {
        check_sm_count(device, plan.config.sm_count)?;
        Ok(Self { plan: plan.clone(), kernel: kernels::FdcDecode::prepare(device, plan.variant)? })
    }

    /// Enqueues one layer's attention and returns. `step` was planned on the same queue.
    ///
    /// # Errors
    /// [`Error::Argument`] for a step of another batch, mask or page table, [`Error::Cuda`] names an argument or workspace
    /// that does not fit.
    pub fn run(
        &self,
        queue: &F::Queue,
        args: DecodeArgs<'_, E>,
        step: &PlannedStep<'_>,
        workspace: ViewMut<'_, u8>,
    ) -> Result<(), Error> {
        let (buffers, layer) = (&self.plan.step, &self.plan.layer);
        if step.shape != buffers.shape {
            let found = format!("{:?}", step.shape);
            return Err(Error::argument("step", format!("a step of {:?}", buffers.shape), found));
        }
        let carver = Carver::new("fdc_decode", workspace, &layer.layout)?;
        let valid_len = buffers.layout.view(buffers.valid_len, &step.workspace)?;
        let first_unit = buffers.layout.view(buffers.first_unit, &step.workspace)?;
        let args = kernels::FdcDecodeArgs {
            params: &self.plan.params,
            blocks: self.plan.blocks,
            q: args.q,
            pages: args.pages,
            block_table: args.block_table,
            valid_len: &valid_len,
            first_unit: &first_unit,
            out: args.out,
            lse: args.lse,
            part_acc: carver.take(layer.part_acc)?,
            part_ml: carver.take(layer.part_ml)?,
            arrivals: carver.take(layer.arrivals)?,
            programmatic: false,
        };
        // SAFETY: both buffers lie in the workspace of a step that `DecodeStep::run` planned for the same batch, queries,
        // window, page table and largest length, from which fixed parts are counted; the step borrows it exclusively, so
        // nobody has written it since.
        Ok(unsafe { self.kernel.launch(queue, args) }?)
    }
}
