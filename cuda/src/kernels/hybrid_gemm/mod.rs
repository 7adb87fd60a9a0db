//! Kernels of `cuda/kernels/hybrid-gemm`.

mod args;
mod large_m;
mod small_m;

pub use args::{HybridGemmArgs, HybridGemmExperts, MOST_CHUNKS, WeightFormat};
pub use large_m::{HybridLargeM, large_m_supports};
pub use small_m::{HybridSmallM, small_tokens};
