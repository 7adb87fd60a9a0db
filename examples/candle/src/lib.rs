//! longkv's decode attention, append and paged caches as [candle](candle_core) custom ops.
//!
//! | item | what it is |
//! |---|---|
//! | [`PagedCache`] | pages of keys and values of every layer in candle tensors; sequences that grow, fork and end |
//! | [`PagedAppend`] | writes new keys and values to their slots, an [`InplaceOp3`](candle_core::InplaceOp3) |
//! | [`PagedDecode`] | attention of a decoding step over the pages, a [`CustomOp3`](candle_core::CustomOp3) |
//! | [`plain`] | the same attention in candle's own ops, to compare with |
//!
//! **Devices.** CPU tensors go to the crates' CPU reference (f32, f16, bf16), CUDA tensors (feature `cuda`; f16, bf16) to
//! the kernels, on candle's own stream and in candle's own memory: nothing is copied, no stream is created, and calls return
//! once the work is enqueued. Nothing ever falls back from one to the other: an op prepared for a device refuses tensors of
//! any other.
//!
//! **Layouts.** Views are taken as they are: cache pages at any strides (NHD, HND, a slice of a larger tensor), new keys and
//! values as slices of a fused projection. What a kernel cannot read in place (queries that are not contiguous, vectors
//! whose channels are not) is an error that says so; call `.contiguous()` where the copy is wanted.
//!
//! **Errors** are candle's: `UnexpectedShape`, `UnexpectedDType`, `UnsupportedDTypeForOp` and `DeviceMismatchBinaryOp` where
//! they fit, `Error::Cuda` around the crates' own error when a kernel cannot be compiled, loaded or launched, and a message
//! that names argument, expectation and finding otherwise. Lengths, page numbers and slots lie in tensors, where only the
//! device can check them: a bad one is skipped (its output is 0, its log-sum-exp -inf) and reported by
//! [`PagedDecode::check`] and [`PagedAppend::check`], which wait for the device.
//!
//! **Gradients.** None: results are detached, as decoding needs.
//!
//! # Example
//!
//! One layer, two sequences of one new token each:
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use longkv_candle::{AttentionSpec, CacheShape, HeadShape, Mask, PagedAppend, PagedCache, PagedDecode, Score, StepShape};
//!
//! # fn main() -> candle_core::Result<()> {
//! let device = Device::Cpu;
//! let shape = CacheShape { layers: 1, pages: 8, page_size: 16, kv_heads: 2, head_dim: 64 };
//! let mut cache = PagedCache::new(shape, DType::F16, &device)?;
//! let heads = HeadShape::new(8, 2, 64, 64).map_err(candle_core::Error::wrap)?;
//! let score = Score::new(0.125).map_err(candle_core::Error::wrap)?;
//! let spec = AttentionSpec { shape: heads, score, mask: Mask::Causal };
//! let append = PagedAppend::prepare(cache.kv(0)?)?;
//! let step = StepShape { batch: 2, q_len: 1, max_pages: 4 };
//! let mut decode = PagedDecode::prepare(spec, step, &cache.k(0)?, &cache.v(0)?)?;
//!
//! let mut sequences = vec![cache.sequence()?, cache.sequence()?];
//! let slots = cache.grow(&mut sequences, &[1, 1])?; // once per step, for all layers
//! let k = Tensor::randn(0f32, 1., (2, 2, 64), &device)?.to_dtype(DType::F16)?; // [tokens, kv_heads, head_dim], rotated
//! let v = Tensor::ones((2, 2, 64), DType::F16, &device)?;
//! append.append(cache.kv(0)?, &k, &v, &slots)?;
//!
//! let (kv_len, block_table) = cache.tables(&sequences, 4)?;
//! let step = decode.step(&kv_len, &block_table)?; // once per step, for all layers
//! let q = Tensor::zeros((2, 1, 8, 64), DType::F16, &device)?; // [batch, q_len, q_heads, head_dim]
//! let attended = step.attend(&q, &cache.k(0)?, &cache.v(0)?)?;
//! assert_eq!(attended.out.dims(), [2, 1, 8, 64]);
//! assert_eq!(attended.lse.dims(), [2, 1, 8]);
//! assert_eq!(attended.out.min_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()?, 1.0); // a mean of ones
//! decode.check()?;
//! append.check()
//! # }
//! ```

mod append;
mod cache;
mod decode;
mod error;
#[cfg(feature = "cuda")]
mod gpu;
mod layout;
pub mod plain;

pub use append::PagedAppend;
pub use attention::page_pool::PagedSequence;
pub use attention::{AttentionSpec, HeadShape, Mask, Score};
pub use cache::{CacheShape, PagedCache};
pub use decode::{Attended, DecodeStep, PagedDecode, StepShape};
