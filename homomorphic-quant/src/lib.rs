//! Attention computed directly on quantized KV codes (HACK).
//!
//! Keys and values are stored as 2, 4 or 8-bit codes in partitions of Π tokens or channels; scores and outputs are integer
//! matrix products of these codes with 8-bit queries and probabilities, corrected by cached sums. Nothing is dequantized.
//!
//! Source: the HACK paper (USENIX ATC '26; its arXiv v1 differs in the quantization axes).
//!
//! # Map
//!
//! | module or type | what it is |
//! |---|---|
//! | [`Config`] | widths, partition Π, sinks, storage type, rounding, layout, and overrides per layer and head |
//! | [`quantizer`] | the quantizer as operations: bit-exact on every backend |
//! | [`HeadBlock`] | a closed block of one KV head in the clear |
//! | [`page`] | the bytes of pages, in every layout |
//! | `gpu` | the kernels, with feature `cuda` |
//! | [`Error`] | what a caller can get wrong |

mod block;
pub mod cache;
pub mod config;
mod error;
#[cfg(feature = "cuda")]
pub mod gpu;
pub mod homomorphic;
pub mod page;
pub mod quantizer;
pub mod reference;
pub mod wire;

pub use block::{BlockPlace, HeadBlock};
pub use cache::{Cache, Capacity, KvShape, Sequence};
pub use config::{Bits, BitsOverride, Config, HeadBits, Layout, OpenBlock, Rounding};
pub use error::Error;
