//! A small Llama engine on the CPU.
pub mod checkpoint;
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
