//! Kernels of `cuda/kernels/attention`.

mod append;
pub(super) mod cache;
mod decode;
mod merge_states;
mod prefill;
mod prefill_maps;

pub use append::{Append, AppendArgs, AppendTables, Rotary};
pub use decode::{
    Decode, DecodeArgs, DecodePlan, DecodePlanArgs, DecodeVariant, columns, part_slots, valid_lens,
};
pub use merge_states::{MergeStates, MergeStatesArgs, MergeStatesLastArriver, MergeStatesScratch};
pub use prefill::{
    MAX_SOFT_CAP, Prefill, PrefillArgs, PrefillKernel, PrefillPlan, PrefillPlanArgs, PrefillResult,
    PrefillVariant, max_tiles, prefill_valid_lens,
};
pub use prefill_maps::PrefillMaps;
