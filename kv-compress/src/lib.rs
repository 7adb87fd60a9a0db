//! Low-rank KV cache with per-head ranks, read without decompression (FDC).
//!
//! Per layer and KV head a projection keeps r_k of the key dimensions and r_v of the value dimensions; attention runs in the
//! reduced basis, and the ranks follow a plan that spends bytes where accuracy needs them.
//!
//! Source: the FDC paper.
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
