//! A matrix that a checkpoint has quantised, in parts.

use half::f16;
use hybrid_gemm::{Codes, Format};

/// Codes `[n, k]` with what their format has beside them.
pub(crate) struct QuantisedMatrix {
    pub(crate) codes: Vec<u8>,
    /// Scales and zero points of groups; none of fp8.
    pub(crate) groups: Vec<f16>,
    pub(crate) zeros: Vec<u8>,
    /// f32 scales of rows or blocks; none of int4.
    pub(crate) beside: Vec<f32>,
    pub(crate) shape: [usize; 2],
    pub(crate) format: Format,
}

impl QuantisedMatrix {
    /// These codes and zero points, given by their index, with random scales.
    pub(crate) fn new(
        rng: &mut fastrand::Rng,
        [n, k]: [usize; 2],
        format: Format,
        mut code: impl FnMut(&mut fastrand::Rng, usize) -> u8,
        mut zero: impl FnMut(&mut fastrand::Rng, usize) -> u8,
    ) -> Self {
        let groups = match format {
            Format::Int4ZeroPoints { group } => n * k.div_ceil(group),
            _ => 0,
        };
        QuantisedMatrix {
            codes: (0..n * k).map(|i| code(rng, i)).collect(),
            groups: (0..groups).map(|_| f16::from_f32(rng.f32() - 0.5)).collect(),
            zeros: (0..groups).map(|i| zero(rng, i)).collect(),
            beside: (0..format.scales(n, k)).map(|_| (rng.f32() - 0.5) / 64.0).collect(),
            shape: [n, k],
            format,
        }
    }

    pub(crate) fn codes(&self) -> Codes<'_> {
        let QuantisedMatrix { codes, groups, zeros, beside, shape, .. } = self;
        let codes = match self.format {
            Format::Int4ZeroPoints { group } => Codes::int4(codes, groups, zeros, *shape, group),
            Format::Fp8Rows => Codes::fp8_rows(codes, beside, *shape),
            _ => Codes::fp8_blocks(codes, beside, *shape),
        };
        codes.expect("codes")
    }
}
