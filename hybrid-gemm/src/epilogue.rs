//! What happens to a sum on its way to O: scale, bias, activation, residual, rounding.
//!
//! In this order, all in f32: the scale of the output feature (int8, fp8 by rows), the bias, the activation, the residual; then one
//! rounding to the output type.

use crate::pack::{RowMajor, TILE_ROWS};
use crate::{DType, Error};

/// Rows of W that [`Activation::SwiGlu`] takes for the gate, then as many for what it gates, and so on. Eight apart, the two
/// factors of an output lie in the same thread's registers.
pub const SWIGLU_GROUP: usize = 8;
const _: () = assert!(TILE_ROWS.is_multiple_of(2 * SWIGLU_GROUP));

/// The function between product and residual.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Activation {
    /// None.
    #[default]
    Identity,
    /// `x / (1 + e⁻ˣ)`
    Silu,
    /// `x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))`, the tanh form of GELU.
    GeluTanh,
    /// `silu(gate) · up` of W with interleaved rows: half as many outputs as W has rows. Values are interleaved by
    /// [`interleave_gate_up`], codes by [`Codes::interleaved`](crate::Codes::interleaved), except those of fp8 in blocks, of whose rows
    /// 128 share a scale.
    SwiGlu,
}

/// What a product does behind its sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EpilogueSpec {
    /// Whether a bias `[n]` is added.
    pub bias: bool,
    /// The activation.
    pub activation: Activation,
    /// Whether a residual `[tokens, out_columns]` of the output's type is added.
    pub residual: bool,
    /// Type of the outputs.
    pub out: DType,
}

impl EpilogueSpec {
    /// The bare product.
    pub const fn plain(out: DType) -> Self {
        EpilogueSpec { bias: false, activation: Activation::Identity, residual: false, out }
    }

    /// Columns of O for a matrix of `n` output features.
    pub const fn out_columns(&self, n: usize) -> usize {
        match self.activation {
            Activation::SwiGlu => n / 2,
            _ => n,
        }
    }

    pub(crate) fn check(&self, n: usize) -> Result<(), Error> {
        match self.activation {
            Activation::SwiGlu if !n.is_multiple_of(2 * SWIGLU_GROUP) => Err(Error::argument(
                "activation",
                format!("a multiple of {} rows for SwiGLU", 2 * SWIGLU_GROUP),
                n,
            )),
            _ => Ok(()),
        }
    }

    /// Turns the finished sums of some rows of W for one token into outputs, without residual and rounding. `first` is
    /// the first of the rows; gives how many outputs `sums` now starts with.
    pub(crate) fn apply(
        &self,
        sums: &mut [f32],
        first: usize,
        scales: &[f32],
        bias: Option<&[f32]>,
    ) -> usize {
        if !scales.is_empty() {
            sums.iter_mut().zip(&scales[first..]).for_each(|(sum, scale)| *sum *= scale);
        }
        if let Some(bias) = bias {
            sums.iter_mut().zip(&bias[first..]).for_each(|(sum, bias)| *sum += bias);
        }
        match self.activation {
            Activation::Identity => sums.len(),
            Activation::Silu => {
                sums.iter_mut().for_each(|x| *x = silu(*x));
                sums.len()
            }
            Activation::GeluTanh => {
                sums.iter_mut().for_each(|x| *x = gelu_tanh(*x));
                sums.len()
            }
            Activation::SwiGlu => {
                for index in 0..sums.len() / 2 {
                    let gate = index / SWIGLU_GROUP * 2 * SWIGLU_GROUP + index % SWIGLU_GROUP;
                    sums[index] = silu(sums[gate]) * sums[gate + SWIGLU_GROUP];
                }
                sums.len() / 2
            }
        }
    }
}

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

fn gelu_tanh(x: f32) -> f32 {
    let inner = (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
    0.5 * x * (1.0 + inner.tanh())
}

/// The rows of a gate and an up projection, both `[inner, k]`, as one matrix `[2 · inner, k]` in f32 for
/// [`Activation::SwiGlu`]: eight rows of the gate, eight of the other, and so on.
///
/// # Errors
/// [`Error::Argument`] for two shapes, or rows that are no multiple of eight.
pub fn interleave_gate_up(gate: RowMajor<'_>, up: RowMajor<'_>) -> Result<Vec<f32>, Error> {
    let [inner, k] = gate.shape();
    if up.shape() != [inner, k] {
        return Err(Error::argument(
            "up",
            format!("[{inner}, {k}], as the gate"),
            format!("{:?}", up.shape()),
        ));
    }
    if !inner.is_multiple_of(SWIGLU_GROUP) {
        return Err(Error::argument("gate", format!("a multiple of {SWIGLU_GROUP} rows"), inner));
    }
    let mut rows = vec![0.0; 2 * inner * k];
    if k > 0 {
        for (row, out) in rows.chunks_exact_mut(k).enumerate() {
            let (group, within) = (row / SWIGLU_GROUP, row % SWIGLU_GROUP);
            let from = if group.is_multiple_of(2) { gate } else { up };
            from.read(group / 2 * SWIGLU_GROUP + within, 0, out);
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of the functions from their definitions in f64, independent of the code above.
    #[test]
    fn activations_at_known_points() {
        for x in [-20.0f32, -3.0, -1.0, -0.1, 0.0, 0.5, 2.0, 15.0] {
            let wide = f64::from(x);
            let silu_wide = wide / (1.0 + (-wide).exp());
            let root = (2.0 / std::f64::consts::PI).sqrt();
            let gelu_wide = 0.5 * wide * (1.0 + (root * (wide + 0.044715 * wide.powi(3))).tanh());
            assert!((f64::from(silu(x)) - silu_wide).abs() < 1e-6 * wide.abs().max(1.0), "silu({x})");
            assert!((f64::from(gelu_tanh(x)) - gelu_wide).abs() < 1e-6 * wide.abs().max(1.0), "gelu({x})");
        }
        // SiLU(1) and the tanh form of GELU(1), as the literature prints them.
        assert!((silu(1.0) - 0.731_058_6).abs() < 1e-6 && (gelu_tanh(1.0) - 0.841_192).abs() < 1e-5);
    }

    #[test]
    fn gates_and_what_they_gate_are_eight_rows_apart() {
        let spec = EpilogueSpec { activation: Activation::SwiGlu, ..EpilogueSpec::plain(DType::F32) };
        let mut sums: Vec<f32> = (0..32).map(|row| row as f32 / 8.0).collect();
        let expected: Vec<f32> = (0..16)
            .map(|i| {
                let gate = if i < 8 { i } else { i + 8 };
                silu(gate as f32 / 8.0) * ((gate + 8) as f32 / 8.0)
            })
            .collect();
        assert_eq!(spec.apply(&mut sums, 0, &[], None), 16);
        assert_eq!(&sums[..16], expected);

        let [gate, up]: [Vec<f32>; 2] =
            [0.0, 1000.0].map(|start| (0..32).map(|i| start + i as f32).collect());
        let matrix = |values| RowMajor::from_slice::<f32>(values, [16, 2]).unwrap();
        let rows = interleave_gate_up(matrix(&gate), matrix(&up)).unwrap();
        for (row, first) in [(0, 0.0), (7, 14.0), (8, 1000.0), (15, 1014.0), (16, 16.0), (24, 1016.0)] {
            assert_eq!(rows[2 * row..2 * row + 2], [first, first + 1.0], "row {row}");
        }
        assert!(spec.check(32).is_ok() && spec.check(40).is_err());
        let odd = RowMajor::from_slice::<f32>(&gate[..18], [9, 2]).unwrap();
        assert!(interleave_gate_up(odd, odd).is_err() && interleave_gate_up(matrix(&gate), odd).is_err());
    }
}
