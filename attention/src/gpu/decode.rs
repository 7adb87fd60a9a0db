//! Decode attention: split over the keys, planned on the device.

use std::sync::Arc;

use cuda::kernels::attention as kernels;
use cuda::launch::{Device, Function};
use cuda::memory::{View, ViewMut};
use cuda::params::{DECODE_TILE, DecodeParams};
use cuda::storage::Storage;
use cuda::workspace::{Carver, Layout, Region};

use super::cache::{self, CacheLayout, to_u32};
use super::check_sm_count;
use crate::{DType, Error, HeadShape, Mask, Score};

/// Blocks per SM; the rings of three fit the 227 KB of an sm_90 SM.
const BLOCKS_PER_SM: u32 = 3;
/// Tiles below which a block's range is not split further: a part costs a partial state and a share of the merge.
const MIN_TILES_PER_BLOCK: u32 = 2;

/// How the keys of a sequence are split over blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Splits {
    /// Every block gets the same number of tiles of the batch: fastest. Results of a sequence depend, in the last bits, on
    /// the lengths of the others.
    Balanced,
    /// Parts of this many tokens, a multiple of 64, whatever else is in the batch: results are batch-invariant.
    Fixed {
        /// Tokens per part.
        tokens: usize,
    },
}

/// What a decode step is for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DecodeConfig {
    /// Heads and sizes.
    pub shape: HeadShape,
    /// Scale and soft-cap.
    pub score: Score,
    /// [`Mask::Causal`], or [`Mask::SlidingWindow`] without sinks.
    pub mask: Mask,
    /// Sequences of every step; empty ones have length 0.
    pub batch: usize,
    /// Queries per sequence, 1 to 8, aligned to the end of its keys.
    pub q_len: usize,
    /// Longest sequence.
    pub max_kv_len: usize,
    /// Where keys and values lie.
    pub cache: CacheLayout,
    /// How keys are split over blocks.
    pub splits: Splits,
    /// SMs of the device.
    pub sm_count: u32,
}

/// Grid, variant and workspace of a decode step.
#[derive(Debug, Clone)]
pub struct DecodePlan {
    config: DecodeConfig,
    variant: kernels::DecodeVariant,
    params: DecodeParams,
    blocks: u32,
    step: StepBuffers,
    layer: LayerBuffers,
}

/// Buffers that one step's plan writes and all its layers read.
#[derive(Debug, Clone)]
struct StepBuffers {
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
    /// Plans decode steps. Needs no device.
    ///
    /// # Errors
    /// [`Error::Argument`] for a shape, mask, cache or size that the kernels do not support.
    pub fn new(config: DecodeConfig) -> Result<Self, Error> {
        let shape = config.shape;
        if !(1..=8).contains(&config.q_len) {
            return Err(Error::argument("q_len", "1 to 8 queries", config.q_len));
        }
        if config.batch == 0 || config.sm_count == 0 {
            let argument = if config.batch == 0 { "batch" } else { "sm_count" };
            return Err(Error::argument(argument, "at least 1", 0));
        }
        let window = match config.mask {
            Mask::Causal => 0,
            Mask::SlidingWindow { window, sinks: 0 } => cache::window(window)?,
            other => {
                return Err(Error::argument(
                    "mask",
                    "causal, or a sliding window without sinks",
                    format!("{other:?}"),
                ));
            }
        };
        let (unit_tiles, fixed_parts) = match config.splits {
            Splits::Balanced => (1, false),
            Splits::Fixed { tokens } if tokens > 0 && tokens.is_multiple_of(DECODE_TILE as usize) => {
                (to_u32("splits", tokens)? / DECODE_TILE, true)
            }
            Splits::Fixed { tokens } => {
                return Err(Error::argument("splits", format!("a multiple of {DECODE_TILE} tokens"), tokens));
            }
        };

        let queries = config.q_len * shape.group();
        let column_tiles = if queries <= 8 { 1 } else { 2 };
        let cache = config.cache.params(config.batch)?;
        let params = DecodeParams {
            k_page_stride: cache.k[0],
            k_token_stride: cache.k[1],
            k_head_stride: cache.k[2],
            v_page_stride: cache.v[0],
            v_token_stride: cache.v[1],
            v_head_stride: cache.v[2],
            table_head_stride: cache.table[0],
            table_batch_stride: cache.table[1],
            batch: to_u32("batch", config.batch)?,
            q_len: config.q_len as u32,
            kv_heads: to_u32("kv_heads", shape.kv_heads())?,
            group: shape.group() as u32,
            column_blocks: queries.div_ceil(kernels::columns(column_tiles)) as u32,
            page_shift: cache.page_shift,
            max_pages: cache.max_pages,
            num_pages: cache.pages,
            num_tokens: cache.tokens,
            max_kv_len: to_u32("max_kv_len", config.max_kv_len)?,
            window,
            unit_tiles,
            fixed_parts: u32::from(fixed_parts),
            min_units: if fixed_parts { 1 } else { MIN_TILES_PER_BLOCK },
            scale: config.score.scale(),
            soft_cap: config.score.soft_cap().unwrap_or(0.0),
        };
        let variant = kernels::DecodeVariant {
            qk_dim: shape.qk_dim(),
            v_dim: shape.v_dim(),
            column_tiles,
            paged: cache.paged,
            soft_cap: config.score.soft_cap().is_some(),
        };

        variant.check(&params)?;
        let blocks = config.sm_count.checked_mul(BLOCKS_PER_SM).filter(|blocks| *blocks <= i32::MAX as u32);
        let blocks = blocks.ok_or_else(|| {
            let expected = format!("at most {}", i32::MAX as u32 / BLOCKS_PER_SM);
            Error::argument("sm_count", expected, config.sm_count)
        })?;
        let columns = kernels::columns(column_tiles);
        let slots = kernels::part_slots(&params, blocks).saturating_mul(columns);
        let mut step = Layout::new();
        let step = StepBuffers {
            valid_len: step.scratch(kernels::valid_lens(&params))?,
            first_unit: step.scratch(config.batch + 1)?,
            arrivals: step.counters(1)?,
            layout: step,
        };
        let items =
            config.batch.saturating_mul(shape.kv_heads()).saturating_mul(params.column_blocks as usize);
        let mut layer = Layout::new();
        let layer = LayerBuffers {
            part_acc: layer.scratch(slots.saturating_mul(shape.v_dim()))?,
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

    /// Layout of the workspace that every [`Decode::run`] uses, zeroed before the first; layers on one stream share it.
    pub fn workspace(&self) -> &Layout {
        &self.layer.layout
    }

    /// Bytes of K and V that a layer reads for sequences of these lengths, each once.
    pub fn bytes_moved(&self, kv_lens: &[usize], dtype: DType) -> u64 {
        let shape = self.config.shape;
        let per_token = shape.kv_heads() * (shape.qk_dim() + shape.v_dim()) * dtype.size();
        let visible = |len: usize| match self.config.mask {
            Mask::SlidingWindow { window, .. } => len.min(window + self.config.q_len - 1),
            _ => len,
        };
        kv_lens.iter().map(|len| (visible(*len) * per_token) as u64).sum()
    }

    /// Floating-point operations of a layer for sequences of these lengths: QKᵀ and PV, without the mask's savings.
    pub fn flops(&self, kv_lens: &[usize]) -> u64 {
        let shape = self.config.shape;
        let per_key = 2 * self.config.q_len * shape.q_heads() * (shape.qk_dim() + shape.v_dim());
        kv_lens.iter().map(|len| (len * per_key) as u64).sum()
    }
}

/// The prepared device-side plan of a step.
#[derive(Debug, Clone)]
pub struct DecodeStep<F> {
    plan: Arc<DecodePlan>,
    kernel: kernels::DecodePlan<F>,
}

/// Arguments of [`DecodeStep::run`]; one of `block_table` and `kv_start` is given, as the cache asks for.
#[derive(Debug)]
pub struct DecodeStepArgs<'a> {
    /// Keys of each sequence `[batch]`, the step's own included.
    pub kv_len: &'a View<'a, u32>,
    /// Page ids `[batch, max_pages]` or `[kv_heads, batch, max_pages]`. Entries of pages that no query of the step sees, past
    /// the length or before every window, are not read.
    pub block_table: Option<&'a View<'a, u32>>,
    /// First token of each sequence `[batch]`.
    pub kv_start: Option<&'a View<'a, u32>>,
    /// Status word: [`FaultCode::BadLength`](crate::FaultCode::BadLength) or
    /// [`BadPage`](crate::FaultCode::BadPage) with the sequence, all of whose heads then give 0 and −inf; of a table with
    /// rows per KV head, only the heads whose row is bad.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function> DecodeStep<F> {
    /// Compiles and loads. May block.
    ///
    /// # Errors
    /// [`Error::Argument`] for a device that the plan was not made for, [`Error::Cuda`] when the kernel cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &DecodePlan) -> Result<Self, Error> {
        check_sm_count(device, plan.config.sm_count)?;
        Ok(Self { plan: Arc::new(plan.clone()), kernel: kernels::DecodePlan::prepare(device)? })
    }

    /// Enqueues the plan of one step and returns it; it serves every layer of the step.
    ///
    /// # Errors
    /// [`Error::Argument`] where the cache of the plan asks for the other of `block_table` and `kv_start`, [`Error::Cuda`]
    /// names an argument or workspace that does not fit.
    pub fn run<'w>(
        &self,
        queue: &F::Queue,
        args: DecodeStepArgs<'_>,
        step_workspace: ViewMut<'w, u8>,
    ) -> Result<PlannedStep<'w>, Error> {
        // The kernel goes by what it is given; the layers go by the plan.
        let paged = self.plan.variant.paged;
        if paged != args.block_table.is_some() {
            let [expected, found] = [paged, !paged].map(|is| if is { "given" } else { "missing" });
            return Err(Error::argument("block_table", expected, found));
        }
        let buffers = &self.plan.step;
        let carver = Carver::new("decode_plan", step_workspace, &buffers.layout)?;
        let args = kernels::DecodePlanArgs {
            params: &self.plan.params,
            kv_len: args.kv_len,
            kv_start: args.kv_start,
            block_table: args.block_table,
            valid_len: carver.take(buffers.valid_len)?,
            first_unit: carver.take(buffers.first_unit)?,
            arrivals: carver.take(buffers.arrivals)?,
            status: args.status,
        };
        self.kernel.launch(queue, args)?;
        Ok(PlannedStep { plan: Arc::clone(&self.plan), workspace: carver.into_workspace() })
    }
}

/// A step that [`DecodeStep::run`] has planned on a queue: what its layers need to know.
///
/// It holds the step's workspace, so that nobody else writes what the kernels trust.
#[derive(Debug)]
pub struct PlannedStep<'w> {
    plan: Arc<DecodePlan>,
    workspace: ViewMut<'w, u8>,
}

/// Prepared decode attention. `E` is the storage type of q, K, V and the output.
#[derive(Debug, Clone)]
pub struct Decode<F, E> {
    plan: DecodePlan,
    kernel: kernels::Decode<F, E>,
}

/// Arguments of [`Decode::run`]; one of `block_table` and `kv_start` is given, the same as to the step.
#[derive(Debug)]
pub struct DecodeArgs<'a, E> {
    /// Queries `[batch, q_len, q_heads, qk_dim]`.
    pub q: &'a View<'a, E>,
    /// Keys, by the cache's strides. Keys and values that some query of a sequence sees are finite; a NaN or infinity among
    /// them may reach its other queries. What no query sees may hold anything.
    pub k: &'a View<'a, E>,
    /// Values, by the cache's strides.
    pub v: &'a View<'a, E>,
    /// Page ids `[batch, max_pages]` or `[kv_heads, batch, max_pages]`.
    pub block_table: Option<&'a View<'a, u32>>,
    /// First token of each sequence `[batch]`.
    pub kv_start: Option<&'a View<'a, u32>>,
    /// Outputs `[batch, q_len, q_heads, v_dim]`.
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
        Ok(Self { plan: plan.clone(), kernel: kernels::Decode::prepare(device, plan.variant)? })
    }

    /// Enqueues one layer's attention and returns. `step` was planned on the same queue, by the same plan.
    ///
    /// # Errors
    /// [`Error::Argument`] for a step of another plan, [`Error::Cuda`] names an argument or workspace that does not fit.
    pub fn run(
        &self,
        queue: &F::Queue,
        args: DecodeArgs<'_, E>,
        step: &PlannedStep<'_>,
        workspace: ViewMut<'_, u8>,
    ) -> Result<(), Error> {
        if step.plan.config != self.plan.config {
            return Err(Error::argument("step", "a step of the same plan", "a step of another"));
        }
        let (buffers, layer) = (&self.plan.step, &self.plan.layer);
        let carver = Carver::new("decode", workspace, &layer.layout)?;
        let valid_len = buffers.layout.view(buffers.valid_len, &step.workspace)?;
        let first_unit = buffers.layout.view(buffers.first_unit, &step.workspace)?;
        let args = kernels::DecodeArgs {
            params: &self.plan.params,
            blocks: self.plan.blocks,
            q: args.q,
            k: args.k,
            v: args.v,
            block_table: args.block_table,
            kv_start: args.kv_start,
            valid_len: &valid_len,
            first_unit: &first_unit,
            out: args.out,
            lse: args.lse,
            part_acc: carver.take(layer.part_acc)?,
            part_ml: carver.take(layer.part_ml)?,
            arrivals: carver.take(layer.arrivals)?,
            programmatic: false,
        };
        // SAFETY: both buffers lie in the workspace of a step that `DecodeStep::run` planned by the same configuration, hence
        // with the same parameters; the step borrows it exclusively, so nobody has written it since.
        Ok(unsafe { self.kernel.launch(queue, args) }?)
    }
}
