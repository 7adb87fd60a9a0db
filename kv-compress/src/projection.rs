//! Projections: which r of d dimensions of a head carry most of a product.
//!
//! Scores are QKᵀ and outputs are built from V·W_O. Either is a product X·Yᵀ of rows that share d dimensions (X = Q, Y = K;
//! or X = V, Y = W_Oᵀ), and a [`Basis`] holds d×d maps A and B whose first r columns give the approximation
//! `X·Yᵀ ≈ (X·A_r)·(Y·B_r)ᵀ`, exact at r = d. Ranks are **nested**: the maps of r are a prefix of those of any larger rank.
//!
//! | method | what it minimises | maps |
//! |---|---|---|
//! | [`Projection::Optimal`] | ‖XYᵀ - X̃Ỹᵀ‖ itself (KQ-SVD, arXiv 2512.05916) | A ≠ B |
//! | [`Projection::JointSvd`] | what [X; Y] loses (FDC: SVD of the stacked rows) | A = B orthogonal |
//! | [`Projection::KeyOnly`] | what the cached rows lose, K or V alone | A = B orthogonal |
//!
//! Queries of a group share their KV head's basis, because the cache holds one key for all of them.

use serde::{Deserialize, Serialize};

use crate::calibrate::{HeadGrams, LayerCalibration};
use crate::linalg::{Matrix, eigen, energy, scale_columns, singular, square_root};
use crate::{Error, RANK_STEP};

/// Singular values below this part of the largest carry no direction of the data.
const NEGLIGIBLE: f64 = 1e-9;

/// How a basis is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Projection {
    /// The best rank-r approximation of the product, by Eckart and Young: KQ-SVD's closed form, from Gram matrices.
    Optimal,
    /// One orthogonal basis from the SVD of the stacked rows, as FDC does.
    JointSvd,
    /// One orthogonal basis from the SVD of what is cached alone. A baseline.
    KeyOnly,
}

impl Projection {
    /// Every method.
    pub const ALL: [Projection; 3] = [Projection::Optimal, Projection::JointSvd, Projection::KeyOnly];
}

impl std::fmt::Display for Projection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Projection::Optimal => "optimal",
            Projection::JointSvd => "joint-svd",
            Projection::KeyOnly => "key-only",
        })
    }
}

/// Which side of a product is stored in the cache.
#[derive(Debug, Clone, Copy)]
enum Cached {
    Left,
    Right,
}

/// Maps of both sides of a product X·Yᵀ, and what each rank loses of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Basis {
    /// A `[d, d]`.
    left: Matrix,
    /// B `[d, d]`.
    right: Matrix,
    /// ‖XYᵀ - X̃Ỹᵀ‖² at rank i · [`RANK_STEP`], from 0 to d.
    lost: Vec<f64>,
}

impl Basis {
    /// A basis for rows with Gram matrices `x` = XᵀX and `y` = YᵀY.
    fn new(projection: Projection, x: &Matrix, y: &Matrix, cached: Cached) -> Result<Self, Error> {
        let (left, right) = match projection {
            Projection::Optimal => balanced(optimal(x, y)?, x, y, cached),
            Projection::JointSvd => orthogonal(&(x + y))?,
            Projection::KeyOnly => match cached {
                Cached::Left => orthogonal(x)?,
                Cached::Right => orthogonal(y)?,
            },
        };
        let d = x.nrows();
        let lost = (0..=d)
            .step_by(RANK_STEP)
            .map(|rank| {
                let kept = left.columns(0, rank) * right.columns(0, rank).transpose();
                energy(&(Matrix::identity(d, d) - kept), x, y)
            })
            .collect();
        Ok(Basis { left, right, lost })
    }

    /// d.
    pub fn dim(&self) -> usize {
        self.left.nrows()
    }

    /// A_rᵀ `[rank, d]`, row-major, as the weight of a linear layer: `x̃ = A_rᵀ·x`.
    ///
    /// # Errors
    /// [`Error::Argument`] when `rank` is above d.
    pub fn left(&self, rank: usize) -> Result<Vec<f64>, Error> {
        self.columns(&self.left, rank)
    }

    /// B_rᵀ `[rank, d]`, row-major: `ỹ = B_rᵀ·y`.
    ///
    /// # Errors
    /// [`Error::Argument`] when `rank` is above d.
    pub fn right(&self, rank: usize) -> Result<Vec<f64>, Error> {
        self.columns(&self.right, rank)
    }

    fn columns(&self, map: &Matrix, rank: usize) -> Result<Vec<f64>, Error> {
        if rank > self.dim() {
            return Err(Error::argument("rank", format!("at most {}", self.dim()), rank));
        }
        // Columns in order are the rows of the transpose.
        Ok(map.columns(0, rank).iter().copied().collect())
    }

    /// What the calibrated product loses: ‖XYᵀ - X̃Ỹᵀ‖² at rank `i · RANK_STEP`, `[d / RANK_STEP + 1]`. The first is the
    /// energy of the whole product; none is above the one before, up to rounding, for [`Projection::Optimal`].
    pub fn lost_energy(&self) -> &[f64] {
        &self.lost
    }
}

/// Bases of one KV head.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadBasis {
    /// Scores QKᵀ: left maps queries, right maps keys.
    pub scores: Basis,
    /// Outputs V·W_O: left maps values; right, transposed, maps W_O's block: `W̃_O = B_rᵀ·W_O`.
    pub values: Basis,
}

impl HeadBasis {
    pub(crate) fn new(projection: Projection, grams: &HeadGrams) -> Result<Self, Error> {
        Ok(HeadBasis {
            scores: Basis::new(projection, &grams.q, &grams.k, Cached::Right)?,
            values: Basis::new(projection, &grams.v, &grams.w_o, Cached::Left)?,
        })
    }
}

/// Bases of a layer's KV heads.
///
/// # Errors
/// [`Error::EmptyCalibration`] when the layer saw no token or no W_O. `layer` is the number that errors name.
pub fn project(
    layer: usize,
    calibration: &LayerCalibration,
    projection: Projection,
) -> Result<Vec<HeadBasis>, Error> {
    use rayon::prelude::*;
    calibration.heads(layer)?.par_iter().map(|grams| HeadBasis::new(projection, grams)).collect()
}

/// Eigenvectors of a Gram matrix, the strongest first, for both sides.
fn orthogonal(gram: &Matrix) -> Result<(Matrix, Matrix), Error> {
    let (_, vectors) = eigen(gram)?;
    Ok((vectors.clone(), vectors))
}

/// KQ-SVD from Gram matrices.
///
/// With polar forms X = U_x·X_½ and Y = U_y·Y_½, where X_½ = (XᵀX)^½, the product is U_x·M·U_yᵀ with M = X_½·Y_½ = U·Σ·Wᵀ.
/// Its best rank-r approximation keeps r singular triplets: X̃ = U_x·U_r·Σ_r^½ and Ỹ = U_y·W_r·Σ_r^½. Since
/// X_½⁻¹·U·Σ = Y_½·W, no inverse is needed: A = Y_½·W·Σ^-½ and B = X_½·U·Σ^-½.
///
/// Directions without energy (σ = 0) have no such column. A_ρ·B_ρᵀ is a projection onto those that have some, so the rest
/// is completed from the SVD of I - A_ρ·B_ρᵀ: then A·Bᵀ = I, and rank d is exact for any rows, calibrated or not.
fn optimal(x: &Matrix, y: &Matrix) -> Result<(Matrix, Matrix), Error> {
    let d = x.nrows();
    let (x_root, y_root) = (square_root(x)?, square_root(y)?);
    let m = singular(&x_root * &y_root)?;
    let solid = m.sigma.iter().take_while(|&&sigma| sigma > NEGLIGIBLE * m.sigma[0]).count();
    let (mut left, mut right) = (Matrix::zeros(d, d), Matrix::zeros(d, d));
    let factors = || m.sigma[..solid].iter().map(|sigma| sigma.sqrt().recip());
    left.columns_mut(0, solid).copy_from(&(y_root * m.w.columns(0, solid)));
    scale_columns(left.columns_mut(0, solid).as_view_mut(), factors());
    right.columns_mut(0, solid).copy_from(&(x_root * m.u.columns(0, solid)));
    scale_columns(right.columns_mut(0, solid).as_view_mut(), factors());
    if solid < d {
        let kept = left.columns(0, solid) * right.columns(0, solid).transpose();
        let rest = singular(Matrix::identity(d, d) - kept)?;
        let factors = || rest.sigma[..d - solid].iter().map(|sigma| sigma.sqrt());
        left.columns_mut(solid, d - solid).copy_from(&rest.u.columns(0, d - solid));
        scale_columns(left.columns_mut(solid, d - solid).as_view_mut(), factors());
        right.columns_mut(solid, d - solid).copy_from(&rest.w.columns(0, d - solid));
        scale_columns(right.columns_mut(solid, d - solid).as_view_mut(), factors());
    }
    Ok((left, right))
}

/// The same product with the scale of the cached side kept: at rank d cached rows have the energy that they had before, so
/// that storage types see familiar numbers however many tokens were calibrated.
fn balanced((left, right): (Matrix, Matrix), x: &Matrix, y: &Matrix, cached: Cached) -> (Matrix, Matrix) {
    let (map, gram) = match cached {
        Cached::Left => (&left, x),
        Cached::Right => (&right, y),
    };
    let factor = (gram.trace() / (gram * map).component_mul(map).sum()).sqrt();
    if !(factor.is_finite() && factor > 0.0) {
        return (left, right);
    }
    match cached {
        Cached::Left => (left * factor, right / factor),
        Cached::Right => (left / factor, right * factor),
    }
}
