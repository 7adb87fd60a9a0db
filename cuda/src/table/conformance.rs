//! Kernels of `cuda/kernels/conformance`: one for each wrapper of `cuda/include/ptx`.

use super::Kernel;

pub(super) const KERNELS: &[Kernel] = &[];
