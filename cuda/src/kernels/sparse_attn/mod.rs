//! Kernels of `cuda/kernels/sparse-attn`.

mod attend;
mod gather;
mod pages;
mod resolve;
mod select;

use crate::Error;

pub use attend::{Attend, AttendArgs, AttendVariant, Plan, PlanArgs, part_slots};
pub use gather::{Gather, GatherArgs};
pub use pages::{Append, AppendArgs, Close, CloseArgs, Flush, FlushArgs};
pub use resolve::{COUNTS, MAX_BUCKETS, MAX_SELECTED, MAX_SLOTS, Resolve, ResolveArgs, resolve_shared_bytes};
pub use select::{
    MAX_GROUP, SELECT_SHARED_BYTES, Score, ScoreArgs, Select, SelectArgs, Summarise, SummariseArgs,
    score_shared_bytes,
};

/// Checks that sizes are at least 1 and that kernels can count them.
fn check_sizes(kernel: &str, sizes: &[(&'static str, u32)]) -> Result<(), Error> {
    for &(argument, value) in sizes {
        if !(1..=1 << 30).contains(&value) {
            return Err(Error::argument(kernel, argument, "1 to 2³⁰", value));
        }
    }
    Ok(())
}

/// Checks that rows are whole requests.
fn check_rows(kernel: &str, rows: u32, kv_heads: u32) -> Result<(), Error> {
    if rows.is_multiple_of(kv_heads) {
        return Ok(());
    }
    Err(Error::argument(kernel, "rows", format_args!("a multiple of the {kv_heads} KV heads"), rows))
}

/// Product of sizes; more than memory holds if it does not fit.
fn product(sizes: &[u32]) -> usize {
    sizes.iter().fold(1usize, |all, &size| all.saturating_mul(size as usize))
}
