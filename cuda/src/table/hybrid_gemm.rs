//! Kernels of `cuda/kernels/hybrid-gemm`.

use super::{ArchClass, Constant, Kernel, Row, dtype};

const TOKENS: Constant = Constant { name: "TOKENS", allowed: &[8, 16, 32, 64] };
// 0: as X, 1: int8, else int4 in groups of so many inputs.
const FORMAT: Constant = Constant { name: "FORMAT", allowed: &[0, 1, 32, 64, 128] };
// Groups of 32 would need more shared memory than sm_86 and later consumer devices have.
const LARGE_FORMAT: Constant = Constant { name: "FORMAT", allowed: &[0, 1, 64, 128] };
const X_DTYPE: Constant = Constant { name: "X_DTYPE", allowed: &[dtype::F16, dtype::BF16] };

/// A ring of up to ten stages, and the tail.
const fn small_row(values: &'static [i64], registers: u32) -> Row {
    let (tokens, format) = (values[0] as u32, values[1] as u32);
    let inputs = match format {
        0 => 64,
        1 => 128,
        _ => 256,
    };
    let stage = slab(format) + tokens * inputs * 2;
    let stages = 96 * 1024 / stage;
    let stages = if stages < 10 { stages } else { 10 };
    Row { values, registers, shared: stages * stage + 224, emulated: true }
}

/// Bytes of a slab with its scales.
const fn slab(format: u32) -> u32 {
    match format {
        0 | 1 => 8192,
        group => 8192 + 256 / group * 128,
    }
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
        ],
    },
];
