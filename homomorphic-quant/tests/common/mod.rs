//! What the tests of the CPU side share. Each test binary uses some of it.
#![allow(dead_code)]

use attention::testing::Inputs;
use attention::{AttentionSpec, HeadShape, HeadsView, Mask, Score};
use homomorphic_quant::{Bits, Cache, Capacity, Config, KvShape, Sequence};

/// Keys and values of some tokens.
pub(crate) struct Tokens {
    pub(crate) shape: KvShape,
    pub(crate) tokens: usize,
    /// `[tokens, kv_heads, qk_dim]`
    pub(crate) k: Vec<f32>,
    /// `[tokens, kv_heads, v_dim]`
    pub(crate) v: Vec<f32>,
}

impl Tokens {
    /// Keys with channel outliers, values N(0, 1): what real models have.
    pub(crate) fn new(shape: KvShape, tokens: usize, seed: u64) -> Self {
        Tokens::of_kinds(shape, tokens, (Inputs::OutlierChannels, Inputs::Normal), seed)
    }

    pub(crate) fn of_kinds(shape: KvShape, tokens: usize, kinds: (Inputs, Inputs), seed: u64) -> Self {
        let KvShape { kv_heads, qk_dim, v_dim } = shape;
        // Heads side by side, so that each channel of each head has its own distribution.
        let k = kinds.0.values(tokens, kv_heads * qk_dim, seed);
        let v = kinds.1.values(tokens, kv_heads * v_dim, seed + 1000);
        Tokens { shape, tokens, k, v }
    }

    pub(crate) fn k(&self) -> HeadsView<'_, f32> {
        HeadsView::nhd(&self.k, self.tokens, self.shape.kv_heads, self.shape.qk_dim).unwrap()
    }

    pub(crate) fn v(&self) -> HeadsView<'_, f32> {
        HeadsView::nhd(&self.v, self.tokens, self.shape.kv_heads, self.shape.v_dim).unwrap()
    }

    pub(crate) fn append(&self, cache: &mut Cache, sequence: &mut Sequence, from: usize, to: usize) {
        cache.append(sequence, self.k().slice(from..to), self.v().slice(from..to)).unwrap();
    }
}

pub(crate) fn config(k: usize, v: usize, partition: usize, sinks: usize) -> Config {
    Config::new(Bits::new(k).unwrap(), Bits::new(v).unwrap())
        .with_partition(partition)
        .unwrap()
        .with_sinks(sinks)
        .unwrap()
}

pub(crate) fn kv(kv_heads: usize, qk_dim: usize, v_dim: usize) -> KvShape {
    KvShape { kv_heads, qk_dim, v_dim }
}

pub(crate) fn cache(config: &Config, shape: KvShape, sequences: usize, tokens: usize) -> Cache {
    Cache::new(config, 0, shape, Capacity::of_tokens(config, sequences, tokens)).unwrap()
}

/// A cache with one sequence of all these tokens.
pub(crate) fn filled(config: &Config, tokens: &Tokens) -> (Cache, Sequence) {
    let mut cache = cache(config, tokens.shape, 1, tokens.tokens);
    let mut sequence = cache.sequence();
    tokens.append(&mut cache, &mut sequence, 0, tokens.tokens);
    (cache, sequence)
}

/// Query heads `q_heads` over a KV shape, scale `1 / sqrt(qk_dim)`.
pub(crate) fn spec(q_heads: usize, shape: KvShape, mask: Mask) -> AttentionSpec {
    AttentionSpec {
        shape: HeadShape::new(q_heads, shape.kv_heads, shape.qk_dim, shape.v_dim).unwrap(),
        score: Score::new(1.0 / (shape.qk_dim as f32).sqrt()).unwrap(),
        mask,
    }
}

/// Everything that a sequence holds: every byte of every part.
pub(crate) fn state(cache: &Cache, sequence: &Sequence) -> Vec<Vec<u8>> {
    let mut state = Vec::new();
    for kv_head in 0..cache.shape().kv_heads {
        for block in 0..sequence.blocks().len() {
            state.push(cache.block_bytes(sequence, block, kv_head).unwrap().to_vec());
        }
        for part in [cache.sinks(sequence, kv_head).unwrap(), cache.open_block(sequence, kv_head).unwrap()] {
            state.push(part.k.iter().chain(&part.v).flat_map(|x| x.to_le_bytes()).collect());
        }
    }
    state
}

/// Outputs and LSEs of the last `queries` tokens.
pub(crate) fn attend(
    spec: &AttentionSpec,
    cache: &Cache,
    sequence: &Sequence,
    q: &[f32],
    splits: Option<usize>,
) -> (Vec<f32>, Vec<f32>) {
    let shape = spec.shape;
    let queries = q.len() / (shape.q_heads() * shape.qk_dim());
    let mut out = attention::testing::poison(queries * shape.q_heads() * shape.v_dim());
    let mut lse = attention::testing::poison(queries * shape.q_heads());
    let q = HeadsView::nhd(q, queries, shape.q_heads(), shape.qk_dim()).unwrap();
    homomorphic_quant::reference::attend(spec, cache, sequence, q, splits, &mut out, &mut lse).unwrap();
    (out, lse)
}

/// Outputs and LSEs in f64 on what the codes stand for.
pub(crate) fn oracle(
    spec: &AttentionSpec,
    cache: &Cache,
    sequence: &Sequence,
    q: &[f32],
) -> attention::reference::Output {
    let shape = spec.shape;
    let queries = q.len() / (shape.q_heads() * shape.qk_dim());
    let q = HeadsView::nhd(q, queries, shape.q_heads(), shape.qk_dim()).unwrap();
    homomorphic_quant::reference::oracle(spec, cache, sequence, q).unwrap()
}

/// Relative error in the Frobenius norm; NaN when any element is.
pub(crate) fn relative(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let error: f64 = found.iter().zip(expected).map(|(&a, &b)| (f64::from(a) - b).powi(2)).sum();
    let norm: f64 = expected.iter().map(|x| x * x).sum();
    (error / norm).sqrt()
}

pub(crate) fn to_f64(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

pub(crate) fn out_of_pages(error: &homomorphic_quant::Error) -> bool {
    let homomorphic_quant::Error::Attention(error) = error else { return false };
    matches!(**error, attention::Error::OutOfPages { .. })
}
