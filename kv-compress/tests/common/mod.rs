//! Rows with known spectra, and the products that projections approximate.
#![allow(dead_code, reason = "every test binary uses its own part")]

use attention::HeadShape;
use attention::testing::Rng;
use kv_compress::calibrate::LayerCalibration;
use nalgebra::DMatrix;

pub(crate) type Matrix = DMatrix<f64>;

/// `[rows, columns]` of standard normal numbers.
pub(crate) fn normal(rows: usize, columns: usize, rng: &mut Rng) -> Matrix {
    Matrix::from_fn(rows, columns, |_, _| rng.normal())
}

/// Rows `[rows, dim]` whose directions, random but shared by all rows, have standard deviations `spread(i)`.
pub(crate) fn rows_with(rows: usize, dim: usize, spread: impl Fn(usize) -> f64, rng: &mut Rng) -> Matrix {
    let directions = normal(dim, dim, rng).qr().q();
    let mut rows = normal(rows, dim, rng);
    for (i, mut column) in rows.column_iter_mut().enumerate() {
        column *= spread(i);
    }
    rows * directions.transpose()
}

/// Rounded to f32, so that what a calibration sees is what the test multiplies.
pub(crate) fn rounded(matrix: Matrix) -> Matrix {
    matrix.map(|x| f64::from(x as f32))
}

/// Activations of one layer, per head.
pub(crate) struct Layer {
    pub(crate) shape: HeadShape,
    pub(crate) hidden: usize,
    /// `[q_heads]` of `[tokens, qk_dim]`
    pub(crate) q: Vec<Matrix>,
    /// `[kv_heads]` of `[tokens, qk_dim]`
    pub(crate) k: Vec<Matrix>,
    /// `[kv_heads]` of `[tokens, v_dim]`
    pub(crate) v: Vec<Matrix>,
    /// `[q_heads]` of `[v_dim, hidden]`
    pub(crate) w_o: Vec<Matrix>,
}

impl Layer {
    /// A layer whose every side has directions of its own, falling like `decay^i`.
    pub(crate) fn new(shape: HeadShape, tokens: usize, hidden: usize, decay: f64, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let mut rows = |rows, dim| rounded(rows_with(rows, dim, |i| decay.powi(i as i32), &mut rng));
        Layer {
            shape,
            hidden,
            q: (0..shape.q_heads()).map(|_| rows(tokens, shape.qk_dim())).collect(),
            k: (0..shape.kv_heads()).map(|_| rows(tokens, shape.qk_dim())).collect(),
            v: (0..shape.kv_heads()).map(|_| rows(tokens, shape.v_dim())).collect(),
            w_o: (0..shape.q_heads()).map(|_| rows(hidden, shape.v_dim()).transpose()).collect(),
        }
    }

    pub(crate) fn tokens(&self) -> usize {
        self.k[0].nrows()
    }

    /// `[tokens, q_heads, qk_dim]`
    pub(crate) fn q_flat(&self) -> Vec<f32> {
        interleave(&self.q)
    }

    /// `[tokens, kv_heads, qk_dim]`
    pub(crate) fn k_flat(&self) -> Vec<f32> {
        interleave(&self.k)
    }

    /// `[tokens, kv_heads, v_dim]`
    pub(crate) fn v_flat(&self) -> Vec<f32> {
        interleave(&self.v)
    }

    /// `[hidden, q_heads · v_dim]`
    pub(crate) fn w_o_flat(&self) -> Vec<f32> {
        interleave(&self.w_o.iter().map(Matrix::transpose).collect::<Vec<_>>())
    }

    pub(crate) fn calibration(&self) -> LayerCalibration {
        let mut calibration = LayerCalibration::new(self.shape);
        calibration.add(&self.q_flat(), &self.k_flat(), &self.v_flat()).unwrap();
        calibration.set_w_o(&self.w_o_flat(), self.hidden).unwrap();
        calibration
    }

    /// Queries of a KV head's group, one below the other: `[group · tokens, qk_dim]`.
    pub(crate) fn q_group(&self, kv_head: usize) -> Matrix {
        stack(&self.q[self.shape.q_heads_of(kv_head)])
    }

    /// W_Oᵀ of a KV head's group: `[group · hidden, v_dim]`.
    pub(crate) fn w_o_group(&self, kv_head: usize) -> Matrix {
        let blocks: Vec<Matrix> =
            self.w_o[self.shape.q_heads_of(kv_head)].iter().map(Matrix::transpose).collect();
        stack(&blocks)
    }
}

/// Heads `[rows, dim]` as `[rows, heads, dim]`.
pub(crate) fn interleave(heads: &[Matrix]) -> Vec<f32> {
    let mut flat = Vec::new();
    for row in 0..heads[0].nrows() {
        for head in heads {
            flat.extend(head.row(row).iter().map(|&x| x as f32));
        }
    }
    flat
}

/// Matrices one below the other.
pub(crate) fn stack(parts: &[Matrix]) -> Matrix {
    let rows: usize = parts.iter().map(Matrix::nrows).sum();
    let mut stacked = Matrix::zeros(rows, parts[0].ncols());
    let mut at = 0;
    for part in parts {
        stacked.rows_mut(at, part.nrows()).copy_from(part);
        at += part.nrows();
    }
    stacked
}

/// A map `[rank, dim]`, row-major, as the matrix `[dim, rank]` that multiplies rows from the right.
pub(crate) fn map(dim: usize, elements: &[f64]) -> Matrix {
    Matrix::from_column_slice(dim, elements.len() / dim, elements)
}
