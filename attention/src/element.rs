//! Storage types of queries, keys, values and outputs.

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
    /// IEEE 754 binary32.
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

    /// Distance between 1 and the next larger value (2⁻²³, 2⁻¹⁰ or 2⁻⁷).
    pub const fn epsilon(self) -> f64 {
        match self {
            DType::F32 => f32::EPSILON as f64,
            DType::F16 => 0.0009765625,
            DType::BF16 => 0.0078125,
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

/// A storage type: `f32`, `f16` or `bf16`. Conversions round to nearest, ties to even, in one step.
pub trait Element:
    sealed::Sealed + bytemuck::Pod + Default + PartialEq + Send + Sync + std::fmt::Debug
{
    /// The type's name.
    const DTYPE: DType;

    /// The value as f32: exact, every storage type is a subset of f32.
    fn to_f32(self) -> f32;

    /// The nearest storable value.
    fn from_f32(value: f32) -> Self;

    /// The nearest storable value, rounded once (not by way of f32).
    fn from_f64(value: f64) -> Self;

    /// The value as f64: exact.
    #[inline]
    fn to_f64(self) -> f64 {
        f64::from(self.to_f32())
    }
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
    #[inline]
    fn from_f64(value: f64) -> Self {
        value as f32
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
    #[inline]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
    #[inline]
    fn from_f64(value: f64) -> Self {
        f16::from_f32(round_to_odd(value))
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
    #[inline]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    #[inline]
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
    #[inline]
    fn from_f64(value: f64) -> Self {
        bf16::from_f32(round_to_odd(value))
    }
}

/// f64 to f32, rounded to odd: an inexact result gets an odd last bit, so that a second rounding to at most 22 bits is
/// the same as one rounding (Boldo and Melquiond, "When double rounding is odd", 2005).
#[inline]
fn round_to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    let back = f64::from(nearest);
    if back == value || nearest.is_nan() {
        return nearest;
    }
    // Towards zero first, then force the last bit. An overflow to infinity truncates to the largest finite value.
    let truncated = if back.abs() > value.abs() { f32::from_bits(nearest.to_bits() - 1) } else { nearest };
    f32::from_bits(truncated.to_bits() | 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f64_is_rounded_once() {
        // Just above a tie of bf16: 1 + 2^-8 is the tie between 1 and 1 + 2^-7, and f32 cannot see the excess.
        let tie = 1.0 + 2f64.powi(-8);
        assert_eq!(bf16::from_f64(tie).to_f64(), 1.0, "a tie goes to even");
        assert_eq!(<bf16 as Element>::from_f64(tie + 2f64.powi(-40)).to_f64(), 1.0 + 2f64.powi(-7));
        assert_eq!(<bf16 as Element>::from_f64(tie - 2f64.powi(-40)).to_f64(), 1.0);
        let tie = 1.0 + 2f64.powi(-11);
        assert_eq!(<f16 as Element>::from_f64(tie).to_f64(), 1.0);
        assert_eq!(<f16 as Element>::from_f64(tie + 2f64.powi(-40)).to_f64(), 1.0 + 2f64.powi(-10));
        // f16 subnormals: half of the smallest one is a tie with zero.
        let tiny = 2f64.powi(-25);
        assert_eq!(<f16 as Element>::from_f64(tiny).to_f64(), 0.0);
        assert_eq!(<f16 as Element>::from_f64(tiny * (1.0 + 2f64.powi(-40))).to_f64(), 2f64.powi(-24));
    }

    #[test]
    fn every_f16_and_bf16_survives_the_round_trip() {
        for bits in 0..=u16::MAX {
            let (h, b) = (f16::from_bits(bits), bf16::from_bits(bits));
            for (name, same) in [
                (
                    "f16",
                    h.is_nan() && <f16 as Element>::from_f64(h.to_f64()).is_nan()
                        || <f16 as Element>::from_f64(h.to_f64()).to_bits() == bits,
                ),
                (
                    "bf16",
                    b.is_nan() && <bf16 as Element>::from_f64(b.to_f64()).is_nan()
                        || <bf16 as Element>::from_f64(b.to_f64()).to_bits() == bits,
                ),
            ] {
                assert!(same, "{name} {bits:#06x} changed");
            }
        }
    }

    #[test]
    fn overflow_and_signs() {
        for value in [1e6, -1e6, f64::INFINITY] {
            assert_eq!(<f16 as Element>::from_f64(value).to_f64(), value.signum() * f64::INFINITY);
        }
        assert_eq!(<f16 as Element>::from_f64(65519.9).to_f64(), 65504.0);
        assert_eq!(<f16 as Element>::from_f64(65520.0).to_f64(), f64::INFINITY);
        assert_eq!(<bf16 as Element>::from_f64(1e300).to_f64(), f64::INFINITY);
        assert_eq!(<bf16 as Element>::from_f64(-1e-300).to_f64().to_bits(), (-0.0f64).to_bits());
        assert!(<bf16 as Element>::from_f64(f64::NAN).is_nan());
    }

    #[test]
    fn epsilons_are_the_types_own() {
        assert_eq!(DType::F16.epsilon(), f16::EPSILON.to_f64());
        assert_eq!(DType::BF16.epsilon(), bf16::EPSILON.to_f64());
        assert_eq!([DType::F32, DType::F16, DType::BF16].map(DType::size), [4, 2, 2]);
    }
}
