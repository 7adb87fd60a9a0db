//! The kernels: plan, prepare, run.
//!
//! A plan needs no device: it checks every shape, fixes the grid and lays out the workspace. `prepare` compiles and loads
//! and may block. `run` only enqueues: no allocation, no synchronization, no read-back, so that a step can be captured in a
//! CUDA graph. Lengths and page ids live in device memory and are checked there; a bad sequence gets output 0 and LSE −inf and
//! is named by the caller's status word.
//!
//! [`Append`] quantizes what new tokens complete and keeps the rest in 16 bits, for one token per step as for a whole prompt.
//! [`Decode`] attends to the result, split over the pages; [`Prefill`] does so for ragged batches of many queries, in one pass or
//! continuing a state, so that an exact prefill is dense attention over the new tokens and then this over the cached ones. All
//! work on the caller's [`Pools`]: pages in [`PageLayout::Packed`](crate::page::PageLayout::Packed), sinks and open blocks as
//! [`SidePage`](crate::page::SidePage)s.
//!
//! A NaN or infinity among new keys or values is not an error here, since nobody would read one back. In a closed block, scale
//! and minimum of the group that it belongs to become NaN and the group's codes 0; in 16 bits it stays what it is. What it hits:
//!
//! - a key: queries of its KV head that see it, or of a closed block any token, in their whole output and LSE, which become NaN. In
//!   16 bits arithmetic decides: a score of −∞ counts as masked.
//! - a value: the channels of its group, or in 16 bits its own, in queries of its KV head that see it; these cease to be finite. So
//!   may those of queries that do not see it, where their tile of rows loads it: 64, 32 or 16 rows (queries times query heads of the KV
//!   head) of a prefill, the columns of a block of decode; tokens are loaded by closed blocks, and the sinks and the open block 16 at a time.
//!
//! All other queries, channels, KV heads and sequences keep their bits. Values beyond about f32::MAX / 3Π in magnitude may overflow
//! in sums and count as infinite.
//!
//! Everything here is generic over [`Device`](cuda::launch::Device), so the emulator runs the same plans as a GPU.

mod append;
mod decode;
mod params;
mod pools;
mod prefill;

pub use append::{Append, AppendArgs, AppendConfig, AppendPlan};
pub use attention::gpu::Splits;
pub use cuda::kernels::homomorphic_quant::Method;
use cuda::kernels::homomorphic_quant::SideArgs;
pub use decode::{Decode, DecodeArgs, DecodeConfig, DecodePlan, DecodeStep, DecodeStepArgs, PlannedStep};
pub use pools::{Counts, Places, Pools};
pub use prefill::{Prefill, PrefillConfig, PrefillInputs, PrefillOutput, PrefillPlan, PrefillState};

use crate::Error;
use crate::page::HeadGeometry;

/// A count that the device keeps in 31 bits.
fn to_u32(argument: &'static str, value: usize) -> Result<u32, Error> {
    u32::try_from(value)
        .ok()
        .filter(|value| *value <= i32::MAX as u32)
        .ok_or_else(|| Error::argument(argument, format!("at most {}", i32::MAX), value))
}

/// Refuses head sizes that a kernel is not written for.
fn check_dims(kernel: &str, geometry: &HeadGeometry) -> Result<(), Error> {
    let constants = cuda::table::kernel(kernel).map_or(&[][..], |kernel| kernel.constants);
    for (argument, constant, dim) in
        [("qk_dim", "QK_DIM", geometry.qk_dim), ("v_dim", "V_DIM", geometry.v_dim)]
    {
        let of_dim = constants.iter().find(|known| known.name == constant);
        let allowed = of_dim.map_or(&[][..], |constant| constant.allowed);
        if !allowed.contains(&(dim as i64)) {
            return Err(Error::argument(argument, format!("one of {allowed:?} channels"), dim));
        }
    }
    Ok(())
}

/// What a kernel's launch would refuse is an argument of the plan.
fn of_plan(error: cuda::Error) -> Error {
    match error {
        cuda::Error::Argument { argument, expected, found, .. } => {
            Error::Argument { argument, expected, found }
        }
        other => Error::Cuda(other),
    }
}

const fn side_args<'a>(places: &Places<'a>) -> SideArgs<'a> {
    SideArgs { block_table: places.block_table, sink_page: places.sink_page, open_page: places.open_page }
}

/// Refuses storage of another type than the cache's.
fn check_dtype<E: cuda::storage::Storage>(pools: &Pools) -> Result<(), Error> {
    let expected = pools.geometry().dtype;
    if E::NAME == expected.to_string() {
        return Ok(());
    }
    Err(Error::argument("E", expected, E::NAME))
}
