//! What goes round: keys and values, or queries.
//!
//! Over a long cached prefix few new tokens have far fewer query bytes than key bytes. Then queries go round and the keys stay,
//! but the partial outputs have to come home in an all-to-all that nothing hides.
//!
//! Source: "Context Parallelism for Scalable Million-Token Inference" (arXiv 2411.01783), Eq. 1-3 and 5, Algorithm 1. T new tokens, P
//! cached ones, N ranks, C FLOP/s and BW bytes/s of a rank.

/// What goes round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Keys and values.
    PassKv,
    /// Queries, then partial outputs.
    PassQ,
}

impl std::fmt::Display for Direction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Direction::PassKv => "pass-KV",
            Direction::PassQ => "pass-Q",
        })
    }
}

/// What the choice depends on besides lengths.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Ranks of the ring (N).
    pub ranks: usize,
    /// Query heads (N_H).
    pub q_heads: usize,
    /// KV heads (N_KV).
    pub kv_heads: usize,
    /// Bytes of an element of queries and partial outputs. The paper has one e for these and for keys.
    pub q_bytes: usize,
    /// Bytes of an element of keys and values.
    pub kv_bytes: usize,
    /// FLOP/s of a rank in attention (C), measured.
    pub flops_per_s: f64,
    /// Bytes/s from a rank to the next (BW), measured.
    pub bytes_per_s: f64,
}

impl Rates {
    /// 2 · N_KV / N_H, by bytes: the share of new tokens up to which queries are the smaller message (Eq. 1).
    pub fn small_query_share(&self) -> f64 {
        2.0 * (self.kv_heads * self.kv_bytes) as f64 / (self.q_heads * self.q_bytes) as f64
    }

    /// New tokens from which the passing of keys is hidden, whatever the prefix (Eq. 2).
    pub fn hidden_kv_tokens(&self) -> f64 {
        self.compute_per_byte(self.kv_bytes) * self.kv_heads as f64 / (2.0 * self.q_heads as f64)
    }

    /// Tokens, new and cached, from which the passing of queries is hidden (Eq. 3).
    pub fn hidden_q_tokens(&self) -> f64 {
        self.compute_per_byte(self.q_bytes) / 4.0
    }

    /// Algorithm 1: keys where they are hidden or smaller, else queries.
    pub fn algorithm_1(&self, new: usize, cached: usize) -> Direction {
        self.keys_if(new, new_share(new, cached) >= self.small_query_share())
    }

    /// Algorithm 1 with the cost of the all-to-all that ends the passing of queries (Eq. 5): the default.
    pub fn choose(&self, new: usize, cached: usize) -> Direction {
        let all_to_all = 4.0 * new as f64 / self.compute_per_byte(self.q_bytes);
        self.keys_if(new, new_share(new, cached) >= self.small_query_share() - all_to_all)
    }

    fn keys_if(&self, new: usize, smaller: bool) -> Direction {
        if new as f64 >= self.hidden_kv_tokens() || smaller { Direction::PassKv } else { Direction::PassQ }
    }

    /// N · C · e / BW.
    fn compute_per_byte(&self, element_bytes: usize) -> f64 {
        self.ranks as f64 * self.flops_per_s * element_bytes as f64 / self.bytes_per_s
    }
}

/// T / (T + P).
fn new_share(new: usize, cached: usize) -> f64 {
    new as f64 / (new + cached).max(1) as f64
}
