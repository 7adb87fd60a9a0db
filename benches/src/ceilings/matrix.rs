//! Rates of the matrix unit through `mma.sync`, operands in registers.
//!
//! On Hopper `wgmma` goes past these; the peers' matrix products show how far.

use longkv_cuda::kernels::ceilings::MmaRate;
use longkv_cuda::kernels::conformance::MmaInstruction;
use longkv_cuda::memory::{View, ViewMut};

use super::{fill_random, report};
use crate::GpuBench;
use crate::figure::Summary;

const REPEATS: usize = 20;
const ROUNDS: u32 = 4096;

/// bf16 and int8.
///
/// # Panics
/// When a launch fails.
pub fn measure(bench: &GpuBench) {
    for (name, unit, instruction) in [
        ("bf16_mma_sync_rate", "TFLOP/s", MmaInstruction::Bf16),
        ("int8_mma_sync_rate", "TOP/s", MmaInstruction::S8S8),
    ] {
        let (rate, parameters) = rate(bench, instruction);
        report(name, unit, rate, &parameters);
    }
}

/// The rate of bf16 products, in TFLOP/s.
///
/// # Panics
/// When a launch fails.
pub fn bf16_rate(bench: &GpuBench) -> Summary {
    rate(bench, MmaInstruction::Bf16).0
}

/// 10¹² operations per second, and what was run.
fn rate(bench: &GpuBench, instruction: MmaInstruction) -> (Summary, [(&'static str, u64); 2]) {
    let kernel = MmaRate::prepare(&bench.gpu, instruction).expect("prepare");
    let blocks = bench.gpu.sm_count() * 4;
    let words = |count: usize| {
        let mut bytes = vec![0u8; count * 4];
        fill_random(&mut bytes);
        let word = |four: &[u8]| u32::from_le_bytes([four[0], four[1], four[2], four[3]]);
        let mut words: Vec<u32> = bytes.chunks_exact(4).map(word).collect();
        if instruction == MmaInstruction::Bf16 {
            // Exponents near 1, so that sums stay finite.
            words.iter_mut().for_each(|word| *word = *word & 0x80ff_80ff | 0x3f00_3f00);
        }
        bench.stream.clone_htod(&words).expect("copy")
    };
    let (a, b) = (words(32 * 4), words(8 * 32 * 2));
    let mut d =
        bench.stream.alloc_zeros::<u32>(MmaRate::<longkv_cuda::driver::GpuFunction>::out_words(blocks));
    let d = d.as_mut().expect("allocate");
    let seconds = bench.times(REPEATS, |stream| {
        let (a, b) = (View::device(&a, stream), View::device(&b, stream));
        kernel.launch(stream, blocks, ROUNDS, &a, &b, &mut ViewMut::device(d, stream)).expect("launch");
    });
    let operations = kernel.operations(blocks, ROUNDS);
    let rate = seconds.map(|seconds| operations as f64 / seconds / 1e12);
    (rate, [("operations", operations), ("blocks", u64::from(blocks))])
}
