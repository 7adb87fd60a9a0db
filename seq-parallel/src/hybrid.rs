//! Hybrid: Ulysses inside groups of ranks, a ring over the groups.
//!
//! A group of u adjacent ranks (the GPUs of a node) deals out heads over its fast links; ranks of the same place in each group form
//! rings over the slow ones. A ring of P / u members is shorter, and every member's network adapter carries a part of it. This is what
//! PecSched does across nodes when the attention stage is Ulysses (§5.3), and USP (arXiv 2405.07719) in general.
//!
//! Tokens are dealt to groups by their placement; within a group each member takes an even part of the group's rows, in order.

use attention::{AttentionSpec, Element};

use crate::fingerprint::Fingerprint;
use crate::placement::{Segment, Shards, cut, join};
use crate::ring::{Direction, Inputs, RingPlan};
use crate::transport::{Subgroup, Transport};
use crate::ulysses::{HeadRows, Members, local_heads, local_spec};
use crate::{Error, Output};

/// A ring over groups.
#[derive(Debug, Clone)]
pub struct HybridPlan {
    spec: AttentionSpec,
    groups: Shards,
    ulysses: usize,
    direction: Direction,
}

impl HybridPlan {
    /// A ring over as many groups as `groups` has ranks, each of `ulysses` ranks, that passes keys and values.
    ///
    /// # Errors
    /// As [`local_heads`]; [`Error::Attention`] for a window of 0 keys.
    pub fn new(spec: AttentionSpec, groups: Shards, ulysses: usize) -> Result<Self, Error> {
        spec.mask.check()?;
        if ulysses == 0 {
            return Err(Error::argument("ulysses", "at least 1 rank", 0));
        }
        local_heads(&spec.shape, ulysses, 0)?;
        Ok(HybridPlan { spec, groups, ulysses, direction: Direction::PassKv })
    }

    /// The same with this going round.
    pub fn passing(self, direction: Direction) -> Self {
        HybridPlan { direction, ..self }
    }

    /// How many ranks in all.
    pub fn ranks(&self) -> usize {
        self.groups.ranks() * self.ulysses
    }

    /// Which tokens the rows of a rank's queries are.
    pub fn queries(&self, rank: usize) -> Vec<Segment> {
        self.part(&self.groups.queries(rank / self.ulysses), rank)
    }

    /// Which tokens the rows of a rank's keys are: its part of its group's cached prefixes, then those of its queries.
    pub fn keys(&self, rank: usize) -> Vec<Segment> {
        let mut keys = self.part(&self.groups.cached(rank / self.ulysses), rank);
        let cached: usize = keys.iter().map(|segment| segment.len).sum();
        keys.extend(
            self.queries(rank).into_iter().map(|segment| Segment { row: cached + segment.row, ..segment }),
        );
        keys
    }

    fn part(&self, group: &[Segment], rank: usize) -> Vec<Segment> {
        let rows: usize = group.iter().map(|segment| segment.len).sum();
        let border = |i: usize| i * rows / self.ulysses;
        cut(group, border(rank % self.ulysses)..border(rank % self.ulysses + 1))
    }

    /// Tokens of each rank of a rank's group, in order: its own are among them.
    pub fn group_tokens(&self, rank: usize) -> Vec<usize> {
        self.members(rank / self.ulysses).query_rows()
    }

    fn members(&self, group: usize) -> Members {
        let ranks = || group * self.ulysses..(group + 1) * self.ulysses;
        Members {
            queries: ranks().map(|rank| self.queries(rank)).collect(),
            keys: ranks().map(|rank| self.keys(rank)).collect(),
        }
    }

    /// The ring of one place in the groups, with the heads of that place.
    fn ring(&self, place: usize) -> Result<RingPlan, Error> {
        let spec = local_spec(&self.spec, &local_heads(&self.spec.shape, self.ulysses, place)?)?;
        let keys = (0..self.groups.ranks()).map(|group| join(self.members(group).keys)).collect();
        Ok(RingPlan::with_keys(spec, self.groups.clone(), Some(keys))?.passing(self.direction))
    }

    /// What every rank must agree on, for [`Fingerprint::agree`].
    pub fn fingerprint<Q: Element, T: Element>(&self) -> Fingerprint {
        Fingerprint::of_attention(&self.spec, &self.groups)
            .with("the ranks of a group", self.ulysses as u64)
            .with("the direction", self.direction as u64)
            .with("the type of queries", Q::DTYPE as u64)
            .with("the type of keys and values", T::DTYPE as u64)
    }

    /// Payload bytes that a rank sends: to the heads of its group, round its ring, and back.
    ///
    /// # Errors
    /// [`Error::Argument`] for a rank that is not there.
    pub fn bytes_sent(&self, rank: usize, q_bytes: usize, kv_bytes: usize) -> Result<u64, Error> {
        let ring = self.ring_bytes_sent(rank, q_bytes, kv_bytes)?;
        let (group, place) = (rank / self.ulysses, rank % self.ulysses);
        let (shape, members) = (self.spec.shape, self.members(group));
        let (q_rows, kv_rows) = (members.query_rows(), members.key_rows());
        let q_heads = shape.q_heads() / self.ulysses;
        let kv_heads = shape.kv_heads().div_ceil(self.ulysses);
        let to_heads = q_rows[place] * q_heads * shape.qk_dim() * q_bytes
            + kv_rows[place] * kv_heads * (shape.qk_dim() + shape.v_dim()) * kv_bytes;
        let others: usize = q_rows.iter().sum::<usize>() - q_rows[place];
        let back = others * q_heads * (shape.v_dim() + 1) * 4;
        Ok(((self.ulysses - 1) * to_heads + back) as u64 + ring)
    }

    /// Runs one rank.
    ///
    /// # Errors
    /// [`Error::Argument`] when the inputs are not this rank's rows, or the transport has other ranks; [`Error::Peer`] when a rank has
    /// failed.
    pub fn run<Q: Element, T: Element, X: Transport + ?Sized>(
        &self,
        inputs: Inputs<'_, Q, T>,
        transport: &mut X,
    ) -> Result<Output, Error> {
        if transport.ranks() != self.ranks() {
            return Err(Error::argument("transport", format!("{} ranks", self.ranks()), transport.ranks()));
        }
        let rank = transport.rank();
        let (shape, members, node) = (self.spec.shape, self.members(rank / self.ulysses), self.node(rank));
        let HeadRows { q, k, v } =
            members.to_heads(&shape, inputs, &mut Subgroup::new(transport, node.clone())?)?;
        let output = self.run_heads(Inputs { q: &q, k: &k, v: &v }, transport)?;
        members.to_tokens(&shape, &output, &mut Subgroup::new(transport, node)?)
    }

    /// The ranks of a rank's group.
    pub fn node(&self, rank: usize) -> Vec<usize> {
        let first = rank / self.ulysses * self.ulysses;
        (first..first + self.ulysses).collect()
    }

    /// Runs the ring of one rank alone, on heads that it has already: its place's, of all tokens of its group, rank after rank. So has a
    /// rank whose group splits the weights of projections ([`megatron`](crate::megatron)). Gives outputs `[group's tokens, own q_heads,
    /// v_dim]`.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_heads<Q: Element, T: Element, X: Transport + ?Sized>(
        &self,
        inputs: Inputs<'_, Q, T>,
        transport: &mut X,
    ) -> Result<Output, Error> {
        if transport.ranks() != self.ranks() {
            return Err(Error::argument("transport", format!("{} ranks", self.ranks()), transport.ranks()));
        }
        let place = transport.rank() % self.ulysses;
        let across = (0..self.groups.ranks()).map(|group| group * self.ulysses + place).collect();
        self.ring(place)?.run(inputs, &mut Subgroup::new(transport, across)?)
    }

    /// Payload bytes that a rank sends in [`run_heads`](Self::run_heads).
    ///
    /// # Errors
    /// [`Error::Argument`] for a rank that is not there.
    pub fn ring_bytes_sent(&self, rank: usize, q_bytes: usize, kv_bytes: usize) -> Result<u64, Error> {
        if rank >= self.ranks() {
            return Err(Error::argument("rank", format!("below {}", self.ranks()), rank));
        }
        Ok(self.ring(rank % self.ulysses)?.bytes_sent(rank / self.ulysses, q_bytes, kv_bytes))
    }
}
