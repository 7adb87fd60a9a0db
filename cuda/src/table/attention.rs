//! Kernels of `cuda/kernels/attention`.

use super::{ArchClass, Constant, Kernel, Row, dtype};

const V_DIM: Constant = Constant { name: "V_DIM", allowed: &[32, 64, 80, 96, 112, 128, 192, 256, 512] };
const OUT_DTYPE: Constant = Constant { name: "OUT_DTYPE", allowed: &[dtype::F32, dtype::F16, dtype::BF16] };

const fn merge_row(values: &'static [i64], registers: u32, shared: u32) -> Row {
    Row { values, registers, shared, emulated: true }
}

const DECODE_CONSTANTS: &[Constant] = &[
    Constant { name: "QK_DIM", allowed: &[64, 96, 128, 192, 256] },
    Constant { name: "V_DIM", allowed: &[64, 96, 128, 192, 256] },
    Constant { name: "COLUMN_TILES", allowed: &[1, 2] },
    Constant { name: "KV_DTYPE", allowed: &[dtype::F16, dtype::BF16] },
    Constant { name: "PAGED", allowed: &[0, 1] },
    Constant { name: "SOFT_CAP", allowed: &[0, 1] },
];

/// Queries of 16 rows, four rings of 16 KiB and the tail of two column tiles. Where three blocks fit an SM the kernel's own
/// launch bound holds it to 168 registers.
const fn decode_row(values: &'static [i64]) -> Row {
    Row { values, registers: 255, shared: 16 * values[0] as u32 * 2 + 4 * 16 * 1024 + 516, emulated: true }
}

const PREFILL_CONSTANTS: &[Constant] = &[
    Constant { name: "QK_DIM", allowed: &[64, 96, 128, 192, 256] },
    Constant { name: "V_DIM", allowed: &[64, 96, 128, 192, 256] },
    Constant { name: "KV_DTYPE", allowed: &[dtype::F16, dtype::BF16] },
    Constant { name: "PAGED", allowed: &[0, 1] },
    Constant { name: "SOFT_CAP", allowed: &[0, 1] },
    Constant { name: "CARRY", allowed: &[0, 1] },
];

/// Rows of q, a tile of 64 keys, a tile of 64 values, the places of their rows in the cache, and what is kept of the item and of
/// what its rows see.
const fn prefill_row(values: &'static [i64]) -> Row {
    let (qk_dim, v_dim) = (values[0] as u32, values[1] as u32);
    let rows = if qk_dim <= 128 && v_dim <= 128 { 128 } else { 64 };
    Row {
        values,
        registers: 255,
        shared: rows * qk_dim * 2 + 64 * (qk_dim + v_dim) * 2 + 2176 + 12 * rows,
        emulated: true,
    }
}

const PREFILL_SM90A_CONSTANTS: &[Constant] = &[
    Constant { name: "QK_DIM", allowed: &[64, 128] },
    Constant { name: "V_DIM", allowed: &[64, 128] },
    Constant { name: "KV_DTYPE", allowed: &[dtype::F16, dtype::BF16] },
    Constant { name: "PAGED", allowed: &[0, 1] },
    Constant { name: "SOFT_CAP", allowed: &[0, 1] },
    Constant { name: "CARRY", allowed: &[0, 1] },
    Constant { name: "TMA", allowed: &[0, 1] },
];

/// 128 rows of q, two tiles of 128 keys and two of 128 values, and what is kept beside them. 384 threads of 168 registers fill an SM;
/// warpgroups then trade them.
const fn prefill_sm90a_row(values: &'static [i64]) -> Row {
    let (qk_dim, v_dim) = (values[0] as u32, values[1] as u32);
    Row { values, registers: 168, shared: 128 * (qk_dim * 2 + 4 * (qk_dim + v_dim)) + 1744, emulated: true }
}

const APPEND_CONSTANTS: &[Constant] = &[
    Constant { name: "QK_DIM", allowed: &[32, 64, 80, 96, 112, 128, 192, 256] },
    Constant { name: "V_DIM", allowed: &[32, 64, 80, 96, 112, 128, 192, 256] },
    Constant { name: "KV_DTYPE", allowed: &[dtype::F16, dtype::BF16] },
    // 0: none, 1: half-split, 2: interleaved.
    Constant { name: "ROTARY", allowed: &[0, 1, 2] },
];

const fn append_row(values: &'static [i64]) -> Row {
    Row { values, registers: 64, shared: 0, emulated: true }
}

pub(super) const KERNELS: &[Kernel] = &[
    Kernel {
        name: "append",
        group: "attention",
        source: include_str!("../../kernels/attention/append.cu"),
        constants: APPEND_CONSTANTS,
        arch: ArchClass::Portable,
        threads: 128,
        rows: &[
            append_row(&[64, 64, dtype::F16, 1]),
            append_row(&[96, 96, dtype::BF16, 1]),
            append_row(&[128, 128, dtype::BF16, 1]),
            append_row(&[128, 128, dtype::F16, 2]),
            append_row(&[256, 256, dtype::BF16, 0]),
        ],
    },
    Kernel {
        name: "prefill",
        group: "attention",
        source: include_str!("../../kernels/attention/prefill.cu"),
        constants: PREFILL_CONSTANTS,
        arch: ArchClass::Portable,
        threads: 128,
        rows: &[
            prefill_row(&[64, 64, dtype::F16, 0, 0, 0]),
            prefill_row(&[64, 64, dtype::F16, 0, 0, 1]),
            prefill_row(&[64, 64, dtype::BF16, 1, 0, 1]),
            prefill_row(&[96, 96, dtype::F16, 1, 0, 0]),
            prefill_row(&[128, 128, dtype::BF16, 1, 0, 0]),
            prefill_row(&[128, 128, dtype::BF16, 0, 0, 0]),
            prefill_row(&[128, 128, dtype::BF16, 0, 0, 1]),
            prefill_row(&[192, 128, dtype::BF16, 1, 0, 0]),
            prefill_row(&[256, 256, dtype::BF16, 1, 1, 0]),
        ],
    },
    Kernel {
        name: "prefill_sm90a",
        group: "attention",
        source: include_str!("../../kernels/attention/prefill_sm90a.cu"),
        constants: PREFILL_SM90A_CONSTANTS,
        arch: ArchClass::Hopper,
        threads: 384,
        rows: &[
            prefill_sm90a_row(&[64, 64, dtype::F16, 0, 0, 0, 1]),
            prefill_sm90a_row(&[128, 128, dtype::BF16, 1, 0, 0, 1]),
            prefill_sm90a_row(&[128, 128, dtype::BF16, 0, 0, 0, 0]),
            prefill_sm90a_row(&[128, 128, dtype::BF16, 0, 0, 0, 1]),
            prefill_sm90a_row(&[128, 128, dtype::BF16, 0, 0, 1, 1]),
            prefill_sm90a_row(&[128, 128, dtype::BF16, 1, 1, 0, 1]),
        ],
    },
    Kernel {
        name: "prefill_plan",
        group: "attention",
        source: include_str!("../../kernels/attention/prefill_plan.cu"),
        constants: &[],
        arch: ArchClass::Portable,
        threads: 256,
        rows: &[Row { values: &[], registers: 64, shared: 128, emulated: true }],
    },
    Kernel {
        name: "decode_plan",
        group: "attention",
        source: include_str!("../../kernels/attention/decode_plan.cu"),
        constants: &[],
        arch: ArchClass::Portable,
        threads: 128,
        rows: &[Row { values: &[], registers: 64, shared: 64, emulated: true }],
    },
    Kernel {
        name: "decode",
        group: "attention",
        source: include_str!("../../kernels/attention/decode.cu"),
        constants: DECODE_CONSTANTS,
        arch: ArchClass::Portable,
        threads: 128,
        rows: &[
            decode_row(&[64, 64, 1, dtype::F16, 1, 0]),
            decode_row(&[64, 64, 2, dtype::BF16, 0, 1]),
            decode_row(&[96, 96, 1, dtype::F16, 1, 0]),
            decode_row(&[128, 128, 1, dtype::BF16, 1, 0]),
            decode_row(&[128, 128, 2, dtype::BF16, 1, 0]),
            decode_row(&[128, 128, 1, dtype::F16, 0, 0]),
            decode_row(&[128, 128, 2, dtype::F16, 1, 1]),
            decode_row(&[192, 128, 1, dtype::BF16, 1, 0]),
            decode_row(&[256, 256, 1, dtype::BF16, 1, 1]),
            decode_row(&[256, 256, 2, dtype::BF16, 0, 0]),
        ],
    },
    Kernel {
        name: "merge_states",
        group: "attention",
        source: include_str!("../../kernels/attention/merge_states.cu"),
        constants: &[V_DIM, OUT_DTYPE],
        arch: ArchClass::Portable,
        threads: 128,
        rows: &[
            merge_row(&[64, dtype::F32], 48, 0),
            merge_row(&[96, dtype::BF16], 48, 0),
            merge_row(&[128, dtype::F32], 48, 0),
            merge_row(&[128, dtype::F16], 48, 0),
            merge_row(&[128, dtype::BF16], 48, 0),
            merge_row(&[256, dtype::BF16], 48, 0),
        ],
    },
    Kernel {
        name: "merge_states_last_arriver",
        group: "attention",
        source: include_str!("../../kernels/attention/merge_states_last_arriver.cu"),
        constants: &[V_DIM, OUT_DTYPE],
        arch: ArchClass::Portable,
        threads: 128,
        rows: &[
            merge_row(&[64, dtype::F32], 56, 2176),
            merge_row(&[96, dtype::BF16], 56, 2176),
            merge_row(&[128, dtype::F32], 56, 2176),
            merge_row(&[128, dtype::F16], 56, 2176),
            merge_row(&[128, dtype::BF16], 56, 2176),
            merge_row(&[256, dtype::BF16], 56, 2176),
        ],
    },
];
