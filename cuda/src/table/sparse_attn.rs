//! Kernels of `cuda/kernels/sparse-attn`.

use super::{ArchClass, Kernel, Row};

/// The largest step: 4096 pages over 16,384 slots.
const RESOLVE_SHARED: u32 = crate::kernels::sparse_attn::resolve_shared_bytes(4096, 16384) as u32;

pub(super) const KERNELS: &[Kernel] = &[
    Kernel {
        name: "sparse_gather",
        group: "sparse-attn",
        source: include_str!("../../kernels/sparse-attn/sparse_gather.cu"),
        constants: &[],
        arch: ArchClass::Portable,
        threads: 256,
        rows: &[Row { values: &[], registers: 64, shared: 0, emulated: true }],
    },
    Kernel {
        name: "sparse_resolve",
        group: "sparse-attn",
        source: include_str!("../../kernels/sparse-attn/sparse_resolve.cu"),
        constants: &[],
        arch: ArchClass::Portable,
        threads: 256,
        rows: &[Row { values: &[], registers: 64, shared: RESOLVE_SHARED, emulated: true }],
    },
];
