//! Kernels of `cuda/kernels/homomorphic-quant`.

mod append;
mod decode;
mod page;
mod prefill;

pub use append::{Append, AppendArgs, AppendVariant};
pub use decode::{
    Decode, DecodeArgs, DecodePlan, DecodePlanArgs, DecodeVariant, Method, SideArgs, check_params, columns,
    part_slots,
};
pub use page::{PackedSegment, Pieces};
pub use prefill::{Prefill, PrefillArgs, PrefillResult, PrefillState, PrefillVariant, StateArgs};

/// Elements of a dense tensor; `usize::MAX`, which no view has, where no memory can hold them.
fn elements(extents: &[usize]) -> usize {
    if extents.contains(&0) {
        return 0;
    }
    extents.iter().copied().fold(1, usize::saturating_mul)
}

/// Bytes of a pool of `pages` pages that are `stride` bytes apart and `page` bytes long.
fn pool_bytes(pages: u32, stride: i64, page: usize) -> usize {
    match (pages, usize::try_from(stride)) {
        (0, _) => 0,
        (pages, Ok(stride)) => stride.saturating_mul(pages as usize - 1).saturating_add(page),
        (_, Err(_)) => usize::MAX,
    }
}

const fn larger(a: usize, b: usize) -> usize {
    if a > b { a } else { b }
}
