//! The product on a GPU: plan, prepare, run.
//!
//! A plan needs no device: it checks every shape, fixes the grid and lays out the workspace. `prepare` compiles and loads and
//! may block. `run` only enqueues: no allocation, no synchronization, no read-back, so that a step can be captured in a CUDA
//! graph. What may change from call to call, tokens and alpha, lies in the schedule, one small struct in device memory that
//! the caller writes from [`Plan::schedule`]; a captured graph follows it. The kernel checks it: a bad one gives O of zeros
//! and is named by the caller's status word. Of a staged call, whose launches have a schedule each, a bad one costs the columns of
//! its launch.
//!
//! - [`Plan`], [`Gemm`]: one matrix, read where it lies or staged by a copy engine ([`Gemm::run_staged`]).
//! - [`GroupedPlan`], [`GroupedGemm`]: one matrix per expert (MoE), in one launch; rows per expert lie in device memory too.
//! - [`DeviceWeights`]: where columns lie; [`ResidentWeights`] and [`ResidentExperts`] pin the host part and copy the rest to HBM, and
//!   wait for their readers when they are dropped; a [`ResidentGemm`] keeps its weights alive.
//! - [`DeviceSchedule`], [`DeviceTable`], [`DeviceReceipt`]: schedules, experts' places and counters in device memory.
//! - [`DeviceTimer`], [`AlphaControl`]: paths timed by events ([`Plan::tuned`]), and a controller that moves alpha in device memory.
//! - The receipt: [`Plan::traffic`] turns the counters of a launch into [`Traffic`](crate::Traffic), to hold against
//!   [`Plan::predict`].
//!
//! Everything but what owns device memory is generic over [`Device`](cuda::launch::Device), so the emulator runs the same plans.

mod adaptive;
mod gemm;
mod grouped;
mod on_device;
mod plan;
mod resident;
mod staging;

pub use adaptive::{AlphaControl, DeviceTimer};
pub use gemm::{DeviceWeights, Gemm, GemmArgs, Strides};
pub use grouped::{GroupedArgs, GroupedGemm, GroupedPlan};
pub use on_device::{DeviceReceipt, DeviceSchedule, DeviceTable};
pub use plan::Plan;
pub use resident::{ResidentExperts, ResidentGemm, ResidentWeights};
