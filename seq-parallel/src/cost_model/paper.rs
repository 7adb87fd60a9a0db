//! The formulas of PecSched §5.3 as printed: volumes in elements per node and layer, FLOPs per GPU and layer.
//!
//! They are kept verbatim, to reproduce the paper's choices, though they do not all hold together: W_K and W_V count once, the QKV work
//! of Megatron is divided by T although its region gathers T times the tokens, and attention counts the ring's first step only, on
//! different numbers of tokens for the two schemes. [`corrected`](super::corrected) is the default.

use super::{Cluster, Layer, Scheme};

/// What a stage moves and computes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Volumes {
    /// Elements moved in a node.
    pub elements: f64,
    /// FLOPs of a GPU.
    pub flops: f64,
}

/// The attention stage: QKV projection, attention, output projection.
///
/// Megatron: comm 2sd(T−1)G, compute 2sd(N_h+N_KV)d_h/T + 4(sT)²d/T + 2sd². Ulysses: comm 2s(N_h+N_KV)d_h(G−1) +
/// (d(N_h+N_KV)d_h + d²)G(T−1)/T, compute 2sd(N_h+N_KV)d_h + 4(sG)²d/G + 2sd².
pub fn attention(scheme: Scheme, layer: &Layer, cluster: &Cluster, s: f64) -> Volumes {
    let (d, g, t) = (layer.hidden, cluster.g(), cluster.t());
    let heads = (layer.q_heads + layer.kv_heads) * layer.head_dim;
    match scheme {
        Scheme::Megatron => Volumes {
            elements: 2.0 * s * d * (t - 1.0) * g,
            flops: 2.0 * s * d * heads / t + 4.0 * (s * t).powi(2) * d / t + 2.0 * s * d * d,
        },
        Scheme::Ulysses => Volumes {
            elements: 2.0 * s * heads * (g - 1.0) + (d * heads + d * d) * g * (t - 1.0) / t,
            flops: 2.0 * s * d * heads + 4.0 * (s * g).powi(2) * d / g + 2.0 * s * d * d,
        },
    }
}

/// The MLP stage. Megatron: comm 2sd(T−1)G. Ulysses: comm 8d²(T−1)G/T. Compute 16sd² for both.
pub fn mlp(scheme: Scheme, layer: &Layer, cluster: &Cluster, s: f64) -> Volumes {
    let (d, g, t) = (layer.hidden, cluster.g(), cluster.t());
    let flops = 16.0 * s * d * d;
    match scheme {
        Scheme::Megatron => Volumes { elements: 2.0 * s * d * (t - 1.0) * g, flops },
        Scheme::Ulysses => Volumes { elements: 8.0 * d * d * (t - 1.0) * g / t, flops },
    }
}

/// Tokens per GPU at which both schemes move as much in the attention stage: below, Megatron moves less. `None` where one always does.
pub fn attention_crossover(layer: &Layer, cluster: &Cluster) -> Option<f64> {
    let (d, g, t) = (layer.hidden, cluster.g(), cluster.t());
    let heads = (layer.q_heads + layer.kv_heads) * layer.head_dim;
    let per_token = 2.0 * (d * (t - 1.0) * g - heads * (g - 1.0));
    let weights = (d * heads + d * d) * g * (t - 1.0) / t;
    (per_token > 0.0 && weights > 0.0).then(|| weights / per_token)
}

/// The same of the MLP stage: 4d / T. `None` without tensor parallelism, when nothing is moved.
pub fn mlp_crossover(layer: &Layer, cluster: &Cluster) -> Option<f64> {
    (cluster.region > 1).then(|| 4.0 * layer.hidden / cluster.t())
}
