//! A batch with random contents, its oracle, and every scheme on it.
#![allow(dead_code)]

use attention::reference;
use attention::testing::{Comparison, Inputs as Kind, Tolerance};
use attention::{AttentionSpec, Element, HeadShape, Mask, Score};
use seq_parallel::Output;
use seq_parallel::placement::{Segment, Sequence};
use seq_parallel::ring::Inputs;
use seq_parallel::transport::Transport;
use seq_parallel::transport::local;

/// Packed contents of a batch.
pub(crate) struct Contents<E> {
    pub(crate) spec: AttentionSpec,
    pub(crate) sequences: Vec<Sequence>,
    /// `[new tokens, q_heads, qk_dim]`
    pub(crate) q: Vec<E>,
    /// `[tokens, kv_heads, qk_dim]`, cached tokens of a sequence before its new ones.
    pub(crate) k: Vec<E>,
    pub(crate) v: Vec<E>,
    pub(crate) oracle: reference::Output,
}

/// A rank's rows.
pub(crate) struct Rows<E> {
    pub(crate) q: Vec<E>,
    pub(crate) k: Vec<E>,
    pub(crate) v: Vec<E>,
}

impl<E> Rows<E> {
    pub(crate) fn inputs(&self) -> Inputs<'_, E, E> {
        Inputs { q: &self.q, k: &self.k, v: &self.v }
    }
}

pub(crate) fn spec(q_heads: usize, kv_heads: usize, dim: usize, mask: Mask) -> AttentionSpec {
    let shape = HeadShape::new(q_heads, kv_heads, dim, dim).unwrap();
    AttentionSpec { shape, score: Score::new((dim as f32).sqrt().recip()).unwrap(), mask }
}

pub(crate) fn sequences(lens: &[(usize, usize)]) -> Vec<Sequence> {
    lens.iter().map(|&(cached, new)| Sequence { cached, new }).collect()
}

impl<E: Element> Contents<E> {
    pub(crate) fn new(spec: AttentionSpec, sequences: Vec<Sequence>, seed: u64) -> Self {
        let shape = spec.shape;
        let new: usize = sequences.iter().map(|sequence| sequence.new).sum();
        let all: usize = sequences.iter().map(Sequence::kv_len).sum();
        let q = Kind::Normal.generate(new * shape.q_heads(), shape.qk_dim(), seed);
        let k = Kind::OutlierChannels.generate(all * shape.kv_heads(), shape.qk_dim(), seed + 1);
        let v = Kind::Normal.generate(all * shape.kv_heads(), shape.v_dim(), seed + 2);
        let oracle = seq_parallel::reference::attend(&spec, &sequences, &q, &k, &v).unwrap();
        Contents { spec, sequences, q, k, v, oracle }
    }

    /// The rows of these segments.
    pub(crate) fn rows(&self, queries: &[Segment], keys: &[Segment]) -> Rows<E> {
        let shape = self.spec.shape;
        let take = |data: &[E], width: usize, segments: &[Segment], new_only: bool| {
            let mut rows = Vec::new();
            for segment in segments {
                let before: usize = self.sequences[..segment.sequence]
                    .iter()
                    .map(|sequence| if new_only { sequence.new } else { sequence.kv_len() })
                    .sum();
                let cached = if new_only { self.sequences[segment.sequence].cached } else { 0 };
                assert_eq!(rows.len(), segment.row * width, "rows follow each other");
                for position in segment.positions() {
                    let token = before + position - cached;
                    rows.extend_from_slice(&data[token * width..(token + 1) * width]);
                }
            }
            rows
        };
        Rows {
            q: take(&self.q, shape.q_heads() * shape.qk_dim(), queries, true),
            k: take(&self.k, shape.kv_heads() * shape.qk_dim(), keys, false),
            v: take(&self.v, shape.kv_heads() * shape.v_dim(), keys, false),
        }
    }

    /// Compares the outputs of all ranks with the oracle; `queries[r]` says which tokens rank r's rows are. Gives the largest error.
    pub(crate) fn check(&self, case: &str, queries: &[Vec<Segment>], outputs: &[Output]) -> f64 {
        let (heads, v_dim) = (self.spec.shape.q_heads(), self.spec.shape.v_dim());
        let mut out = vec![f32::NAN; self.oracle.out.len()];
        let mut lse = vec![f32::NAN; self.oracle.lse.len()];
        for (queries, output) in queries.iter().zip(outputs) {
            for segment in queries {
                let before: usize =
                    self.sequences[..segment.sequence].iter().map(|sequence| sequence.new).sum();
                for (i, position) in segment.positions().enumerate() {
                    let to = before + position - self.sequences[segment.sequence].cached;
                    let from = segment.row + i;
                    let width = heads * v_dim;
                    out[to * width..(to + 1) * width]
                        .copy_from_slice(&output.out[from * width..(from + 1) * width]);
                    lse[to * heads..(to + 1) * heads]
                        .copy_from_slice(&output.lse[from * heads..(from + 1) * heads]);
                }
            }
        }
        let compared = Comparison::new(&out, &self.oracle.out, Tolerance::new(1e-5, 1e-5));
        compared.assert(format!("{case}: outputs"));
        Comparison::new(&lse, &self.oracle.lse, Tolerance::LSE).assert(format!("{case}: LSEs"));
        compared.max_abs
    }
}

/// Runs `body(rank, transport)` on as many threads as there are transports.
pub(crate) fn on_ranks<X: Transport, R: Send>(
    ranks: usize,
    wrap: impl Fn(local::Local) -> X,
    body: impl Fn(usize, &mut X) -> R + Sync,
) -> Vec<R> {
    let (_, ends) = local::World::new(ranks).unwrap();
    let ends: Vec<X> = ends.into_iter().map(wrap).collect();
    local::run_on(ends, |mut end| {
        let rank = end.rank();
        body(rank, &mut end)
    })
}
