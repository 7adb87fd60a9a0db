//! The product on a GPU: plan, prepare, run.
//!
//! A plan needs no device: it checks every shape, fixes the grid and lays out the workspace. `prepare` compiles and loads and
//! may block. `run` only enqueues: no allocation, no synchronization, no read-back, so that a step can be captured in a CUDA
//! graph. What may change from call to call, tokens and alpha, lies in the schedule, one small struct in device memory that
//! the caller writes from [`Plan::schedule`]; a captured graph follows it. The kernel checks it: a bad one gives O of zeros
//! and is named by the caller's status word.
//!
//! - [`Plan`], [`Gemm`]: one matrix.
//! - [`DeviceWeights`]: where its columns lie; [`ResidentWeights`] pins the host part and copies the rest to HBM.
//! - [`DeviceSchedule`], [`DeviceReceipt`]: the schedule and the counters in device memory.
//! - The receipt: [`Plan::traffic`] turns the counters of a launch into [`Traffic`](crate::Traffic), to hold against
//!   [`Plan::predict`].
//!
//! Everything but what owns device memory is generic over [`Device`](cuda::launch::Device), so the emulator runs the same plans.

mod gemm;
mod on_device;
mod plan;
mod resident;

pub use gemm::{DeviceWeights, Gemm, GemmArgs, Strides};
pub use on_device::{DeviceReceipt, DeviceSchedule};
pub use plan::Plan;
pub use resident::ResidentWeights;
