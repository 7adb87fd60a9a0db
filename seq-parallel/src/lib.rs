//! Ring-style sequence-parallel prefill with a scheme chosen for each stage (PecSched's fast SP).
//!
//! One long sequence is prefilled over P ranks: ring attention between nodes, and inside a node Megatron-style or Ulysses-style
//! sharding for the attention stage and for the MLP stage, whichever combination is estimated to be fastest.
//!
//! Source: PecSched (arXiv 2409.15104v2), §5.3.
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
