//! fp8 E4M3 (OCP 8-bit floating point, Micikevicius et al. 2022): 4 bits of exponent with bias 7, 3 of mantissa, subnormals, no
//! infinity. The largest finite value is 448; 0x7f and 0xff are NaN.

/// The largest finite value.
pub const MAX: f32 = 448.0;
/// Exponent of the smallest normal number.
const LEAST_EXPONENT: i32 = -6;

/// The value of a code, exactly.
pub fn to_f32(code: u8) -> f32 {
    let (sign, magnitude) = (u32::from(code & 0x80) << 24, u32::from(code & 0x7f));
    let value = match magnitude {
        0x7f => f32::NAN,
        0..8 => magnitude as f32 / 512.0,
        // Four bits of exponent and three of mantissa, in the places of an f32's.
        _ => f32::from_bits((magnitude + ((127 - 7) << 3)) << 20),
    };
    f32::from_bits(value.to_bits() | sign)
}

/// The nearest code, ties to even; what is past the largest finite value, infinity included, becomes that. NaN stays NaN.
pub fn from_f32(value: f32) -> u8 {
    let sign = ((value.to_bits() >> 24) & 0x80) as u8;
    let magnitude = value.abs();
    if magnitude.is_nan() {
        return 0x7f;
    }
    if magnitude >= MAX {
        return sign | 0x7e;
    }
    // Codes of one exponent are steps of 2^(exponent - 3); a step too many carries into the exponent, as it should.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(LEAST_EXPONENT);
    let steps = (magnitude / 2f32.powi(exponent - 3)).round_ties_even() as u8;
    sign | (((exponent - LEAST_EXPONENT) as u8) * 8 + steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the definition, in f64.
    fn value(code: u8) -> f64 {
        let sign = if code < 0x80 { 1.0 } else { -1.0 };
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
        match exponent {
            0 => sign * mantissa / 8.0 * 2f64.powi(-6),
            _ => sign * (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
        }
    }

    #[test]
    fn every_code_comes_back() {
        for code in 0..=u8::MAX {
            let found = to_f32(code);
            if code & 0x7f == 0x7f {
                assert!(found.is_nan() && from_f32(found) & 0x7f == 0x7f, "{code:#x}");
            } else {
                assert_eq!(f64::from(found).to_bits(), value(code).to_bits(), "{code:#x}");
                assert_eq!(from_f32(found), code, "{found}");
            }
        }
    }

    #[test]
    fn rounds_to_nearest_even_and_saturates() {
        let mut rng = fastrand::Rng::with_seed(6);
        let mut inputs: Vec<f32> =
            (0..20_000).map(|_| 900.0 * (rng.f32() - 0.5) * rng.f32().powi(8)).collect();
        for code in 0..0x7e {
            let middle = ((value(code) + value(code + 1)) / 2.0) as f32;
            inputs.extend([middle, middle.next_down(), middle.next_up(), -middle]);
        }
        inputs.extend([448.0, 464.0, 1e9, f32::INFINITY, f32::NEG_INFINITY, f32::MIN_POSITIVE, 1e-45, -0.0]);
        for x in inputs {
            let found = from_f32(x);
            let distance = |code: u8| (value(code) - f64::from(x.abs()).min(448.0)).abs();
            // The nearest; of two, the even one.
            let best =
                (0..0x7f).min_by(|a, b| distance(*a).total_cmp(&distance(*b)).then((a % 2).cmp(&(b % 2))));
            let expected = best.unwrap_or(0) | if x.is_sign_negative() { 0x80 } else { 0 };
            assert_eq!(found, expected, "{x}: {found:#x}, not {expected:#x}, seed 6");
        }
    }
}
