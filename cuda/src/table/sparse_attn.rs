//! Kernels of `cuda/kernels/sparse-attn`.

use super::{ArchClass, Constant, Kernel, Row, dtype};
use crate::kernels::sparse_attn::{SELECT_SHARED_BYTES, resolve_shared_bytes, score_shared_bytes};

/// The largest step: 4096 pages over 16,384 slots.
const RESOLVE_SHARED: u32 = resolve_shared_bytes(4096, 16384) as u32;

const KV_DTYPE: Constant = Constant { name: "KV_DTYPE", allowed: &[dtype::F16, dtype::BF16] };

const ATTEND_CONSTANTS: &[Constant] = &[
    Constant { name: "QK_DIM", allowed: &[64, 96, 128, 192, 256] },
    Constant { name: "V_DIM", allowed: &[64, 96, 128, 192, 256] },
    Constant { name: "COLUMN_TILES", allowed: &[1, 2] },
    KV_DTYPE,
    Constant { name: "SOFT_CAP", allowed: &[0, 1] },
];

/// As of the dense decode: queries of 16 rows, four rings of 16 KiB and the tail of two column tiles.
const fn attend_row(values: &'static [i64]) -> Row {
    Row { values, registers: 255, shared: 16 * values[0] as u32 * 2 + 4 * 16 * 1024 + 516, emulated: true }
}

/// Summaries of one vector or two.
const ROW_DIM: Constant = Constant { name: "ROW_DIM", allowed: &[64, 96, 128, 192, 256, 384, 512] };

const fn score_row(values: &'static [i64]) -> Row {
    Row { values, registers: 128, shared: score_shared_bytes(values[0] as usize) as u32, emulated: true }
}

/// A kernel without constants.
const fn plain(name: &'static str, source: &'static str, threads: u32, rows: &'static [Row]) -> Kernel {
    Kernel { name, group: "sparse-attn", source, constants: &[], arch: ArchClass::Portable, threads, rows }
}

pub(super) const KERNELS: &[Kernel] = &[
    plain(
        "sparse_append",
        include_str!("../../kernels/sparse-attn/sparse_append.cu"),
        128,
        &[Row { values: &[], registers: 64, shared: 0, emulated: true }],
    ),
    Kernel {
        name: "sparse_attend",
        group: "sparse-attn",
        source: include_str!("../../kernels/sparse-attn/sparse_attend.cu"),
        constants: ATTEND_CONSTANTS,
        arch: ArchClass::Portable,
        threads: 128,
        rows: &[
            attend_row(&[64, 64, 1, dtype::F16, 0]),
            attend_row(&[128, 128, 1, dtype::BF16, 0]),
            attend_row(&[128, 128, 2, dtype::BF16, 1]),
        ],
    },
    plain(
        "sparse_close",
        include_str!("../../kernels/sparse-attn/sparse_close.cu"),
        128,
        &[Row { values: &[], registers: 64, shared: 20, emulated: true }],
    ),
    plain(
        "sparse_flush",
        include_str!("../../kernels/sparse-attn/sparse_flush.cu"),
        256,
        &[Row { values: &[], registers: 64, shared: 0, emulated: true }],
    ),
    plain(
        "sparse_gather",
        include_str!("../../kernels/sparse-attn/sparse_gather.cu"),
        256,
        &[Row { values: &[], registers: 64, shared: 0, emulated: true }],
    ),
    plain(
        "sparse_plan",
        include_str!("../../kernels/sparse-attn/sparse_plan.cu"),
        128,
        // A bit for each of 4096 selected pages.
        &[Row { values: &[], registers: 64, shared: 24 + 4096 / 8, emulated: true }],
    ),
    plain(
        "sparse_resolve",
        include_str!("../../kernels/sparse-attn/sparse_resolve.cu"),
        256,
        &[Row { values: &[], registers: 64, shared: RESOLVE_SHARED, emulated: true }],
    ),
    Kernel {
        name: "sparse_score",
        group: "sparse-attn",
        source: include_str!("../../kernels/sparse-attn/sparse_score.cu"),
        constants: &[ROW_DIM, KV_DTYPE],
        arch: ArchClass::Portable,
        threads: 128,
        rows: &[score_row(&[128, dtype::F16]), score_row(&[256, dtype::BF16])],
    },
    plain(
        "sparse_select",
        include_str!("../../kernels/sparse-attn/sparse_select.cu"),
        512,
        &[Row { values: &[], registers: 64, shared: SELECT_SHARED_BYTES as u32, emulated: true }],
    ),
    Kernel {
        name: "sparse_summarise",
        group: "sparse-attn",
        source: include_str!("../../kernels/sparse-attn/sparse_summarise.cu"),
        constants: &[KV_DTYPE],
        arch: ArchClass::Portable,
        threads: 128,
        rows: &[
            Row { values: &[dtype::F16], registers: 64, shared: 0, emulated: true },
            Row { values: &[dtype::BF16], registers: 64, shared: 0, emulated: true },
        ],
    },
];
