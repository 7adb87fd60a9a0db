//! Kernels of `cuda/kernels/attention`.

use super::Kernel;

pub(super) const KERNELS: &[Kernel] = &[];
