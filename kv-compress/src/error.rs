//! The one error type of this crate.

use attention::Element;

/// What a caller can get wrong: every variant names the argument, what was expected and what was found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument has the wrong shape, length or value.
    #[error("`{argument}`: expected {expected}, found {found}")]
    Argument {
        /// The argument's name.
        argument: &'static str,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },

    /// A calibration saw nothing: there is no statistic to make a projection from.
    #[error("calibration of layer {layer}: no {what} were added")]
    EmptyCalibration {
        /// The layer.
        layer: usize,
        /// What is missing: `tokens` or `W_O`.
        what: &'static str,
    },

    /// An activation, a weight or an element of a cache is NaN or infinite, perhaps only as stored in 16 bits. Nothing was added.
    #[error("`{argument}`: element {index} is {value}, not a finite number")]
    NotFinite {
        /// The argument's name.
        argument: &'static str,
        /// Which element, row-major; of a layer's maps, KV head after KV head.
        index: usize,
        /// What it is, as stored.
        value: f64,
    },

    /// A plan or a calibration was made for another model.
    #[error("made for another model: {what} is {expected} there, {found} here")]
    Mismatch {
        /// What differs.
        what: String,
        /// What the file was made for.
        expected: String,
        /// What the model has.
        found: String,
    },

    /// A file is not what it should be: no plan or calibration, damaged, or of a version that is not known.
    #[error("{what}: {reason}")]
    Malformed {
        /// What was read.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },

    /// What the user's measure of the model said.
    #[error("the measure of the model failed: {0}")]
    Measure(Box<dyn std::error::Error + Send + Sync>),

    /// The shared vocabulary refused an argument, or a page pool ran out.
    #[error(transparent)]
    Attention(Box<attention::Error>),

    /// A kernel could not be compiled, loaded or launched, or an argument does not fit it.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(Box<cuda::Error>),
}

impl From<attention::Error> for Error {
    fn from(error: attention::Error) -> Self {
        Error::Attention(Box::new(error))
    }
}

#[cfg(feature = "cuda")]
impl From<cuda::Error> for Error {
    fn from(error: cuda::Error) -> Self {
        Error::Cuda(Box::new(error))
    }
}

impl Error {
    /// Shorthand for [`Error::Argument`].
    pub fn argument(argument: &'static str, expected: impl ToString, found: impl ToString) -> Self {
        Error::Argument { argument, expected: expected.to_string(), found: found.to_string() }
    }

    /// Shorthand for [`Error::Mismatch`].
    pub(crate) fn mismatch(what: impl Into<String>, expected: impl ToString, found: impl ToString) -> Self {
        Error::Mismatch { what: what.into(), expected: expected.to_string(), found: found.to_string() }
    }

    /// Shorthand for [`Error::Malformed`].
    pub(crate) fn malformed(what: &'static str, reason: impl ToString) -> Self {
        Error::Malformed { what, reason: reason.to_string() }
    }
}

/// Checks that a slice has exactly the length of a shape.
pub(crate) fn check_len(argument: &'static str, found: usize, shape: &[usize]) -> Result<(), Error> {
    match shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim)) {
        Some(expected) if expected == found => Ok(()),
        _ => Err(Error::argument(argument, format!("{shape:?} elements"), found)),
    }
}

/// Checks a size that something is divided by.
pub(crate) fn at_least_1(argument: &'static str, value: usize) -> Result<usize, Error> {
    if value == 0 { Err(Error::argument(argument, "at least 1", 0)) } else { Ok(value) }
}

/// Checks that every element is a finite number.
pub(crate) fn check_finite<'a>(
    argument: &'static str,
    values: impl IntoIterator<Item = &'a f32>,
) -> Result<(), Error> {
    match values.into_iter().enumerate().find(|(_, x)| !x.is_finite()) {
        Some((index, &x)) => Err(Error::NotFinite { argument, index, value: f64::from(x) }),
        None => Ok(()),
    }
}

/// Rounds to the storage type, which must hold every element as a finite number.
pub(crate) fn stored<'a, T: Element>(
    argument: &'static str,
    values: impl IntoIterator<Item = &'a f32>,
) -> Result<Vec<T>, Error> {
    let stored: Vec<T> = values.into_iter().map(|&x| T::from_f32(x)).collect();
    match stored.iter().position(|x| !x.to_f64().is_finite()) {
        Some(index) => Err(Error::NotFinite { argument, index, value: stored[index].to_f64() }),
        None => Ok(stored),
    }
}
