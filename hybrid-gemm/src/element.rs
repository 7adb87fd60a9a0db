//! Storage types of activations, outputs and unquantised weights.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// Name of a storage type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 binary32: outputs of kernels, and everything on the CPU.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    BF16,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
        })
    }
}

/// A storage type: `f32`, `f16` or `bf16`. Conversions round to nearest, ties to even.
pub trait Element:
    sealed::Sealed + bytemuck::Pod + Default + PartialEq + Send + Sync + std::fmt::Debug
{
    /// The type's name.
    const DTYPE: DType;

    /// The value as f32, which is exact.
    fn to_f32(self) -> f32;

    /// The nearest storable value.
    fn from_f32(value: f32) -> Self;

    /// Values as f32: exact. Both slices have the same length.
    fn widen(values: &[Self], out: &mut [f32]);
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;

    #[inline]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline]
    fn from_f32(value: f32) -> Self {
        value
    }

    fn widen(values: &[Self], out: &mut [f32]) {
        out.copy_from_slice(values);
    }
}

macro_rules! half_element {
    ($type:ident, $name:ident) => {
        impl Element for $type {
            const DTYPE: DType = DType::$name;

            #[inline]
            fn to_f32(self) -> f32 {
                $type::to_f32(self)
            }

            #[inline]
            fn from_f32(value: f32) -> Self {
                $type::from_f32(value)
            }

            fn widen(values: &[Self], out: &mut [f32]) {
                values.convert_to_f32_slice(out);
            }
        }
    };
}
half_element!(f16, F16);
half_element!(bf16, BF16);

/// Little-endian bytes of a storage type as f32; the bytes may start anywhere.
pub(crate) fn widen_bytes(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    fn convert<E: Element>(bytes: &[u8], out: &mut [f32]) {
        // Values of a file need not be aligned, so they pass through memory that is.
        let mut aligned = [E::default(); 64];
        for (bytes, out) in bytes.chunks(64 * size_of::<E>()).zip(out.chunks_mut(64)) {
            let values = &mut aligned[..out.len()];
            bytemuck::cast_slice_mut::<E, u8>(values).copy_from_slice(bytes);
            E::widen(values, out);
        }
    }
    match dtype {
        DType::F32 => convert::<f32>(bytes, out),
        DType::F16 => convert::<f16>(bytes, out),
        DType::BF16 => convert::<bf16>(bytes, out),
    }
}
