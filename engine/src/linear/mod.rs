//! The linear seam: where weight matrices live and how they are multiplied.
//!
//! Every matrix of a decoder layer and the output projection goes through [`place`] when a model is loaded. A method
//! implements [`Linear`] and gets a line in [`METHODS`] and in `place`.

mod dense;

use attention::DType;
use ndarray::{ArcArray2, Array2, ArrayView2, CowArray, Ix2};

use crate::Error;
use crate::mode::{Method, Mode};
pub use dense::Dense;

/// The methods of this seam.
pub const METHODS: &[Method] = &[Method {
    name: "dense",
    summary: "all weights in memory, in f32",
    file: false,
    options: &[],
    with: &[],
}];

/// Which matrix of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// One of a decoder layer.
    Layer {
        /// The layer, from 0.
        layer: usize,
        /// Which of its matrices.
        projection: Projection,
    },
    /// The output projection to the vocabulary.
    Output,
}

/// The matrices of a decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Projection {
    Query,
    Key,
    Value,
    AttentionOutput,
    Gate,
    Up,
    Down,
}

/// A weight as it comes from the checkpoint.
#[derive(Debug, Clone)]
pub struct Weight {
    /// W `[out_features, in_features]`. Shared with the embedding table where the checkpoint ties them.
    pub matrix: ArcArray2<f32>,
    /// `[out_features]`.
    pub bias: Option<Vec<f32>>,
    /// The type that the checkpoint stores: storing the matrix in it again loses nothing.
    pub stored: DType,
}

/// A linear layer `y = x Wᵀ + b`.
pub trait Linear: Send + Sync {
    /// Multiplies rows `x` `[tokens, in_features]` to `[tokens, out_features]`.
    ///
    /// # Errors
    /// [`Error::Argument`] when `x` has another width than the matrix.
    fn forward(&self, x: ArrayView2<'_, f32>) -> Result<Array2<f32>, Error>;

    /// The matrix W `[out_features, in_features]`, for methods that fold another matrix into it.
    fn matrix(&self) -> CowArray<'_, f32, Ix2>;

    /// The bias `[out_features]`.
    fn bias(&self) -> Option<&[f32]>;
}

/// Puts a weight where the mode wants it.
///
/// # Errors
/// An unknown mode, or one that the method refuses.
pub fn place(mode: &Mode, role: Role, weight: Weight) -> Result<Box<dyn Linear>, Error> {
    let _ = role; // All matrices are alike to the dense method.
    match mode.accept("linear", METHODS)?.name {
        "dense" => Ok(Box::new(Dense::new(weight))),
        name => unreachable!("method {name} is listed but not built"),
    }
}
