//! Shared by the integration tests of this crate.
#![allow(dead_code)] // each test binary uses a part

use attention::testing::Inputs;
use attention::{AttentionSpec, Element, HeadShape, HeadsView, Mask, Score};
use longkv_attention as attention;
use proptest::test_runner::Config;

/// `cases` random cases, or `PROPTEST_CASES` of them.
pub(crate) fn config(cases: u32) -> Config {
    let mut config = Config { failure_persistence: None, ..Config::default() };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = cases;
    }
    config
}

pub(crate) fn spec(shape: HeadShape, mask: Mask) -> AttentionSpec {
    // 1 / sqrt(qk_dim): the models' own choice where no dimension was removed.
    let scale = 1.0 / (shape.qk_dim() as f32).sqrt();
    AttentionSpec { shape, score: Score::new(scale).unwrap(), mask }
}

/// Random queries, keys and values of one sequence, tokens before heads.
pub(crate) struct Sequence<Q, T> {
    pub(crate) shape: HeadShape,
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) q: Vec<Q>,
    pub(crate) k: Vec<T>,
    pub(crate) v: Vec<T>,
}

impl<Q: Element, T: Element> Sequence<Q, T> {
    pub(crate) fn new(shape: HeadShape, queries: usize, keys: usize, kind: Inputs, seed: u64) -> Self {
        Sequence {
            shape,
            queries,
            keys,
            q: kind.generate(queries * shape.q_heads(), shape.qk_dim(), seed * 3 + 1),
            k: kind.generate(keys * shape.kv_heads(), shape.qk_dim(), seed * 3 + 2),
            v: kind.generate(keys * shape.kv_heads(), shape.v_dim(), seed * 3 + 3),
        }
    }

    pub(crate) fn q(&self) -> HeadsView<'_, Q> {
        HeadsView::nhd(&self.q, self.queries, self.shape.q_heads(), self.shape.qk_dim()).unwrap()
    }

    pub(crate) fn k(&self) -> HeadsView<'_, T> {
        HeadsView::nhd(&self.k, self.keys, self.shape.kv_heads(), self.shape.qk_dim()).unwrap()
    }

    pub(crate) fn v(&self) -> HeadsView<'_, T> {
        HeadsView::nhd(&self.v, self.keys, self.shape.kv_heads(), self.shape.v_dim()).unwrap()
    }
}

/// Attention from its definition, with an explicit boolean mask `visible(query, key)`: every score of every pair, an
/// unshifted softmax where it cannot overflow. Written apart from the oracle, to check the oracle.
pub(crate) fn by_definition<Q: Element, T: Element>(
    spec: &AttentionSpec,
    sequence: &Sequence<Q, T>,
    visible: impl Fn(usize, usize) -> bool,
) -> (Vec<f64>, Vec<f64>) {
    let shape = sequence.shape;
    let group = shape.q_heads() / shape.kv_heads();
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for query in 0..sequence.queries {
        for head in 0..shape.q_heads() {
            let kv_head = head / group;
            let q = sequence.q().vector(query, head);
            let score = |key: usize| {
                let k = sequence.k().vector(key, kv_head);
                let dot: f64 = (0..shape.qk_dim()).map(|c| q[c].to_f64() * k[c].to_f64()).sum();
                let score = dot * f64::from(spec.score.scale());
                spec.score.soft_cap().map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
            };
            let scores: Vec<(usize, f64)> =
                (0..sequence.keys).filter(|&key| visible(query, key)).map(|key| (key, score(key))).collect();
            let shift = scores.iter().map(|&(_, score)| score).fold(0.0, f64::max);
            let sum: f64 = scores.iter().map(|&(_, score)| (score - shift).exp()).sum();
            for c in 0..shape.v_dim() {
                let weighted: f64 = scores
                    .iter()
                    .map(|&(key, score)| {
                        (score - shift).exp() * sequence.v().vector(key, kv_head)[c].to_f64()
                    })
                    .sum();
                out.push(if scores.is_empty() { 0.0 } else { weighted / sum });
            }
            lse.push(if scores.is_empty() { f64::NEG_INFINITY } else { shift + sum.ln() });
        }
    }
    (out, lse)
}
