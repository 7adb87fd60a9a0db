//! The corrected model: seconds per layer, with the whole ring.
//!
//! - QKV and output projections take the same work per GPU under both schemes: a region gathers T times the tokens and has 1/T of the
//!   weights.
//! - Attention is causal: 2·s·S·d FLOPs per GPU over all steps, whatever the ring's length. Ulysses rings run between nodes (R
//!   members); Megatron rings between regions (R·G/T members).
//! - Keys and values of a step are 2·s·N_KV·d_h elements per GPU in both cases. A step lasts as long as the longer of compute and
//!   transfer; only the first has nothing to wait for. Between nodes transfers cross the network adapter, otherwise the links of the
//!   node: in a ring of regions every step waits for its slowest hop.
//! - Weights that Ulysses has to gather in a region can be fetched during the stage before; only what is longer is charged.

use super::{Cluster, Layer, Scheme};
use crate::transport::sim::Link;

/// Rates of a GPU and its links, measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// FLOP/s of attention on a block of many tokens.
    pub attention_flops_per_s: f64,
    /// Tokens of a block at which attention reaches half of that: small blocks do not fill a GPU.
    pub half_rate_tokens: f64,
    /// FLOP/s of matrix products.
    pub matmul_flops_per_s: f64,
    /// Between GPUs of a node.
    pub intra: Link,
    /// Between nodes, per GPU.
    pub inter: Link,
    /// Bytes of an element of what stages compute on: activations, queries, outputs and weights.
    pub element_bytes: f64,
    /// Bytes of an element of keys and values, which a cache may store in fewer.
    pub kv_bytes: f64,
}

/// Seconds of a stage in one layer.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Seconds {
    /// Computing.
    pub compute: f64,
    /// Collectives within the node, which nothing hides.
    pub intra: f64,
    /// Waiting for the ring.
    pub exposed_ring: f64,
    /// Waiting for weights.
    pub exposed_weights: f64,
}

impl Seconds {
    /// All of it.
    pub fn total(&self) -> f64 {
        self.compute + self.intra + self.exposed_ring + self.exposed_weights
    }
}

/// The attention stage. `before` is the time of the stage before it, which can hide the fetching of weights.
pub fn attention(
    scheme: Scheme,
    layer: &Layer,
    cluster: &Cluster,
    rates: &Rates,
    s: f64,
    before: f64,
) -> Seconds {
    let (d, g, t) = (layer.hidden, cluster.g(), cluster.t());
    let (q_dim, kv_dim) = (layer.q_heads * layer.head_dim, layer.kv_heads * layer.head_dim);
    let e = rates.element_bytes;
    let projections = 2.0 * s * d * (q_dim + 2.0 * kv_dim) + 2.0 * s * q_dim * d;
    let (members, block, hop) = match scheme {
        Scheme::Ulysses => (cluster.nodes, s * g, rates.inter),
        // In a ring of regions some hops stay in a node; the slowest decides.
        Scheme::Megatron => (
            cluster.nodes * cluster.gpus / cluster.region,
            s * t,
            if cluster.nodes > 1 { rates.inter } else { rates.intra },
        ),
    };
    let tokens = s * g * cluster.nodes as f64;
    let rate = rates.attention_flops_per_s * block / (block + rates.half_rate_tokens);
    let attention = 2.0 * s * tokens * q_dim / rate;
    // Causal with zigzag placement: every step the same.
    let step = attention / members as f64;
    let transfer = hop.seconds(2.0 * s * kv_dim * rates.kv_bytes);
    let exposed_ring = (members - 1) as f64 * (transfer - step).max(0.0);
    let (intra, weights) = match scheme {
        Scheme::Megatron => (gathered(2.0 * (t - 1.0) * s * d * e, t, &rates.intra), 0.0),
        Scheme::Ulysses => (
            gathered(s * 2.0 * (q_dim * e + kv_dim * rates.kv_bytes) * (g - 1.0) / g, g, &rates.intra),
            gathered((d * (q_dim + 2.0 * kv_dim) + q_dim * d) * (t - 1.0) / t * e, t, &rates.intra),
        ),
    };
    Seconds {
        compute: projections / rates.matmul_flops_per_s + attention,
        intra,
        exposed_ring,
        exposed_weights: (weights - before).max(0.0),
    }
}

/// The MLP stage. `before` is the time of the stage before it.
pub fn mlp(scheme: Scheme, layer: &Layer, cluster: &Cluster, rates: &Rates, s: f64, before: f64) -> Seconds {
    let (d, t, e) = (layer.hidden, cluster.t(), rates.element_bytes);
    let compute = 2.0 * s * layer.mlp.weights(d) / rates.matmul_flops_per_s;
    match scheme {
        Scheme::Megatron => Seconds {
            compute,
            intra: gathered(2.0 * (t - 1.0) * s * d * e, t, &rates.intra),
            ..Seconds::default()
        },
        Scheme::Ulysses => {
            let weights = gathered(layer.mlp.weights(d) * (t - 1.0) / t * e, t, &rates.intra);
            Seconds { compute, exposed_weights: (weights - before).max(0.0), ..Seconds::default() }
        }
    }
}

/// Seconds of a collective in which a GPU moves `bytes` among `members`; none among one.
fn gathered(bytes: f64, members: f64, link: &Link) -> f64 {
    if members > 1.0 { link.seconds(bytes) } else { 0.0 }
}
