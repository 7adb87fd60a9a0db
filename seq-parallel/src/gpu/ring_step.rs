//! One step of a ring: a rank's queries meet the block of keys and values that it holds.

use std::ops::Range;

use attention::gpu::PrefillKernel;
use attention::{DType, HeadShape};
use cuda::kernels::attention as kernels;
use cuda::launch::{Device, Function};
use cuda::memory::{View, ViewMut};
use cuda::params::{PREFILL_TILE_FINISH, PREFILL_TILE_RESUME, PrefillParams, PrefillTile};
use cuda::storage::Storage;
use cuda::workspace::{Carver, Layout, Region};

use super::tile_list::{Carry, Meeting, TileLists};
use crate::Error;
use crate::placement::Segment;
use crate::ring::{Direction, RingPlan};
use crate::schedule::source;

/// All steps of one rank of a ring: what [`cpu::absorb`](crate::cpu::absorb) computes tile by tile, each step one launch.
///
/// Where keys go round, the softmax state of the rank's queries is carried from step to step in f32 and ends as output in the
/// last step that shows a query keys. Where queries go round, each step leaves normalised partial outputs of the visiting
/// queries.
#[derive(Debug, Clone)]
pub struct RingStepPlan {
    shape: HeadShape,
    direction: Direction,
    variant: kernels::PrefillVariant,
    /// What is the same in all steps.
    params: PrefillParams,
    lists: TileLists,
    /// Of each step, query tokens, key tokens and floating-point operations.
    sizes: Vec<(usize, usize, u64)>,
    layout: Layout,
    work: Region<u32>,
}

impl RingStepPlan {
    /// Plans the steps of rank `rank`. Needs no device.
    ///
    /// # Errors
    /// [`Error::Argument`] for a rank that is not there, or more tokens than the kernel counts; [`Error::Cuda`] for heads that it
    /// is not written for.
    pub fn new(ring: &RingPlan, rank: usize) -> Result<Self, Error> {
        let (spec, ranks) = (*ring.spec(), ring.ranks());
        if rank >= ranks {
            return Err(Error::argument("rank", format!("below {ranks}"), rank));
        }
        let shape = spec.shape;
        let variant = kernels::PrefillVariant {
            qk_dim: shape.qk_dim(),
            v_dim: shape.v_dim(),
            paged: false,
            soft_cap: spec.score.soft_cap().is_some(),
            carry: true,
            kernel: PrefillKernel::Auto,
        };
        let meetings: Vec<Meeting> = (0..ranks)
            .map(|step| {
                let visitor = source(rank, step, ranks);
                let (queries, keys) = match ring.direction() {
                    Direction::PassKv => (rank, visitor),
                    Direction::PassQ => (visitor, rank),
                };
                Meeting { queries: ring.shards().queries(queries), keys: ring.keys(keys) }
            })
            .collect();
        let tokens = |segments: &[Segment]| segments.iter().map(|segment| segment.len).sum::<usize>();
        let sizes: Vec<(usize, usize, u64)> = meetings
            .iter()
            .enumerate()
            .map(|(step, meeting)| (tokens(&meeting.queries), tokens(&meeting.keys), ring.flops(rank, step)))
            .collect();
        // Rows, keys and offsets between them are 32-bit on the device.
        let rows = sizes.iter().map(|(queries, ..)| queries * shape.group()).max().unwrap_or(0);
        let keys = sizes.iter().map(|(_, keys, _)| *keys).max().unwrap_or(0);
        if rows.saturating_add(keys) > i32::MAX as usize {
            let found = format!("{rows} rows and {keys} keys");
            return Err(Error::argument("shards", format!("at most {} of a rank", i32::MAX), found));
        }
        let (k, v) = (shape.kv_heads() * shape.qk_dim(), shape.kv_heads() * shape.v_dim());
        let params = PrefillParams {
            k_page_stride: 0,
            k_token_stride: k as i64,
            k_head_stride: shape.qk_dim() as i64,
            v_page_stride: 0,
            v_token_stride: v as i64,
            v_head_stride: shape.v_dim() as i64,
            table_batch_stride: 0,
            table_head_stride: 0,
            batch: 1,
            num_queries: 0,
            kv_heads: shape.kv_heads() as u32,
            group: shape.group() as u32,
            page_shift: 0,
            max_pages: 0,
            num_pages: 0,
            num_tokens: 0,
            max_kv_len: 0,
            // What rows see stands in the list.
            causal: 0,
            window: 0,
            sinks: 0,
            prefix: 0,
            tile_rows: variant.rows() as u32,
            max_tiles: 0,
            resume: 0,
            scale: spec.score.scale(),
            soft_cap: spec.score.soft_cap().unwrap_or(0.0),
        };
        variant.check(&params)?;
        let carry = match ring.direction() {
            Direction::PassKv => Carry::Through,
            Direction::PassQ => Carry::Within,
        };
        let lists = TileLists::new(&spec.mask, &meetings, carry, variant.rows(), shape.group())?;
        let mut layout = Layout::new();
        let work = layout.counters(1)?;
        let direction = ring.direction();
        Ok(RingStepPlan { shape, direction, variant, params, lists, sizes, layout, work })
    }

    /// The same steps by this kernel instead of the one for the device.
    ///
    /// # Errors
    /// [`Error::Cuda`] for heads that it is not written for.
    pub fn with_kernel(self, kernel: PrefillKernel) -> Result<Self, Error> {
        let variant = kernels::PrefillVariant { kernel, ..self.variant };
        variant.check(&self.params)?;
        Ok(RingStepPlan { variant, ..self })
    }

    /// How many steps.
    pub fn steps(&self) -> usize {
        self.sizes.len()
    }

    /// The tiles of all steps, to be uploaded once per batch; they serve every layer.
    pub fn tiles(&self) -> &[PrefillTile] {
        &self.lists.tiles
    }

    /// How many tiles of each step begin rows `[steps]`, to be uploaded once per batch.
    pub fn tile_counts(&self) -> &[u32] {
        &self.lists.counts
    }

    /// Layout of the workspace, zeroed before the first run. One serves all steps and layers of a stream.
    pub fn workspace(&self) -> &Layout {
        &self.layout
    }

    /// Query tokens of a step: the rank's own, or the visiting rank's.
    pub fn query_tokens(&self, step: usize) -> usize {
        self.sizes[step].0
    }

    /// Elements of a step's block: K `[key tokens, kv_heads, qk_dim]`, then V `[key tokens, kv_heads, v_dim]`.
    pub fn block_len(&self, step: usize) -> usize {
        self.sizes[step].1 * self.shape.kv_heads() * (self.shape.qk_dim() + self.shape.v_dim())
    }

    /// Elements of the longest block of all steps.
    pub fn max_block_len(&self) -> usize {
        (0..self.steps()).map(|step| self.block_len(step)).max().unwrap_or(0)
    }

    /// What goes round.
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// Floating-point operations of a step: QKᵀ and PV over the pairs that the mask leaves.
    pub fn flops(&self, step: usize) -> u64 {
        self.sizes[step].2
    }

    /// Bytes of a step: queries and the block, each counted once, and of the rows that see a key of it the state, read where there
    /// is one, and written, or the output.
    pub fn bytes_moved(&self, step: usize, dtype: DType) -> u64 {
        let (heads, v_dim) = (self.shape.q_heads(), self.shape.v_dim());
        let state = (4 * (v_dim + 2)) as u64;
        let output = match self.direction {
            Direction::PassKv => v_dim * dtype.size() + 4,
            Direction::PassQ => 4 * (v_dim + 1),
        } as u64;
        let range = self.lists.steps[step].clone();
        let heads_of_list = &self.lists.tiles[range][..self.lists.counts[step] as usize];
        let of_tile = |tile: &PrefillTile| {
            let all = tile.queries as usize * self.shape.group();
            let rows = (all - tile.first_row as usize).min(self.variant.rows()) * self.shape.kv_heads();
            let read = if tile.flags & PREFILL_TILE_RESUME != 0 { state } else { 0 };
            let written = if tile.flags & PREFILL_TILE_FINISH != 0 { output } else { state };
            rows as u64 * (read + written)
        };
        let q = self.query_tokens(step) * heads * self.shape.qk_dim();
        ((q + self.block_len(step)) * dtype.size()) as u64 + heads_of_list.iter().map(of_tile).sum::<u64>()
    }

    /// Where the two halves of a step's block lie.
    fn halves(&self, step: usize) -> (Range<usize>, Range<usize>) {
        let len = self.block_len(step);
        let k = self.sizes[step].1 * self.shape.kv_heads() * self.shape.qk_dim();
        (0..k, k..len)
    }
}

/// The prepared steps of a ring. `E` is the storage type of q, K, V and the output.
#[derive(Debug, Clone)]
pub struct RingStep<F, E> {
    plan: RingStepPlan,
    kernel: kernels::Prefill<F, E>,
}

/// Arguments of [`RingStep::run`].
#[derive(Debug)]
pub struct RingStepArgs<'a, E> {
    /// [`RingStepPlan::tiles`] on the device, 16-byte aligned.
    pub tiles: &'a View<'a, PrefillTile>,
    /// [`RingStepPlan::tile_counts`] on the device `[steps]`.
    pub tile_counts: &'a View<'a, u32>,
    /// Queries `[query tokens, q_heads, qk_dim]`, after RoPE, 16-byte aligned.
    pub q: &'a View<'a, E>,
    /// The block that the rank holds, as it travels: K `[key tokens, kv_heads, qk_dim]`, then V `[key tokens, kv_heads, v_dim]`,
    /// 16-byte aligned.
    pub block: &'a View<'a, E>,
    /// Unnormalised outputs `[query tokens, q_heads, v_dim]`, the same buffer in all steps where keys go round; partial outputs of
    /// the visiting queries where these do. Anything before the first step.
    pub o: ViewMut<'a, f32>,
    /// Maxima and sums `[query tokens, q_heads, 2]`, in natural units; anything before the first step.
    pub ml: ViewMut<'a, f32>,
    /// Outputs `[query tokens, q_heads, v_dim]` of the queries that end in this step. Where queries go round, absent.
    pub out: Option<ViewMut<'a, E>>,
    /// Log-sum-exps `[query tokens, q_heads]` of the same: natural log, scale applied; -inf where no key was seen.
    pub lse: ViewMut<'a, f32>,
    /// Status word: [`FaultCode::BadRange`](attention::FaultCode::BadRange) or [`BadIndex`](attention::FaultCode::BadIndex) with a
    /// tile that is not one of the plan, and is skipped.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function, E: Storage> RingStep<F, E> {
    /// Compiles and loads the kernel. May block.
    ///
    /// # Errors
    /// [`Error::Cuda`] when it cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &RingStepPlan) -> Result<Self, Error> {
        let kernel = kernels::Prefill::prepare(device, plan.variant, &plan.params)?;
        Ok(RingStep { kernel, plan: plan.clone() })
    }

    /// The plan.
    pub fn plan(&self) -> &RingStepPlan {
        &self.plan
    }

    /// Enqueues step `step` and returns; a step in which the mask hides all keys enqueues nothing. Rows that see no key of the block
    /// keep their state bit for bit.
    ///
    /// # Errors
    /// [`Error::Argument`] for a step that is not there, or an output where none is due or the other way round; [`Error::Cuda`] names
    /// an argument or workspace that does not fit.
    pub fn run(
        &self,
        queue: &F::Queue,
        step: usize,
        args: RingStepArgs<'_, E>,
        workspace: ViewMut<'_, u8>,
    ) -> Result<(), Error> {
        let plan = &self.plan;
        if step >= plan.steps() {
            return Err(Error::argument("step", format!("below {}", plan.steps()), step));
        }
        if args.out.is_some() != (plan.direction == Direction::PassKv) {
            let [expected, found] =
                [args.out.is_none(), args.out.is_some()].map(|is| if is { "given" } else { "missing" });
            return Err(Error::argument("out", expected, found));
        }
        let list = plan.lists.steps[step].clone();
        if list.is_empty() {
            return Ok(());
        }
        let (queries, keys, _) = plan.sizes[step];
        let params = PrefillParams {
            num_queries: queries as u32,
            num_tokens: keys as u32,
            max_kv_len: keys as u32,
            max_tiles: list.len() as u32,
            ..plan.params
        };
        let (k, v) = plan.halves(step);
        let carver = Carver::new("prefill", workspace, &plan.layout)?;
        let args = kernels::PrefillArgs {
            params: &params,
            q: args.q,
            k: &args.block.part(k)?,
            v: &args.block.part(v)?,
            block_table: None,
            tiles: &args.tiles.part(list)?,
            tile_count: &args.tile_counts.part(step..step + 1)?,
            valid_len: None,
            result: kernels::PrefillResult::State {
                o: args.o,
                ml: args.ml,
                out: args.out,
                lse: Some(args.lse),
            },
            work: carver.take(plan.work)?,
            status: Some(args.status),
            programmatic: false,
        };
        Ok(self.kernel.launch(queue, args)?)
    }
}
