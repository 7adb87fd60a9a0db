//! What the machine can do at most: every figure is held to these, measured in the same process or by the same program.
//!
//! - [`memory`]: read, copy and write bandwidth of device memory, by loads and by bulk copies.
//! - [`matrix`]: rates of the matrix unit through `mma.sync`.
//! - [`host_link`]: host memory by copy engine, by loads and by bulk copies; whether L2 keeps what was read.
//! - [`overhead`]: what launches and events cost.
//!
//! They are measured as kernels are, with a cold L2 and the launch's latency hidden. Data is random: a device that moves or multiplies zeros draws less power and clocks higher.

pub mod host_link;
pub mod matrix;
pub mod memory;
pub mod overhead;

use std::sync::Arc;

use longkv_cuda::cudarc::driver::{CudaSlice, CudaStream};
use serde_json::Value;

use crate::GpuBench;
use crate::data::repeated;
use crate::figure::{self, CEILINGS_VARIABLE, Summary};

pub use matrix::bf16_rate;
pub use memory::read_bandwidth;

/// Measures everything, prints it and writes it down.
pub fn all(bench: &GpuBench) {
    memory::measure(bench);
    matrix::measure(bench);
    overhead::measure(bench);
    host_link::measure(bench);
}

/// Prints a ceiling and writes its line.
fn report(name: &str, unit: &str, summary: Summary, parameters: &[(&str, u64)]) {
    let sizes: Vec<String> = parameters.iter().map(|(name, value)| format!("{name} {value}")).collect();
    let Summary { median, p10, p90, .. } = summary;
    println!("{name:24} {median:10.2} {unit:8} ({p10:.2} to {p90:.2})  {}", sizes.join(", "));
    let line: Value = figure::ceiling(name, unit, summary, parameters);
    figure::append(CEILINGS_VARIABLE, &line);
}

/// A rate in GB/s (10⁹ bytes) of times in seconds.
fn gb_s(bytes: usize, seconds: Summary) -> Summary {
    seconds.map(|seconds| bytes as f64 / seconds / 1e9)
}

/// Fills bytes without a pattern that memory or links could profit from (xorshift64).
fn fill_random(bytes: &mut [u8]) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for chunk in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
    }
}

/// Device memory filled with random bytes: a random block of at most 64 MiB, repeated.
///
/// # Panics
/// When the device has not enough memory.
pub(crate) fn random_bytes(stream: &Arc<CudaStream>, len: usize) -> CudaSlice<u8> {
    let mut block = vec![0; len.min(64 << 20)];
    fill_random(&mut block);
    repeated(stream, &block, len)
}
