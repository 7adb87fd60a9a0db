// The kernels of this folder as rows of a kernel table. Included by build.rs, which compiles them, and by the tests.
//
// BUG = 0 is the correct kernel; other values plant one mistake each.

use cuda::table::{ArchClass, Constant, Kernel, Row};

const fn row(values: &'static [i64]) -> Row {
    Row { values, registers: 255, shared: 0, emulated: true }
}

const BUG: &[Constant] = &[Constant { name: "BUG", allowed: &[0, 1, 2, 3, 4] }];
const BUGS_1: &[Row] = &[row(&[0]), row(&[1])];

const fn planted(name: &'static str, threads: u32, rows: &'static [Row]) -> Kernel {
    Kernel { name, group: "planted", source: "", constants: BUG, arch: ArchClass::Hopper, threads, rows }
}

pub(crate) const KERNELS: &[Kernel] = &[
    planted("missing_barrier", 128, BUGS_1),
];
