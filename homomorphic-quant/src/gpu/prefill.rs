//! Prefill on codes: ragged batches of queries over what the cache holds.

use attention::{HeadShape, Mask, Score};
use cuda::kernels::homomorphic_quant as kernels;
use cuda::launch::{Device, Function};
use cuda::memory::{View, ViewMut};
use cuda::params::HackDecodeParams;
use cuda::storage::Storage;

use super::params::{Queried, params};
use super::{Places, Pools, check_dims, check_dtype, of_plan, side_args, to_u32};
use crate::{Error, reference};

/// What a prefill is for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PrefillConfig {
    /// Whether the cache holds the new tokens when it runs ([`Codes`](reference::Prefill::Codes)), or all that it holds comes before
    /// them ([`Exact`](reference::Prefill::Exact)): then the new tokens see each other by dense attention, whose state is
    /// continued here. That dense attention has no sinks: with a window that keeps sinks, a sequence whose new tokens are more than
    /// the window must have all of them in the cache already, or is a [`BadLength`](attention::FaultCode::BadLength).
    pub mode: reference::Prefill,
    /// The cache.
    pub pools: Pools,
    /// Heads and sizes.
    pub shape: HeadShape,
    /// Scale and soft-cap.
    pub score: Score,
    /// [`Mask::Causal`], or [`Mask::SlidingWindow`] with at most as many sinks as the cache.
    pub mask: Mask,
    /// Sequences of every run; those without new tokens have an empty range.
    pub batch: usize,
    /// Queries of one sequence at most; the grid grows with it.
    pub max_queries: usize,
    /// Queries of every run, all sequences together.
    pub num_queries: usize,
    /// Longest sequence that the cache holds.
    pub max_kv_len: usize,
}

/// Grid and variant of a prefill. It needs no workspace.
#[derive(Debug, Clone)]
pub struct PrefillPlan {
    config: PrefillConfig,
    variant: kernels::PrefillVariant,
    params: HackDecodeParams,
}

impl PrefillPlan {
    /// Plans prefills. Needs no device.
    ///
    /// # Errors
    /// [`Error::Argument`] for a shape, mask or size that the kernel does not support.
    pub fn new(config: PrefillConfig) -> Result<Self, Error> {
        let geometry = config.pools.geometry();
        check_dims("hack_prefill", geometry)?;
        if config.max_queries == 0 {
            return Err(Error::argument("max_queries", "at least 1", 0));
        }
        let queried = Queried {
            shape: config.shape,
            score: config.score,
            mask: config.mask,
            batch: config.batch,
            q_len: config.max_queries,
            max_kv_len: config.max_kv_len,
        };
        let params = params(&config.pools, &queried)?;
        kernels::check_params("hack_prefill", &params).map_err(of_plan)?;
        to_u32("num_queries", config.num_queries.saturating_mul(config.shape.group()))?;
        to_u32("max_kv_len", config.max_kv_len.saturating_add(config.max_queries))?;
        let grid = config.batch.saturating_mul(config.shape.kv_heads());
        if grid > 65535 {
            return Err(Error::argument("batch", "at most 65535 sequences times KV heads", grid));
        }
        let variant = kernels::PrefillVariant {
            k_bits: geometry.bits.k.count(),
            v_bits: geometry.bits.v.count(),
            partition: geometry.partition,
            qk_dim: config.shape.qk_dim(),
            v_dim: config.shape.v_dim(),
            soft_cap: config.score.soft_cap().is_some(),
        };
        Ok(Self { config, variant, params })
    }

    /// Bytes of queries, results, pages and 16-bit tokens for sequences of these (queries, cached tokens), each counted once.
    pub fn bytes_moved(&self, sequences: &[(usize, usize)]) -> u64 {
        let (pools, shape) = (&self.config.pools, self.config.shape);
        let per_query =
            shape.q_heads() * ((shape.qk_dim() + shape.v_dim()) * pools.geometry().dtype.size() + 4);
        let of_sequence = |&(queries, len): &(usize, usize)| {
            let (closed, exact) = pools.split(len);
            let cached =
                closed * pools.page_bytes() + exact * pools.kv_heads() * pools.open_page().token_bytes();
            (queries * per_query + cached) as u64
        };
        sequences.iter().map(of_sequence).sum()
    }

    /// Operations for sequences of these (queries, cached tokens): QKᵀ and PV over the tokens that the mask leaves.
    pub fn flops(&self, sequences: &[(usize, usize)]) -> u64 {
        let (shape, mask) = (self.config.shape, self.config.mask);
        let per_key = 2 * shape.q_heads() * (shape.qk_dim() + shape.v_dim());
        let keys = |&(queries, cached): &(usize, usize)| -> u64 {
            let total = match self.config.mode {
                reference::Prefill::Codes => cached,
                reference::Prefill::Exact => cached + queries,
            };
            let seen = |query| {
                let ranges = mask.keys(query, queries, total);
                ranges
                    .iter()
                    .map(|range| range.end.min(cached).saturating_sub(range.start) as u64)
                    .sum::<u64>()
            };
            (0..queries).map(seen).sum()
        };
        sequences.iter().map(keys).sum::<u64>() * per_key as u64
    }
}

/// A prepared prefill. `E` is the storage type of q, of the cache's 16-bit values and of the output.
#[derive(Debug, Clone)]
pub struct Prefill<F, E> {
    plan: PrefillPlan,
    kernel: kernels::Prefill<F, E>,
}

/// Inputs of a prefill.
#[derive(Debug)]
pub struct PrefillInputs<'a, E> {
    /// Queries `[num_queries, q_heads, qk_dim]`, after RoPE.
    pub q: &'a View<'a, E>,
    /// First query of each sequence, then one past the last `[batch + 1]`.
    pub cu_queries: &'a View<'a, u32>,
    /// Tokens that the cache holds of each sequence `[batch]`. In mode `Codes` its queries are the last of them.
    pub kv_len: &'a View<'a, u32>,
    /// Packed pages.
    pub pages: &'a View<'a, u8>,
    /// Sinks.
    pub sink_pool: &'a View<'a, E>,
    /// Open blocks.
    pub open_pool: &'a View<'a, E>,
    /// Where the sequences lie.
    pub places: Places<'a>,
    /// Status word: [`FaultCode::BadLength`](attention::FaultCode::BadLength), [`BadPage`](attention::FaultCode::BadPage) or
    /// [`BadIndex`](attention::FaultCode::BadIndex) (sink or open page) with the sequence, whose queries then see nothing; or
    /// [`BadRange`](attention::FaultCode::BadRange) with a sequence whose `cu_queries` descend, pass the queries, begin before
    /// another's end or are too many, and whose rows are not written.
    pub status: ViewMut<'a, u64>,
}

/// Where a prefill leaves its output.
#[derive(Debug)]
pub struct PrefillOutput<'a, E> {
    /// Outputs `[num_queries, q_heads, v_dim]`.
    pub out: ViewMut<'a, E>,
    /// Log-sum-exps `[num_queries, q_heads]`, natural log.
    pub lse: ViewMut<'a, f32>,
}

/// A raw softmax state in natural units: what a prefill with `carry` of the attention crate leaves and continues.
#[derive(Debug)]
pub struct PrefillState<'a> {
    /// Unnormalised outputs O `[num_queries, q_heads, v_dim]`.
    pub o: ViewMut<'a, f32>,
    /// Maxima m and sums l `[num_queries, q_heads, 2]`.
    pub ml: ViewMut<'a, f32>,
}

impl<'a> From<PrefillState<'a>> for kernels::StateArgs<'a> {
    fn from(state: PrefillState<'a>) -> Self {
        kernels::StateArgs { o: state.o, ml: state.ml }
    }
}

impl<F: Function, E: Storage> Prefill<F, E> {
    /// Compiles and loads. May block.
    ///
    /// # Errors
    /// [`Error::Argument`] when `E` is not the cache's type, [`Error::Cuda`] when the kernel cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &PrefillPlan) -> Result<Self, Error> {
        check_dtype::<E>(&plan.config.pools)?;
        Ok(Self { plan: plan.clone(), kernel: kernels::Prefill::prepare(device, plan.variant)? })
    }

    /// Enqueues one layer's prefill and returns.
    ///
    /// # Errors
    /// [`Error::Cuda`] names an argument that does not fit.
    pub fn run(
        &self,
        queue: &F::Queue,
        inputs: PrefillInputs<'_, E>,
        output: PrefillOutput<'_, E>,
    ) -> Result<(), Error> {
        let state = kernels::PrefillState::Empty;
        let result = kernels::PrefillResult::Output { state, out: output.out, lse: output.lse };
        self.launch(queue, inputs, result)
    }

    /// Enqueues the end of a prefill and returns: what `state` has seen, and the cached tokens. Where a query sees none of these, the
    /// output is the state's. The state itself stays as it is.
    ///
    /// # Errors
    /// As [`Prefill::run`].
    pub fn finish(
        &self,
        queue: &F::Queue,
        inputs: PrefillInputs<'_, E>,
        state: PrefillState<'_>,
        output: PrefillOutput<'_, E>,
    ) -> Result<(), Error> {
        let state = kernels::PrefillState::Resume(state.into());
        let result = kernels::PrefillResult::Output { state, out: output.out, lse: output.lse };
        self.launch(queue, inputs, result)
    }

    /// Enqueues a step and returns: the state takes the cached tokens in, or starts anew with them unless `resume`. Rows that see
    /// none of them keep their state bit for bit.
    ///
    /// # Errors
    /// As [`Prefill::run`].
    pub fn run_step(
        &self,
        queue: &F::Queue,
        inputs: PrefillInputs<'_, E>,
        state: PrefillState<'_>,
        resume: bool,
    ) -> Result<(), Error> {
        self.launch(queue, inputs, kernels::PrefillResult::State { state: state.into(), resume })
    }

    fn launch(
        &self,
        queue: &F::Queue,
        inputs: PrefillInputs<'_, E>,
        result: kernels::PrefillResult<'_, E>,
    ) -> Result<(), Error> {
        let config = &self.plan.config;
        let args = kernels::PrefillArgs {
            params: &self.plan.params,
            num_queries: config.num_queries as u32,
            cached: config.mode == reference::Prefill::Codes,
            q: inputs.q,
            pages: inputs.pages,
            sink_pool: inputs.sink_pool,
            open_pool: inputs.open_pool,
            places: side_args(&inputs.places),
            cu_queries: inputs.cu_queries,
            kv_len: inputs.kv_len,
            result,
            status: inputs.status,
            programmatic: false,
        };
        Ok(self.kernel.launch(queue, args)?)
    }
}
