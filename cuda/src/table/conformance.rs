//! Kernels of `cuda/kernels/conformance`: one for each family of wrappers in `cuda/include/ptx` and `cuda/include/tile`.

use super::{ArchClass, Constant, Kernel, Row, dtype};

/// A conformance kernel: each row is one value of its only constant, or the single row of a kernel without constants.
macro_rules! kernel {
    ($name:literal, $arch:ident, $threads:literal, $constants:expr, $rows:expr) => {
        Kernel {
            name: $name,
            group: "conformance",
            source: include_str!(concat!("../../kernels/conformance/", $name, ".cu")),
            constants: $constants,
            arch: ArchClass::$arch,
            threads: $threads,
            rows: $rows,
        }
    };
}

const fn row(values: &'static [i64], registers: u32, shared: u32) -> Row {
    Row { values, registers, shared, emulated: true }
}

pub(super) const KERNELS: &[Kernel] = &[
    kernel!(
        "mma_fragments",
        Portable,
        32,
        &[Constant { name: "INSTRUCTION", allowed: &[0, 1, 2, 3, 4, 5, 6] }],
        &[
            row(&[0], 32, 0),
            row(&[1], 32, 0),
            row(&[2], 32, 0),
            row(&[3], 32, 0),
            row(&[4], 32, 0),
            row(&[5], 32, 0),
            row(&[6], 32, 0),
        ]
    ),
    kernel!("ldmatrix_fragments", Portable, 32, &[], &[row(&[], 40, 512)]),
    kernel!("stmatrix_fragments", Hopper, 32, &[], &[row(&[], 32, 512)]),
    kernel!(
        "swizzled_fragments",
        Portable,
        32,
        &[Constant { name: "ROW_BYTES", allowed: &[32, 64, 128, 192, 256] }],
        &[
            row(&[32], 48, 1024),
            row(&[64], 64, 2048),
            row(&[128], 72, 4096),
            row(&[192], 80, 6144),
            row(&[256], 80, 8192),
        ]
    ),
    kernel!("cp_async_sizes", Portable, 128, &[], &[row(&[], 32, 4096)]),
    kernel!(
        "copy_ring_sum",
        Portable,
        128,
        &[Constant { name: "STAGES", allowed: &[2, 3, 4] }],
        &[row(&[2], 48, 4096), row(&[3], 48, 6144), row(&[4], 48, 8192)]
    ),
    kernel!("weighted_parts", Portable, 32, &[], &[row(&[], 72, 0)]),
    kernel!("vector_memory", Portable, 128, &[], &[row(&[], 56, 0)]),
    kernel!("convert", Portable, 256, &[], &[row(&[], 24, 0)]),
    kernel!("math_approx", Portable, 256, &[], &[row(&[], 24, 0)]),
    kernel!("warp_reductions", Portable, 32, &[], &[row(&[], 56, 0)]),
    kernel!("named_barriers", Portable, 128, &[], &[row(&[], 16, 512)]),
    kernel!("message_passing", Portable, 64, &[], &[row(&[], 48, 8)]),
    kernel!("status_contention", Portable, 64, &[], &[row(&[], 16, 0)]),
    kernel!("mbarrier_rounds", Hopper, 128, &[], &[row(&[], 32, 288)]),
    kernel!("bulk_copies", Hopper, 128, &[], &[row(&[], 32, 16400)]),
    kernel!(
        "wgmma_product",
        Hopper,
        256,
        &[Constant { name: "DTYPE", allowed: &[dtype::F16, dtype::BF16] }],
        &[row(&[dtype::F16], 128, 49184), row(&[dtype::BF16], 128, 49184)]
    ),
];
