//! Element types that kernels store.

use bytemuck::Pod;
use half::{bf16, f16};

use crate::table::dtype;

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// A floating-point type that kernels read or write: `f32`, `f16` or `bf16`.
pub trait Storage: Pod + sealed::Sealed {
    /// The type's number in the kernel table and in `types.cuh`.
    const DTYPE: i64;
    /// The type's name.
    const NAME: &'static str;
}

impl Storage for f32 {
    const DTYPE: i64 = dtype::F32;
    const NAME: &'static str = "f32";
}

impl Storage for f16 {
    const DTYPE: i64 = dtype::F16;
    const NAME: &'static str = "f16";
}

impl Storage for bf16 {
    const DTYPE: i64 = dtype::BF16;
    const NAME: &'static str = "bf16";
}
