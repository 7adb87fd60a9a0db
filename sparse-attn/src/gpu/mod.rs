//! The kernels: plan, prepare, run.
//!
//! A plan needs no device: it checks every shape and fixes the grid. `prepare` compiles and loads and may block. `run` only
//! enqueues: no allocation, no synchronization, no read-back, so that a step can be captured in a CUDA graph. Selections and the
//! tables of slots live in device memory; a bad row keeps its state and is named by the caller's status word.
//!
//! [`Step`] is all of them in a row, the decoding step of [`Cache`](crate::Cache) on the device; each is also there by itself.
//!
//! Everything here is generic over [`Device`], so the emulator runs the same plans as a GPU.

mod attend;
pub mod calibrate;
mod extent;
mod gather;
mod pages;
mod resolve;
mod select;
mod step;

use attention::DType;
use cuda::launch::Device;
use cuda::storage::Storage;
use cuda::table::dtype;

use crate::Error;
use crate::page::PageSpec;

pub use attend::{Attend, AttendArgs, AttendConfig, AttendPlan, List, Listed, Lists, ListsArgs, Output};
pub use extent::Extent;
pub use gather::{Gather, GatherArgs, GatherConfig, GatherPlan};
pub use pages::{Append, AppendArgs, Close, CloseArgs, Flush, FlushArgs, PagesConfig, PagesPlan};
pub use resolve::{Resolve, ResolveArgs, ResolveConfig, ResolvePlan};
pub use select::{
    Choose, ChooseArgs, ChooseConfig, Select, SelectArgs, SelectConfig, SelectPlan, SummariseArgs,
};
pub use step::{
    Memories, NewTokens, PrefetchArgs, PromptArgs, State, Step, StepArgs, StepConfig, StepPlan, Tables,
};

/// Checks that a plan was made for this device and these elements.
fn check_device<D: Device, E: Storage>(device: &D, page: &PageSpec, planned: u32) -> Result<(), Error> {
    match device.sm_count() {
        Some(found) if found != planned => {
            let (expected, found) = (format!("{planned} SMs, as planned"), format!("{found} SMs"));
            return Err(Error::argument("device", expected, found));
        }
        _ => {}
    }
    let kernels = match page.dtype() {
        DType::F16 => dtype::F16,
        DType::BF16 => dtype::BF16,
        // The CPU alone has pages of these.
        _ => dtype::F32,
    };
    if kernels != E::DTYPE || kernels == dtype::F32 {
        return Err(Error::argument("dtype", format!("16-bit pages of {}", E::NAME), page.dtype()));
    }
    Ok(())
}
