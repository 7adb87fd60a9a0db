//! What the tests of every crate share: inputs that break kernels, and comparisons that NaN never passes.
//!
//! Enable feature `testing` in `[dev-dependencies]`. Two questions are never mixed here: whether a kernel is right (tight
//! tolerances against the oracle on the same codes, ranks or pages) and how lossy a method is (measured, reported).

mod compare;
mod inputs;
pub mod product;
mod rng;

pub use compare::{Comparison, Tolerance, Worst, calc_diff, flash_tolerance};
pub use inputs::{Inputs, edge_lengths, head_ratios, paged_copy, poison, shuffled_pages};
pub use rng::Rng;
