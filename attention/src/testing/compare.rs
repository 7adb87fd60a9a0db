//! Comparisons of a result with the oracle. NaN never passes one, and neither does a wrong infinity.

use crate::{DType, Element};

/// The element that is furthest out of tolerance.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Worst {
    /// Its place in the tensor.
    pub index: usize,
    /// What was found.
    pub actual: f64,
    /// What was expected.
    pub expected: f64,
}

/// `|actual - expected| <= absolute + relative · |expected|`, element by element. Infinities must be equal.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// Error allowed at 0.
    pub absolute: f64,
    /// Error allowed per unit of the expected value.
    pub relative: f64,
}

impl Tolerance {
    /// An absolute and a relative tolerance.
    pub const fn new(absolute: f64, relative: f64) -> Self {
        Tolerance { absolute, relative }
    }

    /// Natural-log LSE of kernels that compute in f32: 1e-4 absolute, and f32's own error in large scores.
    pub const LSE: Tolerance = Tolerance::new(1e-4, 1e-6);

    /// Merged f32 states: 1e-5 relative.
    pub const MERGE: Tolerance = Tolerance::new(1e-6, 1e-5);

    /// Outputs of kernels that keep P and sums in f32 and round once: one unit in the last place of the storage type, and
    /// f32's error in the sums of values of size about 1.
    pub fn rounded_once<T: Element>() -> Self {
        Tolerance::new(2e-6, T::DTYPE.epsilon().max(2e-6))
    }

    /// Outputs of tensor-core kernels, which also round P to the storage type: what FlashInfer's tests allow, 1e-3 for f16 and
    /// 1e-2 for bf16.
    pub fn tensor_core<T: Element>() -> Self {
        let allowed = match T::DTYPE {
            DType::F32 => 1e-5,
            DType::F16 => 1e-3,
            DType::BF16 => 1e-2,
        };
        Tolerance::new(allowed, allowed)
    }

    /// How far out an element is: at most 1 within tolerance, infinite for NaN.
    fn excess(&self, actual: f64, expected: f64) -> f64 {
        if actual == expected {
            return 0.0;
        }
        let ratio = (actual - expected).abs() / (self.absolute + self.relative * expected.abs());
        if ratio.is_nan() || !expected.is_finite() { f64::INFINITY } else { ratio }
    }
}

/// How a result compares with what was expected of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Elements compared.
    pub len: usize,
    /// Largest absolute error; NaN if any element is NaN.
    pub max_abs: f64,
    /// Root of the mean squared error.
    pub rms: f64,
    /// [`calc_diff`] of the finite expected elements.
    pub diff: f64,
    /// Elements out of tolerance.
    pub failures: usize,
    /// The element furthest out of tolerance, or closest to it.
    pub worst: Option<Worst>,
}

impl Comparison {
    /// Compares element by element.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn new<T: Element>(actual: &[T], expected: &[f64], tolerance: Tolerance) -> Self {
        let actual: Vec<f64> = actual.iter().map(|x| x.to_f64()).collect();
        Comparison::of_f64(&actual, expected, tolerance)
    }

    /// [`new`](Self::new) for results that are f64.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn of_f64(actual: &[f64], expected: &[f64], tolerance: Tolerance) -> Self {
        assert_eq!(actual.len(), expected.len(), "result and expectation have different lengths");
        let mut comparison =
            Comparison { len: actual.len(), max_abs: 0.0, rms: 0.0, diff: 0.0, failures: 0, worst: None };
        let mut worst_excess = -1.0;
        for (index, (&actual, &expected)) in actual.iter().zip(expected).enumerate() {
            let error = if actual == expected { 0.0 } else { (actual - expected).abs() };
            comparison.rms += error * error;
            if error.is_nan() || error > comparison.max_abs {
                comparison.max_abs = error;
            }
            let excess = tolerance.excess(actual, expected);
            comparison.failures += usize::from(excess > 1.0);
            if excess > worst_excess {
                worst_excess = excess;
                comparison.worst = Some(Worst { index, actual, expected });
            }
        }
        if !actual.is_empty() {
            comparison.rms = (comparison.rms / actual.len() as f64).sqrt();
        }
        comparison.diff = calc_diff(actual, expected);
        comparison
    }

    /// Compares outputs of attention `[rows, dim]`: each element by [`Tolerance::tensor_core`], and each row by [`calc_diff`],
    /// which has to be below 1e-5. One wrong value among hundreds of keys shows in the second alone. A row that is out counts
    /// as one more failure, and `diff` is that of the worst row.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn attention<T: Element>(actual: &[T], expected: &[f64], dim: usize) -> Self {
        let actual: Vec<f64> = actual.iter().map(|x| x.to_f64()).collect();
        Comparison::attention_f64(&actual, expected, dim, Tolerance::tensor_core::<T>())
    }

    /// [`attention`](Self::attention) for results that are f64.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn attention_f64(actual: &[f64], expected: &[f64], dim: usize, tolerance: Tolerance) -> Self {
        const ROW: f64 = 1e-5;
        let mut comparison = Comparison::of_f64(actual, expected, tolerance);
        comparison.diff = 0.0;
        for (actual, expected) in actual.chunks(dim).zip(expected.chunks(dim)) {
            let diff = calc_diff(actual, expected);
            if diff.is_nan() || diff > comparison.diff {
                comparison.diff = diff;
            }
            comparison.failures += usize::from(diff.is_nan() || diff >= ROW);
        }
        comparison
    }

    /// Whether every element is within tolerance.
    pub fn passes(&self) -> bool {
        self.failures == 0
    }

    /// Fails a test with the case's name (put shape and seed into it) and the worst element.
    ///
    /// # Panics
    /// When an element is out of tolerance.
    #[track_caller]
    pub fn assert(&self, case: impl std::fmt::Display) {
        assert!(self.passes(), "{case}: {self}");
    }
}

impl std::fmt::Display for Comparison {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {} elements out of tolerance", self.failures, self.len)?;
        if let Some(Worst { index, actual, expected }) = self.worst {
            write!(f, ", worst at {index}: {actual:e} instead of {expected:e}")?;
        }
        write!(f, " (max abs {:.3e}, rms {:.3e}, diff {:.3e})", self.max_abs, self.rms, self.diff)
    }
}

/// `1 - 2·Σxy / Σ(x² + y²)`, DeepGEMM's measure of how far a tensor is from another, over the elements whose expected value
/// is finite: 0 when equal, NaN when a result is NaN, so assert `diff < bound` and never `!(diff >= bound)`.
///
/// # Panics
/// When the lengths differ.
pub fn calc_diff(actual: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len(), "result and expectation have different lengths");
    let (mut cross, mut squares) = (0.0, 0.0);
    for (&x, &y) in actual.iter().zip(expected).filter(|(_, y)| y.is_finite()) {
        cross += x * y;
        squares += x * x + y * y;
    }
    if squares == 0.0 { 0.0 } else { 1.0 - 2.0 * cross / squares }
}

/// Largest absolute error that FlashAttention-3's tests allow a kernel of storage type `T`.
///
/// `2·max|low - oracle| + 2·max|(oracle + 0.3 - 0.3) - oracle|`: twice the error of `low`, a plain attention that rounds
/// its intermediates to `T`, plus twice the error of one rounding at the size of the outputs, where the sums are done in
/// `T`. NaN when `low` is NaN.
///
/// # Panics
/// When the lengths differ.
pub fn flash_tolerance<T: Element>(low: &[T], oracle: &[f64]) -> f64 {
    assert_eq!(low.len(), oracle.len(), "result and oracle have different lengths");
    let max = |errors: &mut dyn Iterator<Item = f64>| {
        errors.fold(0.0, |m: f64, e| if e.is_nan() || e > m { e } else { m })
    };
    let low_error = max(&mut low.iter().zip(oracle).map(|(low, x)| (low.to_f64() - x).abs()));
    let rounding = max(&mut oracle.iter().map(|&x| {
        let stored = T::from_f64(x).to_f64();
        let raised = T::from_f64(stored + 0.3).to_f64();
        (T::from_f64(raised - 0.3).to_f64() - stored).abs()
    }));
    2.0 * low_error + 2.0 * rounding
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRICT: Tolerance = Tolerance::new(0.1, 0.0);

    #[test]
    fn nan_and_wrong_infinities_never_pass() {
        let infinity = f64::INFINITY;
        for (case, actual, expected, passes) in [
            ("equal", 1.0, 1.0, true),
            ("within", 1.09, 1.0, true),
            ("outside", 1.11, 1.0, false),
            ("both -inf", -infinity, -infinity, true),
            ("-inf for a number", -infinity, 1.0, false),
            ("a number for -inf", 1.0, -infinity, false),
            ("opposite infinities", infinity, -infinity, false),
            ("NaN", f64::NAN, 1.0, false),
            ("NaN expected", 1.0, f64::NAN, false),
            ("NaN for NaN", f64::NAN, f64::NAN, false),
        ] {
            let comparison = Comparison::of_f64(&[0.0, actual], &[0.0, expected], STRICT);
            assert_eq!(comparison.passes(), passes, "{case}: {comparison}");
            if !passes {
                assert_eq!(comparison.worst.map(|worst| worst.index), Some(1), "{case}");
            }
        }
        let nan = Comparison::of_f64(&[f64::NAN, 5.0], &[1.0, 1.0], STRICT);
        assert!(nan.diff.is_nan() && nan.rms.is_nan());
        assert_eq!((nan.failures, nan.worst.map(|worst| worst.index)), (2, Some(0)));
        assert!(Comparison::of_f64(&[], &[], STRICT).passes());
    }

    #[test]
    #[should_panic(
        expected = "shape 3, seed 7: 1 of 2 elements out of tolerance, worst at 1: 2e0 instead of 1e0"
    )]
    fn a_failure_names_case_and_element() {
        Comparison::of_f64(&[1.0, 2.0], &[1.0, 1.0], STRICT).assert("shape 3, seed 7");
    }

    #[test]
    fn one_wrong_value_in_a_row_shows() {
        let expected: Vec<f64> = (0..128).map(|i| f64::from(i % 7) * 0.02 - 0.06).collect();
        let right: Vec<half::bf16> = expected.iter().map(|&x| Element::from_f64(x)).collect();
        assert!(Comparison::attention(&right, &expected, 64).passes());
        // As if one value row of several hundred had been another's: each element stays within 1e-2.
        let wrong: Vec<half::bf16> = (0..128)
            .map(|i| Element::from_f64(expected[i] + if i >= 64 { 1e-3 * (i as f64).sin() } else { 0.0 }))
            .collect();
        let comparison = Comparison::attention(&wrong, &expected, 64);
        assert_eq!(comparison.failures, 1, "{comparison}");
        assert!(comparison.diff > 1e-5 && comparison.diff < 1e-3, "{comparison}");
    }

    #[test]
    fn diff_of_known_vectors() {
        assert_eq!(calc_diff(&[1.0, 2.0], &[1.0, 2.0]), 0.0);
        assert_eq!(calc_diff(&[0.0], &[0.0]), 0.0);
        assert_eq!(calc_diff(&[1.0, 0.0], &[0.0, 1.0]), 1.0);
        assert!((calc_diff(&[2.0], &[1.0]) - 0.2).abs() < 1e-15);
        assert_eq!(calc_diff(&[-f64::INFINITY, 3.0], &[-f64::INFINITY, 3.0]), 0.0, "empty rows do not count");
    }

    #[test]
    fn flash_tolerance_follows_the_storage_type() {
        let oracle: Vec<f64> = (0..100).map(|i| f64::from(i) / 100.0).collect();
        let half: Vec<half::f16> = oracle.iter().map(|&x| Element::from_f64(x)).collect();
        let brain: Vec<half::bf16> = oracle.iter().map(|&x| Element::from_f64(x)).collect();
        let (half, brain) = (flash_tolerance(&half, &oracle), flash_tolerance(&brain, &oracle));
        assert!(half > 1e-4 && half < 3e-3 && brain > 4.0 * half && brain < 3e-2, "f16 {half}, bf16 {brain}");
        assert!(flash_tolerance(&[f32::NAN], &[0.0]).is_nan());
    }
}
