//! The one error type of this crate.

/// What a caller can get wrong, and what a pool of pages can run out of.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument has the wrong shape, length or value.
    #[error("argument `{argument}`: expected {expected}, found {found}")]
    Argument {
        /// The argument's name.
        argument: &'static str,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },

    /// A request does not fit the device pool, not even after every other request gave what it can spare. It was refused;
    /// the others keep what they have.
    #[error("device pool: the request needs {needed} pages, {available} of {capacity} can be had")]
    Refused {
        /// Pages that the request cannot do without.
        needed: usize,
        /// Pages free, or that other requests can spare.
        available: usize,
        /// Pages in the pool.
        capacity: usize,
    },

    /// A handle outlived its request: that was freed, or belongs to another cache.
    #[error("request {index} of generation {generation} is not live")]
    StaleRequest {
        /// The request's place.
        index: u32,
        /// The generation that the handle was made for.
        generation: u32,
    },

    /// A selection was made for another request or layer, or before the index changed.
    #[error("selection for {selected}, the cache is at {current}")]
    StaleSelection {
        /// What the selection was made for.
        selected: String,
        /// What it was used with.
        current: String,
    },

    /// A trace is not what this crate writes.
    #[error("trace, line {line}: expected {expected}, found {found}")]
    Trace {
        /// The line, from 1.
        line: usize,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },

    /// A page pool or an attention argument: see [`attention::Error`].
    #[error(transparent)]
    Attention(Box<attention::Error>),

    /// A kernel could not be prepared or launched.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] cuda::Error),
}

impl From<attention::Error> for Error {
    fn from(error: attention::Error) -> Self {
        Error::Attention(Box::new(error))
    }
}

impl Error {
    /// Shorthand for [`Error::Argument`].
    pub fn argument(argument: &'static str, expected: impl ToString, found: impl ToString) -> Self {
        Error::Argument { argument, expected: expected.to_string(), found: found.to_string() }
    }
}

/// Checks that a slice has exactly the length of a shape.
pub(crate) fn check_len(argument: &'static str, found: usize, shape: &[usize]) -> Result<(), Error> {
    let expected = shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
    if expected == Some(found) {
        return Ok(());
    }
    let elements = expected.map_or("more than fit memory".to_string(), |n| n.to_string());
    Err(Error::argument(argument, format!("{shape:?} = {elements} elements"), format!("{found} elements")))
}
