//! Kernels of `cuda/kernels/homomorphic-quant`.

use super::{ArchClass, Constant, Kernel, Row, dtype};

const BITS: &[i64] = &[2, 4, 8];
const PARTITION: Constant = Constant { name: "PARTITION", allowed: &[32, 64, 128] };
const DIMS: &[i64] = &[64, 96, 128, 256];
const KV_DTYPE: Constant = Constant { name: "KV_DTYPE", allowed: &[dtype::F16, dtype::BF16] };

const APPEND_CONSTANTS: &[Constant] = &[
    Constant { name: "K_BITS", allowed: BITS },
    Constant { name: "V_BITS", allowed: BITS },
    PARTITION,
    Constant { name: "QK_DIM", allowed: DIMS },
    Constant { name: "V_DIM", allowed: DIMS },
    KV_DTYPE,
];

const DECODE_CONSTANTS: &[Constant] = &[
    Constant { name: "K_BITS", allowed: BITS },
    Constant { name: "V_BITS", allowed: BITS },
    PARTITION,
    Constant { name: "QK_DIM", allowed: DIMS },
    Constant { name: "V_DIM", allowed: DIMS },
    // Warps that share pages, eight query columns each.
    Constant { name: "COLUMN_TILES", allowed: &[1, 2, 4] },
    KV_DTYPE,
    Constant { name: "SOFT_CAP", allowed: &[0, 1] },
];

const PREFILL_CONSTANTS: &[Constant] = &[
    Constant { name: "K_BITS", allowed: BITS },
    Constant { name: "V_BITS", allowed: BITS },
    PARTITION,
    Constant { name: "QK_DIM", allowed: DIMS },
    Constant { name: "V_DIM", allowed: DIMS },
    KV_DTYPE,
    Constant { name: "SOFT_CAP", allowed: &[0, 1] },
];

const fn append_row(values: &'static [i64]) -> Row {
    let shared = crate::kernels::homomorphic_quant::AppendVariant {
        k_bits: values[0] as usize,
        v_bits: values[1] as usize,
        partition: values[2] as usize,
        qk_dim: values[3] as usize,
        v_dim: values[4] as usize,
    }
    .shared_bytes();
    Row { values, registers: 168, shared: shared as u32, emulated: true }
}

/// Launch bounds hold the registers to 168 where three blocks share an SM.
const fn decode_row(values: &'static [i64]) -> Row {
    let shared = crate::kernels::homomorphic_quant::DecodeVariant {
        // Both methods stream alike.
        method: crate::kernels::homomorphic_quant::Method::Codes,
        k_bits: values[0] as usize,
        v_bits: values[1] as usize,
        partition: values[2] as usize,
        qk_dim: values[3] as usize,
        v_dim: values[4] as usize,
        column_tiles: values[5] as usize,
        soft_cap: values[7] != 0,
    }
    .shared_bytes();
    Row { values, registers: 255, shared: shared as u32, emulated: true }
}

const fn prefill_row(values: &'static [i64]) -> Row {
    let shared = crate::kernels::homomorphic_quant::PrefillVariant {
        k_bits: values[0] as usize,
        v_bits: values[1] as usize,
        partition: values[2] as usize,
        qk_dim: values[3] as usize,
        v_dim: values[4] as usize,
        soft_cap: values[6] != 0,
    }
    .shared_bytes();
    Row { values, registers: 255, shared: shared as u32, emulated: true }
}

pub(super) const KERNELS: &[Kernel] = &[
    Kernel {
        name: "hack_append",
        group: "homomorphic-quant",
        source: include_str!("../../kernels/homomorphic-quant/hack_append.cu"),
        constants: APPEND_CONSTANTS,
        arch: ArchClass::Portable,
        threads: 128,
        rows: &[
            append_row(&[2, 2, 64, 128, 128, dtype::BF16]),
            append_row(&[4, 4, 64, 128, 128, dtype::BF16]),
            append_row(&[8, 8, 64, 128, 128, dtype::BF16]),
            append_row(&[4, 2, 64, 96, 96, dtype::F16]),
            append_row(&[2, 4, 32, 64, 64, dtype::F16]),
            append_row(&[8, 2, 128, 256, 256, dtype::BF16]),
            append_row(&[2, 2, 32, 256, 128, dtype::F16]),
        ],
    },
    Kernel {
        name: "hack_decode_plan",
        group: "homomorphic-quant",
        source: include_str!("../../kernels/homomorphic-quant/hack_decode_plan.cu"),
        constants: &[],
        arch: ArchClass::Portable,
        threads: 128,
        rows: &[Row { values: &[], registers: 64, shared: 64, emulated: true }],
    },
    Kernel {
        name: "hack_decode",
        group: "homomorphic-quant",
        source: include_str!("../../kernels/homomorphic-quant/hack_decode.cu"),
        constants: DECODE_CONSTANTS,
        arch: ArchClass::Portable,
        threads: 128,
        rows: &[
            decode_row(&[2, 2, 64, 128, 128, 1, dtype::BF16, 0]),
            decode_row(&[4, 4, 64, 128, 128, 1, dtype::BF16, 0]),
            decode_row(&[8, 8, 64, 128, 128, 1, dtype::BF16, 0]),
            decode_row(&[2, 2, 64, 128, 128, 2, dtype::F16, 0]),
            decode_row(&[2, 4, 32, 64, 64, 1, dtype::F16, 0]),
            decode_row(&[4, 2, 64, 96, 96, 1, dtype::F16, 1]),
            decode_row(&[2, 2, 128, 128, 128, 1, dtype::F16, 0]),
            decode_row(&[8, 2, 128, 256, 256, 1, dtype::BF16, 0]),
            decode_row(&[8, 8, 32, 256, 256, 1, dtype::F16, 0]),
            decode_row(&[2, 2, 32, 256, 128, 1, dtype::F16, 0]),
            decode_row(&[4, 4, 64, 128, 128, 4, dtype::BF16, 0]),
        ],
    },
    Kernel {
        name: "hack_dequant_decode",
        group: "homomorphic-quant",
        source: include_str!("../../kernels/homomorphic-quant/hack_dequant_decode.cu"),
        constants: DECODE_CONSTANTS,
        arch: ArchClass::Portable,
        threads: 128,
        rows: &[
            decode_row(&[2, 2, 64, 128, 128, 1, dtype::BF16, 0]),
            decode_row(&[4, 4, 64, 128, 128, 1, dtype::BF16, 0]),
            decode_row(&[8, 8, 64, 128, 128, 1, dtype::BF16, 0]),
            decode_row(&[2, 4, 32, 64, 64, 1, dtype::F16, 0]),
        ],
    },
    Kernel {
        name: "hack_prefill",
        group: "homomorphic-quant",
        source: include_str!("../../kernels/homomorphic-quant/hack_prefill.cu"),
        constants: PREFILL_CONSTANTS,
        arch: ArchClass::Portable,
        threads: 128,
        rows: &[
            prefill_row(&[2, 2, 64, 128, 128, dtype::BF16, 0]),
            prefill_row(&[4, 4, 64, 128, 128, dtype::BF16, 0]),
            prefill_row(&[8, 8, 64, 128, 128, dtype::BF16, 0]),
            prefill_row(&[2, 4, 32, 64, 64, dtype::F16, 0]),
            prefill_row(&[4, 2, 64, 96, 96, dtype::F16, 1]),
            prefill_row(&[2, 2, 128, 128, 128, dtype::F16, 0]),
            prefill_row(&[4, 4, 64, 256, 256, dtype::BF16, 0]),
            prefill_row(&[2, 2, 32, 256, 128, dtype::F16, 0]),
            prefill_row(&[2, 2, 128, 256, 256, dtype::F16, 0]),
        ],
    },
];
