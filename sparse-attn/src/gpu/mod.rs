//! The kernels: plan, prepare, run.
//!
//! A plan needs no device: it checks every shape and fixes the grid. `prepare` compiles and loads and may block. `run` only
//! enqueues: no allocation, no synchronization, no read-back, so that a step can be captured in a CUDA graph. Selections and the
//! tables of slots live in device memory; a bad row keeps its state and is named by the caller's status word.
//!
//! Everything here is generic over [`Device`](cuda::launch::Device), so the emulator runs the same plans as a GPU.

mod gather;
mod resolve;

pub use gather::{Gather, GatherArgs, GatherConfig, GatherPlan};
pub use resolve::{Resolve, ResolveArgs, ResolveConfig, ResolvePlan};
