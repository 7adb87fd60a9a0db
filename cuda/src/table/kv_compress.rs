//! Kernels of `cuda/kernels/kv-compress`.

use super::{ArchClass, Constant, Kernel, Row, dtype};

const HEAD_DIM: Constant = Constant { name: "HEAD_DIM", allowed: &[32, 64, 96, 128] };
const KV_DTYPE: Constant = Constant { name: "KV_DTYPE", allowed: &[dtype::F16, dtype::BF16] };
const COLUMN_TILES: Constant = Constant { name: "COLUMN_TILES", allowed: &[1, 2] };
const SOFT_CAP: Constant = Constant { name: "SOFT_CAP", allowed: &[0, 1] };
// 0: none, 1: half-split, 2: interleaved.
const ROTARY: Constant = Constant { name: "ROTARY", allowed: &[0, 1, 2] };

/// 64 rows of vectors, and a projection of full rank or its reverse.
const fn project_row(values: &'static [i64]) -> Row {
    let head_dim = values[0] as u32;
    Row { values, registers: 96, shared: (64 + head_dim) * head_dim * 2, emulated: true }
}

/// Queries of 16 rows, four rings of 16 KiB and the tail of two column tiles.
const fn decode_row(values: &'static [i64], registers: u32) -> Row {
    Row { values, registers, shared: 16 * values[0] as u32 * 2 + 4 * 16 * 1024 + 516, emulated: true }
}

pub(super) const KERNELS: &[Kernel] = &[
    Kernel {
        name: "fdc_append",
        group: "kv-compress",
        source: include_str!("../../kernels/kv-compress/fdc_append.cu"),
        constants: &[HEAD_DIM, KV_DTYPE, ROTARY],
        arch: ArchClass::Portable,
        threads: 128,
        rows: &[
            project_row(&[64, dtype::F16, 1]),
            project_row(&[96, dtype::BF16, 0]),
            project_row(&[128, dtype::BF16, 1]),
            project_row(&[128, dtype::F16, 2]),
        ],
    },
    Kernel {
        name: "fdc_decode",
        group: "kv-compress",
        source: include_str!("../../kernels/kv-compress/fdc_decode.cu"),
        constants: &[HEAD_DIM, COLUMN_TILES, KV_DTYPE, SOFT_CAP],
        arch: ArchClass::Portable,
        threads: 128,
        rows: &[
            decode_row(&[64, 1, dtype::F16, 0], 168),
            decode_row(&[96, 2, dtype::BF16, 0], 168),
            decode_row(&[128, 1, dtype::BF16, 0], 168),
            decode_row(&[128, 2, dtype::BF16, 0], 168),
            decode_row(&[128, 1, dtype::F16, 1], 168),
        ],
    },
    Kernel {
        name: "fdc_reconstruct",
        group: "kv-compress",
        source: include_str!("../../kernels/kv-compress/fdc_reconstruct.cu"),
        constants: &[HEAD_DIM, KV_DTYPE],
        arch: ArchClass::Portable,
        threads: 128,
        rows: &[project_row(&[64, dtype::F16]), project_row(&[128, dtype::BF16])],
    },
];
