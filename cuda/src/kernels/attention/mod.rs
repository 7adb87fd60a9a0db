//! Kernels of `cuda/kernels/attention`.

mod decode;
mod merge_states;

pub use decode::{Decode, DecodeArgs, DecodePlan, DecodePlanArgs, DecodeVariant, columns, part_slots};
pub use merge_states::{MergeStates, MergeStatesArgs, MergeStatesLastArriver, MergeStatesScratch};
