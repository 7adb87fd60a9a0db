// The kernels of this folder as rows of a kernel table. Included by build.rs, which compiles them, and by the tests.
//
// Most take a last parameter `bug`: 0 is the correct kernel, each other value plants one mistake.

use cuda::table::{ArchClass, Constant, Kernel, Row};

const fn row(values: &'static [i64]) -> Row {
    Row { values, registers: 255, shared: 227 * 1024, emulated: true }
}

const fn planted(name: &'static str, threads: u32) -> Kernel {
    const ONE: &[Row] = &[row(&[])];
    Kernel { name, group: "planted", source: "", constants: &[], arch: ArchClass::Hopper, threads, rows: ONE }
}

pub(crate) const KERNELS: &[Kernel] = &[
    planted("async_proxy", 64),
    planted("atomics", 64),
    planted("barriers", 128),
    planted("between_blocks", 64),
    planted("bounds", 32),
    planted("cp_async_ring", 64),
    planted("decode_like", 128),
    planted("dependent", 32),
    planted("last_arriver_sum", 64),
    planted("mbarrier_ring", 96),
    planted("mma_tile", 32),
    planted("neighbours", 128),
    planted("parameters", 32),
    planted("product_128", 128),
    planted("speed", 128),
    planted("tma_pages", 96),
    planted("tma_ring", 96),
    planted("vocabulary", 32),
    planted("warps", 32),
    Kernel {
        constants: &[Constant { name: "FACTOR", allowed: &[10, 20] }],
        rows: &[row(&[10]), row(&[20])],
        ..planted("variants", 32)
    },
];
