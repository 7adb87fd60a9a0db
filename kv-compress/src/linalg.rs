//! Dense f64 linear algebra on matrices of a head's size: Gram matrices, square roots, singular values.

use nalgebra::{DMatrix, DMatrixView, DMatrixViewMut, Dyn, SVD, SymmetricEigen};

use crate::Error;

pub(crate) type Matrix = DMatrix<f64>;

/// Rows that one product takes at a time: 128 columns of f64 are then 256 KiB, which an L2 holds.
const BLOCK: usize = 256;
/// Sweeps after which a decomposition counts as failed; it takes a few dozen per column in practice.
const MAX_SWEEPS: usize = 100_000;
/// Relative size below which a singular value or eigenvalue is rounding error.
const NEGLIGIBLE: f64 = 1e-13;

/// Adds XᵀX to `gram` `[dim, dim]`, for rows X `[rows, dim]` of f32, given one by one.
pub(crate) fn add_gram<'a>(gram: &mut Matrix, rows: impl Iterator<Item = &'a [f32]>) {
    let dim = gram.nrows();
    let mut block: Vec<f64> = Vec::with_capacity(BLOCK * dim);
    let mut flush = |block: &mut Vec<f64>| {
        let rows = block.len() / dim;
        // Rows in order are the columns of Xᵀ; the same memory read across is X.
        let transposed = DMatrixView::from_slice(block, dim, rows);
        let x = DMatrixView::from_slice_with_strides_generic(block, Dyn(rows), Dyn(dim), Dyn(dim), Dyn(1));
        gram.gemm(1.0, &transposed, &x, 1.0);
        block.clear();
    };
    for row in rows {
        block.extend(row.iter().map(|&x| f64::from(x)));
        if block.len() == BLOCK * dim {
            flush(&mut block);
        }
    }
    if !block.is_empty() {
        flush(&mut block);
    }
}

/// A row-major matrix `[rows, columns]`.
pub(crate) fn from_rows(rows: usize, columns: usize, elements: &[f64]) -> Matrix {
    Matrix::from_row_slice(rows, columns, elements)
}

/// Row-major elements.
pub(crate) fn to_rows(matrix: &Matrix) -> Vec<f64> {
    matrix.transpose().as_slice().to_vec()
}

/// Eigenvalues of a symmetric matrix, falling, and eigenvectors as columns.
pub(crate) fn eigen(matrix: &Matrix) -> Result<(Vec<f64>, Matrix), Error> {
    let symmetric = (matrix + matrix.transpose()) * 0.5;
    let eigen = SymmetricEigen::try_new(symmetric, f64::EPSILON, MAX_SWEEPS).ok_or_else(diverged)?;
    let mut order: Vec<usize> = (0..matrix.nrows()).collect();
    order.sort_by(|&a, &b| eigen.eigenvalues[b].total_cmp(&eigen.eigenvalues[a]));
    let values = order.iter().map(|&i| eigen.eigenvalues[i]).collect();
    let vectors =
        Matrix::from_columns(&order.iter().map(|&i| eigen.eigenvectors.column(i)).collect::<Vec<_>>());
    Ok((values, vectors))
}

/// The symmetric square root of a positive semi-definite matrix; eigenvalues that rounding made negative count as 0.
pub(crate) fn square_root(gram: &Matrix) -> Result<Matrix, Error> {
    let (values, vectors) = eigen(gram)?;
    let largest = values[0].max(0.0);
    let root = |value: f64| if value > NEGLIGIBLE * largest { value.sqrt() } else { 0.0 };
    let mut scaled = vectors.clone();
    for (mut column, &value) in scaled.column_iter_mut().zip(&values) {
        column *= root(value);
    }
    Ok(scaled * vectors.transpose())
}

/// `U · diag(σ) · Wᵀ` of a square matrix, σ falling.
pub(crate) struct Singular {
    pub(crate) u: Matrix,
    pub(crate) sigma: Vec<f64>,
    pub(crate) w: Matrix,
}

/// Singular values and vectors of a square matrix.
pub(crate) fn singular(matrix: Matrix) -> Result<Singular, Error> {
    let svd = SVD::try_new(matrix, true, true, f64::EPSILON, MAX_SWEEPS).ok_or_else(diverged)?;
    match (svd.u, svd.v_t) {
        (Some(u), Some(v_t)) => {
            Ok(Singular { u, sigma: svd.singular_values.iter().copied().collect(), w: v_t.transpose() })
        }
        _ => Err(diverged()),
    }
}

fn diverged() -> Error {
    Error::argument("calibration", "matrices whose decomposition converges", "one that does not")
}

/// tr(Eᵀ·X·E·Y) for symmetric X and Y: the energy ‖A·E·Bᵀ‖² of an error E between rows A and B with Gram matrices X and Y.
pub(crate) fn energy(error: &Matrix, x: &Matrix, y: &Matrix) -> f64 {
    // Both factors are [dim, dim]; the trace of a product is the sum of their elementwise product.
    let (left, right) = (x * error, error * y);
    left.component_mul(&right).sum().max(0.0)
}

/// Multiplies columns by factors.
pub(crate) fn scale_columns(mut matrix: DMatrixViewMut<'_, f64>, factors: impl Iterator<Item = f64>) {
    for (mut column, factor) in matrix.column_iter_mut().zip(factors) {
        column *= factor;
    }
}
