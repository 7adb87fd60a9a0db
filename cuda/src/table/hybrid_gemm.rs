//! Kernels of `cuda/kernels/hybrid-gemm`.

use super::{ArchClass, Constant, Kernel, Row, dtype};

const TOKENS: Constant = Constant { name: "TOKENS", allowed: &[8, 16, 32, 64] };
// 0: as X, 1: int8, 2: fp8 by rows, 3: fp8 in blocks, else int4 in groups of so many inputs, one more with zero points.
const FORMAT: Constant = Constant { name: "FORMAT", allowed: &[0, 1, 2, 3, 32, 33, 64, 65, 128, 129] };
// Groups of 32 would need more shared memory than sm_86 and later consumer devices have.
const LARGE_FORMAT: Constant = Constant { name: "FORMAT", allowed: &[0, 1, 2, 3, 64, 65, 128, 129] };
const X_DTYPE: Constant = Constant { name: "X_DTYPE", allowed: &[dtype::F16, dtype::BF16] };

/// A ring of up to ten stages, and the tail.
const fn small_row(values: &'static [i64], registers: u32) -> Row {
    let (tokens, format) = (values[0] as u32, values[1] as u32);
    let inputs = match format {
        0 => 64,
        1..=3 => 128,
        _ => 256,
    };
    let stage = slab(format) + tokens * inputs * 2;
    let stages = 96 * 1024 / stage;
    let stages = if stages < 10 { stages } else { 10 };
    Row { values, registers, shared: stages * stage + 224, emulated: true }
}

/// Bytes of a slab with room for its scales, a multiple of 128.
const fn slab(format: u32) -> u32 {
    let scales = match format {
        0..=2 => 0,
        3 => 4,
        group if group % 32 == 0 => 256 / group * 128,
        zero_points => 256 / (zero_points - 1) * 160,
    };
    8192 + scales.next_multiple_of(128)
}

/// Two chunks of activations of 256 tokens, four slabs of weights, and the receipt.
const fn large_row(values: &'static [i64]) -> Row {
    let shared = 2 * 32 * 1024 + 4 * slab(values[0] as u32) + 216;
    Row { values, registers: 255, shared, emulated: true }
}

pub(super) const KERNELS: &[Kernel] = &[
    Kernel {
        name: "hybrid_small_m",
        group: "hybrid-gemm",
        source: include_str!("../../kernels/hybrid-gemm/hybrid_small_m.cu"),
        constants: &[TOKENS, FORMAT, X_DTYPE],
        arch: ArchClass::Portable,
        threads: 128,
        rows: &[
            small_row(&[8, 0, dtype::BF16], 128),
            small_row(&[16, 0, dtype::F16], 128),
            small_row(&[64, 0, dtype::BF16], 184),
            small_row(&[16, 1, dtype::BF16], 128),
            small_row(&[8, 1, dtype::F16], 128),
            small_row(&[16, 128, dtype::BF16], 160),
            small_row(&[64, 32, dtype::F16], 224),
            small_row(&[16, 129, dtype::BF16], 160),
            small_row(&[64, 33, dtype::F16], 224),
            small_row(&[8, 2, dtype::F16], 128),
            small_row(&[16, 3, dtype::BF16], 160),
            small_row(&[64, 3, dtype::BF16], 224),
        ],
    },
    Kernel {
        name: "hybrid_large_m",
        group: "hybrid-gemm",
        source: include_str!("../../kernels/hybrid-gemm/hybrid_large_m.cu"),
        constants: &[LARGE_FORMAT, X_DTYPE],
        arch: ArchClass::Portable,
        threads: 256,
        rows: &[
            large_row(&[0, dtype::BF16]),
            large_row(&[0, dtype::F16]),
            large_row(&[1, dtype::BF16]),
            large_row(&[128, dtype::BF16]),
            large_row(&[64, dtype::F16]),
            large_row(&[129, dtype::BF16]),
            large_row(&[65, dtype::F16]),
            large_row(&[3, dtype::BF16]),
        ],
    },
];
