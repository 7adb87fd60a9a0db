//! Kernels of `cuda/kernels/attention`.

use super::{ArchClass, Constant, Kernel, Row, dtype};

const V_DIM: Constant = Constant { name: "V_DIM", allowed: &[32, 64, 80, 96, 112, 128, 192, 256, 512] };
const OUT_DTYPE: Constant = Constant { name: "OUT_DTYPE", allowed: &[dtype::F32, dtype::F16, dtype::BF16] };

const fn merge_row(values: &'static [i64], registers: u32, shared: u32) -> Row {
    Row { values, registers, shared, emulated: true }
}

pub(super) const KERNELS: &[Kernel] = &[
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
