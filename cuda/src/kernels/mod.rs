//! Typed kernels: one struct per kernel owns its function and has its only launch.
//!
//! Each struct checks lengths, alignment and shared memory, then launches; it is generic over
//! [`Function`](crate::launch::Function), so the same code runs on the driver and in the emulator.

pub mod attention;
pub mod ceilings;
pub mod conformance;
pub mod homomorphic_quant;
pub mod hybrid_gemm;
pub mod kv_compress;
pub mod sparse_attn;
