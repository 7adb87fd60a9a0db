//! Rings on paper: thousands of ranks, α-β links, stragglers.
//!
//! The same order of events as in [`ring`](crate::ring): a rank posts its block when it begins a step, the link is busy until it has left,
//! the neighbour begins its next step when it is done with its own and the block is there. The work of each step is counted from the
//! placement, to the pair. Nothing here is measured; rates are inputs.

use attention::Mask;

use crate::Error;
use crate::cost_model::{Layer, Mlp};
use crate::placement::{Placement, Sequence, Shards};
use crate::schedule::{self, source};
use crate::transport::sim::Link;

/// A causal prefill of one sequence.
#[derive(Debug, Clone)]
pub struct Prefill {
    /// Tokens.
    pub tokens: usize,
    /// How they are placed.
    pub placement: Placement,
    /// The model's layer; all are alike.
    pub layer: Layer,
    /// How many layers.
    pub layers: usize,
    /// Bytes of a key or value element.
    pub element_bytes: f64,
}

/// The machines.
#[derive(Debug, Clone)]
pub struct Machines {
    /// From each rank to the next.
    pub link: Link,
    /// FLOP/s of attention.
    pub attention_flops_per_s: f64,
    /// FLOP/s of matrix products.
    pub matmul_flops_per_s: f64,
    /// How much slower than the others a rank is: (rank, factor).
    pub stragglers: Vec<(usize, f64)>,
}

/// Times of a prefill, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timeline {
    /// All layers.
    pub total_s: f64,
    /// Attention of one layer on the rank that ends last.
    pub attention_s: f64,
    /// Waiting for blocks in one layer, on the rank that waits longest.
    pub exposed_s: f64,
    /// Time of one rank without communication and idling, over ranks · time: 1 is perfect.
    pub efficiency: f64,
}

/// Runs a prefill on `ranks` ranks, on paper.
///
/// # Errors
/// [`Error::Argument`] for no ranks, a rate that is not positive, or a straggler that is not there.
pub fn simulate(prefill: &Prefill, machines: &Machines, ranks: usize) -> Result<Timeline, Error> {
    let positive = |x: f64| x > 0.0 && !x.is_nan();
    for (argument, value) in [
        ("attention_flops_per_s", machines.attention_flops_per_s),
        ("matmul_flops_per_s", machines.matmul_flops_per_s),
        ("bytes_per_s", machines.link.bytes_per_s),
        ("element_bytes", prefill.element_bytes),
    ] {
        if !positive(value) {
            return Err(Error::argument(argument, "a number above 0", value));
        }
    }
    let mut slowness = vec![1.0; ranks];
    for &(rank, factor) in &machines.stragglers {
        match slowness.get_mut(rank) {
            Some(slowness) if positive(factor) => *slowness = factor,
            _ => {
                return Err(Error::argument(
                    "stragglers",
                    format!("ranks below {ranks} with factors above 0"),
                    format!("({rank}, {factor})"),
                ));
            }
        }
    }
    let shards = Shards::new([Sequence::new(prefill.tokens)], prefill.placement, ranks)?;
    let layer = &prefill.layer;
    let q_dim = layer.q_heads * layer.head_dim;
    let kv_dim = layer.kv_heads * layer.head_dim;
    let queries: Vec<_> = (0..ranks).map(|rank| shards.queries(rank)).collect();
    let tokens: Vec<f64> = (0..ranks).map(|rank| shards.query_tokens(rank) as f64).collect();
    // Query-key pairs to seconds: 2 FLOPs each for QKᵀ and PV and every channel of every query head.
    let pair_s = 4.0 * q_dim / machines.attention_flops_per_s;
    let block = |rank: usize| tokens[rank] * 2.0 * kv_dim * prefill.element_bytes;

    let mut begin = vec![0.0f64; ranks];
    let mut done = vec![0.0f64; ranks];
    let mut link_free = vec![0.0f64; ranks];
    let mut exposed = vec![0.0f64; ranks];
    for step in 0..ranks {
        let mut arrival = vec![0.0f64; ranks];
        if step > 0 {
            for (rank, arrival) in arrival.iter_mut().enumerate() {
                // The block was posted when its holder began the step before.
                let left = (rank + ranks - 1) % ranks;
                link_free[left] = link_free[left].max(begin[left])
                    + block(source(rank, step, ranks)) / machines.link.bytes_per_s;
                *arrival = link_free[left] + machines.link.alpha_s;
            }
        }
        for rank in 0..ranks {
            begin[rank] = done[rank].max(arrival[rank]);
            exposed[rank] += begin[rank] - done[rank];
            let pairs = schedule::pairs(&Mask::Causal, &queries[rank], &queries[source(rank, step, ranks)]);
            done[rank] = begin[rank] + pairs as f64 * pair_s * slowness[rank];
        }
    }
    let max = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
    let weights = layer.hidden * (2.0 * q_dim + 2.0 * kv_dim) + layer.mlp.weights(layer.hidden);
    let linear = |rank: usize| 2.0 * weights * tokens[rank] / machines.matmul_flops_per_s * slowness[rank];
    let linear_s = (0..ranks).map(linear).fold(0.0, f64::max);
    let attention_s = max(&done);
    let n = prefill.tokens as f64;
    let alone = n * (n + 1.0) / 2.0 * pair_s + 2.0 * weights * n / machines.matmul_flops_per_s;
    let per_layer = attention_s + linear_s;
    let efficiency = if per_layer > 0.0 { alone / (ranks as f64 * per_layer) } else { 1.0 };
    Ok(Timeline {
        total_s: per_layer * prefill.layers as f64,
        attention_s,
        exposed_s: max(&exposed),
        efficiency,
    })
}

/// Llama 3.1 405B's layer per GPU of a node of eight, tensor-parallel: what context-parallel ranks of such nodes compute.
pub const LLAMA_405B_TP8: Layer = Layer {
    hidden: 16384.0,
    q_heads: 16.0,
    kv_heads: 1.0,
    head_dim: 128.0,
    mlp: Mlp::SwiGlu { inner: 53248.0 / 8.0 },
};
