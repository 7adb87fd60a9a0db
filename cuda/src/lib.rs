//! CUDA device code of the longkv kernels and the runtime that compiles, caches and launches it.
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod cache;
pub mod compile;
pub mod digest;
#[cfg(feature = "driver")]
pub mod driver;
mod error;
pub mod kernels;
pub mod launch;
pub mod memory;
pub mod nvrtc;
pub mod params;
pub mod prebuilt;
pub mod probe;
pub mod sources;
pub mod status;
pub mod storage;
pub mod table;
pub mod workspace;

pub use error::Error;

#[cfg(feature = "driver")]
pub use cudarc;
