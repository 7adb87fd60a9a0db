//! GEMM whose weights live in host memory, in HBM or in both (C2CServe's HybridGEMM).
//!
//! O = X·Wᵀ reads W in place over both links at once, with an output-stationary and a weight-stationary dataflow over disjoint
//! output columns and a cost model that divides the work between them.
//!
//! Source: the C2CServe paper, HybridGEMM.
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
