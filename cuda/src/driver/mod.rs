//! The launch vocabulary on a real GPU.
//!
//! A [`Gpu`] stands for one CUDA context of the caller; it loads kernels, and a [`GpuFunction`] launches one on a stream of
//! the caller. Memory and streams are `cudarc`'s, re-exported as [`cudarc`].
//!
//! **Streams.** Nothing here creates a stream. In `cudarc` a second stream switches the caller's whole context to tracking
//! every slice with events; that is the caller's decision to make, and so is turning the tracking off around a
//! [graph](Graph) capture.
//!
//! **Errors** keep the driver call's name and its raw code. `cudarc`'s own error is never formatted, since that calls the
//! driver once more.

mod call;
mod function;
mod gpu;
mod graph;
mod launch_log;
mod mapped;
mod side_stream;
mod tensor_map;
mod timing;

pub use call::{failed, quiesce};
pub use function::{FunctionUse, GpuFunction};
pub use gpu::Gpu;
pub use graph::Graph;
pub use launch_log::{LAUNCH_LOG_VARIABLE, Launched, launches};
pub use mapped::{Mapped, MappedKind, Registered};
pub use side_stream::SideStream;
pub use timing::Timer;
