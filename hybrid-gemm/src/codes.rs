//! Weights that are quantised already: codes, scales and zero points as a checkpoint has them.
//!
//! They are packed as they are, nothing is rounded: codes that are NaN stay NaN, and a scale may be anything. An output that a scale
//! of infinity or NaN reaches is not finite; others know nothing of it.

use half::f16;

use crate::format::FP8_BLOCK;
use crate::quantized::INT4_LAST;
use crate::{Error, Format, e4m3};

/// A quantised matrix `[n, k]`.
#[derive(Debug, Clone, Copy)]
pub struct Codes<'a> {
    kind: Kind<'a>,
    shape: [usize; 2],
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind<'a> {
    /// Codes `[n, k]`, one to a byte; scales and zero points `[n, groups]`.
    Int4 { codes: &'a [u8], scales: &'a [f16], zeros: &'a [u8], group: usize },
    /// Codes `[n, k]`.
    Fp8 { codes: &'a [u8], scales: &'a [f32], format: Format },
}

fn check_len(argument: &'static str, what: &str, expected: Option<usize>, found: usize) -> Result<(), Error> {
    match expected {
        Some(expected) if expected == found => Ok(()),
        Some(expected) => Err(Error::argument(argument, format!("{expected} {what}"), found)),
        None => Err(Error::argument(argument, "a shape whose size fits", "a larger one")),
    }
}

impl<'a> Codes<'a> {
    /// Int4 with zero points, `w = (code - zero) · scale`: codes `[n, k]` of 0 to 15, one to a byte; scales and zero points of 0 to 15
    /// `[n, ceil(k / group)]`. This is what AWQ and GPTQ checkpoints hold, unpacked and with output features as rows.
    ///
    /// # Errors
    /// [`Error::Argument`] for groups that no kernel knows, other lengths, and codes or zero points past 15.
    pub fn int4(
        codes: &'a [u8],
        scales: &'a [f16],
        zeros: &'a [u8],
        [n, k]: [usize; 2],
        group: usize,
    ) -> Result<Self, Error> {
        Format::Int4ZeroPoints { group }.check()?;
        let groups = n.checked_mul(k.div_ceil(group));
        check_len("codes", "codes", n.checked_mul(k), codes.len())?;
        check_len("scales", "scales of groups", groups, scales.len())?;
        check_len("zeros", "zero points of groups", groups, zeros.len())?;
        for (argument, values) in [("codes", codes), ("zeros", zeros)] {
            if let Some(found) = values.iter().find(|value| **value > INT4_LAST) {
                return Err(Error::argument(argument, format!("0 to {INT4_LAST}"), found));
            }
        }
        Ok(Codes { kind: Kind::Int4 { codes, scales, zeros, group }, shape: [n, k] })
    }

    /// fp8 e4m3 in blocks of 128 × 128: codes `[n, k]`, scales `[ceil(n / 128), ceil(k / 128)]` (`weight_scale_inv` of DeepSeek-V3).
    ///
    /// # Errors
    /// [`Error::Argument`] for other lengths.
    pub fn fp8_blocks(codes: &'a [u8], scales: &'a [f32], shape: [usize; 2]) -> Result<Self, Error> {
        Codes::fp8(codes, scales, shape, Format::Fp8Blocks)
    }

    /// fp8 e4m3 by rows: codes `[n, k]`, a scale for each output feature `[n]`.
    ///
    /// # Errors
    /// [`Error::Argument`] for other lengths.
    pub fn fp8_rows(codes: &'a [u8], scales: &'a [f32], shape: [usize; 2]) -> Result<Self, Error> {
        Codes::fp8(codes, scales, shape, Format::Fp8Rows)
    }

    fn fp8(codes: &'a [u8], scales: &'a [f32], [n, k]: [usize; 2], format: Format) -> Result<Self, Error> {
        check_len("codes", "codes", n.checked_mul(k), codes.len())?;
        check_len("scales", "scales", Some(format.scales(n, k)), scales.len())?;
        Ok(Codes { kind: Kind::Fp8 { codes, scales, format }, shape: [n, k] })
    }

    /// `[n, k]`
    pub const fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// The format that they are in.
    pub const fn format(&self) -> Format {
        match self.kind {
            Kind::Int4 { group, .. } => Format::Int4ZeroPoints { group },
            Kind::Fp8 { format, .. } => format,
        }
    }

    /// Scales that lie beside the matrix.
    pub(crate) const fn scales(&self) -> &'a [f32] {
        match self.kind {
            Kind::Int4 { .. } => &[],
            Kind::Fp8 { scales, .. } => scales,
        }
    }

    pub(crate) const fn kind(&self) -> Kind<'a> {
        self.kind
    }

    /// The weight of an output feature and an input, in f64: exactly what the codes say.
    pub fn weight(&self, row: usize, input: usize) -> f64 {
        let k = self.shape[1];
        match self.kind {
            Kind::Int4 { codes, scales, zeros, group } => {
                let of_group = row * k.div_ceil(group) + input / group;
                let steps = f64::from(codes[row * k + input]) - f64::from(zeros[of_group]);
                steps * scales[of_group].to_f64()
            }
            Kind::Fp8 { codes, scales, format } => {
                let at = match format {
                    Format::Fp8Blocks => row / FP8_BLOCK * k.div_ceil(FP8_BLOCK) + input / FP8_BLOCK,
                    _ => row,
                };
                f64::from(e4m3::to_f32(codes[row * k + input])) * f64::from(scales[at])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_name_the_argument() {
        let (codes, ones) = ([3u8; 6 * 40], [f16::ONE; 12]);
        let zeros = [8u8; 12];
        let wide = {
            let mut wide = codes;
            wide[17] = 16;
            wide
        };
        for (case, result, named) in [
            ("groups of 48", Codes::int4(&codes, &ones, &zeros, [6, 40], 48), "groups of 48"),
            (
                "a code short",
                Codes::int4(&codes[1..], &ones, &zeros, [6, 40], 32),
                "`codes`: expected 240 codes, found 239",
            ),
            ("scales", Codes::int4(&codes, &ones[1..], &zeros, [6, 40], 32), "`scales`: expected 12"),
            ("zero points", Codes::int4(&codes, &ones, &zeros[..6], [6, 40], 32), "`zeros`: expected 12"),
            (
                "a code of 16",
                Codes::int4(&wide, &ones, &zeros, [6, 40], 32),
                "`codes`: expected 0 to 15, found 16",
            ),
            (
                "a zero point of 16",
                Codes::int4(&codes, &ones, &[16; 12], [6, 40], 32),
                "`zeros`: expected 0 to 15",
            ),
            ("past memory", Codes::int4(&codes, &ones, &zeros, [usize::MAX, 40], 32), "`codes`"),
            ("fp8 codes", Codes::fp8_rows(&codes, &[1.0; 6], [6, 41]), "`codes`: expected 246"),
            ("scales of rows", Codes::fp8_rows(&codes, &[1.0; 7], [6, 40]), "`scales`: expected 6"),
            ("scales of blocks", Codes::fp8_blocks(&codes, &[1.0; 6], [6, 40]), "`scales`: expected 1"),
        ] {
            let error = result.expect_err(case).to_string();
            assert!(error.contains(named), "{case}: {error}");
        }
        assert!(Codes::int4(&codes, &ones, &zeros, [6, 40], 32).is_ok());
    }

    #[test]
    fn weights_are_what_the_codes_say() {
        let zeros: Vec<u8> = (0..4).collect();
        let scales: Vec<f16> = [1.0, 2.0, 4.0, 8.0].map(f16::from_f32).to_vec();
        let codes: Vec<u8> = (0..2 * 40).map(|i| i % 16).collect();
        let int4 = Codes::int4(&codes, &scales, &zeros, [2, 40], 32).unwrap();
        // Row 1 starts at code 8; its second group has zero point 3 and scale 8.
        assert_eq!((int4.weight(0, 5), int4.weight(1, 33)), (5.0, ((8 + 33) % 16 - 3) as f64 * 8.0));
        let codes = vec![0x38u8; 130 * 129]; // 1.0
        let scales = [2.0, 3.0, 5.0, 7.0];
        let blocks = Codes::fp8_blocks(&codes, &scales, [130, 129]).unwrap();
        let corners =
            [(127, 127), (0, 128), (128, 0), (129, 128)].map(|(row, input)| blocks.weight(row, input));
        assert_eq!(corners, [2.0, 3.0, 5.0, 7.0]);
    }
}
