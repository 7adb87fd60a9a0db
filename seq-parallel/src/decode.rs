//! Decoding over shards: keys and values stay with the ranks that prefilled them, the query comes to them.
//!
//! Of each layer every rank has a [`Shard`]. A step has a *home* rank, which runs the model. It sends the queries of the new tokens to
//! all other ranks, together with the keys and values of those tokens that they are to keep; each attends to its shard and sends back
//! partial outputs and log-sum-exps in f32; home merges them in the order of ranks, so that runs are bitwise equal. What moves per
//! token and layer is a query there and an output back, however long the sequence is.
//!
//! New tokens go to the ranks that hold the fewest ([`deal`]), so that shards stay balanced.
//!
//! Source: PecSched §5 (a long decode stays where its keys and values are, and its query is copied to all of them); the merge is that
//! of partial softmax states ([`attention::softmax_state`]).

use std::ops::Range;
use std::sync::Arc;

use attention::softmax_state::{Normalised, Raw};
use attention::{AttentionSpec, Element, HeadShape, HeadsView};

use crate::placement::{Segment, cut};
use crate::ring::Inputs;
use crate::schedule;
use crate::transport::{Buffer, Operation, Tag, Transport};
use crate::{Error, Output, cpu};

/// One rank's share of one layer's keys and values of a sequence.
#[derive(Debug, Clone)]
pub struct Shard<T> {
    shape: HeadShape,
    segments: Vec<Segment>,
    tokens: usize,
    k: Vec<T>,
    v: Vec<T>,
}

impl<T: Element> Shard<T> {
    /// A shard without tokens.
    pub fn new(shape: HeadShape) -> Self {
        Shard { shape, segments: Vec::new(), tokens: 0, k: Vec::new(), v: Vec::new() }
    }

    /// Appends tokens.
    ///
    /// - `segments`: which tokens of the sequence they are, with rows counted from 0; all of one sequence;
    /// - `k` `[tokens, kv_heads, qk_dim]` after RoPE, `v` `[tokens, kv_heads, v_dim]`.
    ///
    /// # Errors
    /// [`Error::Argument`] when there are not as many keys or values as the segments say; nothing is appended then.
    pub fn append(&mut self, segments: &[Segment], k: &[T], v: &[T]) -> Result<(), Error> {
        let new = tokens(segments);
        crate::error::check_len("k", k.len(), &[new, self.shape.kv_heads(), self.shape.qk_dim()])?;
        crate::error::check_len("v", v.len(), &[new, self.shape.kv_heads(), self.shape.v_dim()])?;
        // Room for both first: keys without values would stay behind.
        for (held, new) in [(&mut self.k, k.len()), (&mut self.v, v.len())] {
            held.try_reserve(new)
                .map_err(|error| Error::argument("tokens", "keys and values that fit memory", error))?;
        }
        self.k.extend_from_slice(k);
        self.v.extend_from_slice(v);
        for segment in segments {
            let segment = Segment { row: self.tokens + segment.row, ..*segment };
            match self.segments.last_mut().and_then(|last| Some((continued(last, &segment)?, last))) {
                Some((longer, last)) => *last = longer,
                None => self.segments.push(segment),
            }
        }
        self.tokens += new;
        Ok(())
    }

    /// Tokens held.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Bytes of keys and values held.
    pub fn bytes(&self) -> usize {
        size_of_val(self.k.as_slice()) + size_of_val(self.v.as_slice())
    }

    /// Which tokens of the sequence are held.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Keys and values, to be changed.
    pub fn values_mut(&mut self) -> [&mut [T]; 2] {
        [&mut self.k, &mut self.v]
    }

    /// Forgets all but the first `tokens` tokens, where there are more; memory is kept.
    pub fn truncate(&mut self, tokens: usize) {
        if tokens < self.tokens {
            self.segments = cut(&self.segments, 0..tokens);
            self.tokens = tokens;
        }
        self.k.truncate(self.tokens * self.shape.kv_heads() * self.shape.qk_dim());
        self.v.truncate(self.tokens * self.shape.kv_heads() * self.shape.v_dim());
    }

    /// Attends to what is held.
    ///
    /// - `queries`: which tokens the rows of `q` `[tokens, q_heads, qk_dim]` are.
    ///
    /// # Errors
    /// [`Error::Argument`] or [`Error::Attention`] when shapes do not fit.
    pub fn attend(&self, spec: &AttentionSpec, queries: &[Segment], q: &[f32]) -> Result<Output, Error> {
        let (shape, rows) = (spec.shape, tokens(queries));
        crate::error::check_len("q", q.len(), &[rows, shape.q_heads(), shape.qk_dim()])?;
        let mut states = vec![Raw::empty(shape.v_dim()); rows * shape.q_heads()];
        cpu::absorb(
            spec,
            &schedule::tiles(&spec.mask, queries, &self.segments),
            HeadsView::nhd(q, rows, shape.q_heads(), shape.qk_dim())?,
            HeadsView::nhd(&self.k, self.tokens, shape.kv_heads(), shape.qk_dim())?,
            HeadsView::nhd(&self.v, self.tokens, shape.kv_heads(), shape.v_dim())?,
            &mut states,
        )?;
        Ok(cpu::finish(&states))
    }
}

/// One segment in the place of two, where the second goes on as the first began.
fn continued(first: &Segment, second: &Segment) -> Option<Segment> {
    let distance = second.start.checked_sub(first.last()).filter(|distance| *distance > 0)?;
    let fits = |segment: &Segment| segment.len == 1 || segment.stride == distance;
    (first.sequence == second.sequence && fits(first) && fits(second)).then(|| Segment {
        stride: distance,
        len: first.len + second.len,
        ..*first
    })
}

fn tokens(segments: &[Segment]) -> usize {
    segments.iter().map(|segment| segment.len).sum()
}

/// Deals `new` tokens at positions `start..` of a sequence to ranks that hold `held[r]` tokens: one by one to whoever has the fewest,
/// the first of several, but each rank's in one piece. Gives the positions of each rank's, `(first, how many)`.
pub fn deal(held: &[usize], start: usize, new: usize) -> Vec<(usize, usize)> {
    let mut dealt = vec![0; held.len()];
    for _ in 0..new {
        let fewest = (0..held.len()).min_by_key(|&rank| held[rank] + dealt[rank]);
        if let Some(rank) = fewest {
            dealt[rank] += 1;
        }
    }
    let mut first = start;
    let place = |len: usize| {
        first += len;
        (first - len, len)
    };
    dealt.into_iter().map(place).collect()
}

/// A step of decoding over shards: what every rank knows of it.
#[derive(Debug, Clone)]
pub struct DecodeStep {
    spec: AttentionSpec,
    home: usize,
    /// Position of the first new token.
    start: usize,
    /// Of each rank, the first new token that it keeps, and how many.
    dealt: Vec<(usize, usize)>,
    new: usize,
}

impl DecodeStep {
    /// A step over ranks that hold `held[r]` tokens of a sequence: its next `new` tokens, which rank `home` computes.
    ///
    /// # Errors
    /// [`Error::Argument`] for no ranks or a home that is none of them; [`Error::Attention`] for a window of 0 keys.
    pub fn new(spec: AttentionSpec, held: &[usize], new: usize, home: usize) -> Result<Self, Error> {
        spec.mask.check()?;
        if home >= held.len() {
            return Err(Error::argument("home", format!("a rank below {}", held.len()), home));
        }
        let start = held.iter().sum();
        Ok(DecodeStep { spec, home, start, dealt: deal(held, start, new), new })
    }

    /// How many new tokens each rank keeps.
    pub fn dealt(&self) -> impl Iterator<Item = usize> + '_ {
        self.dealt.iter().map(|(_, len)| *len)
    }

    /// Payload bytes that a rank sends in one layer, with keys and values of `kv_bytes` an element. Home: to every other rank the queries
    /// in f32, and the keys and values that it keeps. Another rank: its partial outputs and log-sum-exps in f32.
    pub fn bytes_sent(&self, rank: usize, kv_bytes: usize) -> u64 {
        if rank != self.home {
            return self.partial_bytes() as u64;
        }
        let others = (0..self.dealt.len()).filter(|other| *other != self.home);
        others.map(|other| self.query_bytes(other, kv_bytes) as u64).sum()
    }

    fn query_bytes(&self, to: usize, kv_bytes: usize) -> usize {
        let shape = self.spec.shape;
        let kv = self.dealt[to].1 * shape.kv_heads() * (shape.qk_dim() + shape.v_dim());
        4 * self.new * shape.q_heads() * shape.qk_dim() + kv_bytes * kv
    }

    fn partial_bytes(&self) -> usize {
        4 * self.new * self.spec.shape.q_heads() * (self.spec.shape.v_dim() + 1)
    }

    /// The new tokens, as queries: which tokens rows are.
    pub fn queries(&self) -> Vec<Segment> {
        let all = Segment { sequence: 0, start: self.start, stride: 1, len: self.new, row: 0 };
        (self.new > 0).then_some(all).into_iter().collect()
    }

    /// Rows of the new tokens that a rank keeps.
    pub fn rows(&self, rank: usize) -> Range<usize> {
        let (first, len) = self.dealt[rank];
        first - self.start..first - self.start + len
    }

    /// The new tokens that a rank keeps, as it appends them to its [`Shard`].
    pub fn kept(&self, rank: usize) -> Vec<Segment> {
        let (start, len) = self.dealt[rank];
        (len > 0).then_some(Segment { sequence: 0, start, stride: 1, len, row: 0 }).into_iter().collect()
    }

    fn check<X: Transport + ?Sized>(&self, transport: &X) -> Result<(), Error> {
        let ranks = self.dealt.len();
        if transport.ranks() != ranks {
            return Err(Error::argument("transport", format!("{ranks} ranks"), transport.ranks()));
        }
        Ok(())
    }

    /// Home's part of a layer. `inputs` are those of all new tokens. Gives their attention over all shards.
    ///
    /// # Errors
    /// [`Error::Argument`] when a tensor has another length, or the transport other ranks or another rank than home's;
    /// [`Error::Peer`] when a rank has failed.
    pub fn ask<T: Element, X: Transport + ?Sized>(
        &self,
        layer: usize,
        inputs: Inputs<'_, f32, T>,
        shard: &mut Shard<T>,
        transport: &mut X,
    ) -> Result<Output, Error> {
        self.check(transport)?;
        let (home, shape) = (self.home, self.spec.shape);
        if transport.rank() != home {
            return Err(Error::argument("transport", format!("home, rank {home}"), transport.rank()));
        }
        let (k_width, v_width) = (shape.kv_heads() * shape.qk_dim(), shape.kv_heads() * shape.v_dim());
        crate::error::check_len("q", inputs.q.len(), &[self.new, shape.q_heads(), shape.qk_dim()])?;
        crate::error::check_len("k", inputs.k.len(), &[self.new, k_width])?;
        crate::error::check_len("v", inputs.v.len(), &[self.new, v_width])?;
        let part = |rank: usize| {
            let rows = self.rows(rank);
            (
                &inputs.k[rows.start * k_width..rows.end * k_width],
                &inputs.v[rows.start * v_width..rows.end * v_width],
            )
        };
        let [query, partial] = tags(layer);
        let mut asked = Vec::with_capacity(self.dealt.len());
        for other in (0..self.dealt.len()).filter(|other| *other != home) {
            let (k, v) = part(other);
            let mut message = Buffer::new(self.query_bytes(other, T::DTYPE.size()));
            let (q_bytes, kv_bytes) = message.bytes_mut().split_at_mut(size_of_val(inputs.q));
            let (k_bytes, v_bytes) = kv_bytes.split_at_mut(size_of_val(k));
            q_bytes.copy_from_slice(bytemuck::cast_slice(inputs.q));
            k_bytes.copy_from_slice(bytemuck::cast_slice(k));
            v_bytes.copy_from_slice(bytemuck::cast_slice(v));
            asked.push((other, exchange(query, other, message, 0, transport)?));
        }
        let mut answers = Vec::with_capacity(asked.len());
        for (other, ticket) in asked {
            let answer = exchange(partial, other, Buffer::new(0), self.partial_bytes(), transport)?;
            answers.push((other, ticket, answer));
        }
        // While the others compute.
        let (k, v) = part(home);
        shard.append(&self.kept(home), k, v)?;
        let own = shard.attend(&self.spec, &self.queries(), inputs.q)?;
        let mut partials: Vec<Option<Output>> = self.dealt.iter().map(|_| None).collect();
        partials[home] = Some(own);
        for (other, ticket, answer) in answers {
            transport.wait(ticket)?;
            let answer = transport.wait(answer)?;
            let (out, lse) = answer.values::<f32>().split_at(self.new * shape.q_heads() * shape.v_dim());
            partials[other] = Some(Output { out: out.to_vec(), lse: lse.to_vec() });
        }
        merge(shape.v_dim(), partials.into_iter().flatten())
    }

    /// The part of a layer of a rank that is not home.
    ///
    /// # Errors
    /// [`Error::Argument`] for a transport with other ranks, or of home; [`Error::Peer`] when a rank has failed.
    pub fn answer<T: Element, X: Transport + ?Sized>(
        &self,
        layer: usize,
        shard: &mut Shard<T>,
        transport: &mut X,
    ) -> Result<(), Error> {
        self.check(transport)?;
        let (rank, home, shape) = (transport.rank(), self.home, self.spec.shape);
        if rank == home {
            return Err(Error::argument("transport", "another rank than home", rank));
        }
        let [query, partial] = tags(layer);
        let expected = self.query_bytes(rank, T::DTYPE.size());
        let ticket = exchange(query, home, Buffer::new(0), expected, transport)?;
        let message = transport.wait(ticket)?;
        let (q, kv) = message.bytes().split_at(4 * self.new * shape.q_heads() * shape.qk_dim());
        let kv: Vec<T> = bytemuck::pod_collect_to_vec(kv);
        let (k, v) = kv.split_at(self.dealt[rank].1 * shape.kv_heads() * shape.qk_dim());
        shard.append(&self.kept(rank), k, v)?;
        let Output { mut out, lse } =
            shard.attend(&self.spec, &self.queries(), &bytemuck::pod_collect_to_vec::<u8, f32>(q))?;
        out.extend(lse);
        let ticket = exchange(partial, home, Buffer::of(&out), 0, transport)?;
        transport.wait(ticket)?;
        Ok(())
    }
}

/// The tags of a layer: queries to the shards, partial outputs back.
fn tags(layer: usize) -> [Tag; 2] {
    [Operation::DecodeQuery, Operation::DecodePartial].map(|operation| Tag::new(operation, layer))
}

/// Sends to and receives from one rank.
fn exchange<X: Transport + ?Sized>(
    tag: Tag,
    peer: usize,
    mut message: Buffer,
    expected: usize,
    transport: &mut X,
) -> Result<crate::transport::Ticket, Error> {
    transport.seal(&mut message, tag);
    transport.exchange(tag, peer, Arc::new(message), peer, Buffer::new(expected))
}

/// The output over the keys of all partial outputs of the same queries, merged by their log-sum-exps, in their order.
///
/// # Errors
/// [`Error::Argument`] or [`Error::Attention`] when they are not of one shape.
pub fn merge(v_dim: usize, partials: impl IntoIterator<Item = Output>) -> Result<Output, Error> {
    let mut states: Option<Vec<Raw<f32>>> = None;
    for Output { out, lse } in partials {
        crate::error::check_len("partials", out.len(), &[lse.len(), v_dim])?;
        let rows = out.chunks_exact(v_dim.max(1)).zip(lse);
        let rows: Vec<_> = rows.map(|(out, lse)| Raw::from(&Normalised { out: out.to_vec(), lse })).collect();
        match &mut states {
            None => states = Some(rows),
            Some(states) => {
                crate::error::check_len("partials", rows.len(), &[states.len()])?;
                for (state, row) in states.iter_mut().zip(&rows) {
                    state.merge(row)?;
                }
            }
        }
    }
    Ok(cpu::finish(&states.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_tokens_go_to_whoever_has_the_fewest() {
        for (held, new, expected) in [
            (vec![3, 3, 3], 1, vec![1, 0, 0]),
            (vec![4, 3, 3], 1, vec![0, 1, 0]),
            (vec![4, 4, 3], 4, vec![1, 1, 2]),
            (vec![0, 9, 2], 3, vec![3, 0, 0]),
            (vec![0, 9, 2], 20, vec![11, 1, 8]),
            (vec![5], 7, vec![7]),
            (vec![1, 2], 0, vec![0, 0]),
        ] {
            let start = held.iter().sum();
            let dealt = deal(&held, start, new);
            assert_eq!(dealt.iter().map(|(_, len)| *len).collect::<Vec<_>>(), expected, "{held:?} + {new}");
            let ends = dealt.iter().scan(start, |next, &(first, len)| {
                assert_eq!(first, *next, "{held:?} + {new}: no gaps");
                *next += len;
                Some(*next)
            });
            assert_eq!(ends.last(), Some(start + new));
        }
    }

    /// Token by token round the ranks a shard's list of segments does not grow.
    #[test]
    fn segments_of_a_long_decode_are_few() {
        let mut shard = Shard::<f32>::new(HeadShape::new(1, 1, 1, 1).unwrap());
        shard
            .append(&[Segment { sequence: 0, start: 0, stride: 1, len: 5, row: 0 }], &[0.0; 5], &[0.0; 5])
            .unwrap();
        for i in 0..100 {
            let segment = Segment { sequence: 0, start: 20 + 4 * i, stride: 1, len: 1, row: 0 };
            shard.append(&[segment], &[0.0], &[0.0]).unwrap();
        }
        let strides: Vec<_> = shard.segments().iter().map(|segment| (segment.stride, segment.len)).collect();
        assert_eq!(strides, [(1, 5), (4, 100)]);
        let positions: Vec<_> = shard.segments().iter().flat_map(Segment::positions).collect();
        let expected: Vec<_> = (0..5).chain((0..100).map(|i| 20 + 4 * i)).collect();
        assert_eq!((positions, shard.tokens(), shard.bytes()), (expected, 105, 840));
        assert!(matches!(shard.append(&[], &[0.0], &[]), Err(Error::Argument { argument: "k", .. })));
        shard.truncate(7);
        assert_eq!((shard.tokens(), shard.bytes()), (7, 56));
        let positions: Vec<_> = shard.segments().iter().flat_map(Segment::positions).collect();
        assert_eq!(positions, [0, 1, 2, 3, 4, 20, 24]);
        shard.truncate(8);
        assert_eq!(shard.tokens(), 7, "there are no more");
        shard.truncate(0);
        assert_eq!((shard.tokens(), shard.bytes(), shard.segments().len()), (0, 0, 0));
    }
}
