//! Ring attention: blocks go round while they are computed on.
//!
//! A [`Ring`] is a state machine. Each [`step`](Ring::step) waits for the next block, posts it on to the next rank, computes on it
//! while it travels, and takes the result into an f32 softmax state (m, l, O), so that the error does not grow with the number of
//! ranks. Between two steps it can be paused: [`pause`](Ring::pause) waits for what is under way, after which the transport serves
//! others, and a paused ring goes on bit for bit where it stopped.
//!
//! Keys and values travel as one message, K behind V never repeated for query heads; two buffers suffice for any number of ranks.

mod direction;
mod pass_kv;
mod pass_q;
mod rotation;

use attention::{AttentionSpec, Element, HeadsView};

pub use direction::{Direction, Rates};
use pass_kv::PassKv;
use pass_q::PassQ;
#[cfg(feature = "cuda")]
pub(crate) use rotation::Rotation;
pub use rotation::{Carrier, HostCarrier};

use crate::fingerprint::Fingerprint;
use crate::placement::{Segment, Shards};
use crate::schedule::{self, Tile, source};
use crate::transport::Transport;
use crate::{Error, Output};

/// A rank's rows of queries, keys and values, contiguous.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a, Q, T> {
    /// Queries `[query tokens, q_heads, qk_dim]`, after RoPE.
    pub q: &'a [Q],
    /// Keys `[key tokens, kv_heads, qk_dim]`, after RoPE.
    pub k: &'a [T],
    /// Values `[key tokens, kv_heads, v_dim]`.
    pub v: &'a [T],
}

/// A block of keys and values on its way through a rank.
#[derive(Debug, Clone, Copy)]
pub struct Chunk<'a, T> {
    /// The rank that it belongs to.
    pub source: usize,
    /// Which tokens its rows are.
    pub segments: &'a [Segment],
    /// Keys `[tokens, kv_heads, qk_dim]`.
    pub k: HeadsView<'a, T>,
    /// Values `[tokens, kv_heads, v_dim]`.
    pub v: HeadsView<'a, T>,
}

/// A ring over a batch.
#[derive(Debug, Clone)]
pub struct RingPlan {
    spec: AttentionSpec,
    shards: Shards,
    direction: Direction,
    /// Keys of each rank where they are not those that `shards` says.
    keys: Option<Vec<Vec<Segment>>>,
    max_query_tokens: usize,
    max_key_tokens: usize,
}

impl RingPlan {
    /// A ring of as many ranks as the shards have, that passes keys and values.
    ///
    /// # Errors
    /// [`Error::Attention`] for a window of 0 keys.
    pub fn new(spec: AttentionSpec, shards: Shards) -> Result<Self, Error> {
        Self::with_keys(spec, shards, None)
    }

    /// A ring whose ranks hold these keys instead of those of the shards.
    pub(crate) fn with_keys(
        spec: AttentionSpec,
        shards: Shards,
        keys: Option<Vec<Vec<Segment>>>,
    ) -> Result<Self, Error> {
        spec.mask.check()?;
        let (max_query_tokens, mut max_key_tokens) = shards.most_tokens();
        if let Some(keys) = &keys {
            let tokens = |keys: &Vec<Segment>| keys.iter().map(|segment| segment.len).sum();
            max_key_tokens = keys.iter().map(tokens).max().unwrap_or(0);
        }
        Ok(RingPlan { spec, direction: Direction::PassKv, keys, max_query_tokens, max_key_tokens, shards })
    }

    /// The same ring with this going round.
    pub fn passing(self, direction: Direction) -> Self {
        RingPlan { direction, ..self }
    }

    /// What attention computes.
    pub fn spec(&self) -> &AttentionSpec {
        &self.spec
    }

    /// Who owns what.
    pub fn shards(&self) -> &Shards {
        &self.shards
    }

    /// What goes round.
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// How many ranks, which is how many steps.
    pub fn ranks(&self) -> usize {
        self.shards.ranks()
    }

    /// Which tokens the rows of a rank's keys are.
    pub fn keys(&self, rank: usize) -> Vec<Segment> {
        self.keys.as_ref().map_or_else(|| self.shards.keys(rank), |keys| keys[rank].clone())
    }

    fn key_tokens(&self, rank: usize) -> usize {
        match &self.keys {
            None => self.shards.key_tokens(rank),
            Some(keys) => keys[rank].iter().map(|segment| segment.len).sum(),
        }
    }

    /// What a rank computes at a step: rows of the queries against rows of the keys that it holds then.
    pub fn tiles(&self, rank: usize, step: usize) -> Vec<Tile> {
        let visitor = source(rank, step, self.ranks());
        let (queries, keys) = match self.direction {
            Direction::PassKv => (rank, visitor),
            Direction::PassQ => (visitor, rank),
        };
        schedule::tiles(&self.spec.mask, &self.shards.queries(queries), &self.keys(keys))
    }

    /// Floating-point operations of a rank at a step: QKᵀ and PV over the pairs that the mask leaves.
    pub fn flops(&self, rank: usize, step: usize) -> u64 {
        let shape = self.spec.shape;
        let pairs: u64 = self.tiles(rank, step).iter().map(|tile| tile.pairs(&self.spec.mask)).sum();
        pairs * (2 * shape.q_heads() * (shape.qk_dim() + shape.v_dim())) as u64
    }

    /// Payload bytes that a rank sends in all steps, with elements of `q_bytes` in queries and `kv_bytes` in keys and values.
    ///
    /// Passing keys: the blocks of all ranks but its right neighbour's own, each tokens · kv_heads · (qk_dim + v_dim) · e. Passing
    /// queries: likewise tokens · q_heads · qk_dim · e, then for every other rank's queries partial outputs and LSEs in f32.
    pub fn bytes_sent(&self, rank: usize, q_bytes: usize, kv_bytes: usize) -> u64 {
        let (shape, ranks) = (self.spec.shape, self.ranks());
        let visitors = (0..ranks - 1).map(|step| source(rank, step, ranks));
        let bytes: usize = match self.direction {
            Direction::PassKv => visitors.map(|source| self.kv_len(source, kv_bytes)).sum(),
            Direction::PassQ => {
                let others = (0..ranks).filter(|&other| other != rank);
                let partials = others
                    .map(|other| self.shards.query_tokens(other) * shape.q_heads() * 4 * (shape.v_dim() + 1));
                visitors.map(|source| self.q_len(source, q_bytes)).sum::<usize>() + partials.sum::<usize>()
            }
        };
        bytes as u64
    }

    /// Bytes of the two buffers that go round, frames not counted.
    pub fn workspace_bytes(&self, q_bytes: usize, kv_bytes: usize) -> usize {
        let shape = self.spec.shape;
        2 * match self.direction {
            Direction::PassKv => {
                self.max_key_tokens * shape.kv_heads() * (shape.qk_dim() + shape.v_dim()) * kv_bytes
            }
            Direction::PassQ => self.max_query_tokens * shape.q_heads() * shape.qk_dim() * q_bytes,
        }
    }

    /// What every rank of this ring must agree on, for [`Fingerprint::agree`].
    pub fn fingerprint<Q: Element, T: Element>(&self) -> Fingerprint {
        Fingerprint::of_attention(&self.spec, &self.shards)
            .with("the direction", self.direction as u64)
            .with("the type of queries", Q::DTYPE as u64)
            .with("the type of keys and values", T::DTYPE as u64)
    }

    /// Runs the whole ring of one rank.
    ///
    /// # Errors
    /// As [`Ring::new`] and [`Ring::step`].
    pub fn run<Q: Element, T: Element, X: Transport + ?Sized>(
        &self,
        inputs: Inputs<'_, Q, T>,
        transport: &mut X,
    ) -> Result<Output, Error> {
        let mut ring = Ring::new(self, transport.rank(), inputs)?;
        while !ring.is_done() {
            ring.step(transport, |_| {})?;
        }
        ring.finish(transport)
    }

    /// Bytes of a rank's block of keys and values.
    fn kv_len(&self, rank: usize, bytes: usize) -> usize {
        let shape = self.spec.shape;
        self.key_tokens(rank) * shape.kv_heads() * (shape.qk_dim() + shape.v_dim()) * bytes
    }

    /// Bytes of a rank's block of queries.
    fn q_len(&self, rank: usize, bytes: usize) -> usize {
        self.shards.query_tokens(rank) * self.spec.shape.q_heads() * self.spec.shape.qk_dim() * bytes
    }

    fn check_inputs<Q, T>(&self, rank: usize, inputs: &Inputs<'_, Q, T>) -> Result<(), Error> {
        if rank >= self.ranks() {
            return Err(Error::argument("rank", format!("below {}", self.ranks()), rank));
        }
        let (shape, queries, keys) = (self.spec.shape, self.shards.query_tokens(rank), self.key_tokens(rank));
        crate::error::check_len("q", inputs.q.len(), &[queries, shape.q_heads(), shape.qk_dim()])?;
        crate::error::check_len("k", inputs.k.len(), &[keys, shape.kv_heads(), shape.qk_dim()])?;
        crate::error::check_len("v", inputs.v.len(), &[keys, shape.kv_heads(), shape.v_dim()])
    }
}

/// One rank of a ring in progress. `Q` is the type of queries, `T` that of keys and values.
#[derive(Debug)]
pub struct Ring<'a, Q, T> {
    plan: &'a RingPlan,
    kind: Kind<'a, Q, T>,
}

#[derive(Debug)]
enum Kind<'a, Q, T> {
    Kv(PassKv<T>),
    Q(PassQ<'a, Q, T>),
}

impl<'a, Q: Element, T: Element> Ring<'a, Q, T> {
    /// Rank `rank` of a ring, before its first step.
    ///
    /// # Errors
    /// [`Error::Argument`] for a rank that is not there, or inputs that are not its rows.
    pub fn new(plan: &'a RingPlan, rank: usize, inputs: Inputs<'a, Q, T>) -> Result<Self, Error> {
        plan.check_inputs(rank, &inputs)?;
        let kind = match plan.direction {
            Direction::PassKv => Kind::Kv(PassKv::new(plan, rank, inputs)),
            Direction::PassQ => Kind::Q(PassQ::new(plan, rank, inputs)),
        };
        Ok(Ring { plan, kind })
    }

    /// Steps done.
    pub fn steps_done(&self) -> usize {
        match &self.kind {
            Kind::Kv(ring) => ring.steps_done(),
            Kind::Q(ring) => ring.steps_done(),
        }
    }

    /// Whether all steps are done.
    pub fn is_done(&self) -> bool {
        self.steps_done() == self.plan.ranks()
    }

    /// Does the next step. `on_chunk` sees every block of keys and values that this rank holds, each once: all of them where keys go
    /// round, its own where queries do. What decoding wants to keep it can take there, without a second transfer.
    ///
    /// # Errors
    /// [`Error::Argument`] after the last step, or for a transport with other ranks; [`Error::Peer`] when a rank has failed.
    pub fn step<X: Transport + ?Sized>(
        &mut self,
        transport: &mut X,
        on_chunk: impl FnMut(Chunk<'_, T>),
    ) -> Result<(), Error> {
        if transport.ranks() != self.plan.ranks() {
            return Err(Error::argument(
                "transport",
                format!("{} ranks", self.plan.ranks()),
                transport.ranks(),
            ));
        }
        if self.is_done() {
            return Err(Error::argument("step", format!("at most {} steps", self.plan.ranks()), "one more"));
        }
        match &mut self.kind {
            Kind::Kv(ring) => ring.step(self.plan, transport, on_chunk),
            Kind::Q(ring) => ring.step(self.plan, transport, on_chunk),
        }
    }

    /// Waits for what is under way, so that the transport is free: for a preempting ring, or because this one is given up. The ring
    /// goes on with the next [`step`](Self::step). All ranks must pause after the same step; see
    /// [`pause_together`](Self::pause_together).
    ///
    /// # Errors
    /// [`Error::Peer`] when a rank has failed.
    pub fn pause<X: Transport + ?Sized>(&mut self, transport: &mut X) -> Result<(), Error> {
        match &mut self.kind {
            Kind::Kv(ring) => ring.pause(transport),
            Kind::Q(ring) => ring.pause(transport),
        }
    }

    /// Pauses at a step that all ranks agree on: the last that any of them has begun. Every rank calls it, whatever its step.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn pause_together<X: Transport + ?Sized>(
        &mut self,
        transport: &mut X,
        mut on_chunk: impl FnMut(Chunk<'_, T>),
    ) -> Result<(), Error> {
        let steps = transport.gather_words(&[self.steps_done() as u64])?;
        let last = steps.into_iter().max().unwrap_or(0) as usize;
        while self.steps_done() < last {
            self.step(transport, &mut on_chunk)?;
        }
        self.pause(transport)
    }

    /// The outputs of this rank's queries, after the last step.
    ///
    /// # Errors
    /// [`Error::Argument`] before the last step; [`Error::Peer`] when a rank has failed in the all-to-all that ends the passing of
    /// queries.
    pub fn finish<X: Transport + ?Sized>(self, transport: &mut X) -> Result<Output, Error> {
        if !self.is_done() {
            let expected = format!("{} steps", self.plan.ranks());
            return Err(Error::argument("ring", expected, format!("{} steps", self.steps_done())));
        }
        match self.kind {
            Kind::Kv(ring) => Ok(ring.finish()),
            Kind::Q(ring) => ring.finish(self.plan, transport),
        }
    }
}

/// Queries in f32, which is exact.
fn to_f32<Q: Element>(q: &[Q]) -> Vec<f32> {
    q.iter().map(|x| x.to_f32()).collect()
}
