//! The one error type of this crate.

use std::path::{Path, PathBuf};

/// What a caller can get wrong, and what is wrong with a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument has the wrong shape, type, length or value.
    #[error("argument `{argument}`: expected {expected}, found {found}")]
    Argument {
        /// The argument's name.
        argument: &'static str,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },

    /// A file cannot be opened or mapped.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },

    /// A file ends before its header says.
    #[error("{}: truncated: expected {expected} bytes, found {found}", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes that the header promises.
        expected: u64,
        /// Bytes in the file.
        found: u64,
    },

    /// A file is no safetensors file, or holds a tensor that is no weight.
    #[error("{}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// A file has no such tensor.
    #[error("{}: no tensor named {name}", path.display())]
    MissingTensor {
        /// The tensor.
        name: String,
        /// The file.
        path: PathBuf,
    },

    /// Memory that a kernel would read in place starts between two of the units that it reads.
    #[error(
        "{what} starts at byte {offset}, kernels read it in place from multiples of {alignment} only: pack it"
    )]
    Misaligned {
        /// What starts there.
        what: String,
        /// The offset or address.
        offset: u64,
        /// What would divide it.
        alignment: u64,
    },

    /// Host memory that the device cannot reach.
    #[error("{what} lies in host memory that the device cannot reach: {fix}")]
    NotMapped {
        /// What lies there.
        what: String,
        /// How to make it reachable.
        fix: &'static str,
    },

    /// No path can compute this product.
    #[error("no path is left: {0}")]
    NoPath(String),

    /// The driver refused.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] cuda::Error),
}

impl Error {
    /// Shorthand for [`Error::Argument`].
    pub fn argument(argument: &'static str, expected: impl ToString, found: impl ToString) -> Self {
        Error::Argument { argument, expected: expected.to_string(), found: found.to_string() }
    }

    /// Shorthand for [`Error::Malformed`].
    pub(crate) fn malformed(path: &Path, reason: impl ToString) -> Self {
        Error::Malformed { path: path.to_path_buf(), reason: reason.to_string() }
    }
}
