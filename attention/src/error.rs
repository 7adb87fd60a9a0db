//! The one error type of this crate.

/// What a caller can get wrong, and what a page pool can run out of.
///
/// Values that a GPU kernel would read from device memory (lengths, page ids, split counts) are not errors: a bad one
/// makes its row a [`Fault`](crate::Fault).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument has a value, length or shape that does not fit.
    #[error("argument `{argument}`: expected {expected}, found {found}")]
    Argument {
        /// The argument's name.
        argument: &'static str,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },

    /// A page pool has too few free pages. Nothing was allocated.
    #[error("page pool: {requested} pages requested, {free} of {capacity} free")]
    OutOfPages {
        /// Pages asked for.
        requested: usize,
        /// Pages free at that moment.
        free: usize,
        /// Pages in the pool.
        capacity: usize,
    },

    /// A page handle outlived its page: the page was released by its last owner, or belongs to another pool.
    #[error("page pool: page {page} of generation {generation} is not allocated")]
    StalePage {
        /// The page number.
        page: u32,
        /// The generation that the handle was made for.
        generation: u32,
    },

    /// A page is written through a handle while other owners share it. Ask for a private copy first.
    #[error("page pool: page {page} has {owners} owners, writing needs exactly 1")]
    SharedPage {
        /// The page number.
        page: u32,
        /// Owners of the page.
        owners: u32,
    },

    /// A kernel could not be prepared or launched.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] cuda::Error),
}

impl Error {
    /// Shorthand for [`Error::Argument`].
    pub fn argument(argument: &'static str, expected: impl ToString, found: impl ToString) -> Self {
        Error::Argument { argument, expected: expected.to_string(), found: found.to_string() }
    }
}

/// Checks that a slice has exactly the length of a shape.
///
/// # Errors
/// [`Error::Argument`] when the product of `shape` overflows or differs from `found`.
pub(crate) fn check_len(argument: &'static str, found: usize, shape: &[usize]) -> Result<(), Error> {
    let expected = shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
    if expected == Some(found) {
        return Ok(());
    }
    let elements = expected.map_or("more elements than fit memory".to_string(), |n| format!("{n} elements"));
    Err(Error::argument(argument, format!("{shape:?} = {elements}"), format!("{found} elements")))
}
