//! Kernels of `cuda/kernels/ceilings`: what a device can do at most, measured beside the kernels that are held to it.

use super::{ArchClass, Constant, Kernel, Row};

const fn row(values: &'static [i64], registers: u32, shared: u32) -> Row {
    Row { values, registers, shared, emulated: true }
}

pub(super) const KERNELS: &[Kernel] = &[
    Kernel {
        name: "stream_read",
        group: "ceilings",
        source: include_str!("../../kernels/ceilings/stream_read.cu"),
        constants: &[],
        arch: ArchClass::Portable,
        threads: 256,
        rows: &[row(&[], 64, 0)],
    },
    Kernel {
        name: "stream_copy",
        group: "ceilings",
        source: include_str!("../../kernels/ceilings/stream_copy.cu"),
        constants: &[],
        arch: ArchClass::Portable,
        threads: 256,
        rows: &[row(&[], 64, 0)],
    },
    Kernel {
        name: "stream_write",
        group: "ceilings",
        source: include_str!("../../kernels/ceilings/stream_write.cu"),
        constants: &[],
        arch: ArchClass::Portable,
        threads: 256,
        rows: &[row(&[], 48, 0)],
    },
    Kernel {
        name: "bulk_read",
        group: "ceilings",
        source: include_str!("../../kernels/ceilings/bulk_read.cu"),
        constants: &[],
        arch: ArchClass::Hopper,
        threads: 128,
        rows: &[row(&[], 40, 224 * 1024)],
    },
    Kernel {
        name: "mma_rate",
        group: "ceilings",
        source: include_str!("../../kernels/ceilings/mma_rate.cu"),
        constants: &[Constant { name: "INSTRUCTION", allowed: &[0, 3] }],
        arch: ArchClass::Portable,
        threads: 128,
        rows: &[row(&[0], 80, 0), row(&[3], 80, 0)],
    },
];
