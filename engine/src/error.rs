//! The one error type of the library.

use std::path::{Path, PathBuf};

use attention::DType;

/// What can be wrong with a checkpoint, a mode or a request. Each message is one line that names the culprit.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },

    /// A file is not what its name says.
    #[error("{}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// A key of `config.json` has a value that makes no model, or one that this engine has no code for.
    #[error("config.json: {key}: expected {expected}, found {found}")]
    Config {
        /// The key.
        key: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },

    /// The checkpoint's architecture is none of those that the engine knows.
    #[error("config.json: architecture {found} is not supported (supported: {supported})")]
    UnsupportedArchitecture {
        /// The architecture named by the checkpoint.
        found: String,
        /// The architectures that work.
        supported: String,
    },

    /// The checkpoint extends its context in a way that the engine does not know.
    #[error("config.json: RoPE type {found} is not supported (supported: {supported})")]
    UnsupportedRope {
        /// The `rope_type` of the checkpoint.
        found: String,
        /// The types that work.
        supported: String,
    },

    /// The checkpoint lacks a weight.
    #[error("{}: no tensor named {name}", checkpoint.display())]
    MissingTensor {
        /// The tensor.
        name: String,
        /// The checkpoint's folder.
        checkpoint: PathBuf,
    },

    /// A weight has another shape than the configuration implies.
    #[error("tensor {name}: expected shape {expected:?}, found {found:?}")]
    TensorShape {
        /// The tensor.
        name: String,
        /// Shape implied by `config.json`.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },

    /// A weight is stored in a type other than f32, f16 or bf16.
    #[error("tensor {name}: expected {}, {} or {}, found {found}", DType::F32, DType::F16, DType::BF16)]
    TensorType {
        /// The tensor.
        name: String,
        /// Type in the file.
        found: String,
    },

    /// A weight has an infinity or a NaN.
    #[error("tensor {name}: element {index} is {value}, not a finite number")]
    TensorValue {
        /// The tensor.
        name: String,
        /// Which element, row-major.
        index: usize,
        /// What it is.
        value: f32,
    },

    /// A token is not in the vocabulary.
    #[error("token {token} is out of range: the vocabulary has {vocab_size} tokens")]
    Token {
        /// The token.
        token: u32,
        /// Tokens in the vocabulary.
        vocab_size: usize,
    },

    /// The model gives infinities or NaN: its weights, or what a cache stores in 16 bits, overflow.
    #[error(
        "the logits after position {position} are not finite (token {token}: {value}): the model overflows"
    )]
    Logits {
        /// Position in the sequence, from 0.
        position: usize,
        /// The first token whose logit is not finite.
        token: usize,
        /// That logit.
        value: f32,
    },

    /// A sequence is longer than the model was made for.
    #[error("a context of {asked} tokens is over the model's maximum of {maximum}")]
    Context {
        /// Tokens asked for.
        asked: usize,
        /// The model's maximum.
        maximum: usize,
    },

    /// No method of this name.
    #[error("unknown {seam} mode {found:?} (known: {known})")]
    UnknownMode {
        /// Which seam: `KV`, `linear` or `ranks`.
        seam: &'static str,
        /// The name asked for.
        found: String,
        /// The names that exist.
        known: String,
    },

    /// A mode that cannot be parsed, or that its method refuses.
    #[error("mode {mode:?}: {reason}")]
    Mode {
        /// The mode as it was written.
        mode: String,
        /// What is wrong with it.
        reason: String,
    },

    /// The tokenizer is missing or refused its input.
    #[error("tokenizer: {0}")]
    Tokenizer(String),

    /// An argument has a value that does not fit.
    #[error("{argument}: expected {expected}, found {found}")]
    Argument {
        /// The argument's name.
        argument: &'static str,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },

    /// An attention kernel refused its arguments.
    #[error(transparent)]
    Attention(Box<attention::Error>),

    /// The quantized cache refused its arguments.
    #[error(transparent)]
    HomomorphicQuant(Box<homomorphic_quant::Error>),

    /// Weights in host memory were refused.
    #[error(transparent)]
    HybridGemm(Box<hybrid_gemm::Error>),

    /// A compression plan does not fit, or cannot be made.
    #[error(transparent)]
    Compress(Box<kv_compress::Error>),

    /// The sparse cache refused its arguments.
    #[error(transparent)]
    SparseAttn(Box<sparse_attn::Error>),

    /// Ranks cannot share a prompt in this way, or one of them failed.
    #[error(transparent)]
    SeqParallel(Box<seq_parallel::Error>),
}

/// Errors of the crates are boxed, so that a `Result` of this crate stays small.
macro_rules! from_boxed {
    ($($variant:ident: $error:ty),+) => {
        $(impl From<$error> for Error {
            fn from(error: $error) -> Self {
                Error::$variant(Box::new(error))
            }
        })+
    };
}

from_boxed!(
    Attention: attention::Error,
    HomomorphicQuant: homomorphic_quant::Error,
    HybridGemm: hybrid_gemm::Error,
    Compress: kv_compress::Error,
    SparseAttn: sparse_attn::Error,
    SeqParallel: seq_parallel::Error
);

impl Error {
    /// Shorthand for [`Error::Argument`].
    pub fn argument(argument: &'static str, expected: impl ToString, found: impl ToString) -> Self {
        Error::Argument { argument, expected: expected.to_string(), found: found.to_string() }
    }

    /// Shorthand for [`Error::Config`].
    pub fn config(key: impl Into<String>, expected: impl ToString, found: impl ToString) -> Self {
        Error::Config { key: key.into(), expected: expected.to_string(), found: found.to_string() }
    }

    /// Shorthand for [`Error::Malformed`].
    pub fn malformed(path: &Path, reason: impl ToString) -> Self {
        Error::Malformed { path: path.to_path_buf(), reason: reason.to_string() }
    }

    /// Makes an [`Error::Read`] of this path.
    pub(crate) fn reading(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Error::Read { path, source }
    }
}
