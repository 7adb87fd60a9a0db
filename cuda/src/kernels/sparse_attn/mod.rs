//! Kernels of `cuda/kernels/sparse-attn`.

mod gather;
mod resolve;

pub use gather::{Gather, GatherArgs};
pub use resolve::{MAX_BUCKETS, MAX_SELECTED, MAX_SLOTS, Resolve, ResolveArgs, resolve_shared_bytes};
