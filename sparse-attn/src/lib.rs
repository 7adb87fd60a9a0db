//! Sparse attention over a paged KV cache that is split between HBM and host memory (SPIN).
//!
//! Selection algorithms of different granularity (chunks, clusters, gated blocks, training-free scores) share one partition
//! abstraction over pages; a bucketed LRU decides which pages stay in HBM.
//!
//! Source: the SPIN paper.
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
