//! What the integration tests share. Each test binary uses some of it.
#![allow(dead_code)]

use attention::testing::Rng;
use attention::{AttentionSpec, DType, HeadShape, Mask, Score};
use sparse_attn::{Cache, Capacity, Config, Plan, Queries, RequestId, Tokens};

/// Query heads over KV heads, with vectors of 16.
pub(crate) const DIM: usize = 16;

pub(crate) fn spec(q_heads: usize, kv_heads: usize) -> AttentionSpec {
    let shape = HeadShape::new(q_heads, kv_heads, DIM, DIM).unwrap();
    AttentionSpec { shape, score: Score::new(0.4).unwrap(), mask: Mask::Causal }
}

pub(crate) fn normal(rng: &mut Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.normal() as f32).collect()
}

/// The configurations that every cache test goes through, in f32, for contexts of a few hundred tokens.
pub(crate) fn configs(budget: usize) -> Vec<(&'static str, Config)> {
    use sparse_attn::Algorithm;
    use sparse_attn::index::clusters::Clustering;
    use sparse_attn::index::pages::Scorer;
    let f32 = |config: Config| Config { dtype: DType::F32, buffering: 1.0, ..config };
    let scored = |scorer| {
        let algorithm = Algorithm::Pages { scorer, chunk: 16 };
        f32(Config { algorithm, page: 8, ..Config::quest(budget) })
    };
    let clustering = Clustering { segment: 100, cluster: 8, iterations: 4 };
    let algorithm = Algorithm::Clusters { clustering, reindex: 12, estimate: 0.25 };
    vec![
        ("quest", f32(Config::quest(budget))),
        ("cuboid, chunks of two pages", scored(Scorer::CuboidMean)),
        ("mean and deviation", scored(Scorer::MeanStd { weight: 0.25 })),
        ("shadow_kv", f32(Config { recent: 8, ..Config::shadow_kv(budget) })),
        ("retro_infer", f32(Config { algorithm, recent: 10, ..Config::retro_infer(budget) })),
    ]
}

/// A cache for one layer, and a request.
pub(crate) fn cache(config: &Config, spec: AttentionSpec, max_tokens: usize) -> (Cache<f32>, RequestId) {
    let plan = Plan::new(config, &[spec]).unwrap();
    let capacity = Capacity::of_requests(&plan, 1, max_tokens);
    let mut cache = Cache::new(plan, capacity).unwrap();
    let request = cache.try_admit().unwrap();
    (cache, request)
}

/// Queries, keys and values of some tokens of one layer.
pub(crate) struct Text {
    pub(crate) spec: AttentionSpec,
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
}

impl Text {
    pub(crate) fn new(rng: &mut Rng, spec: AttentionSpec, tokens: usize) -> Self {
        let shape = spec.shape;
        let q = normal(rng, tokens * shape.q_heads() * DIM);
        let (k, v) =
            (normal(rng, tokens * shape.kv_heads() * DIM), normal(rng, tokens * shape.kv_heads() * DIM));
        Text { spec, q, k, v }
    }

    pub(crate) fn tokens(&self, range: std::ops::Range<usize>) -> Tokens<'_> {
        let of = self.spec.shape.kv_heads() * DIM;
        let part = range.start * of..range.end * of;
        Tokens { k: &self.k[part.clone()], k_unrotated: Some(&self.k[part.clone()]), v: &self.v[part] }
    }

    pub(crate) fn queries(&self, range: std::ops::Range<usize>) -> Queries<'_> {
        let of = self.spec.shape.q_heads() * DIM;
        let part = range.start * of..range.end * of;
        Queries { q: &self.q[part.clone()], q_unrotated: Some(&self.q[part]) }
    }

    /// Dense attention of the last `new` of the first `held` tokens.
    pub(crate) fn dense(&self, held: usize, new: usize) -> (Vec<f32>, Vec<f32>) {
        let shape = self.spec.shape;
        let (mut out, mut lse) = (vec![0.0; new * shape.q_heads() * DIM], vec![0.0; new * shape.q_heads()]);
        let view = |values, heads| attention::HeadsView::nhd(values, held, heads, DIM).unwrap();
        let q = self.queries(held - new..held).q;
        attention::cpu::attend(
            &self.spec,
            attention::HeadsView::nhd(q, new, shape.q_heads(), DIM).unwrap(),
            view(self.tokens(0..held).k, shape.kv_heads()),
            view(self.tokens(0..held).v, shape.kv_heads()),
            &mut out,
            &mut lse,
        )
        .unwrap();
        (out, lse)
    }

    pub(crate) fn prefill(&self, cache: &mut Cache<f32>, id: RequestId, range: std::ops::Range<usize>) {
        let heads = self.spec.shape.q_heads();
        let (mut out, mut lse) = (vec![0.0; range.len() * heads * DIM], vec![0.0; range.len() * heads]);
        let (queries, tokens) = (self.queries(range.clone()), self.tokens(range));
        cache.prefill(id, 0, &queries, &tokens, &mut out, &mut lse).unwrap();
    }

    pub(crate) fn decode(&self, cache: &mut Cache<f32>, id: RequestId, token: usize) -> (Vec<f32>, Vec<f32>) {
        let heads = self.spec.shape.q_heads();
        let (mut out, mut lse) = (vec![f32::NAN; heads * DIM], vec![f32::NAN; heads]);
        let (queries, tokens) = (self.queries(token..token + 1), self.tokens(token..token + 1));
        cache.decode(id, 0, &queries, &tokens, &mut out, &mut lse).unwrap();
        (out, lse)
    }
}

pub(crate) fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| if a.is_nan() { f32::INFINITY } else { (a - b).abs() }).fold(0.0, f32::max)
}
