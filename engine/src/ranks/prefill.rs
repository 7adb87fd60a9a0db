//! One rank of several that share a prompt, over any transport.
//!
//! Every rank runs its own tokens through the model; a stage that is shared needs the others. With Ulysses, attention deals out heads
//! within groups of ranks, and rings go over the groups ([`seq_parallel::hybrid`]): a group of one is a plain ring, one group of all is
//! Ulysses alone. With Megatron ([`seq_parallel::megatron`]), a stage runs on its share of the weights for all tokens of its region.
//!
//! Where weights are split over a region, a rank multiplies by its own share alone: a stage of Ulysses gathers the others' first. (A process
//! has loaded all of them, and hands out its share as if it had no more.)
//!
//! Ulysses gives the logits of a single rank bit for bit, where weights are whole in memory and every rank has more than 4 tokens, or the
//! prompt no more than that: a token's products do not depend on the other rows then (few rows are multiplied one by one, which sums in
//! another order), and every head sums its keys in the same order. A ring sums them in the order in which blocks come, which moves the bundled model's logits (around 10) by up to
//! 5·10⁻⁶ where keys and values are stored in f32, and Megatron sums products in parts. In 16 bits a key on the border of two values may
//! then round the other way in the next layer, which moves them by up to 4·10⁻⁴.

use attention::rope::Rope;
use attention::{DType, Element};
use ndarray::{Array1, Array2, ArrayView2};
use seq_parallel::cost_model::Scheme;
use seq_parallel::hybrid::HybridPlan;
use seq_parallel::placement::{Segment, Sequence, Shards};
use seq_parallel::ring::Inputs;
use seq_parallel::transport::{Operation, Subgroup, Tag, Transport};
use seq_parallel::{fingerprint, megatron};

use super::Sharing;
use super::sharing::Way;
use super::weights::Gathered;
use crate::{Config, Error, Model};

/// Keys and values of a rank's own tokens in one layer.
pub(super) struct Own<'a> {
    /// Which tokens they are.
    pub(super) segments: &'a [Segment],
    /// Keys `[tokens, kv_heads, head_dim]` before RoPE.
    pub(super) k: &'a [f32],
    /// The same after RoPE.
    pub(super) rotated: &'a [f32],
    /// Values `[tokens, kv_heads, head_dim]`.
    pub(super) v: &'a [f32],
}

/// Which tokens each rank has.
pub(super) struct Layout {
    plan: HybridPlan,
}

impl Layout {
    fn new(config: &Config, sharing: &Sharing, way: &Way, tokens: usize) -> Result<Self, Error> {
        Ok(Layout { plan: plan(config, sharing, way, tokens, 0)? })
    }

    /// Which tokens a rank's rows are.
    pub(super) fn segments(&self, rank: usize) -> Vec<Segment> {
        self.plan.queries(rank)
    }

    /// Positions of a rank's rows.
    pub(super) fn positions(&self, rank: usize) -> Vec<u32> {
        self.segments(rank).iter().flat_map(Segment::positions).map(|position| position as u32).collect()
    }

    /// Tokens of each rank.
    pub(super) fn tokens(&self) -> Vec<usize> {
        let tokens = |rank| self.segments(rank).iter().map(|segment| segment.len).sum();
        (0..self.plan.ranks()).map(tokens).collect()
    }
}

/// Checks that a model's heads and channels can be dealt, before anything is computed.
pub(super) fn check_model(
    config: &Config,
    sharing: &Sharing,
    tokens: usize,
    stored: DType,
) -> Result<(), Error> {
    let way = sharing.way(config, tokens, stored)?;
    Layout::new(config, sharing, &way, tokens)?;
    match way.mlp {
        Scheme::Megatron => {
            megatron::part("the MLP's inner dimension", config.intermediate_size, way.region, 0)?;
        }
        Scheme::Ulysses => {}
    }
    Ok(())
}

/// Attention of a layer over all ranks.
fn plan(
    config: &Config,
    sharing: &Sharing,
    way: &Way,
    tokens: usize,
    layer: usize,
) -> Result<HybridPlan, Error> {
    let spec = config.attention(layer)?;
    if way.attention == Scheme::Megatron {
        megatron::local_heads(&spec.shape, way.region, 0)?;
    }
    let shards = Shards::new([Sequence::new(tokens)], sharing.placement(), sharing.ranks() / way.group)?;
    Ok(HybridPlan::new(spec, shards, way.group)?.passing(way.direction))
}

/// Checks a prompt, before anything is sent.
pub(super) fn check(model: &Model, tokens: &[u32], held: usize) -> Result<(), Error> {
    if tokens.is_empty() {
        return Err(Error::argument("prompt", "at least 1 token", "none"));
    }
    model.config().check_tokens(tokens)?;
    model.config().check_context(held.saturating_add(tokens.len()))
}

/// Runs one rank's part of a prompt that starts a sequence; `keep` sees the keys and values of its own tokens, layer by layer. Gives who
/// has which tokens, and the last token's hidden state after the final norm `[hidden]`. Every rank calls it with the same arguments.
///
/// `stored` is the type in which keys and values are attended to and travel.
///
/// # Errors
/// As [`check`]; heads, inner channels or ranks that cannot be dealt; ranks that are set up differently or have failed; whatever `keep`
/// returns.
pub(super) fn compute<X: Transport + ?Sized>(
    model: &Model,
    sharing: &Sharing,
    tokens: &[u32],
    stored: DType,
    transport: &mut X,
    keep: impl FnMut(usize, Own<'_>) -> Result<(), Error>,
) -> Result<(Layout, Array1<f32>), Error> {
    check(model, tokens, 0)?;
    check_model(model.config(), sharing, tokens.len(), stored)?;
    let result = match stored {
        DType::F32 => run::<f32, X>(model, sharing, tokens, transport, keep),
        DType::F16 => run::<half::f16, X>(model, sharing, tokens, transport, keep),
        DType::BF16 => run::<half::bf16, X>(model, sharing, tokens, transport, keep),
    };
    tell_of(&result, Tag::new(Operation::PassKv, 0), transport);
    result
}

/// Tells the others, who wait for this rank, of an error of its own. Of a rank that has failed, and of ranks that differ, they know.
pub(super) fn tell_of<T, X: Transport + ?Sized>(result: &Result<T, Error>, at: Tag, transport: &mut X) {
    match result {
        Err(error) if !is_shared(error) => transport.abort(at, &error.to_string()),
        _ => {}
    }
}

/// Whether every rank gets this error.
fn is_shared(error: &Error) -> bool {
    use seq_parallel::Error::{Mismatch, Peer};
    matches!(error, Error::SeqParallel(error) if matches!(**error, Peer { .. } | Mismatch { .. }))
}

/// What all ranks give, or the error of the rank where it began rather than what others heard of it.
pub(super) fn of_all<T>(results: Vec<Result<T, Error>>) -> Result<Vec<T>, Error> {
    let (mut given, mut heard) = (Vec::with_capacity(results.len()), None);
    for result in results {
        match result {
            Ok(one) => given.push(one),
            Err(error) if is_shared(&error) => heard = heard.or(Some(error)),
            Err(error) => return Err(error),
        }
    }
    heard.map_or(Ok(given), Err)
}

fn run<T: Element, X: Transport + ?Sized>(
    model: &Model,
    sharing: &Sharing,
    tokens: &[u32],
    transport: &mut X,
    mut keep: impl FnMut(usize, Own<'_>) -> Result<(), Error>,
) -> Result<(Layout, Array1<f32>), Error> {
    let (config, rank) = (model.config(), transport.rank());
    let way = sharing.way(config, tokens.len(), T::DTYPE)?;
    let layout = Layout::new(config, sharing, &way, tokens.len())?;
    let prompt = fingerprint::digest(tokens.iter().map(|&token| u64::from(token)));
    let schemes = fingerprint::digest([way.attention as u64, way.mlp as u64, way.region as u64]);
    layout
        .plan
        .fingerprint::<f32, T>()
        .with("the schemes of stages (digest)", schemes)
        .with("the prompt (digest)", prompt)
        .agree(transport)?;

    let positions = layout.positions(rank);
    let own: Vec<u32> = positions.iter().map(|&position| tokens[position as usize]).collect();
    let rope = Rope::new(config.rope.clone(), tokens.len())?;
    let segments = layout.segments(rank);
    let mut stages = Stages { model, way, rope, layout: &layout, segments: &segments, rank };
    model.begin_step(own.len());
    let mut x = model.embed(&own);
    for index in 0..config.layers {
        let plan = plan(config, sharing, &way, tokens.len(), index)?;
        let normed = model.layers()[index].attention_normed(x.view());
        x += &match way.attention {
            Scheme::Ulysses => stages.ulysses::<T, X>(index, &plan, normed.view(), transport, &mut keep)?,
            Scheme::Megatron => stages.megatron::<T, X>(index, &plan, normed.view(), transport, &mut keep)?,
        };
        let normed = model.layers()[index].mlp_normed(x.view());
        x += &stages.mlp(index, normed.view(), transport)?;
    }

    // Everyone gets the last token's hidden state.
    let last = (tokens.len() - 1) as u32;
    let hidden = model.final_norm(x.view());
    let own_last: Vec<f32> = match positions.iter().position(|&position| position == last) {
        Some(row) => hidden.row(row).to_vec(),
        None => Vec::new(),
    };
    let has_last = |rank| if layout.positions(rank).contains(&last) { 4 * config.hidden_size } else { 0 };
    let lens: Vec<usize> = (0..sharing.ranks()).map(has_last).collect();
    let last = bytemuck::pod_collect_to_vec(&transport.all_gather_v(bytemuck::cast_slice(&own_last), &lens)?);
    Ok((layout, Array1::from_vec(last)))
}

/// The stages of one rank.
struct Stages<'a> {
    model: &'a Model,
    way: Way,
    rope: Rope,
    layout: &'a Layout,
    /// Own tokens.
    segments: &'a [Segment],
    rank: usize,
}

impl Stages<'_> {
    /// The ranks of the own region.
    fn region(&self) -> Vec<usize> {
        let first = self.rank / self.way.region * self.way.region;
        (first..first + self.way.region).collect()
    }

    fn rotated(&self, x: &[f32], heads: usize, positions: &[u32]) -> Result<Vec<f32>, Error> {
        let mut rotated = x.to_vec();
        self.rope.apply(&mut rotated, heads, positions)?;
        Ok(rotated)
    }

    /// Attention of own tokens, whose heads are dealt to the ranks of a group. Gives `[own tokens, hidden]`.
    fn ulysses<T: Element, X: Transport + ?Sized>(
        &mut self,
        index: usize,
        plan: &HybridPlan,
        x: ArrayView2<'_, f32>,
        transport: &mut X,
        keep: &mut impl FnMut(usize, Own<'_>) -> Result<(), Error>,
    ) -> Result<Array2<f32>, Error> {
        let (heads, layer) = (&self.model.config().heads, &self.model.layers()[index]);
        let positions = self.layout.positions(self.rank);
        let matrices = layer.attention_matrices();
        let gathered = match self.way.region {
            1 => None,
            _ => Some(Gathered::new(&matrices, &mut Subgroup::new(transport, self.region())?)?),
        };
        let [w_q, w_k, w_v, w_o] = gathered.as_ref().map_or(matrices, |gathered| gathered.matrices());
        let [q, k, v] = layer.project([w_q, w_k, w_v], x)?.map(in_order);
        let q = self.rotated(&q, heads.q_heads(), &positions)?;
        let rotated = self.rotated(&k, heads.kv_heads(), &positions)?;
        keep(index, Own { segments: self.segments, k: &k, rotated: &rotated, v: &v })?;
        let (k, v) = (stored::<T>(&rotated), stored::<T>(&v));
        let output = plan.run(Inputs { q: &q, k: &k, v: &v }, transport)?;
        w_o.forward(rows(output.out, positions.len(), heads.q_heads() * heads.v_dim()).view())
    }

    /// Attention with the weights of some heads, for all tokens of a region. Gives `[own tokens, hidden]`.
    fn megatron<T: Element, X: Transport + ?Sized>(
        &mut self,
        index: usize,
        plan: &HybridPlan,
        x: ArrayView2<'_, f32>,
        transport: &mut X,
        keep: &mut impl FnMut(usize, Own<'_>) -> Result<(), Error>,
    ) -> Result<Array2<f32>, Error> {
        let (config, layer) = (self.model.config(), &self.model.layers()[index]);
        let (heads, region) = (&config.heads, self.region());
        let place = self.rank - region[0];
        let own = megatron::local_heads(heads, region.len(), place)?;
        let tokens = plan.group_tokens(self.rank);
        let all: usize = tokens.iter().sum();
        let positions: Vec<u32> = region.iter().flat_map(|&rank| self.layout.positions(rank)).collect();

        // Between gather and scatter the transport is the ring's, so the two are taken apart here.
        let width = config.hidden_size;
        let lens: Vec<usize> = tokens.iter().map(|tokens| tokens * width).collect();
        let gathered = {
            let own: Vec<f32> = x.iter().copied().collect();
            let bytes: Vec<usize> = lens.iter().map(|len| 4 * len).collect();
            let mut region = Subgroup::new(transport, region.clone())?;
            bytemuck::pod_collect_to_vec(&region.all_gather_v(bytemuck::cast_slice(&own), &bytes)?)
        };
        let [q, k, v] =
            layer.project_heads(rows(gathered, all, width).view(), &own.q, &own.kv)?.map(in_order);
        let q = self.rotated(&q, own.q.len(), &positions)?;
        let rotated = self.rotated(&k, own.kv.len(), &positions)?;
        let inputs = (stored::<T>(&rotated), stored::<T>(&v));
        let output = plan.run_heads(Inputs { q: &q, k: &inputs.0, v: &inputs.1 }, transport)?;
        let output = rows(output.out, all, own.q.len() * heads.v_dim());
        let partial = in_order(layer.output_of_heads(output.view(), &own.q)?);

        let mut region = Subgroup::new(transport, region)?;
        let sum = region.reduce_scatter(&partial, &lens)?;
        // The keys and values of own tokens come from the ranks that have their heads.
        let first = megatron::first_kv_heads(heads, tokens.len())?;
        let skip = first[place].start.min(own.kv.end) - own.kv.start;
        let mut kept = |x: &[f32], dim: usize| {
            let heads = x.chunks_exact(own.kv.len() * dim).flat_map(|token| &token[skip * dim..]);
            let heads: Vec<f32> = heads.copied().collect();
            megatron::heads_to_tokens(&tokens, &first, dim, &heads, &mut region)
        };
        let (k, v) = (kept(&k, heads.qk_dim())?, kept(&v, heads.v_dim())?);
        let rotated = self.rotated(&k, heads.kv_heads(), &self.layout.positions(self.rank))?;
        keep(index, Own { segments: self.segments, k: &k, rotated: &rotated, v: &v })?;
        Ok(with_bias(rows(sum, tokens[place], width), layer.output().bias()))
    }

    /// The MLP of own tokens `[own tokens, hidden]`.
    fn mlp<X: Transport + ?Sized>(
        &mut self,
        index: usize,
        x: ArrayView2<'_, f32>,
        transport: &mut X,
    ) -> Result<Array2<f32>, Error> {
        let (config, layer, region) = (self.model.config(), &self.model.layers()[index], self.region());
        let matrices = layer.mlp_matrices();
        if self.way.mlp == Scheme::Ulysses && region.len() == 1 {
            return layer.mlp(matrices, x);
        }
        let tokens: Vec<usize> = region.iter().map(|&rank| self.layout.positions(rank).len()).collect();
        let place = self.rank - region[0];
        let mut region = Subgroup::new(transport, region)?;
        if self.way.mlp == Scheme::Ulysses {
            return layer.mlp(Gathered::new(&matrices, &mut region)?.matrices(), x);
        }
        let width = config.hidden_size;
        let inner =
            megatron::part("the MLP's inner dimension", config.intermediate_size, tokens.len(), place)?;
        let own: Vec<f32> = x.iter().copied().collect();
        let sum = megatron::group_stage(&tokens, &own, width, &mut region, |all| {
            let all = ArrayView2::from_shape((all.len() / width, width), all).expect("rows of this width");
            Ok::<_, Error>(in_order(layer.mlp_of_channels(all, &inner)?))
        })?;
        Ok(with_bias(rows(sum, tokens[place], width), matrices[2].bias()))
    }
}

fn stored<T: Element>(x: &[f32]) -> Vec<T> {
    x.iter().map(|&x| T::from_f32(x)).collect()
}

/// Values as a matrix.
fn rows(values: Vec<f32>, rows: usize, width: usize) -> Array2<f32> {
    Array2::from_shape_vec((rows, width), values).expect("rows of this width")
}

/// A bias is added once, after the sum over ranks.
fn with_bias(mut x: Array2<f32>, bias: Option<&[f32]>) -> Array2<f32> {
    if let Some(bias) = bias {
        x += &ndarray::ArrayView1::from(bias);
    }
    x
}

/// The elements of a matrix, row by row.
fn in_order(matrix: Array2<f32>) -> Vec<f32> {
    if matrix.is_standard_layout() {
        matrix.into_raw_vec_and_offset().0
    } else {
        matrix.iter().copied().collect()
    }
}
