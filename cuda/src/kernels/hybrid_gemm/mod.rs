//! Kernels of `cuda/kernels/hybrid-gemm`.

mod args;
mod small_m;

pub use args::{HybridGemmArgs, WeightFormat};
pub use small_m::{HybridSmallM, small_tokens};
