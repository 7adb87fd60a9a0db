//! Ulysses: from a part of the tokens to a part of the heads and back, in two all-to-alls.
//!
//! Before attention every rank has all heads of some tokens, during attention some heads of all tokens, so that attention is the plain
//! one. Needs heads that can be dealt to the ranks. A KV head is sent to several ranks where there are more ranks than KV heads.
//!
//! Source: DeepSpeed-Ulysses (arXiv 2309.14509); PecSched uses it within a node (§5.3).

use std::ops::Range;

use attention::softmax_state::Raw;
use attention::{AttentionSpec, Element, HeadShape, HeadsView};

use crate::fingerprint::Fingerprint;
use crate::placement::{Segment, Shards, join};
use crate::ring::Inputs;
use crate::schedule;
use crate::transport::{Buffer, Transport};
use crate::{Error, Output, cpu};

/// The heads of one rank of several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalHeads {
    /// Query heads.
    pub q: Range<usize>,
    /// KV heads that they read; other ranks may have the same.
    pub kv: Range<usize>,
}

/// Deals heads to ranks: rank r gets the r-th part of the query heads and the KV heads that these read.
///
/// # Errors
/// [`Error::Divisibility`] that says which: query heads must divide by the ranks, and of KV heads and ranks one must divide the other.
pub fn local_heads(shape: &HeadShape, ranks: usize, rank: usize) -> Result<LocalHeads, Error> {
    deal_heads("Ulysses", shape, ranks, rank)
}

/// As [`local_heads`], for a scheme of this name.
pub(crate) fn deal_heads(
    scheme: &'static str,
    shape: &HeadShape,
    ranks: usize,
    rank: usize,
) -> Result<LocalHeads, Error> {
    let error = |what, count, rule| Error::Divisibility { scheme, what, count, ranks, rule };
    if ranks == 0 || rank >= ranks {
        return Err(Error::argument("rank", format!("below {ranks} ranks"), rank));
    }
    if !shape.q_heads().is_multiple_of(ranks) {
        return Err(error("q_heads", shape.q_heads(), "they must be a multiple of the ranks"));
    }
    let kv_heads = shape.kv_heads();
    if !kv_heads.is_multiple_of(ranks) && !ranks.is_multiple_of(kv_heads) {
        return Err(error(
            "kv_heads",
            kv_heads,
            "they must be a multiple of the ranks, or the ranks a multiple of them",
        ));
    }
    let q = shape.q_heads() / ranks;
    let q = rank * q..(rank + 1) * q;
    Ok(LocalHeads { kv: shape.kv_head_of(q.start)..shape.kv_head_of(q.end - 1) + 1, q })
}

/// Rows of each member of a group.
#[derive(Debug, Clone)]
pub(crate) struct Members {
    pub(crate) queries: Vec<Vec<Segment>>,
    pub(crate) keys: Vec<Vec<Segment>>,
}

/// All tokens of a group, own heads: queries, keys, values.
pub(crate) struct HeadRows<Q, T> {
    pub(crate) q: Vec<Q>,
    pub(crate) k: Vec<T>,
    pub(crate) v: Vec<T>,
}

impl Members {
    fn rows(lists: &[Vec<Segment>]) -> Vec<usize> {
        lists.iter().map(|list| list.iter().map(|segment| segment.len).sum()).collect()
    }

    pub(crate) fn query_rows(&self) -> Vec<usize> {
        Self::rows(&self.queries)
    }

    pub(crate) fn key_rows(&self) -> Vec<usize> {
        Self::rows(&self.keys)
    }

    /// From own tokens, all heads, to all tokens of the group, own heads: queries, keys, values.
    pub(crate) fn to_heads<Q: Element, T: Element, X: Transport + ?Sized>(
        &self,
        shape: &HeadShape,
        inputs: Inputs<'_, Q, T>,
        transport: &mut X,
    ) -> Result<HeadRows<Q, T>, Error> {
        let (rank, ranks) = (transport.rank(), transport.ranks());
        let (q_rows, kv_rows) = (self.query_rows(), self.key_rows());
        crate::error::check_len("q", inputs.q.len(), &[q_rows[rank], shape.q_heads(), shape.qk_dim()])?;
        crate::error::check_len("k", inputs.k.len(), &[kv_rows[rank], shape.kv_heads(), shape.qk_dim()])?;
        crate::error::check_len("v", inputs.v.len(), &[kv_rows[rank], shape.kv_heads(), shape.v_dim()])?;
        let own = local_heads(shape, ranks, rank)?;
        let mut send = Vec::with_capacity(ranks);
        for to in 0..ranks {
            let heads = local_heads(shape, ranks, to)?;
            let mut message = Buffer::new(0);
            push(&mut message, inputs.q, shape.q_heads(), shape.qk_dim(), &heads.q);
            push(&mut message, inputs.k, shape.kv_heads(), shape.qk_dim(), &heads.kv);
            push(&mut message, inputs.v, shape.kv_heads(), shape.v_dim(), &heads.kv);
            send.push(message);
        }
        let parts = |from: usize| {
            let q = q_rows[from] * own.q.len() * shape.qk_dim() * Q::DTYPE.size();
            let k = kv_rows[from] * own.kv.len() * shape.qk_dim() * T::DTYPE.size();
            (q, k, kv_rows[from] * own.kv.len() * shape.v_dim() * T::DTYPE.size())
        };
        let lens: Vec<usize> = (0..ranks).map(parts).map(|(q, k, v)| q + k + v).collect();
        let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
        for (from, message) in transport.all_to_all_v(send, &lens)?.iter().enumerate() {
            let (q_len, k_len, _) = parts(from);
            let (q_part, rest) = message.bytes().split_at(q_len);
            let (k_part, v_part) = rest.split_at(k_len);
            q.extend(bytemuck::pod_collect_to_vec::<u8, Q>(q_part));
            k.extend(bytemuck::pod_collect_to_vec::<u8, T>(k_part));
            v.extend(bytemuck::pod_collect_to_vec::<u8, T>(v_part));
        }
        Ok(HeadRows { q, k, v })
    }

    /// From all tokens of the group, own heads, to own tokens, all heads: outputs and LSEs in f32.
    pub(crate) fn to_tokens<X: Transport + ?Sized>(
        &self,
        shape: &HeadShape,
        output: &Output,
        transport: &mut X,
    ) -> Result<Output, Error> {
        let (rank, ranks) = (transport.rank(), transport.ranks());
        let (rows, heads) = (self.query_rows(), shape.q_heads() / ranks);
        let (width, v_dim) = (heads * shape.v_dim(), shape.v_dim());
        let mut send = Vec::with_capacity(ranks);
        let mut first = 0;
        for rows in &rows {
            let mut message = Buffer::new(0);
            push_values(&mut message, &output.out[first * width..(first + rows) * width]);
            push_values(&mut message, &output.lse[first * heads..(first + rows) * heads]);
            send.push(message);
            first += rows;
        }
        let own = rows[rank];
        let received = transport.all_to_all_v(send, &vec![4 * own * heads * (v_dim + 1); ranks])?;
        let mut all =
            Output { out: vec![0.0; own * shape.q_heads() * v_dim], lse: vec![0.0; own * shape.q_heads()] };
        for (from, message) in received.iter().enumerate() {
            let (out, lse) = message.values::<f32>().split_at(own * width);
            for row in 0..own {
                let head = row * shape.q_heads() + from * heads;
                all.out[head * v_dim..][..width].copy_from_slice(&out[row * width..][..width]);
                all.lse[head..][..heads].copy_from_slice(&lse[row * heads..][..heads]);
            }
        }
        Ok(all)
    }
}

/// Appends some heads of every token.
fn push<E: Element>(message: &mut Buffer, rows: &[E], heads: usize, dim: usize, part: &Range<usize>) {
    for token in rows.chunks_exact(heads * dim) {
        push_values(message, &token[part.start * dim..part.end * dim]);
    }
}

fn push_values<E: Element>(message: &mut Buffer, values: &[E]) {
    let start = message.len();
    message.resize(start + size_of_val(values));
    message.bytes_mut()[start..].copy_from_slice(bytemuck::cast_slice(values));
}

/// The spec of one rank's heads.
pub(crate) fn local_spec(spec: &AttentionSpec, heads: &LocalHeads) -> Result<AttentionSpec, Error> {
    let shape = HeadShape::new(heads.q.len(), heads.kv.len(), spec.shape.qk_dim(), spec.shape.v_dim())?;
    Ok(AttentionSpec { shape, ..*spec })
}

/// Attention over a batch whose heads are dealt to all ranks.
#[derive(Debug, Clone)]
pub struct UlyssesPlan {
    spec: AttentionSpec,
    shards: Shards,
}

impl UlyssesPlan {
    /// Deals heads to as many ranks as the shards have.
    ///
    /// # Errors
    /// As [`local_heads`]; [`Error::Attention`] for a window of 0 keys.
    pub fn new(spec: AttentionSpec, shards: Shards) -> Result<Self, Error> {
        spec.mask.check()?;
        local_heads(&spec.shape, shards.ranks(), 0)?;
        Ok(UlyssesPlan { spec, shards })
    }

    /// Who owns what.
    pub fn shards(&self) -> &Shards {
        &self.shards
    }

    /// What every rank must agree on, for [`Fingerprint::agree`].
    pub fn fingerprint<Q: Element, T: Element>(&self) -> Fingerprint {
        Fingerprint::of_attention(&self.spec, &self.shards)
            .with("the type of queries", Q::DTYPE as u64)
            .with("the type of keys and values", T::DTYPE as u64)
    }

    /// Payload bytes that a rank sends: its tokens' queries, keys and values to the other ranks' heads, then outputs and LSEs of its
    /// heads in f32 to the other ranks' tokens.
    pub fn bytes_sent(&self, rank: usize, q_bytes: usize, kv_bytes: usize) -> u64 {
        let (shape, ranks) = (self.spec.shape, self.shards.ranks());
        let (queries, keys) = (self.shards.query_tokens(rank), self.shards.key_tokens(rank));
        let q_heads = shape.q_heads() / ranks;
        let kv_heads = shape.kv_heads().div_ceil(ranks);
        let to_heads = queries * q_heads * shape.qk_dim() * q_bytes
            + keys * kv_heads * (shape.qk_dim() + shape.v_dim()) * kv_bytes;
        let back = (self.shards.new_tokens() - queries) * q_heads * (shape.v_dim() + 1) * 4;
        ((ranks - 1) * to_heads + back) as u64
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
        let (rank, ranks) = (transport.rank(), self.shards.ranks());
        if transport.ranks() != ranks {
            return Err(Error::argument("transport", format!("{ranks} ranks"), transport.ranks()));
        }
        let members = Members {
            queries: (0..ranks).map(|rank| self.shards.queries(rank)).collect(),
            keys: (0..ranks).map(|rank| self.shards.keys(rank)).collect(),
        };
        let spec = local_spec(&self.spec, &local_heads(&self.spec.shape, ranks, rank)?)?;
        let HeadRows { q, k, v } = members.to_heads(&self.spec.shape, inputs, transport)?;
        let (shape, rows, keys) =
            (spec.shape, members.query_rows().iter().sum(), members.key_rows().iter().sum());
        let q: Vec<f32> = q.iter().map(|x| x.to_f32()).collect();
        let tiles = schedule::tiles(&spec.mask, &join(members.queries.clone()), &join(members.keys.clone()));
        let mut states = vec![Raw::empty(shape.v_dim()); rows * shape.q_heads()];
        cpu::absorb(
            &spec,
            &tiles,
            HeadsView::nhd(&q, rows, shape.q_heads(), shape.qk_dim())?,
            HeadsView::nhd(&k, keys, shape.kv_heads(), shape.qk_dim())?,
            HeadsView::nhd(&v, keys, shape.kv_heads(), shape.v_dim())?,
            &mut states,
        )?;
        let pairs: u64 = tiles.iter().map(|tile| tile.pairs(&spec.mask)).sum();
        // Clocks count pairs of all heads.
        transport.computed(pairs / ranks as u64);
        members.to_tokens(&self.spec.shape, &cpu::finish(&states), transport)
    }
}
