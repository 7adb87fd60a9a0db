//! Sequence-parallel prefill: one long prompt over many ranks (PecSched's fast SP).
//!
//! Ring attention between nodes, and inside a node Megatron-style or Ulysses-style sharding for the attention stage and for the MLP
//! stage, whichever combination is estimated to be fastest. Ranks are threads or processes; nothing here knows which.
//!
//! Source: PecSched (arXiv 2409.15104v2), §5.3; ring attention (arXiv 2310.01889) with zigzag and striped placement; pass-Q from arXiv
//! 2411.01783.
//!
//! # Map
//!
//! | module or type | what it is |
//! |---|---|
//! | [`placement`] | which rank owns which tokens: contiguous, zigzag, striped; packed batches, cached prefixes, uneven ranks |
//! | [`schedule`] | what is computed at each step, as full and diagonal tiles |
//! | [`ring`] | ring attention as a state machine that can be paused; keys or queries go round |
//! | [`ulysses`] | tokens to heads and back |
//! | [`hybrid`] | Ulysses inside groups, a ring over them |
//! | [`megatron`] | stages split by their weights |
//! | [`decode`] | decoding over shards that stay where prefill left them |
//! | [`cost_model`], [`select`] | what each would take: the paper's formulas and corrected ones; the least |
//! | [`simulate`] | rings of thousands of ranks on paper: links, stragglers, exposed communication |
//! | [`transport`] | how ranks move bytes: threads, modelled delay, faults and deadlines |
//! | [`mod@commit`] | a step that all ranks keep, or none: one rank decides |
//! | [`fingerprint`] | what ranks must agree on before they start |
//! | [`cpu`] | a list of tiles in f32 |
//! | [`mod@reference`] | the oracle |
//! | `gpu` (feature `cuda`; NCCL with feature `nccl`) | a step of the ring as one launch; rings over blocks in device memory; messages packed there, among ranks on one GPU or over NCCL |
//! | `testing` (feature `testing`) | the suite that every transport passes |
//! | [`Error`], [`PeerFault`] | what a caller can get wrong, and how another rank can fail |
//!
//! # Example
//!
//! A prompt of 100 tokens over 4 ranks, as threads:
//!
//! ```
//! use attention::{AttentionSpec, HeadShape, Mask, Score};
//! use seq_parallel::placement::{Placement, Sequence, Shards};
//! use seq_parallel::ring::{Inputs, RingPlan};
//! use seq_parallel::transport::{Transport, local};
//! # fn main() -> Result<(), seq_parallel::Error> {
//! let spec = AttentionSpec { shape: HeadShape::new(4, 2, 64, 64)?, score: Score::new(0.125)?, mask: Mask::Causal };
//! let shards = Shards::new([Sequence::new(100)], Placement::Zigzag, 4)?;
//! let plan = RingPlan::new(spec, shards.clone())?;
//!
//! let q = vec![0.5f32; 100 * 4 * 64]; // [tokens, q_heads, qk_dim]
//! let k: Vec<f32> = (0..100 * 2 * 64).map(|i| (i as f32 * 0.37).sin()).collect(); // [tokens, kv_heads, qk_dim]
//! let v = vec![2.0f32; 100 * 2 * 64];
//! let outputs = local::run(4, |mut end| {
//!     let rank = end.rank();
//!     let (q, k, v) = (shards.take(rank, &q, 4 * 64)?, shards.take(rank, &k, 2 * 64)?, shards.take(rank, &v, 2 * 64)?);
//!     plan.fingerprint::<f32, f32>().agree(&mut end)?;
//!     plan.run(Inputs { q: &q, k: &k, v: &v }, &mut end)
//! })?;
//!
//! let mut out = vec![0.0; 100 * 4 * 64];
//! for (rank, output) in outputs.into_iter().enumerate() {
//!     shards.put(rank, &output?.out, 4 * 64, &mut out)?;
//! }
//! assert!(out.iter().all(|x| (x - 2.0).abs() < 1e-5)); // means of equal values
//! # Ok(())
//! # }
//! ```

pub mod commit;
pub mod cost_model;
pub mod cpu;
pub mod decode;
mod error;
pub mod fingerprint;
#[cfg(feature = "cuda")]
pub mod gpu;
pub mod hybrid;
pub mod megatron;
pub mod placement;
pub mod reference;
pub mod ring;
pub mod schedule;
pub mod select;
pub mod simulate;
#[cfg(feature = "testing")]
pub mod testing;
pub mod transport;
pub mod ulysses;

pub use error::{Error, PeerFault};

/// Attention outputs of one rank's queries.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    /// Outputs `[query tokens, q_heads, v_dim]`; 0 where no key was seen.
    pub out: Vec<f32>,
    /// Log-sum-exps `[query tokens, q_heads]`: natural log, scale applied; -inf where no key was seen.
    pub lse: Vec<f32>,
}
