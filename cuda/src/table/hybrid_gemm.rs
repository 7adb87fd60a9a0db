//! Kernels of `cuda/kernels/hybrid-gemm`.

use super::{ArchClass, Constant, Kernel, Row, dtype};

const TOKENS: Constant = Constant { name: "TOKENS", allowed: &[8, 16, 32, 64] };
// 0: as X, 1: int8, else int4 in groups of so many inputs.
const FORMAT: Constant = Constant { name: "FORMAT", allowed: &[0, 1, 32, 64, 128] };
const LARGE_FORMAT: Constant = Constant { name: "FORMAT", allowed: &[0, 1] };
const X_DTYPE: Constant = Constant { name: "X_DTYPE", allowed: &[dtype::F16, dtype::BF16] };

/// A ring of up to ten stages, and the tail.
const fn small_row(values: &'static [i64], registers: u32) -> Row {
    let (tokens, format) = (values[0] as u32, values[1] as u32);
    let (inputs, scales) = match format {
        0 => (64, 0),
        1 => (128, 0),
        group => (256, 256 / group * 128),
    };
    let stage = 8192 + scales + tokens * inputs * 2;
    let stages = 96 * 1024 / stage;
    let stages = if stages < 10 { stages } else { 10 };
    Row { values, registers, shared: stages * stage + 72, emulated: true }
}

/// Two chunks of activations of 256 tokens, four slabs of weights, and the receipt.
const fn large_row(values: &'static [i64]) -> Row {
    Row { values, registers: 255, shared: 2 * 32 * 1024 + 4 * 8192 + 64, emulated: true }
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
            small_row(&[16, 128, dtype::BF16], 144),
            small_row(&[64, 32, dtype::F16], 216),
        ],
    },
    Kernel {
        name: "hybrid_large_m",
        group: "hybrid-gemm",
        source: include_str!("../../kernels/hybrid-gemm/hybrid_large_m.cu"),
        constants: &[LARGE_FORMAT, X_DTYPE],
        arch: ArchClass::Portable,
        threads: 256,
        rows: &[large_row(&[0, dtype::BF16]), large_row(&[0, dtype::F16]), large_row(&[1, dtype::BF16])],
    },
];
