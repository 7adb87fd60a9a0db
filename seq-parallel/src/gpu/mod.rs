//! The device side: messages that lie in GPU memory, and the ring on a GPU as plan, prepare, run.
//!
//! A plan needs no device: it works out the tiles of every step and lays out the workspace. `prepare` compiles and loads and may
//! block. `run` only enqueues: no allocation, no synchronization, no read-back, so that a step can be captured in a CUDA graph.
//! Kernels are generic over [`Device`](cuda::launch::Device), so the emulator runs the same plans as a GPU.

mod pack;
mod ring;
mod ring_step;
mod tile_list;
pub mod transport;
mod transport_local;
#[cfg(feature = "nccl")]
mod transport_nccl;
#[cfg(feature = "nccl")]
mod transport_nccl_library;
mod transport_staged;

pub use pack::{Pack, PackArgs, PackPlan, Rows};
pub use ring::{Block, DeviceCarrier, DeviceRing, DeviceRingArgs};
pub use ring_step::{RingStep, RingStepArgs, RingStepPlan};
