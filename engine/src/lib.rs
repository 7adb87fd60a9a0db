//! A small Llama engine on the CPU: the first user of the longkv crates, and their demo.
//!
//! It runs Hugging Face checkpoints of the Llama family. What a long context costs is behind three seams, each a trait
//! that is implemented once per method; everything else is plain.
//!
//! | module | what it is |
//! |---|---|
//! | [`kv`] | seam: what a token leaves behind in a layer, and how attention reads it |
//! | [`linear`] | seam: where weight matrices live (in memory, or split between host memory and HBM) and how they are multiplied |
//! | [`ranks`] | seam: who computes a prompt |
//! | [`mode`] | how a method is asked for: `NAME[:FILE][,key=value…][+NAME]` |
//! | [`config`], [`checkpoint`], [`Model`] | a checkpoint: its shape, its weights, its forward pass |
//! | [`Session`] | one sequence in progress |
//! | [`tokenizer`], [`generate`] | text in, text out |
//! | [`compress`] | compression plans for the KV mode `fdc` |
//! | [`cli`] | the command line, for this package's binary and for those that bring ranks of their own |
//! | [`eval`], [`retrieval`] | what a mode costs in quality: perplexity, and finding planted values again |
//!
//! # Example
//!
//! ```
//! use longkv_engine::generate::argmax;
//! use longkv_engine::tokenizer::Tokenizer;
//! use longkv_engine::{Model, Session, ranks};
//! # fn main() -> Result<(), longkv_engine::Error> {
//! # let path = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/model"));
//! let model = Model::load(path, &"dense".parse()?)?;
//! let tokenizer = Tokenizer::read(path, model.config())?;
//! let mut session = Session::new(&model, &"dense".parse()?, ranks::open(&"single".parse()?)?, 64)?;
//!
//! let mut logits = session.prefill(&tokenizer.encode(b"import o")?)?;
//! let mut text = Vec::new();
//! for _ in 0..8 {
//!     let token = argmax(logits.view());
//!     text.extend(tokenizer.decode(&[token])?);
//!     logits = session.decode(token)?;
//! }
//! assert_eq!(session.len(), 16);
//! assert!(text.is_ascii());
//! # Ok(())
//! # }
//! ```

pub mod checkpoint;
pub mod cli;
pub mod compress;
pub mod config;
mod error;
pub mod eval;
pub mod generate;
pub mod kv;
pub mod linear;
pub mod mode;
mod model;
pub mod ranks;
pub mod retrieval;
mod session;
pub mod tokenizer;

pub use config::Config;
pub use error::Error;
pub use model::Model;
pub use session::Session;
