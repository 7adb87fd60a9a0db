//! How close a kernel is to the reference on the same codes.

use std::fmt::Display;

use attention::Element;
use attention::testing::{Comparison, Inputs, Tolerance};
use half::bf16;

/// Codes of queries and probabilities are those of the reference but for near-ties that the last bit decides (one in ten
/// thousand): the median row shows nothing of them, and one wrong code moves a score, and an output, by less than 1e-2.
///
/// `found` and `expected` are outputs `[rows, dim]` and LSEs `[rows]`.
pub(crate) fn assert_close<E: Element>(
    (found_out, found_lse): (&[E], &[f32]),
    (out, lse): (&[f64], &[f64]),
    dim: usize,
    name: &impl Display,
) {
    let epsilon = E::DTYPE.epsilon();
    Comparison::new(found_lse, lse, Tolerance::new(1e-2, 1e-5)).assert(format_args!("lse of {name}"));
    Comparison::new(found_out, out, Tolerance::new(1e-2, 5e-3 + epsilon))
        .assert(format_args!("out of {name}"));
    let median = |mut errors: Vec<f64>| {
        errors.sort_by(f64::total_cmp);
        errors.get(errors.len() / 2).copied().unwrap_or(0.0)
    };
    let of_lse: Vec<f64> =
        found_lse.iter().zip(lse).map(|(x, y)| (f64::from(*x) - y).abs() / (1.0 + y.abs())).collect();
    let of_lse = median(of_lse.into_iter().filter(|error| error.is_finite()).collect());
    assert!(of_lse < 2e-5, "{name}: median error of lse {of_lse:e}");
    // Rows as wholes, beyond the rounding of the output: half a unit in the last place.
    let rows = found_out.chunks_exact(dim).zip(out.chunks_exact(dim));
    let of_rows = rows.filter(|(_, expected)| expected.iter().any(|x| *x != 0.0)).map(|(found, expected)| {
        let excess = |(x, y): (&E, &f64)| ((x.to_f64() - y).abs() - 0.5 * epsilon * y.abs()).max(0.0).powi(2);
        let error: f64 = found.iter().zip(expected).map(excess).sum();
        (error / expected.iter().map(|y| y * y).sum::<f64>()).sqrt()
    });
    let of_rows = median(of_rows.collect());
    assert!(of_rows < 1e-4, "{name}: median row error {of_rows:e}");
}

/// Outputs that are too large by less than their type resolves are still found out, since many of them cross to the next number.
#[test]
#[should_panic(expected = "median row error")]
fn a_small_factor_is_noticed() {
    let out: Vec<f64> = Inputs::Normal.values(50, 64, 3).into_iter().map(f64::from).collect();
    let lse = vec![1.0; 50];
    let found = |factor: f64| -> Vec<bf16> { out.iter().map(|x| bf16::from_f64(x * factor)).collect() };
    assert_close((&found(1.0), &[1.0; 50]), (&out, &lse), 64, &"rounded outputs");
    assert_close((&found(1.003), &[1.0; 50]), (&out, &lse), 64, &"outputs times 1.003");
}
