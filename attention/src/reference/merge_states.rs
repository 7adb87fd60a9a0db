//! The merge of partial states that split-KV attention ends with.

use super::Output;
use crate::error::check_len;
use crate::softmax_state::Real;
use crate::{Error, Fault, FaultCode};

/// Merges up to `max_splits` normalised partial states of each row into one: the oracle of the kernel `merge_states`.
///
/// - `partial_out` `[rows, max_splits, v_dim]`, `partial_lse` `[rows, max_splits]` (natural log);
/// - `num_splits` `[rows]`: states of each row that count, all of them without it;
/// - the output has `out` `[rows, v_dim]` and `lse` `[rows]`.
///
/// An empty state has LSE -inf and its partial output is not read. A row of empty states, or with no state, gives output 0
/// and LSE -inf; so does a row with `num_splits > max_splits`, which is reported as a fault. A NaN LSE gives NaN.
///
/// # Errors
/// [`Error::Argument`] when a length does not fit.
pub fn merge_states(
    partial_out: &[f32],
    partial_lse: &[f32],
    num_splits: Option<&[u32]>,
    rows: usize,
    max_splits: usize,
    v_dim: usize,
) -> Result<Output, Error> {
    check_len("partial_out", partial_out.len(), &[rows, max_splits, v_dim])?;
    check_len("partial_lse", partial_lse.len(), &[rows, max_splits])?;
    if let Some(num_splits) = num_splits {
        check_len("num_splits", num_splits.len(), &[rows])?;
    }
    let mut output =
        Output { out: vec![0.0; rows * v_dim], lse: vec![f64::NEG_INFINITY; rows], faults: Vec::new() };
    for row in 0..rows {
        let splits = num_splits.map_or(max_splits, |splits| splits[row] as usize);
        if splits > max_splits {
            output.faults.push(Fault { code: FaultCode::BadSplits, index: row as u64 });
            continue;
        }
        let lse = &partial_lse[row * max_splits..][..splits];
        let m = lse.iter().fold(f64::NEG_INFINITY, |m, &lse| m.max_or_nan(f64::from(lse)));
        if m == f64::NEG_INFINITY {
            continue;
        }
        let weights: Vec<f64> = lse.iter().map(|&lse| (f64::from(lse) - m).exp()).collect();
        let l: f64 = weights.iter().sum();
        let out = &mut output.out[row * v_dim..(row + 1) * v_dim];
        for (split, weight) in weights.iter().enumerate() {
            if lse[split] == f32::NEG_INFINITY {
                continue;
            }
            let partial = &partial_out[(row * max_splits + split) * v_dim..][..v_dim];
            for (o, &x) in out.iter_mut().zip(partial) {
                *o += weight / l * f64::from(x);
            }
        }
        output.lse[row] = m + l.ln();
    }
    Ok(output)
}
