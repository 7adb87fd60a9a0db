//! Weight-only quantisation: int8 per output feature, int4 in groups of inputs with or without zero points, fp8 per output
//! feature or block.
//!
//! All round to nearest, ties to even, against the scale as it is stored, so that decoding is `code · scale`. A symmetric code of n
//! bits lies in `-(2ⁿ⁻¹ - 1) ..= 2ⁿ⁻¹ - 1`; the most negative code stays unused, which keeps the scale the same for both signs. Codes
//! with a zero point lie in `0 ..= 15`; the zero point is one of them, so that 0 is always among the values.

use half::f16;

use crate::{Error, e4m3};

const INT8_MAX: f32 = 127.0;
const INT4_MAX: f32 = 7.0;
/// The largest int4 code, and zero point.
pub const INT4_LAST: u8 = 15;

/// Quantises one output feature `[k]` to int8; gives its scale.
///
/// # Errors
/// [`Error::Argument`] for a value that is not finite.
pub fn quantize_int8(row: &[f32], codes: &mut [i8]) -> Result<f32, Error> {
    let scale = finite_max(row)? / INT8_MAX;
    let steps = steps(scale);
    for (code, value) in codes.iter_mut().zip(row) {
        *code = steps(*value).round_ties_even().clamp(-INT8_MAX, INT8_MAX) as i8;
    }
    Ok(scale)
}

/// Quantises one group of an output feature to int4; gives its scale, as it is stored.
///
/// # Errors
/// [`Error::Argument`] for a value that is not finite, or so large that its scale leaves f16.
pub fn quantize_int4(group: &[f32], codes: &mut [i8]) -> Result<f16, Error> {
    let max = finite_max(group)?;
    let scale = f16::from_f32(max / INT4_MAX);
    if scale.is_infinite() {
        return Err(Error::argument("weights", "values whose int4 scale fits f16", max));
    }
    let steps = steps(scale.to_f32());
    for (code, value) in codes.iter_mut().zip(group) {
        *code = steps(*value).round_ties_even().clamp(-INT4_MAX, INT4_MAX) as i8;
    }
    Ok(scale)
}

/// Quantises one group of an output feature to int4 codes from 0; gives its scale and its zero point.
///
/// # Errors
/// [`Error::Argument`] for a value that is not finite, or values so far apart that their scale leaves f16.
pub fn quantize_int4_zero_point(group: &[f32], codes: &mut [u8]) -> Result<(f16, u8), Error> {
    finite_max(group)?;
    let (least, most) =
        group.iter().fold((0.0f32, 0.0f32), |(least, most), value| (least.min(*value), most.max(*value)));
    let last = f32::from(INT4_LAST);
    // Each end by itself: their distance may leave f32.
    let scale = f16::from_f32(most / last - least / last);
    if scale.is_infinite() {
        return Err(Error::argument(
            "weights",
            "values whose int4 scale fits f16",
            format!("{least} to {most}"),
        ));
    }
    let steps = steps(scale.to_f32());
    let zero = steps(-least).round_ties_even().clamp(0.0, last);
    for (code, value) in codes.iter_mut().zip(group) {
        *code = (steps(*value).round_ties_even() + zero).clamp(0.0, last) as u8;
    }
    Ok((scale, zero as u8))
}

/// Scale with which the largest of some values becomes the largest fp8 value.
///
/// # Errors
/// [`Error::Argument`] for a value that is not finite.
pub fn fp8_scale(values: &[f32]) -> Result<f32, Error> {
    Ok(finite_max(values)? / e4m3::MAX)
}

/// Quantises values to fp8 e4m3 with a scale from [`fp8_scale`].
pub fn quantize_fp8(values: &[f32], scale: f32, codes: &mut [u8]) {
    let steps = steps(scale);
    for (code, value) in codes.iter_mut().zip(values) {
        *code = e4m3::from_f32(steps(*value));
    }
}

/// Eight int4 codes as the word that the packed format holds: even elements in the lower half, odd ones in the upper.
///
/// One mask then takes elements 2i and 2i + 1 into the two halves of a register, the order of a pair of f16 (the
/// interleaving of Marlin and FasterTransformer). A nibble holds `code + 8`.
pub const fn pack_int4(codes: [i8; 8]) -> u32 {
    let mut word = 0;
    let mut i = 0;
    while i < 8 {
        word |= (((codes[i] + 8) as u32) & 0xf) << nibble_shift(i);
        i += 1;
    }
    word
}

/// The same of codes from 0, which a nibble holds as they are.
pub(crate) const fn pack_int4_from_0(codes: [u8; 8]) -> u32 {
    let mut signed = [0; 8];
    let mut i = 0;
    while i < 8 {
        signed[i] = codes[i] as i8 - 8;
        i += 1;
    }
    pack_int4(signed)
}

/// Undoes [`pack_int4`].
pub const fn unpack_int4(word: u32) -> [i8; 8] {
    let mut codes = [0; 8];
    let mut i = 0;
    while i < 8 {
        codes[i] = ((word >> nibble_shift(i)) & 0xf) as i8 - 8;
        i += 1;
    }
    codes
}

const fn nibble_shift(element: usize) -> usize {
    4 * (element / 2 + 4 * (element % 2))
}

fn finite_max(values: &[f32]) -> Result<f32, Error> {
    match values.iter().find(|value| !value.is_finite()) {
        Some(value) => Err(Error::argument("weights", "finite values", value)),
        None => Ok(values.iter().fold(0.0, |max, value| max.max(value.abs()))),
    }
}

/// Division by a scale: by its reciprocal where that is finite, by itself where it is too small for that; 0 for a scale of zeros alone.
fn steps(scale: f32) -> impl Fn(f32) -> f32 {
    let inverse = if scale > 0.0 { scale.recip() } else { 0.0 };
    move |value| if inverse.is_finite() { value * inverse } else { value / scale }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nibbles_are_interleaved_and_come_back() {
        assert_eq!(pack_int4([-8, 0, 0, 0, 0, 0, 0, 0]), 0x8888_8880);
        assert_eq!(pack_int4([1, 2, 3, 4, 5, 6, 7, -7]), 0x1eca_fdb9);
        // Element 2i and 2i + 1 under one mask.
        let word = pack_int4([-7, -6, -5, -4, -3, -2, -1, 0]);
        for i in 0..4 {
            let pair = (word >> (4 * i)) & 0x000f_000f;
            assert_eq!((pair & 0xf, pair >> 16), (2 * i + 1, 2 * i + 2), "pair {i}");
        }
        let mut rng = fastrand::Rng::with_seed(3);
        for _ in 0..1000 {
            let codes = std::array::from_fn(|_| rng.i8(-8..8));
            assert_eq!(unpack_int4(pack_int4(codes)), codes);
        }
    }

    #[test]
    fn errors_are_at_most_half_a_step() {
        let mut rng = fastrand::Rng::with_seed(5);
        for (case, size) in
            [("zeros", 0.0), ("least", 2e-37), ("tiny", 1e-7), ("usual", 0.02), ("large", 300.0)]
        {
            let row: Vec<f32> = (0..128).map(|_| (rng.f32() - 0.5) * size).collect();
            let mut codes = [0; 128];
            let scale = quantize_int8(&row, &mut codes).unwrap();
            for (value, code) in row.iter().zip(codes) {
                let error = (value - f32::from(code) * scale).abs();
                assert!(error <= 0.5001 * scale, "int8, {case}: {value} became {code} · {scale}");
            }
            let scale = quantize_int4(&row, &mut codes).unwrap().to_f32();
            for (value, code) in row.iter().zip(codes) {
                // A scale rounded down to f16 leaves up to 7 · 2⁻¹¹ of a step beyond the last code; below f16's normal
                // numbers it is a multiple of 2⁻²⁴.
                let error = (value - f32::from(code) * scale).abs();
                let bound = 0.504 * scale + 3.5 * 2f32.powi(-24);
                assert!(error <= bound, "int4, {case}: {value} became {code} · {scale}");
            }
        }
    }

    /// A value is at most half a step from its code's, apart from what a rounded scale takes from the ends.
    #[test]
    fn zero_points_follow_the_values() {
        let mut rng = fastrand::Rng::with_seed(7);
        for (case, size, middle) in [
            ("zeros", 0.0, 0.0),
            ("tiny", 1e-7, 0.0),
            ("around 0", 0.02, 0.0),
            ("above 0", 0.02, 0.05),
            ("below 0", 0.02, -0.05),
            ("one side", 0.02, 0.01),
            ("large", 300.0, -20.0),
        ] {
            for _ in 0..50 {
                let group: Vec<f32> = (0..64).map(|_| middle + (rng.f32() - 0.5) * size).collect();
                let mut codes = [99; 64];
                let (scale, zero) = quantize_int4_zero_point(&group, &mut codes).unwrap();
                let scale = scale.to_f32();
                assert!(zero <= 15 && codes.iter().all(|code| *code <= 15), "{case}");
                for (value, code) in group.iter().zip(codes) {
                    let decoded = (i32::from(code) - i32::from(zero)) as f32 * scale;
                    // 15 · 2⁻¹¹ of a step beyond the last code; below f16's normal numbers a scale is a multiple of 2⁻²⁴.
                    let bound = 0.508 * scale + 7.6 * 2f32.powi(-24);
                    assert!((value - decoded).abs() <= bound, "{case}, seed 7: {value} became {decoded}");
                }
            }
        }
        let mut codes = [0; 3];
        // Positive values use all codes, negative ones too, and 0 is exact.
        assert_eq!(quantize_int4_zero_point(&[0.0, 7.5, 15.0], &mut codes).unwrap(), (f16::ONE, 0));
        assert_eq!(codes, [0, 8, 15]);
        assert_eq!(quantize_int4_zero_point(&[-15.0, 0.0, -1.0], &mut codes).unwrap(), (f16::ONE, 15));
        assert_eq!(codes, [0, 15, 14]);
    }

    #[test]
    fn fp8_keeps_four_bits() {
        let mut rng = fastrand::Rng::with_seed(8);
        for (case, size) in
            [("zeros", 0.0), ("least", 2e-37), ("tiny", 1e-34), ("usual", 0.02), ("large", 3e38)]
        {
            let values: Vec<f32> = (0..512).map(|_| (rng.f32() - 0.5) * size).collect();
            let scale = fp8_scale(&values).unwrap();
            let mut codes = [0; 512];
            quantize_fp8(&values, scale, &mut codes);
            for (value, code) in values.iter().zip(codes) {
                let (value, decoded) = (f64::from(*value), f64::from(e4m3::to_f32(code)) * f64::from(scale));
                // Half of the last of four bits, or half a subnormal.
                let bound = 1.001 * (value.abs() / 16.0).max(f64::from(scale) / 1024.0);
                assert!((value - decoded).abs() <= bound, "{case}, seed 8: {value} became {decoded}");
            }
        }
    }

    #[test]
    fn what_has_no_code() {
        let mut codes = [0; 2];
        for value in [f32::NAN, f32::INFINITY] {
            assert!(quantize_int8(&[1.0, value], &mut codes).is_err());
            assert!(quantize_int4(&[1.0, value], &mut codes).is_err());
            assert!(quantize_int4_zero_point(&[1.0, value], &mut [0; 2]).is_err());
            assert!(fp8_scale(&[1.0, value]).is_err());
        }
        assert!(quantize_int4_zero_point(&[6e5, -6e5], &mut [0; 2]).is_err(), "the scale leaves f16");
        assert!(quantize_int4(&[1e6, 0.0], &mut codes).is_err(), "the scale leaves f16");
    }
}
