//! Prefill attention: ragged batches of queries over cached keys, whole or step by step, planned on the device.

use std::sync::Arc;

use cuda::kernels::attention as kernels;
pub use cuda::kernels::attention::{MAX_SOFT_CAP, PrefillKernel};
use cuda::launch::{Device, Function};
use cuda::memory::{View, ViewMut};
use cuda::params::{PrefillParams, PrefillTile};
use cuda::storage::Storage;
use cuda::workspace::{Carver, Layout, Region};

use super::cache::{self, CacheLayout, to_u32};
use crate::{AttentionSpec, DType, Error, Mask};

/// What a prefill is for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PrefillConfig {
    /// Heads, score and mask. Causal masks are aligned to the end of the keys, so that a chunk of queries after a cached
    /// prefix is the plain case.
    pub spec: AttentionSpec,
    /// Sequences of every run; empty ones have no queries.
    pub batch: usize,
    /// Query tokens of every run, all sequences together; those behind the last sequence are padding and give 0 and −inf.
    pub num_queries: usize,
    /// Longest sequence of keys.
    pub max_kv_len: usize,
    /// Where keys and values lie.
    pub cache: CacheLayout,
    /// Whether the softmax state (m, l, O) is kept in f32 from run to run instead of an output: what the steps of a ring
    /// need.
    pub carry: bool,
    /// Which kernel: by default the one for the device.
    pub kernel: PrefillKernel,
}

/// Grid, variant and workspace of a prefill.
#[derive(Debug, Clone)]
pub struct PrefillPlan {
    config: PrefillConfig,
    variant: kernels::PrefillVariant,
    params: PrefillParams,
    buffers: Buffers,
}

/// What the plan on the device writes and all layers read.
#[derive(Debug, Clone)]
struct Buffers {
    layout: Layout,
    valid_len: Region<u32>,
    cost: Region<u32>,
    tiles: Region<PrefillTile>,
    tile_count: Region<u32>,
    arrivals: Region<u32>,
    work: Region<u32>,
}

impl PrefillPlan {
    /// Plans a prefill. Needs no device.
    ///
    /// # Errors
    /// [`Error::Argument`] for a shape, mask, cache or size that the kernel does not support; [`Error::Cuda`] for a head size that it
    /// is not written for, and for a soft cap above [`MAX_SOFT_CAP`].
    pub fn new(config: PrefillConfig) -> Result<Self, Error> {
        let AttentionSpec { shape, score, mask } = config.spec;
        if config.batch == 0 {
            return Err(Error::argument("batch", "at least 1", 0));
        }
        let cache = config.cache.params(config.batch)?;
        let (causal, window, sinks, prefix) = match mask {
            Mask::Full => (0, 0, 0, 0),
            Mask::Causal => (1, 0, 0, 0),
            Mask::SlidingWindow { window, sinks } => {
                (1, cache::window(window)?, to_u32("sinks", sinks.min(config.max_kv_len))?, 0)
            }
            Mask::Prefix { prefix } => (1, 0, 0, to_u32("prefix", prefix.min(config.max_kv_len))?),
        };
        let variant = kernels::PrefillVariant {
            qk_dim: shape.qk_dim(),
            v_dim: shape.v_dim(),
            paged: cache.paged,
            soft_cap: score.soft_cap().is_some(),
            carry: config.carry,
            kernel: config.kernel,
        };
        to_u32("num_queries", config.num_queries.saturating_mul(shape.group()))?;
        let max_tiles = kernels::max_tiles(config.num_queries, shape.group(), variant.rows(), config.batch);
        let params = PrefillParams {
            k_page_stride: cache.k[0],
            k_token_stride: cache.k[1],
            k_head_stride: cache.k[2],
            v_page_stride: cache.v[0],
            v_token_stride: cache.v[1],
            v_head_stride: cache.v[2],
            table_head_stride: cache.table[0],
            table_batch_stride: cache.table[1],
            batch: to_u32("batch", config.batch)?,
            num_queries: to_u32("num_queries", config.num_queries)?,
            kv_heads: to_u32("kv_heads", shape.kv_heads())?,
            group: shape.group() as u32,
            page_shift: cache.page_shift,
            max_pages: cache.max_pages,
            num_pages: cache.pages,
            num_tokens: cache.tokens,
            max_kv_len: to_u32("max_kv_len", config.max_kv_len)?,
            causal,
            window,
            sinks,
            prefix,
            tile_rows: variant.rows() as u32,
            max_tiles: to_u32("num_queries", max_tiles)?,
            resume: 0,
            scale: score.scale(),
            soft_cap: score.soft_cap().unwrap_or(0.0),
        };
        variant.check(&params)?;
        let mut layout = Layout::new();
        let buffers = Buffers {
            valid_len: layout.scratch(kernels::prefill_valid_lens(&params))?,
            cost: layout.scratch(config.batch.saturating_mul(2))?,
            tiles: layout.scratch(max_tiles)?,
            tile_count: layout.scratch(1)?,
            arrivals: layout.counters(1)?,
            work: layout.counters(1)?,
            layout,
        };
        Ok(Self { config, variant, params, buffers })
    }

    /// Layout of the workspace that [`PrefillTiles::run`] fills, zeroed before the first run.
    pub fn workspace(&self) -> &Layout {
        &self.buffers.layout
    }

    /// Whether K and V can come by tensor maps where the device has them.
    ///
    /// # Errors
    /// [`Error::Cuda`] says why they come by cp.async instead: strides that no map can hold, or a kernel or size
    /// for which no map is used. [`PrefillKernel::Auto`] takes the maps for the element types that such a kernel is shipped for.
    pub fn tensor_maps(&self) -> Result<(), Error> {
        self.variant.tensor_maps(&self.params)?;
        Ok(())
    }

    /// Floating-point operations for sequences of these (queries, keys): QKᵀ and PV over the keys that the mask leaves.
    pub fn flops(&self, sequences: &[(usize, usize)]) -> u64 {
        let AttentionSpec { shape, mask, .. } = self.config.spec;
        let per_key = 2 * shape.q_heads() * (shape.qk_dim() + shape.v_dim());
        let keys = |&(queries, kv_len): &(usize, usize)| -> u64 {
            (0..queries).map(|query| mask.keys(query, queries, kv_len).len() as u64).sum()
        };
        sequences.iter().map(keys).sum::<u64>() * per_key as u64
    }

    /// Bytes of queries, keys, values and results for sequences of these (queries, keys), each counted once.
    pub fn bytes_moved(&self, sequences: &[(usize, usize)], dtype: DType) -> u64 {
        let shape = self.config.spec.shape;
        let per_query = shape.q_heads() * ((shape.qk_dim() + shape.v_dim()) * dtype.size() + 4);
        let per_key = shape.kv_heads() * (shape.qk_dim() + shape.v_dim()) * dtype.size();
        sequences.iter().map(|(queries, keys)| (queries * per_query + keys * per_key) as u64).sum()
    }
}

/// The prepared device-side plan of a prefill.
#[derive(Debug, Clone)]
pub struct PrefillTiles<F> {
    plan: Arc<PrefillPlan>,
    kernel: kernels::PrefillPlan<F>,
}

/// Arguments of [`PrefillTiles::run`]; one of `block_table` and `kv_start` is given, as the cache asks for.
#[derive(Debug)]
pub struct PrefillTilesArgs<'a> {
    /// First query of each sequence, then one past the last `[batch + 1]`.
    pub cu_queries: &'a View<'a, u32>,
    /// Keys of each sequence `[batch]`; its queries are the last positions of them.
    pub kv_len: &'a View<'a, u32>,
    /// Page ids `[batch, max_pages]` or `[kv_heads, batch, max_pages]`. Entries of pages that no query sees, past the length or
    /// before every window, are not read.
    pub block_table: Option<&'a View<'a, u32>>,
    /// First token of each sequence `[batch]`.
    pub kv_start: Option<&'a View<'a, u32>>,
    /// Status word: [`FaultCode::BadLength`](crate::FaultCode::BadLength) or
    /// [`BadPage`](crate::FaultCode::BadPage) with the sequence, all of whose rows then see nothing (of a table with rows per
    /// KV head, only those of the bad row's head); or [`BadRange`](crate::FaultCode::BadRange) with a sequence whose
    /// `cu_queries` descend, end past the queries or begin before an earlier sequence ends. Queries of no sequence see
    /// nothing.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function> PrefillTiles<F> {
    /// Compiles and loads. May block.
    ///
    /// # Errors
    /// [`Error::Cuda`] when the kernel cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &PrefillPlan) -> Result<Self, Error> {
        Ok(Self { plan: Arc::new(plan.clone()), kernel: kernels::PrefillPlan::prepare(device)? })
    }

    /// Enqueues the plan of one batch and returns it; it serves every layer.
    ///
    /// # Errors
    /// [`Error::Argument`] where the cache of the plan asks for the other of `block_table` and `kv_start`, [`Error::Cuda`]
    /// names an argument or workspace that does not fit.
    pub fn run<'w>(
        &self,
        queue: &F::Queue,
        args: PrefillTilesArgs<'_>,
        workspace: ViewMut<'w, u8>,
    ) -> Result<PlannedTiles<'w>, Error> {
        // The kernel goes by what it is given; the layers go by the plan.
        let paged = self.plan.variant.paged;
        if paged != args.block_table.is_some() {
            let [expected, found] = [paged, !paged].map(|is| if is { "given" } else { "missing" });
            return Err(Error::argument("block_table", expected, found));
        }
        let buffers = &self.plan.buffers;
        let carver = Carver::new("prefill_plan", workspace, &buffers.layout)?;
        let args = kernels::PrefillPlanArgs {
            params: &self.plan.params,
            cu_queries: args.cu_queries,
            kv_len: args.kv_len,
            kv_start: args.kv_start,
            block_table: args.block_table,
            valid_len: carver.take(buffers.valid_len)?,
            cost: carver.take(buffers.cost)?,
            tiles: carver.take(buffers.tiles)?,
            tile_count: carver.take(buffers.tile_count)?,
            arrivals: carver.take(buffers.arrivals)?,
            status: args.status,
        };
        self.kernel.launch(queue, args)?;
        Ok(PlannedTiles { plan: Arc::clone(&self.plan), workspace: carver.into_workspace() })
    }
}

/// A batch that [`PrefillTiles::run`] has planned on a queue: which queries see which keys.
///
/// It holds the plan's workspace, so that nobody else writes what the kernels read.
#[derive(Debug)]
pub struct PlannedTiles<'w> {
    plan: Arc<PrefillPlan>,
    workspace: ViewMut<'w, u8>,
}

/// A prepared prefill. `E` is the storage type of q, K, V and the output.
#[derive(Debug, Clone)]
pub struct Prefill<F, E> {
    plan: PrefillPlan,
    kernel: kernels::Prefill<F, E>,
}

/// Inputs of a prefill.
#[derive(Debug)]
pub struct PrefillInputs<'a, E> {
    /// Queries `[num_queries, q_heads, qk_dim]`.
    pub q: &'a View<'a, E>,
    /// Keys, by the cache's strides. Keys and values that some query of a sequence sees are finite; a NaN or infinity among
    /// them may reach its other queries. What no query sees may hold anything.
    pub k: &'a View<'a, E>,
    /// Values, by the cache's strides.
    pub v: &'a View<'a, E>,
    /// The block table that was planned with, for a paged cache.
    pub block_table: Option<&'a View<'a, u32>>,
}

/// Where a prefill without `carry` leaves its output.
#[derive(Debug)]
pub struct PrefillOutput<'a, E> {
    /// Outputs `[num_queries, q_heads, v_dim]`.
    pub out: ViewMut<'a, E>,
    /// Log-sum-exps `[num_queries, q_heads]`, natural log.
    pub lse: ViewMut<'a, f32>,
}

/// The softmax state that a prefill with `carry` continues and leaves, in natural units.
#[derive(Debug)]
pub struct PrefillState<'a> {
    /// Unnormalised outputs O `[num_queries, q_heads, v_dim]`.
    pub o: ViewMut<'a, f32>,
    /// Maxima m and sums l `[num_queries, q_heads, 2]`.
    pub ml: ViewMut<'a, f32>,
    /// Whether to continue the state that is there, or to start anew over whatever is there.
    pub resume: bool,
}

impl<F: Function, E: Storage> Prefill<F, E> {
    /// Compiles and loads. May block.
    ///
    /// # Errors
    /// [`Error::Cuda`] when the kernel cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &PrefillPlan) -> Result<Self, Error> {
        Ok(Self {
            plan: plan.clone(),
            kernel: kernels::Prefill::prepare(device, plan.variant, &plan.params)?,
        })
    }

    /// Which kernel was prepared: never [`PrefillKernel::Auto`], and [`PrefillKernel::Wgmma`] only where K and V come by tensor maps.
    pub fn kernel(&self) -> PrefillKernel {
        self.kernel.kernel()
    }

    /// Enqueues a whole prefill of one layer and returns. `tiles` was planned on the same queue, by the same plan.
    ///
    /// # Errors
    /// [`Error::Argument`] for tiles of another plan, [`Error::Cuda`] names an argument that does not fit; a plan with `carry` has no output.
    pub fn run(
        &self,
        queue: &F::Queue,
        inputs: PrefillInputs<'_, E>,
        output: PrefillOutput<'_, E>,
        tiles: &mut PlannedTiles<'_>,
    ) -> Result<(), Error> {
        let result = kernels::PrefillResult::Output { out: output.out, lse: output.lse };
        self.launch(queue, inputs, result, false, tiles)
    }

    /// Enqueues one step over some of the keys and returns: the state takes them in. `tiles` was planned on the same queue,
    /// by the same plan. Rows that see none of the keys keep their state bit for bit.
    ///
    /// # Errors
    /// [`Error::Argument`] for tiles of another plan, [`Error::Cuda`] names an argument that does not fit; a plan without `carry` keeps no state.
    pub fn run_step(
        &self,
        queue: &F::Queue,
        inputs: PrefillInputs<'_, E>,
        state: PrefillState<'_>,
        tiles: &mut PlannedTiles<'_>,
    ) -> Result<(), Error> {
        let result = kernels::PrefillResult::State { o: state.o, ml: state.ml, out: None, lse: None };
        self.launch(queue, inputs, result, state.resume, tiles)
    }

    fn launch(
        &self,
        queue: &F::Queue,
        inputs: PrefillInputs<'_, E>,
        result: kernels::PrefillResult<'_, E>,
        resume: bool,
        tiles: &mut PlannedTiles<'_>,
    ) -> Result<(), Error> {
        if tiles.plan.config != self.plan.config {
            return Err(Error::argument("tiles", "tiles of the same plan", "tiles of another"));
        }
        let params = PrefillParams { resume: u32::from(resume), ..self.plan.params };
        let buffers = &self.plan.buffers;
        let carver = Carver::new("prefill", tiles.workspace.reborrow(), &buffers.layout)?;
        let valid_len = carver.take(buffers.valid_len)?;
        let list = carver.take(buffers.tiles)?;
        let tile_count = carver.take(buffers.tile_count)?;
        let args = kernels::PrefillArgs {
            params: &params,
            q: inputs.q,
            k: inputs.k,
            v: inputs.v,
            block_table: inputs.block_table,
            tiles: &list.part(0..list.len())?,
            tile_count: &tile_count.part(0..1)?,
            valid_len: Some(&valid_len.part(0..valid_len.len())?),
            result,
            work: carver.take(buffers.work)?,
            status: None,
            programmatic: false,
        };
        Ok(self.kernel.launch(queue, args)?)
    }
}
