//! Attention on codes: split over the pages, planned on the device.

use attention::gpu::Splits;
use attention::{HeadShape, Mask, Score};
use cuda::kernels::homomorphic_quant as kernels;
use cuda::kernels::homomorphic_quant::Method;
use cuda::launch::{Device, Function};
use cuda::memory::{View, ViewMut};
use cuda::params::HackDecodeParams;
use cuda::storage::Storage;
use cuda::workspace::{Carver, Layout, Region};

use super::params::{Queried, params};
use super::{Places, Pools, check_dims, check_dtype, of_plan, side_args, to_u32};
use crate::Error;

/// Units below which a block's range is not split further: two pages for each of four teams.
const MIN_UNITS_PER_BLOCK: u32 = 8;

/// What a step is for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DecodeConfig {
    /// What to do with codes: [`Method::Codes`], unless to compare.
    pub method: Method,
    /// The cache.
    pub pools: Pools,
    /// Heads and sizes.
    pub shape: HeadShape,
    /// Scale and soft-cap.
    pub score: Score,
    /// [`Mask::Causal`], or [`Mask::SlidingWindow`] with at most as many sinks as the cache.
    pub mask: Mask,
    /// Sequences of every step; empty ones have length 0.
    pub batch: usize,
    /// Queries per sequence, aligned to the end of its tokens: 1 to decode, a chunk to prefill on codes.
    pub q_len: usize,
    /// Longest sequence.
    pub max_kv_len: usize,
    /// How pages are split over blocks; fixed parts are whole blocks of Π tokens.
    pub splits: Splits,
    /// SMs of the device.
    pub sm_count: u32,
}

/// Grid, variant and workspace of a step.
#[derive(Debug, Clone)]
pub struct DecodePlan {
    config: DecodeConfig,
    variant: kernels::DecodeVariant,
    params: HackDecodeParams,
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
    /// Plans steps. Needs no device.
    ///
    /// # Errors
    /// [`Error::Argument`] for a shape, mask or size that the kernels do not support.
    pub fn new(config: DecodeConfig) -> Result<Self, Error> {
        let (shape, pools, geometry) = (config.shape, config.pools, *config.pools.geometry());
        check_dims(config.method.kernel(), &geometry)?;
        if config.sm_count == 0 {
            return Err(Error::argument("sm_count", "at least 1", 0));
        }
        let queried = Queried {
            shape,
            score: config.score,
            mask: config.mask,
            batch: config.batch,
            q_len: config.q_len,
            max_kv_len: config.max_kv_len,
        };
        let params = params(&pools, &queried)?;
        let (unit_pages, fixed_parts) = match config.splits {
            Splits::Balanced => (1, false),
            Splits::Fixed { tokens } if tokens > 0 && tokens.is_multiple_of(geometry.partition) => {
                (to_u32("splits", tokens / geometry.partition)?, true)
            }
            Splits::Fixed { tokens } => {
                let expected = format!("a multiple of {} tokens", geometry.partition);
                return Err(Error::argument("splits", expected, tokens));
            }
        };

        let queries = config.q_len.saturating_mul(shape.group());
        let column_tiles = match queries {
            ..=8 => 1,
            9..=16 => 2,
            _ => 4,
        };
        let columns = kernels::columns(column_tiles);
        let params = HackDecodeParams {
            column_blocks: queries.div_ceil(columns) as u32,
            unit_pages,
            fixed_parts: u32::from(fixed_parts),
            min_units: if fixed_parts { 1 } else { MIN_UNITS_PER_BLOCK },
            ..params
        };
        kernels::check_params(config.method.kernel(), &params).map_err(of_plan)?;
        let variant = kernels::DecodeVariant {
            method: config.method,
            k_bits: geometry.bits.k.count(),
            v_bits: geometry.bits.v.count(),
            partition: geometry.partition,
            qk_dim: shape.qk_dim(),
            v_dim: shape.v_dim(),
            column_tiles,
            soft_cap: config.score.soft_cap().is_some(),
        };

        let per_sm = variant.blocks_per_sm();
        let blocks = config.sm_count.checked_mul(per_sm).filter(|blocks| *blocks <= i32::MAX as u32);
        let blocks = blocks.ok_or_else(|| {
            let expected = format!("at most {}", i32::MAX as u32 / per_sm);
            Error::argument("sm_count", expected, config.sm_count)
        })?;
        let slots = kernels::part_slots(&params, blocks).saturating_mul(columns);
        let mut step = Layout::new();
        let step = StepBuffers {
            valid_len: step.scratch(config.batch)?,
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

    /// Bytes of pages and 16-bit tokens that a layer reads for sequences of these lengths, each once; without a window.
    pub fn bytes_moved(&self, kv_lens: &[usize]) -> u64 {
        let pools = &self.config.pools;
        let of_len = |&len: &usize| {
            let (closed, exact) = pools.split(len);
            (closed * pools.page_bytes() + exact * pools.kv_heads() * pools.open_page().token_bytes()) as u64
        };
        kv_lens.iter().map(of_len).sum()
    }

    /// Operations of a layer for sequences of these lengths: QKᵀ and PV, without the mask's savings.
    pub fn flops(&self, kv_lens: &[usize]) -> u64 {
        let shape = self.config.shape;
        let per_key = 2 * self.config.q_len * shape.q_heads() * (shape.qk_dim() + shape.v_dim());
        kv_lens.iter().map(|len| (len * per_key) as u64).sum()
    }
}

/// The prepared device-side plan of a step.
#[derive(Debug, Clone)]
pub struct DecodeStep<F> {
    plan: DecodePlan,
    kernel: kernels::DecodePlan<F>,
}

/// Arguments of [`DecodeStep::run`].
#[derive(Debug)]
pub struct DecodeStepArgs<'a> {
    /// Tokens of each sequence `[batch]`, the step's own included.
    pub kv_len: &'a View<'a, u32>,
    /// Where they lie.
    pub places: Places<'a>,
    /// Status word: [`FaultCode::BadLength`](attention::FaultCode::BadLength),
    /// [`BadPage`](attention::FaultCode::BadPage) or [`BadIndex`](attention::FaultCode::BadIndex) (sink or open page) with
    /// the sequence, all of whose heads then give 0 and −inf.
    pub status: ViewMut<'a, u64>,
}

fn check_sm_count(device: &impl Device, planned: u32) -> Result<(), Error> {
    match device.sm_count() {
        Some(found) if found != planned => {
            Err(Error::argument("device", format!("{planned} SMs, as planned"), format!("{found} SMs")))
        }
        _ => Ok(()),
    }
}

impl<F: Function> DecodeStep<F> {
    /// Compiles and loads. May block.
    ///
    /// # Errors
    /// [`Error::Argument`] for a device that the plan was not made for, [`Error::Cuda`] when the kernel cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &DecodePlan) -> Result<Self, Error> {
        check_sm_count(device, plan.config.sm_count)?;
        Ok(Self { plan: plan.clone(), kernel: kernels::DecodePlan::prepare(device)? })
    }

    /// Enqueues the plan of one step and returns it; it serves every layer of the step whose pools have the same shape.
    ///
    /// # Errors
    /// [`Error::Cuda`] names an argument or workspace that does not fit.
    pub fn run<'w>(
        &self,
        queue: &F::Queue,
        args: DecodeStepArgs<'_>,
        step_workspace: ViewMut<'w, u8>,
    ) -> Result<PlannedStep<'w>, Error> {
        let buffers = &self.plan.step;
        let carver = Carver::new("hack_decode_plan", step_workspace, &buffers.layout)?;
        let args = kernels::DecodePlanArgs {
            params: &self.plan.params,
            kv_len: args.kv_len,
            places: side_args(&args.places),
            valid_len: carver.take(buffers.valid_len)?,
            first_unit: carver.take(buffers.first_unit)?,
            arrivals: carver.take(buffers.arrivals)?,
            status: args.status,
        };
        self.kernel.launch(queue, args)?;
        Ok(PlannedStep { plan: self.plan.clone(), workspace: carver.into_workspace() })
    }
}

/// A step that [`DecodeStep::run`] has planned on a queue: what its layers need to know.
///
/// It holds the step's workspace, so that nobody else writes what the kernels trust.
#[derive(Debug)]
pub struct PlannedStep<'w> {
    plan: DecodePlan,
    workspace: ViewMut<'w, u8>,
}

/// Prepared attention on codes. `E` is the storage type of q, of the cache's 16-bit values and of the output.
#[derive(Debug, Clone)]
pub struct Decode<F, E> {
    plan: DecodePlan,
    kernel: kernels::Decode<F, E>,
}

/// Arguments of [`Decode::run`].
#[derive(Debug)]
pub struct DecodeArgs<'a, E> {
    /// Queries `[batch, q_len, q_heads, qk_dim]`.
    pub q: &'a View<'a, E>,
    /// Packed pages.
    pub pages: &'a View<'a, u8>,
    /// Sinks.
    pub sink_pool: &'a View<'a, E>,
    /// Open blocks.
    pub open_pool: &'a View<'a, E>,
    /// Where the sequences lie, the same as given to the step.
    pub places: Places<'a>,
    /// Outputs `[batch, q_len, q_heads, v_dim]`.
    pub out: ViewMut<'a, E>,
    /// Log-sum-exps `[batch, q_len, q_heads]`, natural log.
    pub lse: ViewMut<'a, f32>,
}

impl<F: Function, E: Storage> Decode<F, E> {
    /// Compiles and loads. May block.
    ///
    /// # Errors
    /// [`Error::Argument`] for a device that the plan was not made for or when `E` is not the cache's type, [`Error::Cuda`]
    /// when the kernel cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &DecodePlan) -> Result<Self, Error> {
        check_sm_count(device, plan.config.sm_count)?;
        check_dtype::<E>(&plan.config.pools)?;
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
        let carver = Carver::new(self.plan.variant.method.kernel(), workspace, &layer.layout)?;
        let valid_len = buffers.layout.view(buffers.valid_len, &step.workspace)?;
        let first_unit = buffers.layout.view(buffers.first_unit, &step.workspace)?;
        let args = kernels::DecodeArgs {
            params: &self.plan.params,
            blocks: self.plan.blocks,
            q: args.q,
            pages: args.pages,
            sink_pool: args.sink_pool,
            open_pool: args.open_pool,
            places: side_args(&args.places),
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
