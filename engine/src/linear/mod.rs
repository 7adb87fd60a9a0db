//! The linear seam: where weight matrices live and how they are multiplied.
//!
//! Every matrix of a decoder layer and the output projection goes through [`place`] when a model is loaded. A method
//! implements [`Linear`] and gets a line in [`METHODS`] and in `place`.

mod ceilings;
mod dense;
mod host;
mod ledger;

use std::ops::Range;
use std::sync::Arc;

use attention::DType;
use ndarray::{ArcArray2, Array2, ArrayView1, ArrayView2, CowArray, Ix2, s};

use crate::Error;
use crate::mode::{Method, Mode};
pub use dense::Dense;
pub use host::{Host, HostOptions};
pub use ledger::{Ledger, StepTraffic};

/// The methods of this seam.
pub const METHODS: &[Method] = &[
    Method { name: "dense", summary: "all weights in memory, in f32", file: false, options: &[], with: &[] },
    Method {
        name: "host",
        summary: "a share in host memory, the rest in HBM: host:0.75[,format=stored|int8|int4|int4-zero-points|fp8-rows|fp8-blocks][,alpha=auto|0..1][,ceilings=JSON]",
        // The share stands where other methods have a file.
        file: true,
        options: &["format", "alpha", "ceilings"],
        with: &[],
    },
];

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

    /// Some of the output features, their biases added: `[tokens, rows]`. For ranks that split a matrix; nothing is counted in the
    /// [`Ledger`].
    ///
    /// # Errors
    /// [`Error::Argument`] when `x` has another width than the matrix, or there are no such rows.
    fn forward_rows(&self, x: ArrayView2<'_, f32>, rows: Range<usize>) -> Result<Array2<f32>, Error> {
        let w = self.matrix();
        check_part("rows", &rows, w.nrows())?;
        check_width(x, w.ncols())?;
        let mut y = x.dot(&w.slice(s![rows.clone(), ..]).t());
        if let Some(bias) = self.bias() {
            y += &ArrayView1::from(&bias[rows]);
        }
        Ok(y)
    }

    /// What some of the input features, `x` `[tokens, columns]`, add to the product: `[tokens, out_features]`, without the bias. As
    /// [`forward_rows`](Self::forward_rows) otherwise.
    ///
    /// # Errors
    /// [`Error::Argument`] when `x` is not so wide, or there are no such columns.
    fn forward_columns(&self, x: ArrayView2<'_, f32>, columns: Range<usize>) -> Result<Array2<f32>, Error> {
        let w = self.matrix();
        check_part("columns", &columns, w.ncols())?;
        check_width(x, columns.len())?;
        Ok(x.dot(&w.slice(s![.., columns]).t()))
    }

    /// The matrix W `[out_features, in_features]`, for methods that fold another matrix into it.
    fn matrix(&self) -> CowArray<'_, f32, Ix2>;

    /// The bias `[out_features]`.
    fn bias(&self) -> Option<&[f32]>;

    /// What a product of `tokens` tokens would move and take on a device of the [`Ledger`]; `None` for methods that keep none.
    fn predict(&self, device: usize, tokens: usize) -> Option<hybrid_gemm::Prediction> {
        let _ = (device, tokens);
        None
    }
}

fn check_part(argument: &'static str, part: &Range<usize>, of: usize) -> Result<(), Error> {
    match part.start <= part.end && part.end <= of {
        true => Ok(()),
        false => Err(Error::argument(argument, format!("a part of 0..{of}"), format!("{part:?}"))),
    }
}

fn check_width(x: ArrayView2<'_, f32>, columns: usize) -> Result<(), Error> {
    match x.ncols() == columns {
        true => Ok(()),
        false => Err(Error::argument("x", format!("{columns} columns"), x.ncols())),
    }
}

/// Checks a mode's name and options, before anything is loaded, and gives the ledger that its weights tell what they move.
///
/// # Errors
/// An unknown mode, or one that the method refuses.
pub fn check(mode: &Mode) -> Result<Ledger, Error> {
    match mode.accept("linear", METHODS)?.name {
        "host" => {
            HostOptions::new(mode)?;
            Ok(ceilings::of(mode)?.map_or_else(Ledger::default, Ledger::with))
        }
        _ => Ok(Ledger::default()),
    }
}

/// Puts a weight where the mode wants it. Methods that count what they move tell the ledger.
///
/// # Errors
/// An unknown mode, or one that the method refuses.
pub fn place(
    mode: &Mode,
    role: Role,
    weight: Weight,
    ledger: &Arc<Ledger>,
) -> Result<Box<dyn Linear>, Error> {
    let _ = role; // All matrices are alike to these methods.
    match mode.accept("linear", METHODS)?.name {
        "dense" => Ok(Box::new(Dense::new(weight))),
        "host" => Ok(Box::new(Host::new(weight, HostOptions::new(mode)?, ledger.clone())?)),
        name => unreachable!("method {name} is listed but not built"),
    }
}
