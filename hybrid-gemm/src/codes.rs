//! Weights that are quantised already: codes, scales and zero points as a checkpoint has them.
//!
//! They are packed as they are, nothing is rounded: codes that are NaN stay NaN, and a scale may be anything. An output that a scale
//! of infinity or NaN reaches is not finite, and may be NaN where exact arithmetic has an infinity; others know nothing of it.

use std::fmt;

use half::f16;

use crate::epilogue::SWIGLU_GROUP;
use crate::format::FP8_BLOCK;
use crate::quantized::INT4_LAST;
use crate::{Error, Format, e4m3};

/// A quantised matrix `[n, k]`.
#[derive(Clone, Copy)]
pub struct Codes<'a> {
    kind: Kind<'a>,
    shape: [usize; 2],
}

impl fmt::Debug for Codes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Codes")
            .field("shape", &self.shape)
            .field("format", &self.format())
            .finish_non_exhaustive()
    }
}

#[derive(Clone, Copy)]
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
    /// `[n, ceil(k / group)]`. This is what checkpoints of AWQ hold, and of GPTQ v2 without act-order, unpacked and with output features
    /// as rows. GPTQ v1 stores zero points less 1: add 1 to them, modulo 16. Inputs in act-order are sorted by group first, those of X
    /// alike. Scales that are not f16 are rounded to it.
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
    /// They cannot be [`interleaved`](Self::interleaved) for [`Activation::SwiGlu`](crate::Activation::SwiGlu): a block of 128 rows would
    /// have rows of two scales. Gate and up are two products then.
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

    /// The rows of a gate and an up projection, both `[inner, k]`, as one matrix `[2 · inner, k]` for
    /// [`Activation::SwiGlu`](crate::Activation::SwiGlu), as [`interleave_gate_up`](crate::epilogue::interleave_gate_up) has them: codes,
    /// zero points, and scales of groups and rows.
    ///
    /// # Errors
    /// [`Error::Argument`] for fp8 in blocks, two shapes or formats, and rows that are no multiple of eight.
    pub fn interleaved(gate: Codes<'_>, up: Codes<'_>) -> Result<OwnedCodes, Error> {
        let ([inner, k], format) = (gate.shape, gate.format());
        if (up.shape, up.format()) != (gate.shape, format) {
            return Err(Error::argument(
                "up",
                format!("[{inner}, {k}] of {format}, as the gate"),
                format!("{:?} of {}", up.shape, up.format()),
            ));
        }
        if !inner.is_multiple_of(SWIGLU_GROUP) {
            return Err(Error::argument("gate", format!("a multiple of {SWIGLU_GROUP} rows"), inner));
        }
        let (codes, groups, zeros, rows) = match (gate.kind, up.kind) {
            (Kind::Fp8 { format: Format::Fp8Blocks, .. }, _) => {
                let expected = "scales of groups or rows (gate and up in blocks are two products)";
                return Err(Error::argument("gate", expected, format));
            }
            (
                Kind::Int4 { codes, scales, zeros, group },
                Kind::Int4 { codes: up_codes, scales: up_scales, zeros: up_zeros, .. },
            ) => {
                let groups = k.div_ceil(group);
                (
                    interleave(codes, up_codes, k),
                    interleave(scales, up_scales, groups),
                    interleave(zeros, up_zeros, groups),
                    Vec::new(),
                )
            }
            (Kind::Fp8 { codes, scales, .. }, Kind::Fp8 { codes: up_codes, scales: up_scales, .. }) => {
                (interleave(codes, up_codes, k), Vec::new(), Vec::new(), interleave(scales, up_scales, 1))
            }
            _ => unreachable!("both are of {format}"),
        };
        Ok(OwnedCodes { codes, groups, zeros, rows, shape: [2 * inner, k], format })
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

/// Eight rows of the gate, eight of the other, and so on; a row has `len` values.
fn interleave<T: Copy>(gate: &[T], up: &[T], len: usize) -> Vec<T> {
    // No row has values where k is 0.
    let rows = (SWIGLU_GROUP * len).max(1);
    gate.chunks(rows).zip(up.chunks(rows)).flat_map(|(gate, up)| [gate, up].concat()).collect()
}

/// A quantised matrix that [`Codes::interleaved`] has put together.
#[derive(Clone)]
pub struct OwnedCodes {
    codes: Vec<u8>,
    groups: Vec<f16>,
    zeros: Vec<u8>,
    /// Scales of rows.
    rows: Vec<f32>,
    shape: [usize; 2],
    format: Format,
}

impl OwnedCodes {
    /// The matrix.
    pub fn codes(&self) -> Codes<'_> {
        let OwnedCodes { codes, groups, zeros, rows, shape, format } = self;
        let kind = match *format {
            Format::Int4ZeroPoints { group } => Kind::Int4 { codes, scales: groups, zeros, group },
            format => Kind::Fp8 { codes, scales: rows, format },
        };
        Codes { kind, shape: *shape }
    }
}

impl fmt::Debug for OwnedCodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OwnedCodes").field(&self.codes()).finish()
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
    fn debug_is_short() {
        let codes = [0x38u8; 6 * 40];
        let rows = Codes::fp8_rows(&codes, &[1.0; 6], [6, 40]).unwrap();
        assert_eq!(format!("{rows:?}"), "Codes { shape: [6, 40], format: Fp8Rows, .. }");
    }

    #[test]
    fn what_cannot_be_interleaved() {
        let (codes, ones, scales) = ([3u8; 16 * 40], [f16::ONE; 32], [1.0; 16]);
        let rows = |n| Codes::fp8_rows(&codes[..n * 40], &scales[..n], [n, 40]).unwrap();
        let blocks = Codes::fp8_blocks(&codes, &scales[..1], [16, 40]).unwrap();
        let int4 = Codes::int4(&codes, &ones, &codes[..32], [16, 40], 32).unwrap();
        for (case, gate, up, named) in [
            ("blocks", blocks, blocks, "`gate`: expected scales of groups or rows"),
            ("two formats", rows(16), int4, "`up`: expected [16, 40] of fp8 with scales of rows"),
            ("two shapes", rows(16), rows(8), "found [8, 40]"),
            ("rows", rows(12), rows(12), "`gate`: expected a multiple of 8 rows, found 12"),
        ] {
            let error = Codes::interleaved(gate, up).expect_err(case).to_string();
            assert!(error.contains(named), "{case}: {error}");
        }
        let nothing = Codes::fp8_rows(&[], &scales, [16, 0]).unwrap();
        assert_eq!(Codes::interleaved(nothing, nothing).unwrap().codes().shape(), [32, 0]);
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
