//! Kernels of `cuda/kernels/seq-parallel`. The ring step is `prefill` of the group `attention`.

use super::{ArchClass, Kernel, Row};

pub(super) const KERNELS: &[Kernel] = &[Kernel {
    name: "pack",
    group: "seq-parallel",
    source: include_str!("../../kernels/seq-parallel/pack.cu"),
    constants: &[],
    arch: ArchClass::Portable,
    threads: 256,
    rows: &[Row { values: &[], registers: 64, shared: 0, emulated: true }],
}];
