//! Weight-only quantisation: symmetric int8 per output feature, symmetric int4 in groups of inputs.
//!
//! Both round to nearest, ties to even, against the scale as it is stored, so that decoding is `code · scale` exactly in
//! f32. A code of n bits lies in `-(2ⁿ⁻¹ - 1) ..= 2ⁿ⁻¹ - 1`; the most negative code stays unused, which keeps the scale the
//! same for both signs.

use half::f16;

use crate::Error;

const INT8_MAX: f32 = 127.0;
const INT4_MAX: f32 = 7.0;

/// Quantises one output feature `[k]` to int8; gives its scale.
///
/// # Errors
/// [`Error::Argument`] for a value that is not finite.
pub fn quantize_int8(row: &[f32], codes: &mut [i8]) -> Result<f32, Error> {
    let scale = finite_max(row)? / INT8_MAX;
    let inverse = inverse(scale);
    for (code, value) in codes.iter_mut().zip(row) {
        *code = (value * inverse).round_ties_even().clamp(-INT8_MAX, INT8_MAX) as i8;
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
    let inverse = inverse(scale.to_f32());
    for (code, value) in codes.iter_mut().zip(group) {
        *code = (value * inverse).round_ties_even().clamp(-INT4_MAX, INT4_MAX) as i8;
    }
    Ok(scale)
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

/// 1 / scale, and 0 for a scale of zeros alone.
fn inverse(scale: f32) -> f32 {
    if scale > 0.0 { scale.recip().min(f32::MAX) } else { 0.0 }
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
        for (case, size) in [("zeros", 0.0), ("tiny", 1e-7), ("usual", 0.02), ("large", 300.0)] {
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

    #[test]
    fn what_has_no_code() {
        let mut codes = [0; 2];
        for value in [f32::NAN, f32::INFINITY] {
            assert!(quantize_int8(&[1.0, value], &mut codes).is_err());
            assert!(quantize_int4(&[1.0, value], &mut codes).is_err());
        }
        assert!(quantize_int4(&[1e6, 0.0], &mut codes).is_err(), "the scale leaves f16");
    }
}
