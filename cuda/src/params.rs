//! Structs and constants that kernels and host code share, generated from `cuda/include/*_params.h`.
//!
//! Do not edit: change the header and run `cargo xtask bindings`.

/// Digests of the headers that this file was generated from.
pub const HEADER_DIGESTS: &[(&str, &str)] = &[
    ("merge_states_params.h", "a1ca4ca86a37067ead0a7fdbb4a70c68ff2be74458bddc317fa12c2d18667ee8"),
    ("status_params.h", "4f7980c429bc31cb21feb31a9a1840964bf406b48721d9a745514ad009959d99"),
];

#[doc = " Shape of one merge of partial attention states."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct MergeStatesParams {
    #[doc = " Rows to merge, each into one state."]
    pub rows: u32,
    #[doc = " Partial states stored per row; a row's own count may be smaller."]
    pub max_splits: u32,
    #[doc = " Partial states that one block folds; only the last-arriver kernel reads it."]
    pub splits_per_block: u32,
    #[doc = " Explicit padding, always 0."]
    pub _pad: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of MergeStatesParams"][::core::mem::size_of::<MergeStatesParams>() - 16usize];
    ["Alignment of MergeStatesParams"][::core::mem::align_of::<MergeStatesParams>() - 4usize];
    ["Offset of field: MergeStatesParams::rows"][::core::mem::offset_of!(MergeStatesParams, rows) - 0usize];
    ["Offset of field: MergeStatesParams::max_splits"]
        [::core::mem::offset_of!(MergeStatesParams, max_splits) - 4usize];
    ["Offset of field: MergeStatesParams::splits_per_block"]
        [::core::mem::offset_of!(MergeStatesParams, splits_per_block) - 8usize];
    ["Offset of field: MergeStatesParams::_pad"][::core::mem::offset_of!(MergeStatesParams, _pad) - 12usize];
};
#[doc = " Nothing is wrong."]
pub const FAULT_NONE: FaultCode = 0;
#[doc = " A length exceeds the plan's maximum, or the memory that holds the sequence."]
pub const FAULT_BAD_LENGTH: FaultCode = 1;
#[doc = " A page id lies outside the pool."]
pub const FAULT_BAD_PAGE: FaultCode = 2;
#[doc = " A number of splits exceeds the plan's maximum."]
pub const FAULT_BAD_SPLITS: FaultCode = 3;
#[doc = " A row, slot or head index lies outside its array."]
pub const FAULT_BAD_INDEX: FaultCode = 4;
#[doc = " A work range or an offset array is not ascending, or ends outside its array."]
pub const FAULT_BAD_RANGE: FaultCode = 5;
#[doc = " What a kernel found wrong with one row: the high 32 bits of the status word. The low 32 bits are the row's index."]
pub type FaultCode = ::core::ffi::c_uint;
