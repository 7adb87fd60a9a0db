//! Low-rank KV cache with per-head ranks, read without decompression (FDC).
//!
//! Per layer and KV head a projection keeps r_k of the key dimensions and r_v of the value dimensions; attention runs in the
//! reduced basis, and the ranks follow a plan that spends bytes where accuracy needs them.
//!
//! Source: the FDC paper.
//!
//! # Map
//!
//! - [`HeadRanks`], [`LayerRanks`]: ranks per KV head.
//! - [`cache`]: the ragged paged cache and its layout.
//! - `gpu` (feature `cuda`): append and balanced decode on a GPU.
//! - [`Error`]: what a caller can get wrong.

pub mod cache;
pub mod calibrate;
mod error;
mod format;
#[cfg(feature = "cuda")]
pub mod gpu;
mod linalg;
mod maps;
pub mod merge;
mod plan;
pub mod projection;
pub mod rank_plan;
mod ranks;
pub mod reference;

pub use error::Error;
pub use maps::{HeadMaps, LayerProjection};
pub use plan::CompressionPlan;
pub use ranks::{HeadRanks, LayerRanks, RANK_STEP};
