//! The low-rank kernels on a GPU: plan, prepare, run.
//!
//! A plan needs no device: it checks every shape, fixes the grid and lays out the workspace. `prepare` compiles and loads
//! and may block. `run` only enqueues: no allocation, no synchronization, no read-back, so that a step can be captured in a
//! CUDA graph. Lengths and page ids live in device memory and are checked there; a bad row gets output 0 and LSE −inf and is
//! named by the caller's status word.
//!
//! - [`PackedMaps`]: a layer's maps as these kernels read them.
//! - [`Append`]: RoPE, projection onto each head's basis and the write to the cache, in one kernel.
//! - [`DecodeStep`], then [`Decode`] for each layer: attention in the reduced basis, balanced by bytes over heads of any
//!   ranks.
//! - [`Reconstruct`]: dense keys and values from the cache, which other methods need for every step: a baseline.
//!
//! Everything here is generic over [`Device`](cuda::launch::Device), so the emulator runs the same plans as a GPU.

mod append;
mod decode;
mod maps;
mod reconstruct;

pub use append::{Append, AppendArgs, AppendConfig, AppendPlan, AppendTables, Queries, Vectors};
pub use decode::{
    Decode, DecodeArgs, DecodeConfig, DecodePlan, DecodeStep, DecodeStepArgs, PlannedStep, Splits,
};
pub use maps::PackedMaps;
pub use reconstruct::{Reconstruct, ReconstructArgs, ReconstructPlan};

use attention::HeadShape;
use cuda::params::FdcHeads;

use crate::cache::PageLayout;
use crate::{Error, LayerRanks};

/// The dimension of a head before the reduction, one for keys and values, which `kernel` is written for.
fn head_dim(kernel: &str, shape: HeadShape) -> Result<usize, Error> {
    let constants = cuda::table::kernel(kernel).map_or(&[][..], |kernel| kernel.constants);
    let allowed =
        constants.iter().find(|constant| constant.name == "HEAD_DIM").map_or(&[][..], |dim| dim.allowed);
    match (shape.qk_dim(), shape.v_dim()) {
        (qk_dim, v_dim) if qk_dim == v_dim && allowed.contains(&(qk_dim as i64)) => Ok(qk_dim),
        (qk_dim, v_dim) if qk_dim == v_dim => {
            Err(Error::argument("shape", format!("heads of {allowed:?} dimensions"), qk_dim))
        }
        (qk_dim, v_dim) => {
            let expected = format!("keys and values of one dimension, {qk_dim}");
            Err(Error::argument("shape", expected, format!("values of {v_dim}")))
        }
    }
}

/// Ranks as the kernels take them, for the heads of `shape`.
fn heads(shape: HeadShape, ranks: &LayerRanks) -> Result<FdcHeads, Error> {
    // The ranks may have been made for another shape.
    LayerRanks::new(&shape, ranks.heads().to_vec())?;
    let pairs: Vec<_> = ranks.heads().iter().map(|ranks| (ranks.k, ranks.v)).collect();
    Ok(cuda::kernels::kv_compress::fdc_heads(&pairs)?)
}

/// log2 of the tokens of a page.
fn page_shift(layout: &PageLayout) -> u32 {
    layout.page_size().trailing_zeros()
}

/// A count that the device keeps in 31 bits.
fn to_u32(argument: &'static str, value: usize) -> Result<u32, Error> {
    u32::try_from(value)
        .ok()
        .filter(|value| *value <= i32::MAX as u32)
        .ok_or_else(|| Error::argument(argument, format!("at most {}", i32::MAX), value))
}

/// Refuses a device whose number of SMs is not the one that a plan was made for.
fn check_sm_count(device: &impl cuda::launch::Device, planned: u32) -> Result<(), Error> {
    match device.sm_count() {
        Some(found) if found != planned => {
            Err(Error::argument("device", format!("{planned} SMs, as planned"), format!("{found} SMs")))
        }
        _ => Ok(()),
    }
}
