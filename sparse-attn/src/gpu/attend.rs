//! Attention over lists of pages: hits while misses are on their way, then the misses, merged by LSE.

use std::sync::Arc;

use attention::gpu::Splits;
use cuda::kernels::sparse_attn as kernels;
use cuda::launch::{Device, Function};
use cuda::memory::{View, ViewMut};
use cuda::params::{SPARSE_TILE, SparseAttendParams, SparsePlanParams};
use cuda::storage::Storage;
use cuda::workspace::{Carver, Layout, Region};

use super::extent::{Extent, page_shift, size};
use crate::Error;

/// Blocks per SM; the rings of three fit the 227 KB of an sm_90 SM.
const BLOCKS_PER_SM: u32 = 3;
/// Tiles below which a block's range is not split further: a part costs a partial state and a share of the merge.
const MIN_TILES_PER_BLOCK: u32 = 2;

/// What attention is for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttendConfig {
    /// Sizes.
    pub extent: Extent,
    /// Scale and soft-cap.
    pub score: attention::Score,
    /// How the keys of a row are split over blocks.
    pub splits: Splits,
    /// SMs of the device.
    pub sm_count: u32,
}

/// Grid, variant and workspaces of attention over lists.
#[derive(Debug, Clone)]
pub struct AttendPlan {
    config: AttendConfig,
    variant: kernels::AttendVariant,
    lists: SparsePlanParams,
    params: SparseAttendParams,
    blocks: u32,
    list: ListBuffers,
    layer: LayerBuffers,
}

/// What the plan of a step leaves for attention.
#[derive(Debug, Clone)]
struct ListBuffers {
    layout: Layout,
    hits: Region<u32>,
    num_hits: Region<u32>,
    missed: Region<u32>,
    num_missed: Region<u32>,
    hit_unit: Region<u32>,
    missed_unit: Region<u32>,
    arrivals: Region<u32>,
}

/// Buffers that every launch of attention uses anew.
#[derive(Debug, Clone)]
struct LayerBuffers {
    layout: Layout,
    part_acc: Region<f32>,
    part_ml: Region<f32>,
    arrivals: Region<u32>,
}

impl AttendPlan {
    /// Plans attention. Needs no device.
    ///
    /// # Errors
    /// [`Error::Argument`] or [`Error::Cuda`] for a shape or size that the kernels do not support.
    pub fn new(config: AttendConfig) -> Result<Self, Error> {
        config.extent.check()?;
        let Extent { shape, page, max_selected, slots, max_open, max_pages, runs, .. } = config.extent;
        let (unit_tiles, fixed_parts) = match config.splits {
            Splits::Balanced => (1, false),
            Splits::Fixed { tokens } if tokens > 0 && tokens.is_multiple_of(SPARSE_TILE as usize) => {
                (size("splits", tokens)? / SPARSE_TILE, true)
            }
            Splits::Fixed { tokens } => {
                return Err(Error::argument("splits", format!("a multiple of {SPARSE_TILE} tokens"), tokens));
            }
        };
        let rows = size("requests", config.extent.rows())?;
        let lists = SparsePlanParams {
            rows,
            kv_heads: size("kv_heads", shape.kv_heads())?,
            max_selected: size("max_selected", max_selected)?,
            slots: size("slots", slots)?,
            max_open: size("max_open", max_open)?,
            max_pages: size("max_pages", max_pages)?,
            num_runs: size("runs", runs)?,
            page_shift: page_shift(&page),
            unit_tiles,
            host_pages: size("host_pages", config.extent.host_pages)?,
        };
        let params = SparseAttendParams {
            rows,
            group: shape.group() as u32,
            // The longer of the two lists.
            max_entries: lists.max_selected + lists.max_open,
            num_runs: lists.num_runs,
            page_shift: lists.page_shift,
            unit_tiles,
            fixed_parts: u32::from(fixed_parts),
            min_units: if fixed_parts { 1 } else { MIN_TILES_PER_BLOCK },
            scale: config.score.scale(),
            soft_cap: config.score.soft_cap().unwrap_or(0.0),
        };
        let variant = kernels::AttendVariant {
            qk_dim: shape.qk_dim(),
            v_dim: shape.v_dim(),
            column_tiles: if shape.group() <= 8 { 1 } else { 2 },
            soft_cap: config.score.soft_cap().is_some(),
        };
        variant.check(&params)?;
        let blocks = size("sm_count", config.sm_count as usize)?.saturating_mul(BLOCKS_PER_SM);
        let blocks = size("sm_count", blocks as usize)?;

        let all = config.extent.rows();
        let mut list = Layout::new();
        let list = ListBuffers {
            hits: list.scratch(all * params.max_entries as usize * 2)?,
            num_hits: list.scratch(all)?,
            missed: list.scratch(all * max_selected * 2)?,
            num_missed: list.scratch(all)?,
            hit_unit: list.scratch(all + 1)?,
            missed_unit: list.scratch(all + 1)?,
            arrivals: list.counters(1)?,
            layout: list,
        };
        let parts = kernels::part_slots(&params, blocks).saturating_mul(variant.columns());
        let mut layer = Layout::new();
        let layer = LayerBuffers {
            part_acc: layer.scratch(parts.saturating_mul(shape.v_dim()))?,
            part_ml: layer.scratch(parts.saturating_mul(2))?,
            arrivals: layer.counters(all)?,
            layout: layer,
        };
        Ok(AttendPlan { config, variant, lists, params, blocks, list, layer })
    }

    /// What attention is for.
    pub fn config(&self) -> &AttendConfig {
        &self.config
    }

    /// Layout of the workspace that [`Lists::run`] fills, zeroed before the first run.
    pub fn list_workspace(&self) -> &Layout {
        &self.list.layout
    }

    /// Layout of the workspace that every [`Attend::run`] uses, zeroed before the first; launches on one queue share it.
    pub fn workspace(&self) -> &Layout {
        &self.layer.layout
    }

    /// Bytes of K and V of so many pages, of all rows together, each read once.
    pub fn bytes_moved(&self, pages: usize) -> u64 {
        (pages * self.config.extent.page.bytes()) as u64
    }

    /// Floating-point operations for so many pages, of all rows together: QKᵀ and PV.
    pub fn flops(&self, pages: usize) -> u64 {
        let Extent { shape, page, .. } = self.config.extent;
        (pages * page.tokens() * 2 * shape.group() * (shape.qk_dim() + shape.v_dim())) as u64
    }
}

/// Prepared listing: from slots to runs.
#[derive(Debug, Clone)]
pub struct Lists<F> {
    plan: Arc<AttendPlan>,
    kernel: kernels::Plan<F>,
}

/// Arguments of [`Lists::run`].
#[derive(Debug)]
pub struct ListsArgs<'a> {
    /// Pages `[rows, max_selected]`, [`NONE`](crate::metadata::NONE) for padding.
    pub selected: &'a View<'a, u32>,
    /// Slot of each selected page, misses `[rows, max_selected, 4]` and their number, as [`Resolve`](super::Resolve) leaves
    /// them.
    pub resolved: [&'a View<'a, u32>; 3],
    /// Run of each slot `[rows, slots]`.
    pub slot_table: &'a View<'a, u32>,
    /// Run of each open page `[rows, max_open]`.
    pub open_table: &'a View<'a, u32>,
    /// Host page of each page of a request `[requests, max_pages]`.
    pub host_table: &'a View<'a, u32>,
    /// A [`SparseRow`](cuda::params::SparseRow) each `[rows]`: idle and bad ones read nothing. All read if absent.
    pub rows: Option<&'a View<'a, u32>>,
    /// Tokens of each page `[rows, max_pages]`; all are full if absent.
    pub page_len: Option<&'a View<'a, u8>>,
    /// Tokens of each request `[requests]`.
    pub kv_len: &'a View<'a, u32>,
    /// Of these, tokens in closed pages `[rows]`.
    pub closed: &'a View<'a, u32>,
    /// Status word, with the row: [`FaultCode::BadLength`](attention::FaultCode::BadLength) for fewer tokens than are closed or
    /// more open ones than the table holds, [`FaultCode::BadIndex`](attention::FaultCode::BadIndex) for a slot and
    /// [`FaultCode::BadPage`](attention::FaultCode::BadPage) for a run, page or host page out of range. Such a row reads nothing.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function> Lists<F> {
    /// Compiles and loads the kernel. May block.
    ///
    /// # Errors
    /// [`Error::Cuda`] when it cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &AttendPlan) -> Result<Self, Error> {
        Ok(Self { plan: Arc::new(plan.clone()), kernel: kernels::Plan::prepare(device)? })
    }

    /// Enqueues the listing of one layer and returns what attention takes.
    ///
    /// # Errors
    /// [`Error::Cuda`] names an argument or workspace that does not fit.
    pub fn run<'w>(
        &self,
        queue: &F::Queue,
        args: ListsArgs<'_>,
        workspace: ViewMut<'w, u8>,
    ) -> Result<Listed<'w>, Error> {
        let buffers = &self.plan.list;
        let carver = Carver::new("sparse_plan", workspace, &buffers.layout)?;
        let [slot_of, misses, num_misses] = args.resolved;
        let args = kernels::PlanArgs {
            params: &self.plan.lists,
            selected: args.selected,
            slot_of,
            misses,
            num_misses,
            slot_table: args.slot_table,
            open_table: args.open_table,
            host_table: args.host_table,
            rows: args.rows,
            page_len: args.page_len,
            kv_len: args.kv_len,
            closed: args.closed,
            hits: (carver.take(buffers.hits)?, carver.take(buffers.num_hits)?),
            missed: (carver.take(buffers.missed)?, carver.take(buffers.num_missed)?),
            hit_unit: carver.take(buffers.hit_unit)?,
            missed_unit: carver.take(buffers.missed_unit)?,
            arrivals: carver.take(buffers.arrivals)?,
            status: args.status,
        };
        self.kernel.launch(queue, args)?;
        Ok(Listed { plan: Arc::clone(&self.plan), workspace: carver.into_workspace() })
    }
}

/// The lists of a step, as [`Lists::run`] has left them on a queue. Holds their workspace, so that nobody else writes what the
/// kernels trust.
#[derive(Debug)]
pub struct Listed<'w> {
    plan: Arc<AttendPlan>,
    workspace: ViewMut<'w, u8>,
}

/// Which of a step's lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum List {
    /// Pages that were resident, and open ones.
    Hits,
    /// Pages that are fetched.
    Misses,
}

/// Where attention leaves its result.
#[derive(Debug)]
pub enum Output<'a, E> {
    /// Outputs `[requests, q_heads, v_dim]`.
    Final(ViewMut<'a, E>),
    /// A normalised partial state `[requests, q_heads, v_dim]`, to be another launch's prior.
    Partial(ViewMut<'a, f32>),
}

/// Arguments of [`Attend::run`].
#[derive(Debug)]
pub struct AttendArgs<'a, E> {
    /// Queries `[requests, q_heads, qk_dim]`.
    pub q: &'a View<'a, E>,
    /// Device memory `[runs, K|V, tokens, dim]`. Tokens of a page past its length may hold anything.
    pub runs: &'a View<'a, E>,
    /// Which list.
    pub list: List,
    /// States over other keys that are merged in: outputs `[requests, q_heads, v_dim]` and LSEs `[requests, q_heads]`.
    pub prior: Option<[&'a View<'a, f32>; 2]>,
    /// Where outputs go.
    pub out: Output<'a, E>,
    /// Log-sum-exps `[requests, q_heads]`, natural log; −inf where nothing is read.
    pub lse: ViewMut<'a, f32>,
}

/// Prepared attention. `E` is the storage type of q, K, V and the output.
#[derive(Debug, Clone)]
pub struct Attend<F, E> {
    plan: AttendPlan,
    kernel: kernels::Attend<F, E>,
}

impl<F: Function, E: Storage> Attend<F, E> {
    /// Compiles and loads. May block.
    ///
    /// # Errors
    /// [`Error::Argument`] for a device that the plan was not made for, or another element type; [`Error::Cuda`] when the kernel
    /// cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &AttendPlan) -> Result<Self, Error> {
        super::check_device::<D, E>(device, &plan.config.extent.page, plan.config.sm_count)?;
        Ok(Self { plan: plan.clone(), kernel: kernels::Attend::prepare(device, plan.variant)? })
    }

    /// Enqueues attention over one list and returns.
    ///
    /// # Errors
    /// [`Error::Argument`] for lists of another plan, [`Error::Cuda`] names an argument or workspace that does not fit.
    pub fn run(
        &self,
        queue: &F::Queue,
        args: AttendArgs<'_, E>,
        listed: &Listed<'_>,
        workspace: ViewMut<'_, u8>,
    ) -> Result<(), Error> {
        if listed.plan.config != self.plan.config {
            return Err(Error::argument("listed", "lists of the same plan", "lists of another"));
        }
        let (lists, layer) = (&self.plan.list, &self.plan.layer);
        let mut params = self.plan.params;
        let (entries, num_entries, first_unit) = match args.list {
            List::Hits => (lists.hits, lists.num_hits, lists.hit_unit),
            List::Misses => {
                params.max_entries = self.plan.lists.max_selected;
                (lists.missed, lists.num_missed, lists.missed_unit)
            }
        };
        let carver = Carver::new("sparse_attend", workspace, &layer.layout)?;
        let (out, partial) = match args.out {
            Output::Final(out) => (Some(out), None),
            Output::Partial(partial) => (None, Some(partial)),
        };
        let args = kernels::AttendArgs {
            params: &params,
            blocks: self.plan.blocks,
            q: args.q,
            runs: args.runs,
            entries: &lists.layout.view(entries, &listed.workspace)?,
            num_entries: &lists.layout.view(num_entries, &listed.workspace)?,
            first_unit: &lists.layout.view(first_unit, &listed.workspace)?,
            prior: args.prior,
            out,
            partial,
            lse: args.lse,
            part_acc: carver.take(layer.part_acc)?,
            part_ml: carver.take(layer.part_ml)?,
            arrivals: carver.take(layer.arrivals)?,
        };
        // SAFETY: all buffers lie in the workspace of a step that `Lists::run` planned by the same configuration, hence with the
        // same parameters; the lists borrow it exclusively, so nobody has written it since.
        Ok(unsafe { self.kernel.launch(queue, args) }?)
    }
}
