//! The oracle: the product in f64, in plain loops, from the weights as they are decoded.

use crate::epilogue::{Activation, SWIGLU_GROUP};
use crate::weights::Weights;
use crate::{Element, EpilogueSpec, Error, MatrixView};

/// O = epilogue(X·Wᵀ) in f64, `[tokens, out_columns]` row-major.
///
/// # Errors
/// [`Error::Argument`] for operands of other shapes than the weights'.
pub fn gemm<X: Element, O: Element>(
    x: MatrixView<'_, X>,
    weights: &Weights,
    epilogue: &EpilogueSpec,
    bias: Option<&[f32]>,
    residual: Option<MatrixView<'_, O>>,
) -> Result<Vec<f64>, Error> {
    let tiling = weights.placement().tiling();
    let ([tokens, inputs], n, k) = (x.shape(), tiling.n(), tiling.k());
    if inputs != k {
        return Err(Error::argument("x", format!("{k} columns"), inputs));
    }
    // Codes and scales are exact in f32 but their product need not be, so it is taken here.
    let w = weights.dequantize_f64();
    let columns = epilogue.out_columns(n);
    let mut out = Vec::with_capacity(tokens * columns);
    for token in 0..tokens {
        let x = x.row(token);
        let sum = |row: usize| {
            let products = x.iter().zip(&w[row * k..(row + 1) * k]).map(|(x, w)| f64::from(x.to_f32()) * w);
            products.sum::<f64>() + bias.map_or(0.0, |bias| f64::from(bias[row]))
        };
        for column in 0..columns {
            let value = match epilogue.activation {
                Activation::Identity => sum(column),
                Activation::Silu => silu(sum(column)),
                Activation::GeluTanh => {
                    let x = sum(column);
                    0.5 * x
                        * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
                }
                Activation::SwiGlu => {
                    let gate = column / SWIGLU_GROUP * 2 * SWIGLU_GROUP + column % SWIGLU_GROUP;
                    silu(sum(gate)) * sum(gate + SWIGLU_GROUP)
                }
            };
            out.push(
                value + residual.map_or(0.0, |residual| f64::from(residual.row(token)[column].to_f32())),
            );
        }
    }
    Ok(out)
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}
