//! The device side: messages that lie in GPU memory.

pub mod transport;
mod transport_local;
#[cfg(feature = "nccl")]
mod transport_nccl;
#[cfg(feature = "nccl")]
mod transport_nccl_library;
