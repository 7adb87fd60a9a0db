//! What the stages of a layer would move and take under each scheme.
//!
//! [`paper`] has PecSched's formulas as printed; [`corrected`] has what they should say, with every step of the ring, the links that
//! messages really cross, and what can be overlapped. Symbols are the paper's: s tokens per GPU, T the size of a tensor-parallel region
//! (a replica of the model), G GPUs per node, d the hidden size, N_h and N_KV heads of size d_h.

pub mod corrected;
pub mod paper;
mod profile;

pub use profile::Profile;

use crate::Error;

/// How a stage is shared within a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// Tokens are gathered, weights are split.
    Megatron,
    /// Heads are exchanged for tokens; weights are whole.
    Ulysses,
}

impl std::fmt::Display for Scheme {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Scheme::Megatron => "Megatron",
            Scheme::Ulysses => "Ulysses",
        })
    }
}

/// The feed-forward block of a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Mlp {
    /// d → 4d → d: 8d² weights, 16d² FLOPs per token. What the paper assumes.
    Gelu,
    /// Gate, up and down: 3·d·inner weights, 6·d·inner FLOPs per token.
    SwiGlu {
        /// The inner dimension.
        inner: f64,
    },
}

impl Mlp {
    /// Weights, for a hidden size of d.
    pub fn weights(&self, d: f64) -> f64 {
        match self {
            Mlp::Gelu => 8.0 * d * d,
            Mlp::SwiGlu { inner } => 3.0 * d * inner,
        }
    }
}

/// One layer of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Layer {
    /// Hidden size (d).
    pub hidden: f64,
    /// Query heads (N_h).
    pub q_heads: f64,
    /// KV heads (N_KV).
    pub kv_heads: f64,
    /// Size of a head (d_h).
    pub head_dim: f64,
    /// The feed-forward block.
    pub mlp: Mlp,
}

impl Layer {
    /// Llama 3.1 70B, with the MLP that the paper assumes.
    pub const LLAMA_70B: Layer =
        Layer { hidden: 8192.0, q_heads: 64.0, kv_heads: 8.0, head_dim: 128.0, mlp: Mlp::Gelu };
    /// Llama 3.1 70B as it is.
    pub const LLAMA_70B_SWIGLU: Layer = Layer { mlp: Mlp::SwiGlu { inner: 28672.0 }, ..Self::LLAMA_70B };
    /// Llama 3.1 8B as it is.
    pub const LLAMA_8B_SWIGLU: Layer = Layer {
        hidden: 4096.0,
        q_heads: 32.0,
        kv_heads: 8.0,
        head_dim: 128.0,
        mlp: Mlp::SwiGlu { inner: 14336.0 },
    };
    /// Yi 34B, with the MLP that the paper assumes.
    pub const YI_34B: Layer =
        Layer { hidden: 7168.0, q_heads: 56.0, kv_heads: 8.0, head_dim: 128.0, mlp: Mlp::Gelu };
}

/// GPUs and how they are grouped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cluster {
    /// Nodes (R).
    pub nodes: usize,
    /// GPUs of a node (G).
    pub gpus: usize,
    /// GPUs of a tensor-parallel region (T), which divides G.
    pub region: usize,
}

impl Cluster {
    /// Checks that regions fill nodes.
    ///
    /// # Errors
    /// [`Error::Argument`] for a count of 0; [`Error::Divisibility`] when T does not divide G.
    pub fn check(&self) -> Result<(), Error> {
        for (argument, count) in [("nodes", self.nodes), ("gpus", self.gpus), ("region", self.region)] {
            if count == 0 {
                return Err(Error::argument(argument, "at least 1", 0));
            }
        }
        if !self.gpus.is_multiple_of(self.region) {
            let rule = "a region must divide the GPUs of a node";
            return Err(Error::Divisibility {
                scheme: "fast SP",
                what: "gpus",
                count: self.gpus,
                ranks: self.region,
                rule,
            });
        }
        Ok(())
    }

    fn g(&self) -> f64 {
        self.gpus as f64
    }

    fn t(&self) -> f64 {
        self.region as f64
    }
}
