//! What a bench computed, held against the oracle before it is timed: a few rows of each case, for a kernel that skips work is fast.
//!
//! Whole outputs of every shape are the tests' business.

use std::sync::Arc;

use half::bf16;
use longkv_attention::testing::{Comparison, Tolerance, calc_diff};
use longkv_attention::{
    AttentionSpec, Element, HeadShape, HeadsView, Mask, RaggedKv, RaggedView, Score, reference,
};
use longkv_cuda::cudarc::driver::{CudaSlice, CudaStream, DeviceRepr};
use longkv_cuda::status::StatusWord;

/// A row of attention: one query head of one token.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Output `[dim]`.
    pub out: Vec<f64>,
    /// Log-sum-exp, natural log.
    pub lse: f64,
}

/// The row of a query that sees all of `keys` keys, of which `k` and `v` name the vectors; P is rounded to their type before P·V.
///
/// # Panics
/// When vectors have different lengths.
pub fn attention<'a, T: Element>(
    score: Score,
    q: &[bf16],
    keys: usize,
    k: impl Fn(usize) -> &'a [T],
    v: impl Fn(usize) -> &'a [T],
) -> Row {
    let dim = q.len();
    let spec =
        AttentionSpec { shape: HeadShape::new(1, 1, dim, dim).expect("a head"), score, mask: Mask::Full };
    let gather = |vector: &dyn Fn(usize) -> &'a [T]| (0..keys).flat_map(vector).copied().collect::<Vec<_>>();
    let (k, v) = (gather(&k), gather(&v));
    let heads = |x| HeadsView::nhd(x, keys, 1, dim).expect("keys and values");
    let kv = RaggedKv::single(heads(&k), heads(&v)).expect("keys and values");
    let q = RaggedView::single(HeadsView::nhd(q, 1, 1, dim).expect("a query")).expect("a query");
    let output = reference::prefill(&spec, &q, &kv, reference::Probabilities::Rounded).expect("valid inputs");
    Row { lse: output.lse[0], out: output.out }
}

/// Compares rows of `out` `[rows, dim]` and `lse` `[rows]` with what is expected of them.
///
/// # Panics
/// With the worst element, when a row is out of the tolerances of the tests.
pub fn rows<T: Element + DeviceRepr>(
    stream: &Arc<CudaStream>,
    out: &CudaSlice<T>,
    lse: &CudaSlice<f32>,
    expected: &[(usize, Row)],
) {
    for (row, expected) in expected {
        let dim = expected.out.len();
        let found = download(stream, out, row * dim, dim);
        Comparison::attention(&found, &expected.out, dim).assert(format!("row {row}"));
        let found = download(stream, lse, *row, 1);
        Comparison::new(&found, &[expected.lse], Tolerance::LSE).assert(format!("LSE of row {row}"));
    }
}

/// Compares rows of a kernel that quantizes on its way: an error of 5 % of a row's norm, and of 0.05 in its LSE, which pages that were
/// left out exceed.
///
/// # Panics
/// As [`rows`].
pub fn quantized_rows<T: Element + DeviceRepr>(
    stream: &Arc<CudaStream>,
    out: &CudaSlice<T>,
    lse: &CudaSlice<f32>,
    expected: &[(usize, Row)],
) {
    for (row, expected) in expected {
        let dim = expected.out.len();
        let found: Vec<f64> = download(stream, out, row * dim, dim).iter().map(|x| x.to_f64()).collect();
        let error = found.iter().zip(&expected.out).map(|(x, y)| (x - y).powi(2)).sum::<f64>();
        let norm = expected.out.iter().map(|y| y.powi(2)).sum::<f64>();
        let error = (error / norm).sqrt();
        assert!(error < 0.05, "row {row}: relative error {error:.3e}");
        let found = download(stream, lse, *row, 1);
        Comparison::new(&found, &[expected.lse], Tolerance::new(0.05, 0.0))
            .assert(format!("LSE of row {row}"));
    }
}

/// Compares a row of inner products, whose factors may have been rounded on the way: its norm's worth, and no element NaN.
///
/// # Panics
/// When the row is out of a relative error of 1 %.
pub fn products<T: Element>(what: &str, found: &[T], expected: &[f64]) {
    let found: Vec<f64> = found.iter().map(|x| x.to_f64()).collect();
    let diff = calc_diff(&found, expected);
    assert!(diff < 1e-4, "{what}: differs by {diff:.3e}");
}

/// Compares rows of carried states, O `[rows, dim]` and (m, l) `[rows, 2]`, with the rows that they stand for.
///
/// # Panics
/// As [`rows`].
pub fn states(stream: &Arc<CudaStream>, o: &CudaSlice<f32>, ml: &CudaSlice<f32>, expected: &[(usize, Row)]) {
    for (row, expected) in expected {
        let dim = expected.out.len();
        let [m, l] =
            download(stream, ml, row * 2, 2).try_into().map(|ml: [f32; 2]| ml.map(f64::from)).expect("two");
        let out: Vec<f64> = download(stream, o, row * dim, dim).iter().map(|o| f64::from(*o) / l).collect();
        let tolerance = Tolerance::tensor_core::<bf16>();
        Comparison::attention_f64(&out, &expected.out, dim, tolerance).assert(format!("row {row}"));
        let lse = [m + l.ln()];
        Comparison::of_f64(&lse, &[expected.lse], Tolerance::LSE).assert(format!("LSE of row {row}"));
    }
}

/// `len` elements from element `at` on.
///
/// # Panics
/// When the copy fails, or an earlier launch did.
pub fn download<T: Clone + Default + DeviceRepr>(
    stream: &Arc<CudaStream>,
    slice: &CudaSlice<T>,
    at: usize,
    len: usize,
) -> Vec<T> {
    let found = stream.clone_dtoh(&slice.slice(at..at + len)).expect("copy");
    stream.synchronize().expect("the launch ran without a fault");
    found
}

/// A status word says that nothing was wrong.
///
/// # Panics
/// With the fault, when something was.
pub fn no_fault(stream: &Arc<CudaStream>, status: &StatusWord) {
    assert_eq!(status.read(stream).expect("read the status"), None, "a kernel reports a fault");
}

#[cfg(test)]
mod tests {
    use longkv_attention::testing::Inputs;

    use super::*;

    #[test]
    fn a_row_is_that_of_the_oracle() {
        let (dim, keys) = (64, 50);
        let vectors = |n, seed| Inputs::Normal.generate::<bf16>(n, dim, seed);
        let (q, k, v) = (vectors(1, 1), vectors(keys, 2), vectors(keys, 3));
        let score = Score::new(0.125).expect("a scale");
        let at = |x: &'static [bf16]| move |i: usize| &x[i * dim..(i + 1) * dim];
        let (k, v): (&[bf16], &[bf16]) = (k.leak(), v.leak());
        let row = attention(score, &q, keys, at(k), at(v));
        // The softmax in plain f64; P rounded as the kernels do.
        let dot = |key: usize| -> f64 {
            (0..dim).map(|c| f64::from(q[c].to_f32()) * f64::from(k[key * dim + c].to_f32())).sum::<f64>()
                * 0.125
        };
        let largest = (0..keys).map(dot).fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = (0..keys).map(|key| (dot(key) - largest).exp()).sum();
        assert!((row.lse - (largest + sum.ln())).abs() < 1e-9, "{}", row.lse);
        let p = |key: usize| f64::from(bf16::from_f64((dot(key) - largest).exp()).to_f32());
        let out: Vec<f64> = (0..dim)
            .map(|c| (0..keys).map(|key| p(key) * f64::from(v[key * dim + c].to_f32())).sum::<f64>() / sum)
            .collect();
        Comparison::of_f64(&row.out, &out, Tolerance::new(1e-9, 1e-9)).assert("out");
        // All keys twice: the same output, and ln 2 more.
        let twice = attention(score, &q, 2 * keys, |i| at(k)(i % keys), |i| at(v)(i % keys));
        Comparison::of_f64(&twice.out, &row.out, Tolerance::new(1e-9, 1e-9)).assert("out of twice");
        assert!((twice.lse - row.lse - 2f64.ln()).abs() < 1e-9);
    }
}
