//! Attention vocabulary, its f64 oracle and a CPU path, shared by the longkv attention crates.
//!
//! | module or type | what it is |
//! |---|---|
//! | [`HeadShape`], [`Score`], [`Mask`], [`AttentionSpec`] | what a layer computes: heads and sizes, scale and soft-cap, visible keys |
//! | [`Element`], [`DType`] | storage types: f32, f16, bf16 |
//! | [`HeadsView`] | contiguous vectors `[tokens, heads, dim]` or `[heads, tokens, dim]`, at any stride |
//! | [`RaggedView`], [`RaggedKv`], [`PagedKv`], [`PageStore`], [`BlockTable`] | batches of packed sequences, and paged KV caches |
//! | [`page_pool`] | reference-counted byte pages with copy-on-write, and sequences over them |
//! | [`rope`] | rotary position embedding and its context extensions |
//! | [`softmax_state`] | partial states `(out, lse)` and `(m, l, o)`, and their merge |
//! | [`mod@reference`] | the oracle: attention and the merge of states in f64, in plain loops |
//! | [`cpu`] | dense attention in f32, for an engine without a GPU |
//! | `gpu` (feature `cuda`) | the kernels |
//! | `testing` (feature `testing`) | inputs, tolerances and comparisons that every crate's tests share |
//!
//! # Conventions
//!
//! Query head `h` reads KV head `h / (q_heads / kv_heads)`. Causal masks are aligned to the end of the keys. A score is
//! scaled, then soft-capped, then masked. LSE is natural log with the scale applied. A row that sees no key gives output
//! 0 and LSE -inf, never NaN.
//!
//! # Example
//!
//! One decoding step of a layer with 4 query heads over 2 KV heads of 64 channels, over a cache of 100 tokens:
//!
//! ```
//! use attention::rope::{Rope, RopeConfig};
//! use attention::{AttentionSpec, HeadShape, HeadsView, Mask, Score, cpu};
//! # extern crate longkv_attention as attention;
//! # fn main() -> Result<(), attention::Error> {
//! let shape = HeadShape::new(4, 2, 64, 64)?;
//! let spec = AttentionSpec { shape, score: Score::new(0.125)?, mask: Mask::Causal };
//! let rope = Rope::new(RopeConfig::new(64, 10_000.0), 2048)?;
//!
//! let kv_len = 100;
//! let keys = vec![0.5; kv_len * 2 * 64]; // [kv_len, kv_heads, qk_dim], already rotated
//! let values = vec![2.0; kv_len * 2 * 64]; // [kv_len, kv_heads, v_dim]
//! let mut q = vec![1.0; 4 * 64]; // [1, q_heads, qk_dim]
//! rope.apply(&mut q, 4, &[99])?;
//!
//! let mut out = vec![0.0; 4 * 64]; // [1, q_heads, v_dim]
//! let mut lse = vec![0.0; 4]; // [1, q_heads]
//! cpu::attend(
//!     &spec,
//!     HeadsView::nhd(&q, 1, 4, 64)?,
//!     HeadsView::nhd(&keys, kv_len, 2, 64)?,
//!     HeadsView::nhd(&values, kv_len, 2, 64)?,
//!     &mut out,
//!     &mut lse,
//! )?;
//! assert!(out.iter().all(|x| (x - 2.0).abs() < 1e-5)); // a mean of equal values
//! # Ok(())
//! # }
//! ```

pub mod cpu;
mod element;
mod error;
mod fault;
#[cfg(feature = "cuda")]
pub mod gpu;
mod heads;
mod kv;
mod mask;
pub mod page_pool;
mod paged;
mod ragged;
pub mod reference;
pub mod rope;
mod score;
mod shape;
pub mod softmax_state;
#[cfg(feature = "testing")]
pub mod testing;

pub use element::{DType, Element};
pub use error::Error;
pub use fault::{Fault, FaultCode};
pub use heads::HeadsView;
pub use kv::{KeyValue, KeyValues};
pub use mask::{KeyRanges, Mask, query_position};
pub use paged::{BlockTable, PageLayout, PageStore, PagedKv, PagedLengths};
pub use ragged::{RaggedKv, RaggedView};
pub use score::{AttentionSpec, Score};
pub use shape::HeadShape;
