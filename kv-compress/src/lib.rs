//! Low-rank KV cache with per-head ranks, read without decompression (FDC).
//!
//! Per layer and KV head a projection keeps r_k of the key dimensions and r_v of the value dimensions. New tokens are projected
//! once, attention runs in the reduced basis, and outputs return through W_O: nothing is ever decompressed. Ranks differ per
//! head and layer and follow a plan that spends bytes where accuracy needs them.
//!
//! Sources: FDC (arXiv 2408.04107, "ZeroC", "ZACK" and "FDC" in its versions) for the method; KQ-SVD (arXiv 2512.05916) for the
//! projection that is optimal.
//!
//! # Map
//!
//! From activations to attention, in the order of use:
//!
//! | module or type | what it is |
//! |---|---|
//! | [`calibrate`] | Gram matrices of queries, keys, values and W_O, streamed and merged |
//! | [`projection`] | bases from them: optimal, joint SVD, key-only |
//! | [`rank_plan`] | which head gets which ranks, and why |
//! | [`HeadRanks`], [`LayerRanks`] | ranks per KV head |
//! | [`CompressionPlan`] | ranks and maps of a whole model, one file |
//! | [`LayerProjection`], [`HeadMaps`] | a layer's maps, applied to new tokens |
//! | [`merge`] | the maps folded into weights; Hadamard rotations for a quantizer behind them |
//! | [`cache`] | the ragged paged cache and its layout |
//! | [`mod@reference`] | attention in the reduced basis, f64 |
//! | `gpu` (feature `cuda`) | append and balanced decode on a GPU |
//! | [`Error`] | what a caller can get wrong |
//!
//! # Example
//!
//! Calibrate one layer, plan half the bytes, and project a token:
//!
//! ```
//! use attention::HeadShape;
//! use kv_compress::calibrate::Calibration;
//! use kv_compress::projection::{Projection, project};
//! use kv_compress::rank_plan::{Planner, Profile, Weights};
//! use kv_compress::CompressionPlan;
//! # fn main() -> Result<(), kv_compress::Error> {
//! # let random = |n: usize| -> Vec<f32> { let mut rng = fastrand::Rng::with_seed(1); (0..n).map(|_| rng.f32() - 0.5).collect() };
//! let shape = HeadShape::new(4, 2, 64, 64)?;
//! let (tokens, hidden) = (100, 256);
//! let (q, k, v) = (random(tokens * 4 * 64), random(tokens * 2 * 64), random(tokens * 2 * 64)); // q and k after RoPE
//!
//! let mut calibration = Calibration::new([shape]);
//! calibration.layer_mut(0)?.add(&q, &k, &v)?; // again for every chunk of text
//! calibration.layer_mut(0)?.set_w_o(&random(hidden * 4 * 64), hidden)?;
//!
//! let bases = vec![project(0, &calibration.layers()[0], Projection::Optimal)?];
//! let profile = Profile::new(&calibration, &bases, &[0.125])?;
//! let dense_bytes = 2 * 2 * (64 + 64); // two bytes, two KV heads, keys and values of 64
//! let ranks = Planner::new(&profile, &Weights::equal(&profile))?.within(dense_bytes / 2)?;
//! let plan = CompressionPlan::new(&calibration, Projection::Optimal, &bases, &ranks)?;
//!
//! let layer = &plan.layers()[0];
//! let keys = layer.keys(&k[..2 * 64])?; // of one token, [Σ r_k], for the cache
//! let values = layer.values(&v[..2 * 64])?;
//! assert_eq!(keys.len() + values.len(), 128);
//! # Ok(())
//! # }
//! ```

pub mod cache;
pub mod calibrate;
mod error;
mod format;
#[cfg(feature = "cuda")]
pub mod gpu;
mod linalg;
mod maps;
pub mod merge;
mod plan;
pub mod projection;
pub mod rank_plan;
mod ranks;
pub mod reference;

pub use error::Error;
pub use maps::{HeadMaps, LayerProjection};
pub use plan::CompressionPlan;
pub use ranks::{HeadRanks, LayerRanks, RANK_STEP};
