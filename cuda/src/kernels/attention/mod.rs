//! Kernels of `cuda/kernels/attention`.

mod merge_states;

pub use merge_states::{MergeStates, MergeStatesArgs, MergeStatesLastArriver, MergeStatesScratch};
