//! Messages of collectives: what is sent is packed into them, and what is received is put where it belongs, on the device.
//!
//! Layouts are those of the CPU path, byte for byte, so that ranks of either kind understand each other: between tokens and heads
//! (Ulysses), K behind V as a ring's block, and a shard's rows of a packed tensor and back. Every one of them is rows of bytes that
//! lie evenly apart on both sides, so that one kernel does them all.

use attention::{DType, HeadShape};
use cuda::kernels::seq_parallel as kernels;
use cuda::launch::{Device, Function};
use cuda::memory::{View, ViewMut};
use cuda::params::{PACK_UNIT, PackCopy};

use crate::Error;
use crate::placement::{Segment, Shards};
use crate::ulysses::local_heads;

/// Most copies of one launch.
const MAX_COPIES: usize = u16::MAX as usize;
/// Longest run of bytes that is one copy.
const MAX_RUN: usize = 1 << 30;

/// A list of copies.
#[derive(Debug, Clone, Default)]
pub struct PackPlan {
    copies: Vec<PackCopy>,
    sources: Vec<usize>,
    destinations: Vec<usize>,
    messages: Vec<usize>,
}

/// Rows of bytes, evenly apart in a buffer.
#[derive(Debug, Clone, Copy)]
struct Place {
    buffer: usize,
    offset: usize,
    stride: usize,
}

/// Queries, keys and values of a rank, in rows and bytes of an element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// Query tokens.
    pub queries: usize,
    /// Key tokens.
    pub keys: usize,
}

impl PackPlan {
    /// Own tokens, all heads, to one message per rank of all own tokens, that rank's heads: Ulysses' first all-to-all, sending.
    ///
    /// Sources: q `[queries, q_heads, qk_dim]`, k `[keys, kv_heads, qk_dim]`, v `[keys, kv_heads, v_dim]`. Destination: the messages
    /// of rank 0, 1 … behind each other, each q, k and v of its heads, token by token.
    ///
    /// # Errors
    /// [`Error::Divisibility`] as [`local_heads`], [`Error::Argument`] for more copies than one launch takes.
    pub fn to_heads(
        shape: &HeadShape,
        rows: Rows,
        ranks: usize,
        (q_type, kv_type): (DType, DType),
    ) -> Result<Self, Error> {
        let mut plan = PackPlan::default();
        let mut at = 0;
        for to in 0..ranks {
            let heads = local_heads(shape, ranks, to)?;
            let start = at;
            for (buffer, tokens, all, part, bytes) in [
                (0, rows.queries, shape.q_heads(), &heads.q, shape.qk_dim() * q_type.size()),
                (1, rows.keys, shape.kv_heads(), &heads.kv, shape.qk_dim() * kv_type.size()),
                (2, rows.keys, shape.kv_heads(), &heads.kv, shape.v_dim() * kv_type.size()),
            ] {
                let width = part.len() * bytes;
                let from = Place { buffer, offset: part.start * bytes, stride: all * bytes };
                plan.rows(tokens, width, from, Place { buffer: 0, offset: at, stride: width });
                at += tokens * width;
            }
            plan.messages.push(at - start);
        }
        let q = rows.queries * shape.q_heads() * shape.qk_dim() * q_type.size();
        let kv = |dim: usize| rows.keys * shape.kv_heads() * dim * kv_type.size();
        plan.sources = vec![q, kv(shape.qk_dim()), kv(shape.v_dim())];
        plan.destinations = vec![at];
        plan.checked()
    }

    /// The messages of all ranks to all tokens, own heads: the same all-to-all, receiving. `rows` is what each rank has.
    ///
    /// Source: the messages of rank 0, 1 … behind each other. Destinations: q `[all queries, own q heads, qk_dim]`, k `[all keys, own KV
    /// heads, qk_dim]`, v `[all keys, own KV heads, v_dim]`, rank by rank.
    ///
    /// # Errors
    /// As [`to_heads`](Self::to_heads).
    pub fn from_tokens(
        shape: &HeadShape,
        rows: &[Rows],
        rank: usize,
        (q_type, kv_type): (DType, DType),
    ) -> Result<Self, Error> {
        let heads = local_heads(shape, rows.len(), rank)?;
        let widths = [
            heads.q.len() * shape.qk_dim() * q_type.size(),
            heads.kv.len() * shape.qk_dim() * kv_type.size(),
            heads.kv.len() * shape.v_dim() * kv_type.size(),
        ];
        let mut plan = PackPlan { destinations: vec![0; 3], ..PackPlan::default() };
        let mut at = 0;
        for rows in rows {
            let start = at;
            for (buffer, tokens) in [rows.queries, rows.keys, rows.keys].into_iter().enumerate() {
                let bytes = tokens * widths[buffer];
                plan.run(bytes, (0, at), (buffer, plan.destinations[buffer]));
                plan.destinations[buffer] += bytes;
                at += bytes;
            }
            plan.messages.push(at - start);
        }
        plan.sources = vec![at];
        plan.checked()
    }

    /// All tokens, own heads, to one message per rank of that rank's tokens: Ulysses' second all-to-all, sending. `queries` is how
    /// many query tokens each rank has.
    ///
    /// Sources: outputs `[all queries, own q heads, v_dim]` and LSEs `[all queries, own q heads]`, f32. Destination: the messages of
    /// rank 0, 1 … behind each other, each outputs, then LSEs.
    ///
    /// # Errors
    /// As [`to_heads`](Self::to_heads).
    pub fn to_tokens(shape: &HeadShape, queries: &[usize]) -> Result<Self, Error> {
        let heads = local_heads(shape, queries.len(), 0)?.q.len();
        let widths = [heads * shape.v_dim() * 4, heads * 4];
        let mut plan = PackPlan { sources: vec![0; 2], ..PackPlan::default() };
        let mut at = 0;
        for tokens in queries {
            let start = at;
            for (buffer, width) in widths.into_iter().enumerate() {
                plan.run(tokens * width, (buffer, plan.sources[buffer]), (0, at));
                plan.sources[buffer] += tokens * width;
                at += tokens * width;
            }
            plan.messages.push(at - start);
        }
        plan.destinations = vec![at];
        plan.checked()
    }

    /// The messages of all ranks' heads to own tokens, all heads: the same all-to-all, receiving.
    ///
    /// Source: the messages of rank 0, 1 … behind each other. Destinations: outputs `[queries, q_heads, v_dim]` and LSEs `[queries,
    /// q_heads]`, f32.
    ///
    /// # Errors
    /// As [`to_heads`](Self::to_heads).
    pub fn from_heads(shape: &HeadShape, queries: usize, ranks: usize) -> Result<Self, Error> {
        let mut plan = PackPlan::default();
        let mut at = 0;
        for from in 0..ranks {
            let heads = local_heads(shape, ranks, from)?.q;
            let start = at;
            for (buffer, bytes) in [shape.v_dim() * 4, 4].into_iter().enumerate() {
                let width = heads.len() * bytes;
                let to = Place { buffer, offset: heads.start * bytes, stride: shape.q_heads() * bytes };
                plan.rows(queries, width, Place { buffer: 0, offset: at, stride: width }, to);
                at += queries * width;
            }
            plan.messages.push(at - start);
        }
        plan.sources = vec![at];
        let rows = queries * shape.q_heads() * 4;
        plan.destinations = vec![rows * shape.v_dim(), rows];
        plan.checked()
    }

    /// K `[tokens, kv_heads, qk_dim]` and V `[tokens, kv_heads, v_dim]` behind each other: a ring's block.
    ///
    /// # Errors
    /// [`Error::Argument`] for more copies than one launch takes.
    pub fn block(shape: &HeadShape, tokens: usize, dtype: DType) -> Result<Self, Error> {
        let bytes = |dim: usize| tokens * shape.kv_heads() * dim * dtype.size();
        let (k, v) = (bytes(shape.qk_dim()), bytes(shape.v_dim()));
        let mut plan = PackPlan { sources: vec![k, v], destinations: vec![k + v], ..PackPlan::default() };
        plan.run(k, (0, 0), (0, 0));
        plan.run(v, (1, 0), (0, k));
        plan.checked()
    }

    /// A rank's rows of a packed tensor `[new tokens, width]` of `width_bytes`: [`Shards::take`].
    ///
    /// # Errors
    /// [`Error::Argument`] for a width that is no multiple of 4 bytes, or more copies than one launch takes.
    pub fn take(shards: &Shards, rank: usize, width_bytes: usize) -> Result<Self, Error> {
        Self::shard(shards, rank, width_bytes, true)
    }

    /// A rank's rows to their places in a packed tensor: [`Shards::put`].
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub fn put(shards: &Shards, rank: usize, width_bytes: usize) -> Result<Self, Error> {
        Self::shard(shards, rank, width_bytes, false)
    }

    fn shard(shards: &Shards, rank: usize, width: usize, take: bool) -> Result<Self, Error> {
        if rank >= shards.ranks() {
            return Err(Error::argument("rank", format!("below {}", shards.ranks()), rank));
        }
        let mut plan = PackPlan::default();
        let firsts: Vec<usize> = shards
            .sequences()
            .iter()
            .scan(0, |first, sequence| Some(std::mem::replace(first, *first + sequence.new)))
            .collect();
        for Segment { sequence, start, stride, len, row } in shards.queries(rank) {
            let token = firsts[sequence] + start - shards.sequences()[sequence].cached;
            let packed = Place { buffer: 0, offset: token * width, stride: stride * width };
            let own = Place { buffer: 0, offset: row * width, stride: width };
            let (from, to) = if take { (packed, own) } else { (own, packed) };
            if stride == 1 {
                plan.run(len * width, (0, from.offset), (0, to.offset));
            } else {
                plan.rows(len, width, from, to);
            }
        }
        let (packed, own) = (shards.new_tokens() * width, shards.query_tokens(rank) * width);
        (plan.sources, plan.destinations) =
            if take { (vec![packed], vec![own]) } else { (vec![own], vec![packed]) };
        plan.checked()
    }

    /// The copies, to be uploaded once.
    pub fn copies(&self) -> &[PackCopy] {
        &self.copies
    }

    /// Bytes of each source.
    pub fn sources(&self) -> &[usize] {
        &self.sources
    }

    /// Bytes of each destination.
    pub fn destinations(&self) -> &[usize] {
        &self.destinations
    }

    /// Bytes of the message to or from each rank, in the order in which they lie behind each other; empty where there are none.
    pub fn messages(&self) -> &[usize] {
        &self.messages
    }

    /// Bytes that a run reads, which is as many as it writes.
    pub fn bytes_moved(&self) -> u64 {
        self.copies.iter().map(|copy| u64::from(copy.rows) * u64::from(copy.row_bytes)).sum()
    }

    /// Adds rows of `width` bytes.
    fn rows(&mut self, rows: usize, width: usize, from: Place, to: Place) {
        if rows == 0 || width == 0 {
            return;
        }
        if width == from.stride && width == to.stride {
            return self.run(rows * width, (from.buffer, from.offset), (to.buffer, to.offset));
        }
        let most = (MAX_RUN / width).max(1);
        for first in (0..rows).step_by(most) {
            self.copies.push(PackCopy {
                source_offset: (from.offset + first * from.stride) as u64,
                source_stride: from.stride as u64,
                destination_offset: (to.offset + first * to.stride) as u64,
                destination_stride: to.stride as u64,
                rows: most.min(rows - first) as u32,
                row_bytes: width as u32,
                source: from.buffer as u32,
                destination: to.buffer as u32,
            });
        }
    }

    /// Adds `bytes` that lie behind each other on both sides: (buffer, offset).
    fn run(&mut self, bytes: usize, from: (usize, usize), to: (usize, usize)) {
        for first in (0..bytes).step_by(MAX_RUN) {
            self.copies.push(PackCopy {
                source_offset: (from.1 + first) as u64,
                source_stride: 0,
                destination_offset: (to.1 + first) as u64,
                destination_stride: 0,
                rows: 1,
                row_bytes: MAX_RUN.min(bytes - first) as u32,
                source: from.0 as u32,
                destination: to.0 as u32,
            });
        }
    }

    /// The plan, if one launch can do it.
    fn checked(self) -> Result<Self, Error> {
        if self.copies.len() > MAX_COPIES {
            return Err(Error::argument("copies", format!("at most {MAX_COPIES}"), self.copies.len()));
        }
        let unit = u64::from(PACK_UNIT);
        let even = |copy: &&PackCopy| {
            [copy.source_offset, copy.source_stride, copy.destination_offset, copy.destination_stride]
                .iter()
                .chain(&[u64::from(copy.row_bytes)])
                .any(|bytes| bytes % unit != 0)
        };
        if let Some(copy) = self.copies.iter().find(even) {
            return Err(Error::argument("width", format!("a multiple of {unit} bytes"), copy.row_bytes));
        }
        Ok(self)
    }
}

/// The prepared copies of a plan.
#[derive(Debug, Clone)]
pub struct Pack<F> {
    plan: PackPlan,
    kernel: kernels::Pack<F>,
}

/// Arguments of [`Pack::run`].
#[derive(Debug)]
pub struct PackArgs<'a, 'b> {
    /// [`PackPlan::copies`] on the device.
    pub copies: &'a View<'b, PackCopy>,
    /// The plan's sources as bytes, 16-byte aligned.
    pub sources: &'a [View<'b, u8>],
    /// The plan's destinations as bytes, 16-byte aligned.
    pub destinations: &'a mut [ViewMut<'b, u8>],
    /// Status word: [`FaultCode::BadRange`](attention::FaultCode::BadRange) with a copy that is not one of the plan, and is skipped.
    pub status: ViewMut<'b, u64>,
}

impl<F: Function> Pack<F> {
    /// Compiles and loads the kernel. May block.
    ///
    /// # Errors
    /// [`Error::Cuda`] when it cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &PackPlan) -> Result<Self, Error> {
        Ok(Pack { plan: plan.clone(), kernel: kernels::Pack::prepare(device)? })
    }

    /// Enqueues the copies and returns.
    ///
    /// # Errors
    /// [`Error::Argument`] for buffers that are not those of the plan, [`Error::Cuda`] names an argument that does not fit.
    pub fn run(&self, queue: &F::Queue, args: PackArgs<'_, '_>) -> Result<(), Error> {
        let sources: Vec<usize> = args.sources.iter().map(View::len).collect();
        let destinations: Vec<usize> = args.destinations.iter().map(ViewMut::len).collect();
        for (argument, expected, found) in [
            ("sources", &self.plan.sources, &sources),
            ("destinations", &self.plan.destinations, &destinations),
        ] {
            let fits =
                expected.len() == found.len() && expected.iter().zip(found).all(|(need, have)| need <= have);
            if !fits {
                return Err(Error::argument(
                    argument,
                    format!("buffers of {expected:?} bytes"),
                    format!("{found:?}"),
                ));
            }
        }
        let args = kernels::PackArgs {
            copies: args.copies,
            count: self.plan.copies.len() as u32,
            sources: args.sources,
            destinations: args.destinations,
            status: args.status,
        };
        Ok(self.kernel.launch(queue, args)?)
    }
}
