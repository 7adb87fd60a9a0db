//! The one error type of this crate.

/// What a caller can get wrong, what a page pool can run out of, and what can be wrong with a stream.
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

    /// A value to be quantized is infinite or not a number, or becomes so in the cache's storage type. Nothing was
    /// stored.
    #[error(
        "argument `{argument}`: element {index} is {value} in the cache's storage type, not a finite number"
    )]
    NotFinite {
        /// The argument's name.
        argument: &'static str,
        /// Which element, row-major.
        index: usize,
        /// What it is, as text.
        value: String,
    },

    /// A stream ends, or its reader or writer fails, in the middle of something.
    #[error("stream, {section}: {message}")]
    Stream {
        /// What was being read or written.
        section: &'static str,
        /// What kind of failure; a stream that is cut short is [`UnexpectedEof`](std::io::ErrorKind::UnexpectedEof).
        kind: std::io::ErrorKind,
        /// What the reader or writer said.
        message: String,
    },

    /// A stream is not what this crate writes.
    #[error("stream, {section}: {field}: expected {expected}, found {found}")]
    Malformed {
        /// What was being read.
        section: &'static str,
        /// The field that is wrong.
        field: &'static str,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },

    /// Bytes of a stream changed on their way.
    #[error("stream, {section}: checksum {found:#010x}, expected {expected:#010x}")]
    Checksum {
        /// The section whose checksum does not fit.
        section: &'static str,
        /// The checksum in the stream.
        expected: u32,
        /// The checksum of the bytes received.
        found: u32,
    },

    /// A stream is well formed, but made for a cache of another configuration. Raised before any payload is read.
    #[error("stream: {field} differs: this cache has {expected}, the stream {found}")]
    Mismatch {
        /// What differs.
        field: &'static str,
        /// The receiver's.
        expected: String,
        /// The sender's.
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
