//! The one error type of this crate.

use crate::transport::Tag;

/// What a caller can get wrong, and what can go wrong with another rank: every variant names the culprit.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
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

    /// Heads that cannot be dealt to this many ranks.
    #[error("{scheme}: {what} = {count} cannot be dealt to {ranks} ranks: {rule}")]
    Divisibility {
        /// The scheme that asks for it.
        scheme: &'static str,
        /// What is dealt: `q_heads`, `kv_heads` …
        what: &'static str,
        /// How many there are.
        count: usize,
        /// To how many ranks.
        ranks: usize,
        /// Which divisibility failed.
        rule: &'static str,
    },

    /// Two ranks were set up differently.
    #[error("rank {rank} and rank {peer} differ in {what}: {here:#x} here, {there:#x} there")]
    Mismatch {
        /// The rank that noticed.
        rank: usize,
        /// The rank that differs.
        peer: usize,
        /// What differs.
        what: &'static str,
        /// The value here (a number, or a digest of what is longer).
        here: u64,
        /// The value there.
        there: u64,
    },

    /// Another rank failed. Every rank gets this error, with the same culprit and step.
    #[error("rank {rank}: rank {peer} {fault} at {at}")]
    Peer {
        /// The rank that reports.
        rank: usize,
        /// The rank that failed.
        peer: usize,
        /// What was going on.
        at: Tag,
        /// How it failed.
        fault: PeerFault,
    },

    /// The library under a transport refused a call.
    #[error("{library}: {call} failed with {code}: {message}")]
    Library {
        /// `MPI` or `NCCL`.
        library: &'static str,
        /// The call.
        call: &'static str,
        /// Its raw error code.
        code: i64,
        /// What the library says of it.
        message: String,
    },

    /// A kernel or the device refused.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(Box<cuda::Error>),

    /// The shared vocabulary refused an argument.
    #[error(transparent)]
    Attention(#[from] attention::Error),
}

/// How a rank failed the others.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PeerFault {
    /// It sent or took nothing within the deadline.
    #[error("was silent for {waited_ms} ms")]
    Stalled {
        /// Milliseconds waited.
        waited_ms: u64,
    },
    /// Its end of the transport is gone.
    #[error("is gone")]
    Gone,
    /// It sent something that is no message of this step.
    #[error("sent garbage ({0})")]
    Garbage(String),
    /// The library under the transport cannot reach it.
    #[error("cannot be reached ({0})")]
    Unreachable(String),
    /// It gave up by itself.
    #[error("gave up ({0})")]
    Aborted(String),
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
}

/// Checks that a slice has exactly the length of a shape.
pub(crate) fn check_len(argument: &'static str, found: usize, shape: &[usize]) -> Result<(), Error> {
    match shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim)) {
        Some(expected) if expected == found => Ok(()),
        _ => Err(Error::argument(argument, format!("{shape:?} elements"), found)),
    }
}
