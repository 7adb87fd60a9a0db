//! What the benches share: where a GPU is, how device time is taken, how groups are named, what is written down.
//!
//! - [`GpuBench`]: the first GPU, a cold L2 before every launch, device time by events.
//! - [`Case`]: what is checked against the oracle, captured, timed and written down; [`check`] and [`data`] help with it.
//! - [`ceilings`]: what the machine can do at most; the program `ceilings` measures all of it.
//! - [`modules`]: which modules of the executable run.
//! - [`host`]: what the host does, of which figures are written down too.
//! - [`figure`]: medians, and the JSON lines that `cargo xtask gpu-record` reads.
//!
//! Groups are `crate/kernel/backend/dtype`, parameters are shapes, throughput is bytes moved and floating-point operations.
//! The backend `cpu-reference` is the oracle, there to show the shape of the curve, not to be fast. GPU backends appear only
//! where there is a GPU, under its name, so that baselines of different machines never mix.

pub mod case;
pub mod ceilings;
pub mod check;
pub mod data;
pub mod figure;
mod gpu;
pub mod host;
pub mod modules;

use criterion::Throughput;

pub use case::{Case, GpuGroup, Steps, Work};
pub use gpu::GpuBench;
pub use longkv_attention::testing::product::exhaustive;

/// What README.md shows compiles.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct ReadmeCompiles;

/// Throughput in bytes and floating-point operations; criterion prints GiB/s and, as Gelem/s, GFLOP/s.
pub fn throughput(bytes: u64, flops: u64) -> Throughput {
    Throughput::ElementsAndBytes { elements: flops, bytes }
}
