//! Attention computed directly on quantized KV codes (HACK).
//!
//! Keys and values are stored as 2, 4 or 8-bit codes in partitions of Π tokens or channels; scores and outputs are integer
//! matrix products of these codes with 8-bit queries and probabilities, corrected by cached sums. Nothing is dequantized.
//!
//! Source: the HACK paper (USENIX ATC '26; its arXiv v1 differs in the quantization axes).
//!
//! # State
//!
//! Only the error type exists so far; no part of the method is implemented here yet.
//!
//! # Map
//!
//! - [`Error`]: what a caller can get wrong.

mod error;

pub use error::Error;
