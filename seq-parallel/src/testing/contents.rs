//! A batch with random contents and its oracle.

use attention::reference;
use attention::testing::{Comparison, Inputs as Kind, Tolerance};
use attention::{AttentionSpec, Element, HeadShape, Mask, Score};

use crate::Output;
use crate::placement::{Segment, Sequence};
use crate::ring::Inputs;
use crate::transport::{Transport, local};

/// Packed contents of a batch.
pub struct Contents<E> {
    /// What attention computes.
    pub spec: AttentionSpec,
    /// The batch.
    pub sequences: Vec<Sequence>,
    /// `[new tokens, q_heads, qk_dim]`
    pub q: Vec<E>,
    /// `[tokens, kv_heads, qk_dim]`, cached tokens of a sequence before its new ones.
    pub k: Vec<E>,
    /// `[tokens, kv_heads, v_dim]`, likewise.
    pub v: Vec<E>,
    /// What attention is, in f64.
    pub oracle: reference::Output,
}

/// A rank's rows.
pub struct Rows<E> {
    /// `[query tokens, q_heads, qk_dim]`
    pub q: Vec<E>,
    /// `[key tokens, kv_heads, qk_dim]`
    pub k: Vec<E>,
    /// `[key tokens, kv_heads, v_dim]`
    pub v: Vec<E>,
}

impl<E> Rows<E> {
    /// As a ring takes them.
    pub fn inputs(&self) -> Inputs<'_, E, E> {
        Inputs { q: &self.q, k: &self.k, v: &self.v }
    }
}

/// Heads of one size, scaled by its root.
///
/// # Panics
/// For heads that no attention has.
pub fn spec(q_heads: usize, kv_heads: usize, dim: usize, mask: Mask) -> AttentionSpec {
    let shape = HeadShape::new(q_heads, kv_heads, dim, dim).unwrap();
    AttentionSpec { shape, score: Score::new((dim as f32).sqrt().recip()).unwrap(), mask }
}

/// Sequences of (cached, new) tokens.
pub fn sequences(lens: &[(usize, usize)]) -> Vec<Sequence> {
    lens.iter().map(|&(cached, new)| Sequence { cached, new }).collect()
}

impl<E: Element> Contents<E> {
    /// Random contents from a seed, the same in every process.
    ///
    /// # Panics
    /// For a batch that attention refuses.
    pub fn new(spec: AttentionSpec, sequences: Vec<Sequence>, seed: u64) -> Self {
        let shape = spec.shape;
        let new: usize = sequences.iter().map(|sequence| sequence.new).sum();
        let all: usize = sequences.iter().map(Sequence::kv_len).sum();
        let q = Kind::Normal.generate(new * shape.q_heads(), shape.qk_dim(), seed);
        let k = Kind::OutlierChannels.generate(all * shape.kv_heads(), shape.qk_dim(), seed + 1);
        let v = Kind::Normal.generate(all * shape.kv_heads(), shape.v_dim(), seed + 2);
        let oracle = crate::reference::attend(&spec, &sequences, &q, &k, &v).unwrap();
        Contents { spec, sequences, q, k, v, oracle }
    }

    /// The rows of these segments.
    ///
    /// # Panics
    /// Unless their rows follow each other.
    pub fn rows(&self, queries: &[Segment], keys: &[Segment]) -> Rows<E> {
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
    ///
    /// # Panics
    /// When an element is off, or no rank has it.
    pub fn check(&self, case: &str, queries: &[Vec<Segment>], outputs: &[Output]) -> f64 {
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

    /// Compares one rank's outputs with the oracle; `queries` says which tokens its rows are.
    ///
    /// # Panics
    /// When an element is off.
    pub fn check_rank(&self, case: &str, queries: &[Segment], output: &Output) {
        let (heads, v_dim) = (self.spec.shape.q_heads(), self.spec.shape.v_dim());
        let (mut out, mut lse) = (Vec::new(), Vec::new());
        for segment in queries {
            let before: usize = self.sequences[..segment.sequence].iter().map(|sequence| sequence.new).sum();
            for position in segment.positions() {
                let token = before + position - self.sequences[segment.sequence].cached;
                out.extend_from_slice(&self.oracle.out[token * heads * v_dim..][..heads * v_dim]);
                lse.extend_from_slice(&self.oracle.lse[token * heads..][..heads]);
            }
        }
        let compared = Comparison::new(&output.out, &out, Tolerance::new(1e-5, 1e-5));
        compared.assert(format!("{case}: outputs"));
        Comparison::new(&output.lse, &lse, Tolerance::LSE).assert(format!("{case}: LSEs"));
    }
}

/// Runs `body(rank, transport)` on as many threads as there are transports.
///
/// # Panics
/// When a thread panics, or for no ranks.
pub fn on_ranks<X: Transport, R: Send>(
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
