//! All weights in memory, in f32: the reference of the linear seam.

use ndarray::linalg::general_mat_mul;
use ndarray::{ArcArray2, Array2, ArrayView2, Axis, CowArray, Ix2};
use rayon::prelude::*;

use super::{Linear, Weight};
use crate::Error;

/// Rows of `x` up to which each is multiplied on its own: a matrix product packs its operands first, which pays only
/// when the packed weights are used for several rows.
const GEMV_ROWS: usize = 4;
/// Elements of W below which threads cost more than they bring.
const PARALLEL_ELEMENTS: usize = 1 << 17;

/// A matrix in memory.
pub struct Dense {
    matrix: ArcArray2<f32>,
    bias: Option<Vec<f32>>,
}

impl Dense {
    /// Takes the weight as it is.
    pub fn new(weight: Weight) -> Self {
        // Rows are read as slices.
        let matrix = if weight.matrix.is_standard_layout() {
            weight.matrix
        } else {
            weight.matrix.as_standard_layout().into_owned().into_shared()
        };
        Dense { matrix, bias: weight.bias }
    }

    /// `y = W x` for one row: memory-bound, so it reads W once, in order.
    fn gemv(&self, x: &[f32], y: &mut [f32]) {
        let w = self.matrix.as_slice().expect("rows in order since `new`");
        let rows = |(first, y): (usize, &mut [f32])| {
            for (row, y) in w[first * x.len()..].chunks_exact(x.len()).zip(y) {
                *y = dot(row, x);
            }
        };
        if w.len() < PARALLEL_ELEMENTS {
            return rows((0, y));
        }
        let chunk = chunk(y.len());
        y.par_chunks_mut(chunk).enumerate().for_each(|(i, y)| rows((i * chunk, y)));
    }

    /// `Y = X Wᵀ`, threads on columns of Y.
    fn gemm(&self, x: ArrayView2<'_, f32>, y: &mut Array2<f32>) {
        let chunk = chunk(y.ncols());
        let columns: Vec<_> = y.axis_chunks_iter_mut(Axis(1), chunk).collect();
        let weights: Vec<_> = self.matrix.axis_chunks_iter(Axis(0), chunk).collect();
        columns
            .into_par_iter()
            .zip(weights)
            .for_each(|(mut y, w)| general_mat_mul(1.0, &x, &w.t(), 0.0, &mut y));
    }
}

/// Rows of W per task: a few tasks per thread even out their speeds. The cut moves no sum, so results do not depend on
/// the number of threads.
fn chunk(rows: usize) -> usize {
    rows.div_ceil(2 * rayon::current_num_threads()).max(16)
}

impl Linear for Dense {
    fn forward(&self, x: ArrayView2<'_, f32>) -> Result<Array2<f32>, Error> {
        if x.ncols() != self.matrix.ncols() {
            return Err(Error::argument("x", format!("{} columns", self.matrix.ncols()), x.ncols()));
        }
        let mut y = Array2::zeros((x.nrows(), self.matrix.nrows()));
        if x.nrows() <= GEMV_ROWS {
            let x = x.as_standard_layout();
            for (x, mut y) in x.rows().into_iter().zip(y.rows_mut()) {
                self.gemv(x.as_slice().expect("standard layout"), y.as_slice_mut().expect("a new array"));
            }
        } else {
            self.gemm(x, &mut y);
        }
        if let Some(bias) = &self.bias {
            y += &ndarray::ArrayView1::from(bias);
        }
        Ok(y)
    }

    fn matrix(&self) -> CowArray<'_, f32, Ix2> {
        self.matrix.view().into()
    }

    fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }
}

/// Dot product in independent lanes, which the compiler turns into vector code without leave to reorder sums.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [0.0f32; LANES];
    let (a, a_tail) = a.as_chunks::<LANES>();
    let (b, b_tail) = b.as_chunks::<LANES>();
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    let tail: f32 = a_tail.iter().zip(b_tail).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f32>() + tail
}

#[cfg(test)]
mod tests {
    use super::*;
    use attention::DType;

    #[test]
    fn every_path_is_the_definition() {
        for (case, tokens, inputs, outputs, bias) in [
            ("one row", 1, 33, 17, true),
            ("rows of a gemv", 4, 16, 5, false),
            ("smallest product", 5, 16, 5, true),
            ("threads on rows", 2, 512, 300, true),
            ("threads on columns", 40, 100, 130, false),
            ("one output", 1, 7, 1, false),
            ("no rows", 0, 7, 3, true),
        ] {
            let mut rng = fastrand::Rng::with_seed(11);
            let mut random =
                |rows, columns| Array2::from_shape_simple_fn((rows, columns), || rng.f32() - 0.5);
            let (x, w, b) = (random(tokens, inputs), random(outputs, inputs), random(1, outputs));
            // A transposed view: the layout of the operands must not matter.
            let w = w.t().as_standard_layout().into_owned().reversed_axes();
            let linear = Dense::new(Weight {
                matrix: w.to_shared(),
                bias: bias.then(|| b.row(0).to_vec()),
                stored: DType::F32,
            });
            let y = linear.forward(x.view()).unwrap();
            assert_eq!(y.dim(), (tokens, outputs), "{case}");
            for ((t, o), &found) in y.indexed_iter() {
                let exact: f64 =
                    (0..inputs).map(|i| f64::from(x[[t, i]]) * f64::from(w[[o, i]])).sum::<f64>()
                        + if bias { f64::from(b[[0, o]]) } else { 0.0 };
                assert!(
                    (f64::from(found) - exact).abs() < 1e-5,
                    "{case}: [{t}, {o}] is {found}, not {exact}"
                );
            }
            // In parts, as ranks that split the matrix have it.
            let (row, column) = (outputs / 3, inputs / 2);
            let mut parts = Array2::zeros((tokens, 0));
            for rows in [0..row, row..row, row..outputs] {
                let part = linear.forward_rows(x.view(), rows).unwrap();
                parts = ndarray::concatenate![Axis(1), parts, part];
            }
            let mut sum = Array2::<f32>::zeros((tokens, outputs));
            for columns in [0..column, column..inputs] {
                let x = x.slice(ndarray::s![.., columns.clone()]);
                sum += &linear.forward_columns(x, columns).unwrap();
            }
            if let Some(bias) = linear.bias() {
                sum += &ndarray::ArrayView1::from(bias);
            }
            for ((index, &whole), (&rows, &columns)) in y.indexed_iter().zip(parts.iter().zip(&sum)) {
                assert!((rows - whole).abs() < 1e-5, "{case}, rows: {index:?} is {rows}, not {whole}");
                assert!(
                    (columns - whole).abs() < 1e-5,
                    "{case}, columns: {index:?} is {columns}, not {whole}"
                );
            }
            for (argument, refused) in [
                ("rows", linear.forward_rows(x.view(), 0..outputs + 1)),
                ("columns", linear.forward_columns(x.view(), 1..inputs + 1)),
                ("x", linear.forward_columns(x.view(), 0..inputs - 1)),
            ] {
                let error = refused.expect_err(case).to_string();
                assert!(error.starts_with(argument), "{case}: {error}");
            }
            let wide = Array2::zeros((tokens, inputs + 1));
            assert!(
                matches!(linear.forward(wide.view()), Err(Error::Argument { argument: "x", .. })),
                "{case}"
            );
        }
    }
}
