//! Sparse attention over a paged KV cache that is split between HBM and host memory (SPIN).
//!
//! A decoded token reads a small budget of its context. Algorithms of different granularity say which part (chunks,
//! clusters, gated blocks, training-free scores); they share one substrate: pages in host memory, slots on the device for the
//! pages that are used again and again, a bucketed LRU that decides which those are, and one attention that merges
//! what was resident with what had to be fetched.
//!
//! Sources: SPIN for the shared substrate; Quest, ArkVale, ShadowKV, RetroInfer and SeerAttention-R for the algorithms.
//!
//! # Example
//!
//! A prompt of 1000 tokens, then a token that reads at most 160 of them:
//!
//! ```
//! use attention::{AttentionSpec, DType, HeadShape, Mask, Score};
//! use sparse_attn::{Cache, Capacity, Config, Plan, Queries, Tokens};
//! # fn main() -> Result<(), sparse_attn::Error> {
//! let shape = HeadShape::new(4, 2, 64, 64)?;
//! let spec = AttentionSpec { shape, score: Score::new(0.125)?, mask: Mask::Causal };
//! let config = Config { dtype: DType::F32, ..Config::quest(160) }; // pages of 16 by minimum and maximum
//! let plan = Plan::new(&config, &[spec])?;
//! let capacity = Capacity::of_requests(&plan, 1, 2000);
//! let mut cache = Cache::<f32>::new(plan, capacity)?;
//! let request = cache.try_admit()?;
//!
//! let random = |n: usize, seed| { let mut rng = fastrand::Rng::with_seed(seed); (0..n).map(move |_| rng.f32() - 0.5).collect::<Vec<_>>() };
//! let (q, k, v) = (random(1000 * 4 * 64, 1), random(1000 * 2 * 64, 2), vec![2.0; 1000 * 2 * 64]); // q and k after RoPE
//! let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; 1000 * 4]);
//! let tokens = Tokens { k: &k, k_unrotated: None, v: &v };
//! cache.prefill(request, 0, &Queries { q: &q, q_unrotated: None }, &tokens, &mut out, &mut lse)?;
//!
//! let tokens = Tokens { k: &k[..128], k_unrotated: None, v: &v[..128] };
//! let queries = Queries { q: &q[..256], q_unrotated: None };
//! cache.decode(request, 0, &queries, &tokens, &mut out[..256], &mut lse[..4])?;
//! assert!(out[..256].iter().all(|x| (x - 2.0).abs() < 1e-5)); // a mean of equal values
//! assert!(cache.counters().selected <= 2 * 160 / 16);
//! # Ok(())
//! # }
//! ```
//!
//! # Map
//!
//! | module or type | what it is |
//! |---|---|
//! | [`Config`], [`Plan`], [`config`] | which algorithm, which budget, and what of it can be used |
//! | [`page`], [`partition`] | the unit that moves, and the unit that is selected |
//! | [`index`] | summaries: pages, clusters, gates |
//! | [`mod@select`] | scores of a group, top-k, what is always kept |
//! | [`bucketed_lru`], [`metadata`] | which pages stay, and the tables that say where |
//! | [`replacement`], [`trace`] | exact LRU, random and Belady's optimum on recorded selections |
//! | [`budget`] | device pages shared out among requests |
//! | [`host_pool`], [`device_pool`] | the two memories |
//! | [`Cache`], [`step`] | requests, and the step: select → resolve → gather → attend |
//! | [`Counters`] | what happened |
//! | `gpu` (feature `cuda`) | the kernels: each operation, and the whole decoding step over them |
//! | [`Error`] | what a caller can get wrong |

pub mod bucketed_lru;
pub mod budget;
pub mod config;
mod counters;
pub mod device_pool;
mod error;
#[cfg(feature = "cuda")]
pub mod gpu;
pub mod host_pool;
pub mod index;
pub mod metadata;
pub mod page;
pub mod partition;
pub mod replacement;
pub mod select;
pub mod step;
pub mod trace;

pub use bucketed_lru::BucketedLru;
pub use config::{Algorithm, Config, EffectiveBudget, Plan};
pub use counters::Counters;
pub use error::Error;
pub use step::{Cache, Capacity, Memory, Queries, RequestId, Resolved, Tokens};
