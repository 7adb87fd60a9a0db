//! CUDA device code of the longkv kernels and the runtime that compiles, caches and launches it.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod error;
pub mod kernels;
pub mod launch;
pub mod memory;
pub mod probe;
pub mod sources;
pub mod table;

pub use error::Error;

#[cfg(feature = "driver")]
pub use cudarc;
