//! Where a layer's projected keys and values lie.

use ndarray::Array2;

use crate::Error;

/// Projected keys and values of one layer. Rows of keys are `[Σ r_k]` and of values `[Σ r_v]`, KV head after KV head; rows of
/// queries and outputs go query head after query head.
pub(super) trait Store: Send {
    /// Tokens held.
    fn tokens(&self) -> usize;

    /// Appends tokens: `keys` `[new, Σ r_k]`, `values` `[new, Σ r_v]`.
    fn append(&mut self, keys: &[f32], values: &[f32]) -> Result<(), Error>;

    /// Appends tokens and attends from them: `q` `[new, Σ r_k]` over query heads to `[new, Σ r_v]` over query heads.
    fn forward(&mut self, q: &[f32], keys: &[f32], values: &[f32]) -> Result<Array2<f32>, Error>;

    /// Bytes held.
    fn bytes(&self) -> usize;

    /// Forgets everything.
    fn clear(&mut self);

    /// Replaces everything held by noise of like magnitude.
    fn scramble(&mut self, rng: &mut fastrand::Rng);
}

/// Some columns of row-major rows `[.., row]`.
pub(super) fn columns(rows: &[f32], row: usize, columns: std::ops::Range<usize>) -> Vec<f32> {
    rows.chunks_exact(row).flat_map(|row| row[columns.clone()].iter().copied()).collect()
}
