//! The dense kernels on a GPU: plan, prepare, run.
//!
//! A plan needs no device: it checks every shape, fixes the grid and lays out the workspace. `prepare` compiles and loads
//! and may block. `run` only enqueues: no allocation, no synchronization, no read-back, so that a step can be captured in a
//! CUDA graph. Lengths and page ids live in device memory and are checked there; a bad row gets output 0 and LSE −inf and is
//! named by the caller's status word.
//!
//! Everything here is generic over [`Device`](cuda::launch::Device), so the emulator runs the same plans as a GPU.

mod append;
mod cache;
mod decode;
mod merge_states;
mod prefill;

pub use append::{Append, AppendArgs, AppendConfig, AppendPlan, AppendTables};
pub use cache::CacheLayout;
pub use decode::{
    Decode, DecodeArgs, DecodeConfig, DecodePlan, DecodeStep, DecodeStepArgs, PlannedStep, Splits,
};
pub use merge_states::{Merge, MergeArgs, MergeConfig, MergePlan};
pub use prefill::{
    MAX_SOFT_CAP, PlannedTiles, Prefill, PrefillConfig, PrefillInputs, PrefillKernel, PrefillOutput,
    PrefillPlan, PrefillState, PrefillTiles, PrefillTilesArgs,
};

use crate::Error;

/// Refuses a device whose number of SMs is not the one that a plan was made for.
fn check_sm_count(device: &impl cuda::launch::Device, planned: u32) -> Result<(), Error> {
    match device.sm_count() {
        Some(found) if found != planned => {
            Err(Error::argument("device", format!("{planned} SMs, as planned"), format!("{found} SMs")))
        }
        _ => Ok(()),
    }
}
