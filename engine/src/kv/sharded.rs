//! A dense cache whose keys and values stay with the ranks that computed them.
//!
//! Each rank holds its share of the tokens, all layers of them; a query is attended to share by share, and the partial outputs are merged
//! by their log-sum-exps ([`seq_parallel::decode`]). Ranks are threads of this process, which then has all shards, or processes with one
//! each. What moves between them is for [`ranks`](crate::ranks) to say; a cache that has all shards can also be used by itself.

use attention::rope::Rope;
use attention::{AttentionSpec, DType, Element};
use ndarray::{Array2, ArrayView3};
use seq_parallel::Output;
use seq_parallel::decode::{DecodeStep, Shard, merge};
use seq_parallel::placement::Segment;
use seq_parallel::ring::Inputs;
use seq_parallel::transport::Transport;

use super::{Geometry, KvCache, KvMemory, Step};
use crate::mode::Mode;
use crate::{Error, Model};

/// One rank's share, whatever it is stored in. Keys are rotated.
pub(crate) trait RankShard: Send {
    /// Appends tokens to a layer.
    fn append(&mut self, layer: usize, segments: &[Segment], k: &[f32], v: &[f32]) -> Result<(), Error>;
    /// Attends to what a layer holds.
    fn attend(
        &self,
        layer: usize,
        spec: &AttentionSpec,
        queries: &[Segment],
        q: &[f32],
    ) -> Result<Output, Error>;
    /// Home's part of a step; `[q, k, v]` of all new tokens.
    fn ask(
        &mut self,
        layer: usize,
        step: &DecodeStep,
        inputs: [&[f32]; 3],
        transport: &mut dyn Transport,
    ) -> Result<Output, Error>;
    /// Another rank's part of a step.
    fn answer(&mut self, layer: usize, step: &DecodeStep, transport: &mut dyn Transport)
    -> Result<(), Error>;
    /// Tokens that a layer holds.
    fn tokens(&self, layer: usize) -> usize;
    /// Bytes of all layers.
    fn bytes(&self) -> usize;
    /// Forgets all but the first tokens of every layer.
    fn truncate(&mut self, tokens: usize);
    /// Replaces everything by noise of like magnitude.
    fn scramble(&mut self, rng: &mut fastrand::Rng);
}

/// A rank, and its share.
pub(crate) type OfRank = (usize, Box<dyn RankShard>);

/// The shares of all layers.
struct Layers<T>(Vec<Shard<T>>);

fn stored<T: Element>(x: &[f32]) -> Vec<T> {
    x.iter().map(|&x| T::from_f32(x)).collect()
}

impl<T: Element> RankShard for Layers<T> {
    fn append(&mut self, layer: usize, segments: &[Segment], k: &[f32], v: &[f32]) -> Result<(), Error> {
        Ok(self.0[layer].append(segments, &stored::<T>(k), &stored::<T>(v))?)
    }

    fn attend(
        &self,
        layer: usize,
        spec: &AttentionSpec,
        queries: &[Segment],
        q: &[f32],
    ) -> Result<Output, Error> {
        Ok(self.0[layer].attend(spec, queries, q)?)
    }

    fn ask(
        &mut self,
        layer: usize,
        step: &DecodeStep,
        [q, k, v]: [&[f32]; 3],
        transport: &mut dyn Transport,
    ) -> Result<Output, Error> {
        let (k, v) = (stored::<T>(k), stored::<T>(v));
        Ok(step.ask(layer, Inputs { q, k: &k, v: &v }, &mut self.0[layer], transport)?)
    }

    fn answer(
        &mut self,
        layer: usize,
        step: &DecodeStep,
        transport: &mut dyn Transport,
    ) -> Result<(), Error> {
        Ok(step.answer(layer, &mut self.0[layer], transport)?)
    }

    fn tokens(&self, layer: usize) -> usize {
        self.0[layer].tokens()
    }

    fn bytes(&self) -> usize {
        self.0.iter().map(Shard::bytes).sum()
    }

    fn truncate(&mut self, tokens: usize) {
        self.0.iter_mut().for_each(|shard| shard.truncate(tokens));
    }

    fn scramble(&mut self, rng: &mut fastrand::Rng) {
        for values in self.0.iter_mut().flat_map(Shard::values_mut) {
            super::dense::scramble(values, rng);
        }
    }
}

/// The KV cache of one sequence, dealt to ranks.
pub struct ShardedKv {
    shared: Shared,
    /// Of each rank in this process.
    shards: Vec<OfRank>,
    /// Tokens that came after the first prompt, and what each rank in this process sent for them.
    decoded: usize,
    sent: Vec<u64>,
}

/// What all ranks know of a sharded cache.
pub(crate) struct Shared {
    /// The layers.
    pub(crate) geometry: Geometry,
    /// Rotary embedding of queries and keys.
    pub(crate) rope: Rope,
    /// In which type keys and values are stored.
    pub(crate) stored: DType,
    /// Tokens of each rank.
    pub(crate) held: Vec<usize>,
}

impl Shared {
    /// A step of `new` tokens in a layer.
    pub(crate) fn step(&self, layer: usize, new: usize) -> Result<DecodeStep, Error> {
        let Some(&spec) = self.geometry.layers.get(layer) else {
            return Err(Error::argument("layer", format!("below {}", self.geometry.layers.len()), layer));
        };
        Ok(DecodeStep::new(spec, &self.held, new, HOME)?)
    }

    /// Rotated heads of tokens at these positions.
    pub(crate) fn rotated(
        &self,
        mut x: Vec<f32>,
        heads: usize,
        positions: &[u32],
    ) -> Result<Vec<f32>, Error> {
        self.rope.apply(&mut x, heads, positions)?;
        Ok(x)
    }
}

/// The rank that runs the model when a sequence goes on.
pub(crate) const HOME: usize = 0;

impl ShardedKv {
    /// An empty cache over `ranks` ranks, of which `here` are in this process.
    ///
    /// # Errors
    /// [`Error::Mode`] for a KV mode that cannot be sharded; a capacity over the model's maximum.
    pub fn new(
        mode: &Mode,
        model: &Model,
        capacity: usize,
        ranks: usize,
        here: impl IntoIterator<Item = usize>,
    ) -> Result<Self, Error> {
        let stored = stored_type(mode)?;
        let geometry = Geometry::new(model.config(), capacity)?;
        let rope = Rope::new(geometry.rope.clone(), geometry.capacity)?;
        let shards: Vec<_> = here.into_iter().map(|rank| (rank, shard(&geometry, stored))).collect();
        let sent = vec![0; shards.len()];
        let shared = Shared { geometry, rope, stored, held: vec![0; ranks] };
        Ok(ShardedKv { shared, shards, decoded: 0, sent })
    }

    /// Tokens of each rank.
    pub fn held(&self) -> &[usize] {
        &self.shared.held
    }

    /// Bytes that a token takes, all layers.
    pub fn bytes_per_token(&self) -> usize {
        let elements =
            |spec: &AttentionSpec| spec.shape.kv_heads() * (spec.shape.qk_dim() + spec.shape.v_dim());
        self.shared.geometry.layers.iter().map(elements).sum::<usize>() * self.shared.stored.size()
    }

    /// Bytes that a rank in this process holds, counted; `None` for another.
    pub fn bytes(&self, rank: usize) -> Option<usize> {
        self.shards.iter().find(|(here, _)| *here == rank).map(|(_, shard)| shard.bytes())
    }

    /// Tokens that came after the first prompt.
    pub fn decoded(&self) -> usize {
        self.decoded
    }

    /// Bytes that a rank in this process sent for [`decoded`](Self::decoded) tokens; `None` for another.
    pub fn sent(&self, rank: usize) -> Option<u64> {
        self.shards.iter().zip(&self.sent).find(|((here, _), _)| *here == rank).map(|(_, sent)| *sent)
    }

    /// What all ranks know, and the shards in this process.
    pub(crate) fn parts(&mut self) -> (&Shared, &mut [OfRank]) {
        (&self.shared, &mut self.shards)
    }

    /// Takes note that every layer has grown by as many tokens of each rank, and of what each rank in this process sent for it.
    pub(crate) fn grown(&mut self, dealt: &[usize], sent: &[u64]) {
        if !self.is_empty() {
            self.decoded += dealt.iter().sum::<usize>();
            self.sent.iter_mut().zip(sent).for_each(|(all, sent)| *all += sent);
        }
        self.shared.held.iter_mut().zip(dealt).for_each(|(held, new)| *held += new);
    }

    /// Forgets what a step that failed has left in some layers.
    pub(crate) fn restore(&mut self) {
        for (rank, shard) in &mut self.shards {
            shard.truncate(self.shared.held[*rank]);
        }
    }

    /// Appends a step's tokens to the shards, all of which have to be here. Gives the step, and rotated queries if they are asked for.
    fn extend(&mut self, step: &Step<'_>, queries: bool) -> Result<(DecodeStep, Vec<f32>), Error> {
        let ranks = self.shared.held.len();
        if self.shards.len() != ranks {
            let found = format!("{} of them", self.shards.len());
            return Err(Error::argument("shards", format!("those of all {ranks} ranks"), found));
        }
        let start = self.len();
        if !step.positions.iter().copied().eq((start as u32..).take(step.positions.len())) {
            let found = format!("{:?}", step.positions);
            return Err(Error::argument("positions", format!("consecutive from {start}"), found));
        }
        if step.layer == 0 {
            // A step that ended before its last layer has left its tokens in the first ones.
            self.restore();
        }
        let plan = self.shared.step(step.layer, step.positions.len())?;
        self.check_order(step.layer, &plan)?;
        let rotated = |x: ArrayView3<'_, f32>| {
            self.shared.rotated(x.iter().copied().collect(), x.dim().1, step.positions)
        };
        let (k, v) = (rotated(step.k)?, step.v.iter().copied().collect::<Vec<f32>>());
        let q = if queries { rotated(step.q)? } else { Vec::new() };
        let shape = self.shared.geometry.layers[step.layer].shape;
        let (k_width, v_width) = (shape.kv_heads() * shape.qk_dim(), shape.kv_heads() * shape.v_dim());
        for (rank, shard) in &mut self.shards {
            let rows = plan.rows(*rank);
            let part = |x: &[f32], width: usize| x[rows.start * width..rows.end * width].to_vec();
            shard.append(step.layer, &plan.kept(*rank), &part(&k, k_width), &part(&v, v_width))?;
        }
        Ok((plan, q))
    }

    /// Checks that a step comes to its layers in order, each once.
    fn check_order(&self, layer: usize, plan: &DecodeStep) -> Result<(), Error> {
        for ((rank, shard), new) in self.shards.iter().zip(plan.dealt()) {
            let held = self.shared.held[*rank];
            let before = layer.checked_sub(1).map(|before| (before, held + new));
            for (of, expected) in before.into_iter().chain([(layer, held)]) {
                let found = shard.tokens(of);
                if found != expected {
                    let expected =
                        format!("one whose turn it is: {expected} tokens of rank {rank} in layer {of}");
                    return Err(Error::argument("layer", expected, format!("layer {layer}, {found} tokens")));
                }
            }
        }
        Ok(())
    }

    /// One layer's part of a step, where the cache has all shards. Gives its output.
    fn attend(&mut self, step: &Step<'_>) -> Result<Array2<f32>, Error> {
        let (plan, q) = self.extend(step, true)?;
        let spec = self.shared.geometry.layers[step.layer];
        let partials: Vec<Output> = self
            .shards
            .iter()
            .map(|(_, shard)| shard.attend(step.layer, &spec, &plan.queries(), &q))
            .collect::<Result<_, _>>()?;
        let output = merge(spec.shape.v_dim(), partials)?;
        let width = spec.shape.q_heads() * spec.shape.v_dim();
        let out = Array2::from_shape_vec((step.positions.len(), width), output.out)
            .expect("outputs of these tokens");
        let out = step.w_o.forward(out.view())?;
        self.end(step.layer, &plan);
        Ok(out)
    }

    /// Ends a layer's step; with the last layer the tokens are there.
    fn end(&mut self, layer: usize, plan: &DecodeStep) {
        if layer + 1 == self.shared.geometry.layers.len() {
            let dealt: Vec<usize> = plan.dealt().collect();
            self.grown(&dealt, &[]);
        }
    }
}

fn shard(geometry: &Geometry, stored: DType) -> Box<dyn RankShard> {
    fn layers<T: Element>(geometry: &Geometry) -> Box<dyn RankShard> {
        Box::new(Layers(geometry.layers.iter().map(|spec| Shard::<T>::new(spec.shape)).collect()))
    }
    match stored {
        DType::F32 => layers::<f32>(geometry),
        DType::F16 => layers::<half::f16>(geometry),
        DType::BF16 => layers::<half::bf16>(geometry),
    }
}

/// The type in which a mode's keys and values are stored when they are sharded.
///
/// # Errors
/// [`Error::Mode`] for a mode whose attention gives no log-sum-exps, by which shards are merged.
pub fn stored_type(mode: &Mode) -> Result<DType, Error> {
    match mode.name() {
        "dense" => super::dense_dtype(mode),
        name => Err(mode.refuse(format!(
            "{name} cannot be sharded over ranks: shards are merged by log-sum-exps, which dense alone gives"
        ))),
    }
}

/// After an error in any layer of a step, all layers are as they were before the step, which can be made again from its first layer.
impl KvCache for ShardedKv {
    fn forward(&mut self, step: &Step<'_>) -> Result<Array2<f32>, Error> {
        self.attend(step).inspect_err(|_| self.restore())
    }

    fn append(&mut self, step: &Step<'_>) -> Result<(), Error> {
        let (plan, _) = self.extend(step, false).inspect_err(|_| self.restore())?;
        self.end(step.layer, &plan);
        Ok(())
    }

    fn stored(&self) -> DType {
        self.shared.stored
    }

    fn sharded(&self) -> Option<&ShardedKv> {
        Some(self)
    }

    fn sharded_mut(&mut self) -> Option<&mut ShardedKv> {
        Some(self)
    }

    fn len(&self) -> usize {
        self.shared.held.iter().sum()
    }

    /// Of all ranks.
    fn memory(&self) -> KvMemory {
        KvMemory { device: self.len() * self.bytes_per_token(), host: 0 }
    }

    fn clear(&mut self) {
        self.shared.held.fill(0);
        self.restore();
        self.decoded = 0;
        self.sent.fill(0);
    }

    /// The shards in this process.
    fn scramble(&mut self, rng: &mut fastrand::Rng) {
        self.shards.iter_mut().for_each(|(_, shard)| shard.scramble(rng));
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use ndarray::Array3;

    use super::*;

    /// A step that ended between its layers is made again from the first, and a layer whose turn it is not is refused.
    #[test]
    fn a_step_is_made_again_from_its_first_layer() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("model");
        let model = Model::load(&path, &"dense".parse().unwrap()).unwrap();
        let tokens: Vec<u32> = (40..52).collect();
        let heads = &model.config().heads;
        let cache = || ShardedKv::new(&"dense,dtype=f32".parse().unwrap(), &model, 12, 3, 0..3).unwrap();
        let (mut kv, mut fresh) = (cache(), cache());
        for kv in [&mut kv, &mut fresh] {
            model.forward(&tokens[..11], 0, kv).unwrap();
        }
        let zeros = |heads, dim| Array3::zeros((1, heads, dim));
        let (q, k) = (zeros(heads.q_heads(), heads.qk_dim()), zeros(heads.kv_heads(), heads.qk_dim()));
        let v = zeros(heads.kv_heads(), heads.v_dim());
        let step = |layer: usize| Step {
            layer,
            positions: &[11],
            q: q.view(),
            k: k.view(),
            v: v.view(),
            w_o: model.layers()[layer].output(),
        };
        let bytes = |kv: &ShardedKv| (0..3).map(|rank| kv.bytes(rank).unwrap()).sum::<usize>();
        kv.append(&step(0)).unwrap();
        kv.append(&step(1)).unwrap();
        assert!(bytes(&kv) > bytes(&fresh));
        // Layer 1 again.
        let error = kv.append(&step(1)).unwrap_err().to_string();
        assert!(error.starts_with("layer: expected one whose turn it is"), "{error}");
        assert_eq!((kv.len(), bytes(&kv)), (11, bytes(&fresh)), "as before the step");
        let error = kv.append(&step(1)).unwrap_err().to_string();
        assert!(error.contains("tokens of rank") && error.contains("in layer 0"), "{error}");
        kv.append(&step(0)).unwrap();
        let [again, expected] =
            [&mut kv, &mut fresh].map(|kv| model.forward(&tokens[11..12], 11, kv).unwrap());
        assert_eq!(again, expected, "bit for bit");
        assert_eq!((kv.len(), bytes(&kv)), (12, bytes(&fresh)));
    }
}
