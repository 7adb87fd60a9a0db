//! Structs and constants that kernels and host code share, generated from `cuda/include/*_params.h`.
//!
//! Do not edit: change the header and run `cargo xtask bindings`.

/// Digests of the headers that this file was generated from.
pub const HEADER_DIGESTS: &[(&str, &str)] = &[
    ("append_params.h", "d3a48d068dfaa9b2097a8b57cba00cd93802a6e3fa15338c687b9918f2026910"),
    ("decode_params.h", "549968e16df86614bfc18febb9e8a134b45a2341d7ec89cffc90efeaa94a6fee"),
    ("fdc_params.h", "81d02e68ec5e2a1571023e5f5f62e790966675690ec912b76554208839fc847e"),
    ("hack_append_params.h", "0cf237835d324da496bad60f99fce8340db80df7522d0f16f948896b33bd9f4c"),
    ("hack_decode_params.h", "e12f4ad7aca8ed0caec2bd17dc3dda2690f7691835804a3593ba6ea4d05f660d"),
    ("hack_prefill_params.h", "17f9dff541e61bf3193a769f6b05e07dc40753096f7e6d9519c383383b18352e"),
    ("hybrid_gemm_params.h", "15e56944677325f859789ff8e40a705f0a65a185ff10fe645d13754cbf7bd86c"),
    ("merge_states_params.h", "a1ca4ca86a37067ead0a7fdbb4a70c68ff2be74458bddc317fa12c2d18667ee8"),
    ("pack_params.h", "71bdac650f73e5af2c1b6597525ec402a30260efeeccac62f11793faab91c4c4"),
    ("prefill_params.h", "4711692d4d02c34e47bbd523e61a960b6031b52270e1ff13f1fdc1d4ac59ac09"),
    ("sparse_attend_params.h", "394d2e3867d51a47d1390a9726b641504a686552b755c739311604d46a92a859"),
    ("sparse_gather_params.h", "b28e09e1db8b5a9695c604f481db3990c24d89da35da185ed35edf5b9d0e7aae"),
    ("sparse_pages_params.h", "19472e9b7e75ac6d8d594aba9e5fdd2d164c66b79e47c4229abe838b0103c536"),
    ("sparse_resolve_params.h", "5a3c7530aa3099bd6bcf0a35ad0c4df190ec0511f6a5f267825fecc7d6bf071f"),
    ("sparse_select_params.h", "33a92990342ab8f309688498d6c9b2307f5146d6d43b6eeb12aa3f4222b50d0f"),
    ("status_params.h", "b003ec44af62bb463ae9f885e8f21e12f5456f50b5e8509bf8b40a7f539401a9"),
];

#[doc = " Shape and layout of one append of new tokens to a KV cache."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct AppendParams {
    #[doc = " Elements between two pages of K, or 0 where K is not paged."]
    pub k_page_stride: i64,
    #[doc = " Elements between two tokens of K."]
    pub k_token_stride: i64,
    #[doc = " Elements between two heads of K."]
    pub k_head_stride: i64,
    #[doc = " Elements between two pages of V, or 0 where V is not paged."]
    pub v_page_stride: i64,
    #[doc = " Elements between two tokens of V."]
    pub v_token_stride: i64,
    #[doc = " Elements between two heads of V."]
    pub v_head_stride: i64,
    #[doc = " Elements between two tokens of the queries."]
    pub q_new_stride: i64,
    #[doc = " Elements between two tokens of the new keys."]
    pub k_new_stride: i64,
    #[doc = " Elements between two tokens of the new values."]
    pub v_new_stride: i64,
    #[doc = " Slots in the cache; a slot is below this."]
    pub num_slots: i64,
    #[doc = " New tokens."]
    pub tokens: u32,
    #[doc = " Query heads to rotate; 0 where queries are not given."]
    pub q_heads: u32,
    #[doc = " KV heads."]
    pub kv_heads: u32,
    #[doc = " Channels that rotate: a multiple of 16."]
    pub rotary_dim: u32,
    #[doc = " Positions in the tables of cosines and sines."]
    pub positions: u32,
    #[doc = " log2 of the slots in a page; 62 where the cache is one run of slots."]
    pub page_shift: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of AppendParams"][::core::mem::size_of::<AppendParams>() - 104usize];
    ["Alignment of AppendParams"][::core::mem::align_of::<AppendParams>() - 8usize];
    ["Offset of field: AppendParams::k_page_stride"]
        [::core::mem::offset_of!(AppendParams, k_page_stride) - 0usize];
    ["Offset of field: AppendParams::k_token_stride"]
        [::core::mem::offset_of!(AppendParams, k_token_stride) - 8usize];
    ["Offset of field: AppendParams::k_head_stride"]
        [::core::mem::offset_of!(AppendParams, k_head_stride) - 16usize];
    ["Offset of field: AppendParams::v_page_stride"]
        [::core::mem::offset_of!(AppendParams, v_page_stride) - 24usize];
    ["Offset of field: AppendParams::v_token_stride"]
        [::core::mem::offset_of!(AppendParams, v_token_stride) - 32usize];
    ["Offset of field: AppendParams::v_head_stride"]
        [::core::mem::offset_of!(AppendParams, v_head_stride) - 40usize];
    ["Offset of field: AppendParams::q_new_stride"]
        [::core::mem::offset_of!(AppendParams, q_new_stride) - 48usize];
    ["Offset of field: AppendParams::k_new_stride"]
        [::core::mem::offset_of!(AppendParams, k_new_stride) - 56usize];
    ["Offset of field: AppendParams::v_new_stride"]
        [::core::mem::offset_of!(AppendParams, v_new_stride) - 64usize];
    ["Offset of field: AppendParams::num_slots"][::core::mem::offset_of!(AppendParams, num_slots) - 72usize];
    ["Offset of field: AppendParams::tokens"][::core::mem::offset_of!(AppendParams, tokens) - 80usize];
    ["Offset of field: AppendParams::q_heads"][::core::mem::offset_of!(AppendParams, q_heads) - 84usize];
    ["Offset of field: AppendParams::kv_heads"][::core::mem::offset_of!(AppendParams, kv_heads) - 88usize];
    ["Offset of field: AppendParams::rotary_dim"]
        [::core::mem::offset_of!(AppendParams, rotary_dim) - 92usize];
    ["Offset of field: AppendParams::positions"][::core::mem::offset_of!(AppendParams, positions) - 96usize];
    ["Offset of field: AppendParams::page_shift"]
        [::core::mem::offset_of!(AppendParams, page_shift) - 100usize];
};
#[doc = " Tokens of a tile, the granule of the decode kernels' work."]
pub const DECODE_TILE: DecodeConstants = 64;
#[doc = " Constants of the decode kernels."]
pub type DecodeConstants = ::core::ffi::c_uint;
#[doc = " Shape, layout and split of one decode step."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct DecodeParams {
    #[doc = " Elements between two pages of K, or 0 where K is not paged."]
    pub k_page_stride: i64,
    #[doc = " Elements between two tokens of K."]
    pub k_token_stride: i64,
    #[doc = " Elements between two heads of K."]
    pub k_head_stride: i64,
    #[doc = " Elements between two pages of V, or 0 where V is not paged."]
    pub v_page_stride: i64,
    #[doc = " Elements between two tokens of V."]
    pub v_token_stride: i64,
    #[doc = " Elements between two heads of V."]
    pub v_head_stride: i64,
    #[doc = " Entries between two sequences of the block table."]
    pub table_batch_stride: i64,
    #[doc = " Entries between two KV heads of the block table; 0 where all heads share it."]
    pub table_head_stride: i64,
    #[doc = " Sequences."]
    pub batch: u32,
    #[doc = " Queries of each sequence, aligned to the end of its keys."]
    pub q_len: u32,
    #[doc = " KV heads."]
    pub kv_heads: u32,
    #[doc = " Query heads that read one KV head."]
    pub group: u32,
    #[doc = " Blocks of columns that the q_len * group queries of one KV head need."]
    pub column_blocks: u32,
    #[doc = " log2 of the tokens in a page."]
    pub page_shift: u32,
    #[doc = " Pages that the block table holds for one sequence."]
    pub max_pages: u32,
    #[doc = " Pages in the pool; a page id is below this."]
    pub num_pages: u32,
    #[doc = " Tokens in a contiguous cache."]
    pub num_tokens: u32,
    #[doc = " Largest length that the plan allows."]
    pub max_kv_len: u32,
    #[doc = " Keys that a query sees, itself included; 0 for all."]
    pub window: u32,
    #[doc = " Tiles of one unit of work: 1 for balanced splits; a fixed number for splits that no other sequence changes."]
    pub unit_tiles: u32,
    #[doc = " 1 where each unit is a part of its own, 0 where a block's units of one item are one part."]
    pub fixed_parts: u32,
    #[doc = " Units below which a block does not split further."]
    pub min_units: u32,
    #[doc = " Softmax scale."]
    pub scale: f32,
    #[doc = " Soft-cap of the scaled scores; read only where the kernel is compiled with it."]
    pub soft_cap: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of DecodeParams"][::core::mem::size_of::<DecodeParams>() - 128usize];
    ["Alignment of DecodeParams"][::core::mem::align_of::<DecodeParams>() - 8usize];
    ["Offset of field: DecodeParams::k_page_stride"]
        [::core::mem::offset_of!(DecodeParams, k_page_stride) - 0usize];
    ["Offset of field: DecodeParams::k_token_stride"]
        [::core::mem::offset_of!(DecodeParams, k_token_stride) - 8usize];
    ["Offset of field: DecodeParams::k_head_stride"]
        [::core::mem::offset_of!(DecodeParams, k_head_stride) - 16usize];
    ["Offset of field: DecodeParams::v_page_stride"]
        [::core::mem::offset_of!(DecodeParams, v_page_stride) - 24usize];
    ["Offset of field: DecodeParams::v_token_stride"]
        [::core::mem::offset_of!(DecodeParams, v_token_stride) - 32usize];
    ["Offset of field: DecodeParams::v_head_stride"]
        [::core::mem::offset_of!(DecodeParams, v_head_stride) - 40usize];
    ["Offset of field: DecodeParams::table_batch_stride"]
        [::core::mem::offset_of!(DecodeParams, table_batch_stride) - 48usize];
    ["Offset of field: DecodeParams::table_head_stride"]
        [::core::mem::offset_of!(DecodeParams, table_head_stride) - 56usize];
    ["Offset of field: DecodeParams::batch"][::core::mem::offset_of!(DecodeParams, batch) - 64usize];
    ["Offset of field: DecodeParams::q_len"][::core::mem::offset_of!(DecodeParams, q_len) - 68usize];
    ["Offset of field: DecodeParams::kv_heads"][::core::mem::offset_of!(DecodeParams, kv_heads) - 72usize];
    ["Offset of field: DecodeParams::group"][::core::mem::offset_of!(DecodeParams, group) - 76usize];
    ["Offset of field: DecodeParams::column_blocks"]
        [::core::mem::offset_of!(DecodeParams, column_blocks) - 80usize];
    ["Offset of field: DecodeParams::page_shift"]
        [::core::mem::offset_of!(DecodeParams, page_shift) - 84usize];
    ["Offset of field: DecodeParams::max_pages"][::core::mem::offset_of!(DecodeParams, max_pages) - 88usize];
    ["Offset of field: DecodeParams::num_pages"][::core::mem::offset_of!(DecodeParams, num_pages) - 92usize];
    ["Offset of field: DecodeParams::num_tokens"]
        [::core::mem::offset_of!(DecodeParams, num_tokens) - 96usize];
    ["Offset of field: DecodeParams::max_kv_len"]
        [::core::mem::offset_of!(DecodeParams, max_kv_len) - 100usize];
    ["Offset of field: DecodeParams::window"][::core::mem::offset_of!(DecodeParams, window) - 104usize];
    ["Offset of field: DecodeParams::unit_tiles"]
        [::core::mem::offset_of!(DecodeParams, unit_tiles) - 108usize];
    ["Offset of field: DecodeParams::fixed_parts"]
        [::core::mem::offset_of!(DecodeParams, fixed_parts) - 112usize];
    ["Offset of field: DecodeParams::min_units"][::core::mem::offset_of!(DecodeParams, min_units) - 116usize];
    ["Offset of field: DecodeParams::scale"][::core::mem::offset_of!(DecodeParams, scale) - 120usize];
    ["Offset of field: DecodeParams::soft_cap"][::core::mem::offset_of!(DecodeParams, soft_cap) - 124usize];
};
#[doc = " KV heads that one layer may have."]
pub const FDC_MAX_HEADS: FdcConstants = 128;
#[doc = " Channels in a block of channels: ranks are multiples of it."]
pub const FDC_RANK_STEP: FdcConstants = 16;
#[doc = " Tokens in a group of tokens, the granule of the work; a page is whole groups."]
pub const FDC_GROUP: FdcConstants = 16;
#[doc = " Groups of tokens in a unit of decode_plan's sums, whose tiles have 64 tokens."]
pub const FDC_UNIT_GROUPS: FdcConstants = 4;
#[doc = " Constants of the low-rank kernels."]
pub type FdcConstants = ::core::ffi::c_uint;
#[doc = " Ranks of the KV heads of one layer, as sums over the heads before, in blocks of 16 channels. From these follow a head's\nranks, the places of its keys and values in a page, of its queries, outputs and projections, and its share of the work."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct FdcHeads {
    #[doc = " Blocks of key channels of all heads before each head, then of all heads."]
    pub k_before: [u16; 129usize],
    #[doc = " Blocks of value channels of all heads before each head, then of all heads."]
    pub v_before: [u16; 129usize],
    #[doc = " KV heads."]
    pub count: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of FdcHeads"][::core::mem::size_of::<FdcHeads>() - 520usize];
    ["Alignment of FdcHeads"][::core::mem::align_of::<FdcHeads>() - 4usize];
    ["Offset of field: FdcHeads::k_before"][::core::mem::offset_of!(FdcHeads, k_before) - 0usize];
    ["Offset of field: FdcHeads::v_before"][::core::mem::offset_of!(FdcHeads, v_before) - 258usize];
    ["Offset of field: FdcHeads::count"][::core::mem::offset_of!(FdcHeads, count) - 516usize];
};
#[doc = " Shape and layout of one append of new tokens to a low-rank cache."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct FdcAppendParams {
    #[doc = " Elements between two pages."]
    pub page_stride: i64,
    #[doc = " Elements between two tokens of the new queries."]
    pub q_new_stride: i64,
    #[doc = " Elements between two tokens of the new keys."]
    pub k_new_stride: i64,
    #[doc = " Elements between two tokens of the new values."]
    pub v_new_stride: i64,
    #[doc = " Slots in the cache; a slot is below this."]
    pub num_slots: i64,
    #[doc = " New tokens."]
    pub tokens: u32,
    #[doc = " Query heads that read one KV head; 0 where queries are not given."]
    pub group: u32,
    #[doc = " Tiles of 64 rows that the queries of one KV head have."]
    pub q_tiles: u32,
    #[doc = " Tiles of 64 rows that the keys, or the values, of one KV head have."]
    pub kv_tiles: u32,
    #[doc = " Channels that rotate: a multiple of 16."]
    pub rotary_dim: u32,
    #[doc = " Positions in the tables of cosines and sines."]
    pub positions: u32,
    #[doc = " log2 of the tokens in a page."]
    pub page_shift: u32,
    #[doc = " 0."]
    pub padding: u32,
    #[doc = " Ranks."]
    pub heads: FdcHeads,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of FdcAppendParams"][::core::mem::size_of::<FdcAppendParams>() - 592usize];
    ["Alignment of FdcAppendParams"][::core::mem::align_of::<FdcAppendParams>() - 8usize];
    ["Offset of field: FdcAppendParams::page_stride"]
        [::core::mem::offset_of!(FdcAppendParams, page_stride) - 0usize];
    ["Offset of field: FdcAppendParams::q_new_stride"]
        [::core::mem::offset_of!(FdcAppendParams, q_new_stride) - 8usize];
    ["Offset of field: FdcAppendParams::k_new_stride"]
        [::core::mem::offset_of!(FdcAppendParams, k_new_stride) - 16usize];
    ["Offset of field: FdcAppendParams::v_new_stride"]
        [::core::mem::offset_of!(FdcAppendParams, v_new_stride) - 24usize];
    ["Offset of field: FdcAppendParams::num_slots"]
        [::core::mem::offset_of!(FdcAppendParams, num_slots) - 32usize];
    ["Offset of field: FdcAppendParams::tokens"][::core::mem::offset_of!(FdcAppendParams, tokens) - 40usize];
    ["Offset of field: FdcAppendParams::group"][::core::mem::offset_of!(FdcAppendParams, group) - 44usize];
    ["Offset of field: FdcAppendParams::q_tiles"]
        [::core::mem::offset_of!(FdcAppendParams, q_tiles) - 48usize];
    ["Offset of field: FdcAppendParams::kv_tiles"]
        [::core::mem::offset_of!(FdcAppendParams, kv_tiles) - 52usize];
    ["Offset of field: FdcAppendParams::rotary_dim"]
        [::core::mem::offset_of!(FdcAppendParams, rotary_dim) - 56usize];
    ["Offset of field: FdcAppendParams::positions"]
        [::core::mem::offset_of!(FdcAppendParams, positions) - 60usize];
    ["Offset of field: FdcAppendParams::page_shift"]
        [::core::mem::offset_of!(FdcAppendParams, page_shift) - 64usize];
    ["Offset of field: FdcAppendParams::padding"]
        [::core::mem::offset_of!(FdcAppendParams, padding) - 68usize];
    ["Offset of field: FdcAppendParams::heads"][::core::mem::offset_of!(FdcAppendParams, heads) - 72usize];
};
#[doc = " Shape and layout of one rebuilding of dense keys and values from a low-rank cache."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct FdcReconstructParams {
    #[doc = " Elements between two pages of the low-rank cache."]
    pub page_stride: i64,
    #[doc = " Pages in the pool: all are rebuilt."]
    pub num_pages: u32,
    #[doc = " log2 of the tokens in a page."]
    pub page_shift: u32,
    #[doc = " Ranks."]
    pub heads: FdcHeads,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of FdcReconstructParams"][::core::mem::size_of::<FdcReconstructParams>() - 536usize];
    ["Alignment of FdcReconstructParams"][::core::mem::align_of::<FdcReconstructParams>() - 8usize];
    ["Offset of field: FdcReconstructParams::page_stride"]
        [::core::mem::offset_of!(FdcReconstructParams, page_stride) - 0usize];
    ["Offset of field: FdcReconstructParams::num_pages"]
        [::core::mem::offset_of!(FdcReconstructParams, num_pages) - 8usize];
    ["Offset of field: FdcReconstructParams::page_shift"]
        [::core::mem::offset_of!(FdcReconstructParams, page_shift) - 12usize];
    ["Offset of field: FdcReconstructParams::heads"]
        [::core::mem::offset_of!(FdcReconstructParams, heads) - 16usize];
};
#[doc = " Contiguous ranges of equal bytes."]
pub const FDC_SPLIT_BALANCED: FdcSplit = 0;
#[doc = " Parts of a fixed number of bytes each, in contiguous ranges: no sequence's parts depend on another sequence."]
pub const FDC_SPLIT_FIXED: FdcSplit = 1;
#[doc = " One block per sequence and KV head, whatever its bytes: what a kernel without balancing does."]
pub const FDC_SPLIT_NONE: FdcSplit = 2;
#[doc = " How the work of a decode step is dealt to blocks."]
pub type FdcSplit = ::core::ffi::c_uint;
#[doc = " Shape, layout and split of one decode step over a low-rank cache."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct FdcDecodeParams {
    #[doc = " Elements between two pages."]
    pub page_stride: i64,
    #[doc = " Entries between two sequences of the block table."]
    pub table_batch_stride: i64,
    #[doc = " Sequences."]
    pub batch: u32,
    #[doc = " Queries of each sequence, aligned to the end of its keys."]
    pub q_len: u32,
    #[doc = " Query heads that read one KV head."]
    pub group: u32,
    #[doc = " Blocks of columns that the q_len * group queries of one KV head need."]
    pub column_blocks: u32,
    #[doc = " log2 of the tokens in a page."]
    pub page_shift: u32,
    #[doc = " Pages that the block table holds for one sequence."]
    pub max_pages: u32,
    #[doc = " Pages in the pool; a page id is below this."]
    pub num_pages: u32,
    #[doc = " Keys that a query sees, itself included; 0 for all."]
    pub window: u32,
    #[doc = " One of FdcSplit."]
    pub split: u32,
    #[doc = " Work of a fixed part, in weights: 16 tokens of 16 channels."]
    pub part_weight: u32,
    #[doc = " Fixed parts that one item may have: slots of partial states."]
    pub max_parts: u32,
    #[doc = " Work of an item besides its bytes, in weights."]
    pub item_weight: u32,
    #[doc = " Work below which a block does not split further, in weights."]
    pub min_weight: u32,
    #[doc = " Softmax scale: that of the full head dimension, whatever the ranks."]
    pub scale: f32,
    #[doc = " Soft-cap of the scaled scores; read only where the kernel is compiled with it."]
    pub soft_cap: f32,
    #[doc = " 0."]
    pub padding: u32,
    #[doc = " Ranks."]
    pub heads: FdcHeads,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of FdcDecodeParams"][::core::mem::size_of::<FdcDecodeParams>() - 600usize];
    ["Alignment of FdcDecodeParams"][::core::mem::align_of::<FdcDecodeParams>() - 8usize];
    ["Offset of field: FdcDecodeParams::page_stride"]
        [::core::mem::offset_of!(FdcDecodeParams, page_stride) - 0usize];
    ["Offset of field: FdcDecodeParams::table_batch_stride"]
        [::core::mem::offset_of!(FdcDecodeParams, table_batch_stride) - 8usize];
    ["Offset of field: FdcDecodeParams::batch"][::core::mem::offset_of!(FdcDecodeParams, batch) - 16usize];
    ["Offset of field: FdcDecodeParams::q_len"][::core::mem::offset_of!(FdcDecodeParams, q_len) - 20usize];
    ["Offset of field: FdcDecodeParams::group"][::core::mem::offset_of!(FdcDecodeParams, group) - 24usize];
    ["Offset of field: FdcDecodeParams::column_blocks"]
        [::core::mem::offset_of!(FdcDecodeParams, column_blocks) - 28usize];
    ["Offset of field: FdcDecodeParams::page_shift"]
        [::core::mem::offset_of!(FdcDecodeParams, page_shift) - 32usize];
    ["Offset of field: FdcDecodeParams::max_pages"]
        [::core::mem::offset_of!(FdcDecodeParams, max_pages) - 36usize];
    ["Offset of field: FdcDecodeParams::num_pages"]
        [::core::mem::offset_of!(FdcDecodeParams, num_pages) - 40usize];
    ["Offset of field: FdcDecodeParams::window"][::core::mem::offset_of!(FdcDecodeParams, window) - 44usize];
    ["Offset of field: FdcDecodeParams::split"][::core::mem::offset_of!(FdcDecodeParams, split) - 48usize];
    ["Offset of field: FdcDecodeParams::part_weight"]
        [::core::mem::offset_of!(FdcDecodeParams, part_weight) - 52usize];
    ["Offset of field: FdcDecodeParams::max_parts"]
        [::core::mem::offset_of!(FdcDecodeParams, max_parts) - 56usize];
    ["Offset of field: FdcDecodeParams::item_weight"]
        [::core::mem::offset_of!(FdcDecodeParams, item_weight) - 60usize];
    ["Offset of field: FdcDecodeParams::min_weight"]
        [::core::mem::offset_of!(FdcDecodeParams, min_weight) - 64usize];
    ["Offset of field: FdcDecodeParams::scale"][::core::mem::offset_of!(FdcDecodeParams, scale) - 68usize];
    ["Offset of field: FdcDecodeParams::soft_cap"]
        [::core::mem::offset_of!(FdcDecodeParams, soft_cap) - 72usize];
    ["Offset of field: FdcDecodeParams::padding"]
        [::core::mem::offset_of!(FdcDecodeParams, padding) - 76usize];
    ["Offset of field: FdcDecodeParams::heads"][::core::mem::offset_of!(FdcDecodeParams, heads) - 80usize];
};
#[doc = " Shape and layout of one append to a quantized KV cache."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct HackAppendParams {
    #[doc = " Elements between two tokens of the new keys, a multiple of 8."]
    pub k_new_stride: i64,
    #[doc = " Elements between two tokens of the new values, a multiple of 8."]
    pub v_new_stride: i64,
    #[doc = " Bytes between two pages of codes, a multiple of 16."]
    pub page_stride: i64,
    #[doc = " Entries between two sequences of the block table."]
    pub table_batch_stride: i64,
    #[doc = " Sequences."]
    pub batch: u32,
    #[doc = " KV heads."]
    pub kv_heads: u32,
    #[doc = " New tokens in all, over the sequences."]
    pub num_new: u32,
    #[doc = " New tokens of one sequence at most."]
    pub max_new: u32,
    #[doc = " Largest length that the plan allows."]
    pub max_kv_len: u32,
    #[doc = " Tokens at the start of a sequence that stay in 16 bits."]
    pub sinks: u32,
    #[doc = " Pages that the block table holds for one sequence."]
    pub max_pages: u32,
    #[doc = " Pages of codes in the pool; a page id is below this."]
    pub num_pages: u32,
    #[doc = " Pages in the pool of sinks."]
    pub num_sink_pages: u32,
    #[doc = " Pages in the pool of open blocks."]
    pub num_open_pages: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of HackAppendParams"][::core::mem::size_of::<HackAppendParams>() - 72usize];
    ["Alignment of HackAppendParams"][::core::mem::align_of::<HackAppendParams>() - 8usize];
    ["Offset of field: HackAppendParams::k_new_stride"]
        [::core::mem::offset_of!(HackAppendParams, k_new_stride) - 0usize];
    ["Offset of field: HackAppendParams::v_new_stride"]
        [::core::mem::offset_of!(HackAppendParams, v_new_stride) - 8usize];
    ["Offset of field: HackAppendParams::page_stride"]
        [::core::mem::offset_of!(HackAppendParams, page_stride) - 16usize];
    ["Offset of field: HackAppendParams::table_batch_stride"]
        [::core::mem::offset_of!(HackAppendParams, table_batch_stride) - 24usize];
    ["Offset of field: HackAppendParams::batch"][::core::mem::offset_of!(HackAppendParams, batch) - 32usize];
    ["Offset of field: HackAppendParams::kv_heads"]
        [::core::mem::offset_of!(HackAppendParams, kv_heads) - 36usize];
    ["Offset of field: HackAppendParams::num_new"]
        [::core::mem::offset_of!(HackAppendParams, num_new) - 40usize];
    ["Offset of field: HackAppendParams::max_new"]
        [::core::mem::offset_of!(HackAppendParams, max_new) - 44usize];
    ["Offset of field: HackAppendParams::max_kv_len"]
        [::core::mem::offset_of!(HackAppendParams, max_kv_len) - 48usize];
    ["Offset of field: HackAppendParams::sinks"][::core::mem::offset_of!(HackAppendParams, sinks) - 52usize];
    ["Offset of field: HackAppendParams::max_pages"]
        [::core::mem::offset_of!(HackAppendParams, max_pages) - 56usize];
    ["Offset of field: HackAppendParams::num_pages"]
        [::core::mem::offset_of!(HackAppendParams, num_pages) - 60usize];
    ["Offset of field: HackAppendParams::num_sink_pages"]
        [::core::mem::offset_of!(HackAppendParams, num_sink_pages) - 64usize];
    ["Offset of field: HackAppendParams::num_open_pages"]
        [::core::mem::offset_of!(HackAppendParams, num_open_pages) - 68usize];
};
#[doc = " Shape, layout and split of attention over a quantized KV cache."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct HackDecodeParams {
    #[doc = " Bytes between two pages of codes, a multiple of 16."]
    pub page_stride: i64,
    #[doc = " Entries between two sequences of the block table."]
    pub table_batch_stride: i64,
    #[doc = " Sequences."]
    pub batch: u32,
    #[doc = " Queries of each sequence, aligned to the end of its tokens."]
    pub q_len: u32,
    #[doc = " KV heads."]
    pub kv_heads: u32,
    #[doc = " Query heads that read one KV head."]
    pub group: u32,
    #[doc = " Blocks of columns that the q_len * group queries of one KV head need."]
    pub column_blocks: u32,
    #[doc = " Tokens of a closed block."]
    pub partition: u32,
    #[doc = " Tokens at the start of a sequence that are in 16 bits."]
    pub sinks: u32,
    #[doc = " Pages that the block table holds for one sequence."]
    pub max_pages: u32,
    #[doc = " Pages of codes in the pool; a page id is below this."]
    pub num_pages: u32,
    #[doc = " Pages in the pool of sinks."]
    pub num_sink_pages: u32,
    #[doc = " Pages in the pool of open blocks."]
    pub num_open_pages: u32,
    #[doc = " Largest length that the plan allows."]
    pub max_kv_len: u32,
    #[doc = " Tokens that a query sees, itself included; 0 for all."]
    pub window: u32,
    #[doc = " First tokens of a sequence that a window leaves visible: at most `sinks`."]
    pub window_sinks: u32,
    #[doc = " Pages of one unit of work: 1 for balanced splits; a fixed number for splits that no other sequence changes."]
    pub unit_pages: u32,
    #[doc = " 1 where each unit is a part of its own, 0 where a block's units of one item are one part."]
    pub fixed_parts: u32,
    #[doc = " Units below which a block does not split further."]
    pub min_units: u32,
    #[doc = " Softmax scale."]
    pub scale: f32,
    #[doc = " Soft-cap of the scaled scores; read only where the kernel is compiled with it."]
    pub soft_cap: f32,
    #[doc = " Zero."]
    pub _pad: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of HackDecodeParams"][::core::mem::size_of::<HackDecodeParams>() - 96usize];
    ["Alignment of HackDecodeParams"][::core::mem::align_of::<HackDecodeParams>() - 8usize];
    ["Offset of field: HackDecodeParams::page_stride"]
        [::core::mem::offset_of!(HackDecodeParams, page_stride) - 0usize];
    ["Offset of field: HackDecodeParams::table_batch_stride"]
        [::core::mem::offset_of!(HackDecodeParams, table_batch_stride) - 8usize];
    ["Offset of field: HackDecodeParams::batch"][::core::mem::offset_of!(HackDecodeParams, batch) - 16usize];
    ["Offset of field: HackDecodeParams::q_len"][::core::mem::offset_of!(HackDecodeParams, q_len) - 20usize];
    ["Offset of field: HackDecodeParams::kv_heads"]
        [::core::mem::offset_of!(HackDecodeParams, kv_heads) - 24usize];
    ["Offset of field: HackDecodeParams::group"][::core::mem::offset_of!(HackDecodeParams, group) - 28usize];
    ["Offset of field: HackDecodeParams::column_blocks"]
        [::core::mem::offset_of!(HackDecodeParams, column_blocks) - 32usize];
    ["Offset of field: HackDecodeParams::partition"]
        [::core::mem::offset_of!(HackDecodeParams, partition) - 36usize];
    ["Offset of field: HackDecodeParams::sinks"][::core::mem::offset_of!(HackDecodeParams, sinks) - 40usize];
    ["Offset of field: HackDecodeParams::max_pages"]
        [::core::mem::offset_of!(HackDecodeParams, max_pages) - 44usize];
    ["Offset of field: HackDecodeParams::num_pages"]
        [::core::mem::offset_of!(HackDecodeParams, num_pages) - 48usize];
    ["Offset of field: HackDecodeParams::num_sink_pages"]
        [::core::mem::offset_of!(HackDecodeParams, num_sink_pages) - 52usize];
    ["Offset of field: HackDecodeParams::num_open_pages"]
        [::core::mem::offset_of!(HackDecodeParams, num_open_pages) - 56usize];
    ["Offset of field: HackDecodeParams::max_kv_len"]
        [::core::mem::offset_of!(HackDecodeParams, max_kv_len) - 60usize];
    ["Offset of field: HackDecodeParams::window"]
        [::core::mem::offset_of!(HackDecodeParams, window) - 64usize];
    ["Offset of field: HackDecodeParams::window_sinks"]
        [::core::mem::offset_of!(HackDecodeParams, window_sinks) - 68usize];
    ["Offset of field: HackDecodeParams::unit_pages"]
        [::core::mem::offset_of!(HackDecodeParams, unit_pages) - 72usize];
    ["Offset of field: HackDecodeParams::fixed_parts"]
        [::core::mem::offset_of!(HackDecodeParams, fixed_parts) - 76usize];
    ["Offset of field: HackDecodeParams::min_units"]
        [::core::mem::offset_of!(HackDecodeParams, min_units) - 80usize];
    ["Offset of field: HackDecodeParams::scale"][::core::mem::offset_of!(HackDecodeParams, scale) - 84usize];
    ["Offset of field: HackDecodeParams::soft_cap"]
        [::core::mem::offset_of!(HackDecodeParams, soft_cap) - 88usize];
    ["Offset of field: HackDecodeParams::_pad"][::core::mem::offset_of!(HackDecodeParams, _pad) - 92usize];
};
#[doc = " Shape, layout and mask of a prefill over a quantized KV cache."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct HackPrefillParams {
    #[doc = " Cache, heads, mask and score. Of what it says on queries, q_len is the most that a sequence has; what it says on splits is\n not read."]
    pub cache: HackDecodeParams,
    #[doc = " Query tokens of all sequences."]
    pub num_queries: u32,
    #[doc = " 1 where the cache holds the queries' own tokens, as its last; 0 where the queries come after all that it holds."]
    pub cached: u32,
    #[doc = " 1 where the softmax state starts from the one stored, 0 where it starts empty."]
    pub resume: u32,
    #[doc = " 1 where the state is left as it is, unnormalised; 0 where outputs are written."]
    pub keep: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of HackPrefillParams"][::core::mem::size_of::<HackPrefillParams>() - 112usize];
    ["Alignment of HackPrefillParams"][::core::mem::align_of::<HackPrefillParams>() - 8usize];
    ["Offset of field: HackPrefillParams::cache"][::core::mem::offset_of!(HackPrefillParams, cache) - 0usize];
    ["Offset of field: HackPrefillParams::num_queries"]
        [::core::mem::offset_of!(HackPrefillParams, num_queries) - 96usize];
    ["Offset of field: HackPrefillParams::cached"]
        [::core::mem::offset_of!(HackPrefillParams, cached) - 100usize];
    ["Offset of field: HackPrefillParams::resume"]
        [::core::mem::offset_of!(HackPrefillParams, resume) - 104usize];
    ["Offset of field: HackPrefillParams::keep"][::core::mem::offset_of!(HackPrefillParams, keep) - 108usize];
};
#[doc = " Output features of a tile."]
pub const HYBRID_TILE_ROWS: HybridGemmLayout = 64;
#[doc = " Bytes of a slab: 64 rows of 128 bytes."]
pub const HYBRID_SLAB_BYTES: HybridGemmLayout = 8192;
#[doc = " Tokens of a panel of hybrid_small_m."]
pub const HYBRID_SMALL_PANEL: HybridGemmLayout = 64;
#[doc = " Tokens of a panel of hybrid_large_m."]
pub const HYBRID_LARGE_PANEL: HybridGemmLayout = 256;
#[doc = " Output features, and inputs, of a block of fp8 weights."]
pub const HYBRID_FP8_BLOCK: HybridGemmLayout = 128;
#[doc = " Constants of the packed layout of weights: hybrid-gemm/src/pack."]
pub type HybridGemmLayout = ::core::ffi::c_uint;
#[doc = " As X."]
pub const HYBRID_FORMAT_FLOAT: HybridGemmFormat = 0;
#[doc = " Signed codes of 8 bits with one f32 scale per output feature."]
pub const HYBRID_FORMAT_INT8: HybridGemmFormat = 1;
#[doc = " fp8 e4m3 with one f32 scale per output feature."]
pub const HYBRID_FORMAT_FP8_ROWS: HybridGemmFormat = 2;
#[doc = " fp8 e4m3 with one f32 scale per block."]
pub const HYBRID_FORMAT_FP8_BLOCKS: HybridGemmFormat = 3;
#[doc = " Added to the inputs of a group: int4 codes with zero points."]
pub const HYBRID_FORMAT_ZERO_POINTS: HybridGemmFormat = 1;
#[doc = " Values of the constant FORMAT: how weights are stored. Other values are int4 codes in groups of so many inputs, a multiple of 32."]
pub type HybridGemmFormat = ::core::ffi::c_uint;
#[doc = " None."]
pub const HYBRID_IDENTITY: HybridGemmActivation = 0;
#[doc = " x / (1 + exp(-x))"]
pub const HYBRID_SILU: HybridGemmActivation = 1;
#[doc = " The tanh form of GELU."]
pub const HYBRID_GELU_TANH: HybridGemmActivation = 2;
#[doc = " silu(gate) * up of interleaved rows."]
pub const HYBRID_SWIGLU: HybridGemmActivation = 3;
#[doc = " The function between product and residual."]
pub type HybridGemmActivation = ::core::ffi::c_uint;
#[doc = " The tile schedule of a launch, in device memory so that a captured graph follows a change: hybrid-gemm/src/schedule.rs."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct HybridGemmSchedule {
    #[doc = " Tokens M."]
    pub tokens: u32,
    #[doc = " Tokens of a panel."]
    pub panel: u32,
    #[doc = " K tiles of a column."]
    pub k_tiles: u32,
    #[doc = " First column of the launch."]
    pub first_column: u32,
    #[doc = " Host columns of the output-stationary role, from first_column."]
    pub os_columns: u32,
    #[doc = " Host columns of the weight-stationary role, behind those."]
    pub ws_columns: u32,
    #[doc = " Columns in HBM, behind those."]
    pub hbm_columns: u32,
    #[doc = " Blocks of the output-stationary role."]
    pub os_blocks: u32,
    #[doc = " Blocks of the weight-stationary role."]
    pub ws_blocks: u32,
    #[doc = " Blocks of the HBM role."]
    pub hbm_blocks: u32,
    #[doc = " Blocks that share a fetch: 1."]
    pub cluster: u32,
    #[doc = " Which block of each role gets the first item."]
    pub rotation: [u32; 3usize],
    #[doc = " 0."]
    pub padding: [u32; 2usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of HybridGemmSchedule"][::core::mem::size_of::<HybridGemmSchedule>() - 64usize];
    ["Alignment of HybridGemmSchedule"][::core::mem::align_of::<HybridGemmSchedule>() - 4usize];
    ["Offset of field: HybridGemmSchedule::tokens"]
        [::core::mem::offset_of!(HybridGemmSchedule, tokens) - 0usize];
    ["Offset of field: HybridGemmSchedule::panel"]
        [::core::mem::offset_of!(HybridGemmSchedule, panel) - 4usize];
    ["Offset of field: HybridGemmSchedule::k_tiles"]
        [::core::mem::offset_of!(HybridGemmSchedule, k_tiles) - 8usize];
    ["Offset of field: HybridGemmSchedule::first_column"]
        [::core::mem::offset_of!(HybridGemmSchedule, first_column) - 12usize];
    ["Offset of field: HybridGemmSchedule::os_columns"]
        [::core::mem::offset_of!(HybridGemmSchedule, os_columns) - 16usize];
    ["Offset of field: HybridGemmSchedule::ws_columns"]
        [::core::mem::offset_of!(HybridGemmSchedule, ws_columns) - 20usize];
    ["Offset of field: HybridGemmSchedule::hbm_columns"]
        [::core::mem::offset_of!(HybridGemmSchedule, hbm_columns) - 24usize];
    ["Offset of field: HybridGemmSchedule::os_blocks"]
        [::core::mem::offset_of!(HybridGemmSchedule, os_blocks) - 28usize];
    ["Offset of field: HybridGemmSchedule::ws_blocks"]
        [::core::mem::offset_of!(HybridGemmSchedule, ws_blocks) - 32usize];
    ["Offset of field: HybridGemmSchedule::hbm_blocks"]
        [::core::mem::offset_of!(HybridGemmSchedule, hbm_blocks) - 36usize];
    ["Offset of field: HybridGemmSchedule::cluster"]
        [::core::mem::offset_of!(HybridGemmSchedule, cluster) - 40usize];
    ["Offset of field: HybridGemmSchedule::rotation"]
        [::core::mem::offset_of!(HybridGemmSchedule, rotation) - 44usize];
    ["Offset of field: HybridGemmSchedule::padding"]
        [::core::mem::offset_of!(HybridGemmSchedule, padding) - 56usize];
};
#[doc = " Where the columns of an expert of a grouped product lie: hybrid-gemm/src/grouped.rs."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct HybridGemmExpert {
    #[doc = " Bytes before its columns in host memory."]
    pub host_offset: u64,
    #[doc = " Bytes before its columns in HBM."]
    pub hbm_offset: u64,
    #[doc = " Its columns in host memory, the first ones; the rest is in HBM."]
    pub host_columns: u32,
    #[doc = " 0."]
    pub padding: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of HybridGemmExpert"][::core::mem::size_of::<HybridGemmExpert>() - 24usize];
    ["Alignment of HybridGemmExpert"][::core::mem::align_of::<HybridGemmExpert>() - 8usize];
    ["Offset of field: HybridGemmExpert::host_offset"]
        [::core::mem::offset_of!(HybridGemmExpert, host_offset) - 0usize];
    ["Offset of field: HybridGemmExpert::hbm_offset"]
        [::core::mem::offset_of!(HybridGemmExpert, hbm_offset) - 8usize];
    ["Offset of field: HybridGemmExpert::host_columns"]
        [::core::mem::offset_of!(HybridGemmExpert, host_columns) - 16usize];
    ["Offset of field: HybridGemmExpert::padding"]
        [::core::mem::offset_of!(HybridGemmExpert, padding) - 20usize];
};
#[doc = " What launches moved since the receipt was last zeroed: hybrid-gemm/src/traffic.rs."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct HybridGemmTraffic {
    #[doc = " Weight tiles fetched over the host link."]
    pub link_tiles: u64,
    #[doc = " Bytes of weights over the host link."]
    pub link_bytes: u64,
    #[doc = " Weight tiles fetched from HBM."]
    pub hbm_tiles: u64,
    #[doc = " Bytes of weights from HBM."]
    pub hbm_weight_bytes: u64,
    #[doc = " Bytes of weights that a copy engine wrote to HBM, of the link's: booked by the launch behind each copy, whatever it reads."]
    pub staged_bytes: u64,
    #[doc = " Bytes of activations."]
    pub activation_bytes: u64,
    #[doc = " Bytes of partial sums, written and read."]
    pub partial_bytes: u64,
    #[doc = " Bytes of outputs, and of the residual."]
    pub output_bytes: u64,
    #[doc = " Additions and multiplications."]
    pub flops: u64,
    #[doc = " Nanoseconds that the blocks of each role worked, all together."]
    pub role_ns: [u64; 3usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of HybridGemmTraffic"][::core::mem::size_of::<HybridGemmTraffic>() - 96usize];
    ["Alignment of HybridGemmTraffic"][::core::mem::align_of::<HybridGemmTraffic>() - 8usize];
    ["Offset of field: HybridGemmTraffic::link_tiles"]
        [::core::mem::offset_of!(HybridGemmTraffic, link_tiles) - 0usize];
    ["Offset of field: HybridGemmTraffic::link_bytes"]
        [::core::mem::offset_of!(HybridGemmTraffic, link_bytes) - 8usize];
    ["Offset of field: HybridGemmTraffic::hbm_tiles"]
        [::core::mem::offset_of!(HybridGemmTraffic, hbm_tiles) - 16usize];
    ["Offset of field: HybridGemmTraffic::hbm_weight_bytes"]
        [::core::mem::offset_of!(HybridGemmTraffic, hbm_weight_bytes) - 24usize];
    ["Offset of field: HybridGemmTraffic::staged_bytes"]
        [::core::mem::offset_of!(HybridGemmTraffic, staged_bytes) - 32usize];
    ["Offset of field: HybridGemmTraffic::activation_bytes"]
        [::core::mem::offset_of!(HybridGemmTraffic, activation_bytes) - 40usize];
    ["Offset of field: HybridGemmTraffic::partial_bytes"]
        [::core::mem::offset_of!(HybridGemmTraffic, partial_bytes) - 48usize];
    ["Offset of field: HybridGemmTraffic::output_bytes"]
        [::core::mem::offset_of!(HybridGemmTraffic, output_bytes) - 56usize];
    ["Offset of field: HybridGemmTraffic::flops"]
        [::core::mem::offset_of!(HybridGemmTraffic, flops) - 64usize];
    ["Offset of field: HybridGemmTraffic::role_ns"]
        [::core::mem::offset_of!(HybridGemmTraffic, role_ns) - 72usize];
};
#[doc = " Shapes and layouts of one product."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct HybridGemmParams {
    #[doc = " Elements between two rows of X."]
    pub x_stride: i64,
    #[doc = " Elements between two rows of O."]
    pub out_stride: i64,
    #[doc = " Elements between two rows of the residual."]
    pub residual_stride: i64,
    #[doc = " Bytes from a packed column to the next."]
    pub column_bytes: u64,
    #[doc = " f32 of partial sums that the workspace has."]
    pub partial_len: u64,
    #[doc = " Bytes of all experts' columns in host memory, of a grouped product."]
    pub host_bytes: u64,
    #[doc = " Bytes of all experts' columns in HBM."]
    pub hbm_bytes: u64,
    #[doc = " Bytes that a copy engine has brought from host memory for this launch, whose weights in HBM they are; 0 for others."]
    pub staged_bytes: u64,
    #[doc = " Rows of X and O: the schedule's tokens are at most as many."]
    pub max_tokens: u32,
    #[doc = " Output features."]
    pub n: u32,
    #[doc = " Inputs."]
    pub k: u32,
    #[doc = " Slabs of a full tile."]
    pub tile_slabs: u32,
    #[doc = " Columns in host memory, the first ones; of a grouped product, the most that an expert has there."]
    pub host_columns: u32,
    #[doc = " The column that the weights in HBM start with."]
    pub hbm_first: u32,
    #[doc = " Columns that the weights in HBM have."]
    pub hbm_columns: u32,
    #[doc = " Whether the weights in host memory are row-major [n, k]; else they are packed."]
    pub host_row_major: u32,
    #[doc = " Whether the weights in HBM are row-major, as a staged slab of such a matrix is."]
    pub hbm_row_major: u32,
    #[doc = " Parts that the K tiles of a column are dealt to: grid.y."]
    pub k_splits: u32,
    #[doc = " Type of O and of the residual: DTYPE of types.cuh."]
    pub out_dtype: u32,
    #[doc = " One of HybridGemmActivation."]
    pub activation: u32,
    #[doc = " Experts of a grouped product; 0 for a single one."]
    pub experts: u32,
    #[doc = " Tiles of those staged bytes."]
    pub staged_tiles: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of HybridGemmParams"][::core::mem::size_of::<HybridGemmParams>() - 120usize];
    ["Alignment of HybridGemmParams"][::core::mem::align_of::<HybridGemmParams>() - 8usize];
    ["Offset of field: HybridGemmParams::x_stride"]
        [::core::mem::offset_of!(HybridGemmParams, x_stride) - 0usize];
    ["Offset of field: HybridGemmParams::out_stride"]
        [::core::mem::offset_of!(HybridGemmParams, out_stride) - 8usize];
    ["Offset of field: HybridGemmParams::residual_stride"]
        [::core::mem::offset_of!(HybridGemmParams, residual_stride) - 16usize];
    ["Offset of field: HybridGemmParams::column_bytes"]
        [::core::mem::offset_of!(HybridGemmParams, column_bytes) - 24usize];
    ["Offset of field: HybridGemmParams::partial_len"]
        [::core::mem::offset_of!(HybridGemmParams, partial_len) - 32usize];
    ["Offset of field: HybridGemmParams::host_bytes"]
        [::core::mem::offset_of!(HybridGemmParams, host_bytes) - 40usize];
    ["Offset of field: HybridGemmParams::hbm_bytes"]
        [::core::mem::offset_of!(HybridGemmParams, hbm_bytes) - 48usize];
    ["Offset of field: HybridGemmParams::staged_bytes"]
        [::core::mem::offset_of!(HybridGemmParams, staged_bytes) - 56usize];
    ["Offset of field: HybridGemmParams::max_tokens"]
        [::core::mem::offset_of!(HybridGemmParams, max_tokens) - 64usize];
    ["Offset of field: HybridGemmParams::n"][::core::mem::offset_of!(HybridGemmParams, n) - 68usize];
    ["Offset of field: HybridGemmParams::k"][::core::mem::offset_of!(HybridGemmParams, k) - 72usize];
    ["Offset of field: HybridGemmParams::tile_slabs"]
        [::core::mem::offset_of!(HybridGemmParams, tile_slabs) - 76usize];
    ["Offset of field: HybridGemmParams::host_columns"]
        [::core::mem::offset_of!(HybridGemmParams, host_columns) - 80usize];
    ["Offset of field: HybridGemmParams::hbm_first"]
        [::core::mem::offset_of!(HybridGemmParams, hbm_first) - 84usize];
    ["Offset of field: HybridGemmParams::hbm_columns"]
        [::core::mem::offset_of!(HybridGemmParams, hbm_columns) - 88usize];
    ["Offset of field: HybridGemmParams::host_row_major"]
        [::core::mem::offset_of!(HybridGemmParams, host_row_major) - 92usize];
    ["Offset of field: HybridGemmParams::hbm_row_major"]
        [::core::mem::offset_of!(HybridGemmParams, hbm_row_major) - 96usize];
    ["Offset of field: HybridGemmParams::k_splits"]
        [::core::mem::offset_of!(HybridGemmParams, k_splits) - 100usize];
    ["Offset of field: HybridGemmParams::out_dtype"]
        [::core::mem::offset_of!(HybridGemmParams, out_dtype) - 104usize];
    ["Offset of field: HybridGemmParams::activation"]
        [::core::mem::offset_of!(HybridGemmParams, activation) - 108usize];
    ["Offset of field: HybridGemmParams::experts"]
        [::core::mem::offset_of!(HybridGemmParams, experts) - 112usize];
    ["Offset of field: HybridGemmParams::staged_tiles"]
        [::core::mem::offset_of!(HybridGemmParams, staged_tiles) - 116usize];
};
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
#[doc = " Buffers that one launch reads, and as many that it writes."]
pub const PACK_BUFFERS: PackConstants = 3;
#[doc = " Bytes of the smallest unit: what offsets, strides and rows are multiples of."]
pub const PACK_UNIT: PackConstants = 4;
#[doc = " Numbers of kernels/seq-parallel/pack.cu."]
pub type PackConstants = ::core::ffi::c_uint;
#[doc = " Rows of bytes, evenly apart in one buffer, to rows evenly apart in another."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct PackCopy {
    #[doc = " First byte of the first row, in its source."]
    pub source_offset: u64,
    #[doc = " Bytes between two rows there."]
    pub source_stride: u64,
    #[doc = " First byte of the first row, in its destination."]
    pub destination_offset: u64,
    #[doc = " Bytes between two rows there."]
    pub destination_stride: u64,
    #[doc = " Rows."]
    pub rows: u32,
    #[doc = " Bytes of a row."]
    pub row_bytes: u32,
    #[doc = " Number of the source."]
    pub source: u32,
    #[doc = " Number of the destination."]
    pub destination: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PackCopy"][::core::mem::size_of::<PackCopy>() - 48usize];
    ["Alignment of PackCopy"][::core::mem::align_of::<PackCopy>() - 8usize];
    ["Offset of field: PackCopy::source_offset"][::core::mem::offset_of!(PackCopy, source_offset) - 0usize];
    ["Offset of field: PackCopy::source_stride"][::core::mem::offset_of!(PackCopy, source_stride) - 8usize];
    ["Offset of field: PackCopy::destination_offset"]
        [::core::mem::offset_of!(PackCopy, destination_offset) - 16usize];
    ["Offset of field: PackCopy::destination_stride"]
        [::core::mem::offset_of!(PackCopy, destination_stride) - 24usize];
    ["Offset of field: PackCopy::rows"][::core::mem::offset_of!(PackCopy, rows) - 32usize];
    ["Offset of field: PackCopy::row_bytes"][::core::mem::offset_of!(PackCopy, row_bytes) - 36usize];
    ["Offset of field: PackCopy::source"][::core::mem::offset_of!(PackCopy, source) - 40usize];
    ["Offset of field: PackCopy::destination"][::core::mem::offset_of!(PackCopy, destination) - 44usize];
};
#[doc = " Sizes of the buffers of one launch."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct PackParams {
    #[doc = " Bytes of each source; 0 for one that is not there."]
    pub source_bytes: [u64; 3usize],
    #[doc = " Bytes of each destination; 0 for one that is not there."]
    pub destination_bytes: [u64; 3usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PackParams"][::core::mem::size_of::<PackParams>() - 48usize];
    ["Alignment of PackParams"][::core::mem::align_of::<PackParams>() - 8usize];
    ["Offset of field: PackParams::source_bytes"][::core::mem::offset_of!(PackParams, source_bytes) - 0usize];
    ["Offset of field: PackParams::destination_bytes"]
        [::core::mem::offset_of!(PackParams, destination_bytes) - 24usize];
};
#[doc = " The rows' state is stored already and goes on; without it, it starts empty."]
pub const PREFILL_TILE_RESUME: PrefillTileFlags = 1;
#[doc = " No keys follow in later launches: the rows end as output."]
pub const PREFILL_TILE_FINISH: PrefillTileFlags = 2;
#[doc = " What the rows of a tile of a carrying kernel start from and end as: bits of PrefillTile's flags."]
pub type PrefillTileFlags = ::core::ffi::c_uint;
#[doc = " A tile of the rows of a segment, which is a run of queries, with a span of keys. Query i of the segment sees the span's keys\n from i + begin on and before i + end, its first keys before `prefix`, and of those before i + end the first `sinks`."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct PrefillTile {
    #[doc = " Row of the block table."]
    pub sequence: u32,
    #[doc = " The segment's first query, in q."]
    pub first_query: u32,
    #[doc = " Queries of the segment."]
    pub queries: u32,
    #[doc = " The tile's first row, among queries * group."]
    pub first_row: u32,
    #[doc = " First token of the span in a contiguous cache."]
    pub kv_start: u32,
    #[doc = " Keys of the span; 0 where its rows see nothing."]
    pub kv_len: u32,
    #[doc = " Where what a query sees ends, less the query; kv_len for all."]
    pub end: i32,
    #[doc = " Where it begins, less the query; -queries for the first key."]
    pub begin: i32,
    #[doc = " First keys of the span that stay visible before `begin`."]
    pub sinks: u32,
    #[doc = " First keys of the span that every query sees, past `end` too."]
    pub prefix: u32,
    #[doc = " Entry of the list with the same rows' next span, further behind; 0 for none. For carrying kernels."]
    pub next: u32,
    #[doc = " PrefillTileFlags, of a tile that is no other's `next`."]
    pub flags: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PrefillTile"][::core::mem::size_of::<PrefillTile>() - 48usize];
    ["Alignment of PrefillTile"][::core::mem::align_of::<PrefillTile>() - 4usize];
    ["Offset of field: PrefillTile::sequence"][::core::mem::offset_of!(PrefillTile, sequence) - 0usize];
    ["Offset of field: PrefillTile::first_query"][::core::mem::offset_of!(PrefillTile, first_query) - 4usize];
    ["Offset of field: PrefillTile::queries"][::core::mem::offset_of!(PrefillTile, queries) - 8usize];
    ["Offset of field: PrefillTile::first_row"][::core::mem::offset_of!(PrefillTile, first_row) - 12usize];
    ["Offset of field: PrefillTile::kv_start"][::core::mem::offset_of!(PrefillTile, kv_start) - 16usize];
    ["Offset of field: PrefillTile::kv_len"][::core::mem::offset_of!(PrefillTile, kv_len) - 20usize];
    ["Offset of field: PrefillTile::end"][::core::mem::offset_of!(PrefillTile, end) - 24usize];
    ["Offset of field: PrefillTile::begin"][::core::mem::offset_of!(PrefillTile, begin) - 28usize];
    ["Offset of field: PrefillTile::sinks"][::core::mem::offset_of!(PrefillTile, sinks) - 32usize];
    ["Offset of field: PrefillTile::prefix"][::core::mem::offset_of!(PrefillTile, prefix) - 36usize];
    ["Offset of field: PrefillTile::next"][::core::mem::offset_of!(PrefillTile, next) - 40usize];
    ["Offset of field: PrefillTile::flags"][::core::mem::offset_of!(PrefillTile, flags) - 44usize];
};
#[doc = " Where KV heads lie in the tensor maps of K and V."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct PrefillMapHeads {
    #[doc = " Columns of K from one head to the next."]
    pub k_columns: u32,
    #[doc = " Rows of K from one head to the next."]
    pub k_rows: u32,
    #[doc = " Columns of V from one head to the next."]
    pub v_columns: u32,
    #[doc = " Rows of V from one head to the next."]
    pub v_rows: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PrefillMapHeads"][::core::mem::size_of::<PrefillMapHeads>() - 16usize];
    ["Alignment of PrefillMapHeads"][::core::mem::align_of::<PrefillMapHeads>() - 4usize];
    ["Offset of field: PrefillMapHeads::k_columns"]
        [::core::mem::offset_of!(PrefillMapHeads, k_columns) - 0usize];
    ["Offset of field: PrefillMapHeads::k_rows"][::core::mem::offset_of!(PrefillMapHeads, k_rows) - 4usize];
    ["Offset of field: PrefillMapHeads::v_columns"]
        [::core::mem::offset_of!(PrefillMapHeads, v_columns) - 8usize];
    ["Offset of field: PrefillMapHeads::v_rows"][::core::mem::offset_of!(PrefillMapHeads, v_rows) - 12usize];
};
#[doc = " Shape, layout and mask of one prefill."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct PrefillParams {
    #[doc = " Elements between two pages of K, or 0 where K is not paged."]
    pub k_page_stride: i64,
    #[doc = " Elements between two tokens of K."]
    pub k_token_stride: i64,
    #[doc = " Elements between two heads of K."]
    pub k_head_stride: i64,
    #[doc = " Elements between two pages of V, or 0 where V is not paged."]
    pub v_page_stride: i64,
    #[doc = " Elements between two tokens of V."]
    pub v_token_stride: i64,
    #[doc = " Elements between two heads of V."]
    pub v_head_stride: i64,
    #[doc = " Entries between two sequences of the block table."]
    pub table_batch_stride: i64,
    #[doc = " Entries between two KV heads of the block table; 0 where all heads share it."]
    pub table_head_stride: i64,
    #[doc = " Sequences."]
    pub batch: u32,
    #[doc = " Query tokens of all sequences."]
    pub num_queries: u32,
    #[doc = " KV heads."]
    pub kv_heads: u32,
    #[doc = " Query heads that read one KV head."]
    pub group: u32,
    #[doc = " log2 of the tokens in a page."]
    pub page_shift: u32,
    #[doc = " Pages that the block table holds for one sequence."]
    pub max_pages: u32,
    #[doc = " Pages in the pool; a page id is below this."]
    pub num_pages: u32,
    #[doc = " Tokens in a contiguous cache."]
    pub num_tokens: u32,
    #[doc = " Largest length that the plan allows."]
    pub max_kv_len: u32,
    #[doc = " 1 where a query sees the keys up to its own position, 0 where it sees all; of the tiles that are planned."]
    pub causal: u32,
    #[doc = " Keys that a query sees, itself included; 0 for all."]
    pub window: u32,
    #[doc = " First keys of the sequence that stay visible outside the window."]
    pub sinks: u32,
    #[doc = " First keys of the sequence that every query sees, past its own position too."]
    pub prefix: u32,
    #[doc = " Rows of a tile: the kernel's own number."]
    pub tile_rows: u32,
    #[doc = " Entries that the list has room for."]
    pub max_tiles: u32,
    #[doc = " 1 where the softmax state starts from the one stored, 0 where it starts empty."]
    pub resume: u32,
    #[doc = " Softmax scale."]
    pub scale: f32,
    #[doc = " Soft-cap of the scaled scores; read only where the kernel is compiled with it."]
    pub soft_cap: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PrefillParams"][::core::mem::size_of::<PrefillParams>() - 136usize];
    ["Alignment of PrefillParams"][::core::mem::align_of::<PrefillParams>() - 8usize];
    ["Offset of field: PrefillParams::k_page_stride"]
        [::core::mem::offset_of!(PrefillParams, k_page_stride) - 0usize];
    ["Offset of field: PrefillParams::k_token_stride"]
        [::core::mem::offset_of!(PrefillParams, k_token_stride) - 8usize];
    ["Offset of field: PrefillParams::k_head_stride"]
        [::core::mem::offset_of!(PrefillParams, k_head_stride) - 16usize];
    ["Offset of field: PrefillParams::v_page_stride"]
        [::core::mem::offset_of!(PrefillParams, v_page_stride) - 24usize];
    ["Offset of field: PrefillParams::v_token_stride"]
        [::core::mem::offset_of!(PrefillParams, v_token_stride) - 32usize];
    ["Offset of field: PrefillParams::v_head_stride"]
        [::core::mem::offset_of!(PrefillParams, v_head_stride) - 40usize];
    ["Offset of field: PrefillParams::table_batch_stride"]
        [::core::mem::offset_of!(PrefillParams, table_batch_stride) - 48usize];
    ["Offset of field: PrefillParams::table_head_stride"]
        [::core::mem::offset_of!(PrefillParams, table_head_stride) - 56usize];
    ["Offset of field: PrefillParams::batch"][::core::mem::offset_of!(PrefillParams, batch) - 64usize];
    ["Offset of field: PrefillParams::num_queries"]
        [::core::mem::offset_of!(PrefillParams, num_queries) - 68usize];
    ["Offset of field: PrefillParams::kv_heads"][::core::mem::offset_of!(PrefillParams, kv_heads) - 72usize];
    ["Offset of field: PrefillParams::group"][::core::mem::offset_of!(PrefillParams, group) - 76usize];
    ["Offset of field: PrefillParams::page_shift"]
        [::core::mem::offset_of!(PrefillParams, page_shift) - 80usize];
    ["Offset of field: PrefillParams::max_pages"]
        [::core::mem::offset_of!(PrefillParams, max_pages) - 84usize];
    ["Offset of field: PrefillParams::num_pages"]
        [::core::mem::offset_of!(PrefillParams, num_pages) - 88usize];
    ["Offset of field: PrefillParams::num_tokens"]
        [::core::mem::offset_of!(PrefillParams, num_tokens) - 92usize];
    ["Offset of field: PrefillParams::max_kv_len"]
        [::core::mem::offset_of!(PrefillParams, max_kv_len) - 96usize];
    ["Offset of field: PrefillParams::causal"][::core::mem::offset_of!(PrefillParams, causal) - 100usize];
    ["Offset of field: PrefillParams::window"][::core::mem::offset_of!(PrefillParams, window) - 104usize];
    ["Offset of field: PrefillParams::sinks"][::core::mem::offset_of!(PrefillParams, sinks) - 108usize];
    ["Offset of field: PrefillParams::prefix"][::core::mem::offset_of!(PrefillParams, prefix) - 112usize];
    ["Offset of field: PrefillParams::tile_rows"]
        [::core::mem::offset_of!(PrefillParams, tile_rows) - 116usize];
    ["Offset of field: PrefillParams::max_tiles"]
        [::core::mem::offset_of!(PrefillParams, max_tiles) - 120usize];
    ["Offset of field: PrefillParams::resume"][::core::mem::offset_of!(PrefillParams, resume) - 124usize];
    ["Offset of field: PrefillParams::scale"][::core::mem::offset_of!(PrefillParams, scale) - 128usize];
    ["Offset of field: PrefillParams::soft_cap"][::core::mem::offset_of!(PrefillParams, soft_cap) - 132usize];
};
#[doc = " Tokens of a tile, the granule of the work."]
pub const SPARSE_TILE: SparseAttendConstants = 64;
#[doc = " Constants of sparse attention."]
pub type SparseAttendConstants = ::core::ffi::c_uint;
#[doc = " A page that a row reads: where it lies and how much of it is there."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct SparseEntry {
    #[doc = " Run of device memory that holds the page."]
    pub run: u32,
    #[doc = " Tokens of it that exist, from the first on."]
    pub tokens: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SparseEntry"][::core::mem::size_of::<SparseEntry>() - 8usize];
    ["Alignment of SparseEntry"][::core::mem::align_of::<SparseEntry>() - 4usize];
    ["Offset of field: SparseEntry::run"][::core::mem::offset_of!(SparseEntry, run) - 0usize];
    ["Offset of field: SparseEntry::tokens"][::core::mem::offset_of!(SparseEntry, tokens) - 4usize];
};
#[doc = " Sizes of one plan: from slots and open pages to lists of runs."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct SparsePlanParams {
    #[doc = " (Request, KV head) pairs: row = request * kv_heads + kv_head."]
    pub rows: u32,
    #[doc = " KV heads of a request."]
    pub kv_heads: u32,
    #[doc = " Pages that a row may select."]
    pub max_selected: u32,
    #[doc = " Slots of a row."]
    pub slots: u32,
    #[doc = " Open pages that a row may have."]
    pub max_open: u32,
    #[doc = " Pages that a request may have."]
    pub max_pages: u32,
    #[doc = " Runs of device memory."]
    pub num_runs: u32,
    #[doc = " log2 of the tokens in a page, at least 3."]
    pub page_shift: u32,
    #[doc = " Tiles of one unit of work."]
    pub unit_tiles: u32,
    #[doc = " Pages of host memory."]
    pub host_pages: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SparsePlanParams"][::core::mem::size_of::<SparsePlanParams>() - 40usize];
    ["Alignment of SparsePlanParams"][::core::mem::align_of::<SparsePlanParams>() - 4usize];
    ["Offset of field: SparsePlanParams::rows"][::core::mem::offset_of!(SparsePlanParams, rows) - 0usize];
    ["Offset of field: SparsePlanParams::kv_heads"]
        [::core::mem::offset_of!(SparsePlanParams, kv_heads) - 4usize];
    ["Offset of field: SparsePlanParams::max_selected"]
        [::core::mem::offset_of!(SparsePlanParams, max_selected) - 8usize];
    ["Offset of field: SparsePlanParams::slots"][::core::mem::offset_of!(SparsePlanParams, slots) - 12usize];
    ["Offset of field: SparsePlanParams::max_open"]
        [::core::mem::offset_of!(SparsePlanParams, max_open) - 16usize];
    ["Offset of field: SparsePlanParams::max_pages"]
        [::core::mem::offset_of!(SparsePlanParams, max_pages) - 20usize];
    ["Offset of field: SparsePlanParams::num_runs"]
        [::core::mem::offset_of!(SparsePlanParams, num_runs) - 24usize];
    ["Offset of field: SparsePlanParams::page_shift"]
        [::core::mem::offset_of!(SparsePlanParams, page_shift) - 28usize];
    ["Offset of field: SparsePlanParams::unit_tiles"]
        [::core::mem::offset_of!(SparsePlanParams, unit_tiles) - 32usize];
    ["Offset of field: SparsePlanParams::host_pages"]
        [::core::mem::offset_of!(SparsePlanParams, host_pages) - 36usize];
};
#[doc = " Shape and split of one attention over lists of runs."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct SparseAttendParams {
    #[doc = " (Request, KV head) pairs."]
    pub rows: u32,
    #[doc = " Query heads that read one KV head."]
    pub group: u32,
    #[doc = " Entries that the list of a row can hold."]
    pub max_entries: u32,
    #[doc = " Runs of device memory."]
    pub num_runs: u32,
    #[doc = " log2 of the tokens in a page, at least 3."]
    pub page_shift: u32,
    #[doc = " Tiles of one unit of work: 1 for balanced splits; a fixed number for splits that no other row changes."]
    pub unit_tiles: u32,
    #[doc = " 1 where each unit is a part of its own, 0 where a block's units of one row are one part."]
    pub fixed_parts: u32,
    #[doc = " Units below which a block does not split further."]
    pub min_units: u32,
    #[doc = " Softmax scale."]
    pub scale: f32,
    #[doc = " Soft-cap of the scaled scores; read only where the kernel is compiled with it."]
    pub soft_cap: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SparseAttendParams"][::core::mem::size_of::<SparseAttendParams>() - 40usize];
    ["Alignment of SparseAttendParams"][::core::mem::align_of::<SparseAttendParams>() - 4usize];
    ["Offset of field: SparseAttendParams::rows"][::core::mem::offset_of!(SparseAttendParams, rows) - 0usize];
    ["Offset of field: SparseAttendParams::group"]
        [::core::mem::offset_of!(SparseAttendParams, group) - 4usize];
    ["Offset of field: SparseAttendParams::max_entries"]
        [::core::mem::offset_of!(SparseAttendParams, max_entries) - 8usize];
    ["Offset of field: SparseAttendParams::num_runs"]
        [::core::mem::offset_of!(SparseAttendParams, num_runs) - 12usize];
    ["Offset of field: SparseAttendParams::page_shift"]
        [::core::mem::offset_of!(SparseAttendParams, page_shift) - 16usize];
    ["Offset of field: SparseAttendParams::unit_tiles"]
        [::core::mem::offset_of!(SparseAttendParams, unit_tiles) - 20usize];
    ["Offset of field: SparseAttendParams::fixed_parts"]
        [::core::mem::offset_of!(SparseAttendParams, fixed_parts) - 24usize];
    ["Offset of field: SparseAttendParams::min_units"]
        [::core::mem::offset_of!(SparseAttendParams, min_units) - 28usize];
    ["Offset of field: SparseAttendParams::scale"]
        [::core::mem::offset_of!(SparseAttendParams, scale) - 32usize];
    ["Offset of field: SparseAttendParams::soft_cap"]
        [::core::mem::offset_of!(SparseAttendParams, soft_cap) - 36usize];
};
#[doc = " Pools and tables of one gather."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct SparseGatherParams {
    #[doc = " (Request, KV head) pairs: row = request * kv_heads + kv_head."]
    pub rows: u32,
    #[doc = " KV heads of a request."]
    pub kv_heads: u32,
    #[doc = " Misses that a row may have."]
    pub max_selected: u32,
    #[doc = " Slots of a row."]
    pub slots: u32,
    #[doc = " Pages of a request's host table."]
    pub max_pages: u32,
    #[doc = " Pages of host memory, each of kv_heads runs."]
    pub host_pages: u32,
    #[doc = " Runs of device memory."]
    pub device_pages: u32,
    #[doc = " Bytes of a run, a multiple of 16."]
    pub run_bytes: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SparseGatherParams"][::core::mem::size_of::<SparseGatherParams>() - 32usize];
    ["Alignment of SparseGatherParams"][::core::mem::align_of::<SparseGatherParams>() - 4usize];
    ["Offset of field: SparseGatherParams::rows"][::core::mem::offset_of!(SparseGatherParams, rows) - 0usize];
    ["Offset of field: SparseGatherParams::kv_heads"]
        [::core::mem::offset_of!(SparseGatherParams, kv_heads) - 4usize];
    ["Offset of field: SparseGatherParams::max_selected"]
        [::core::mem::offset_of!(SparseGatherParams, max_selected) - 8usize];
    ["Offset of field: SparseGatherParams::slots"]
        [::core::mem::offset_of!(SparseGatherParams, slots) - 12usize];
    ["Offset of field: SparseGatherParams::max_pages"]
        [::core::mem::offset_of!(SparseGatherParams, max_pages) - 16usize];
    ["Offset of field: SparseGatherParams::host_pages"]
        [::core::mem::offset_of!(SparseGatherParams, host_pages) - 20usize];
    ["Offset of field: SparseGatherParams::device_pages"]
        [::core::mem::offset_of!(SparseGatherParams, device_pages) - 24usize];
    ["Offset of field: SparseGatherParams::run_bytes"]
        [::core::mem::offset_of!(SparseGatherParams, run_bytes) - 28usize];
};
#[doc = " A page that was just closed."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct SparseClosing {
    #[doc = " The page."]
    pub page: u32,
    #[doc = " Run of device memory that holds it."]
    pub run: u32,
    #[doc = " The slot that it got; 0xffffffff for none."]
    pub slot: u32,
    #[doc = " The page that lost the slot; 0xffffffff if it was free."]
    pub evicted: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SparseClosing"][::core::mem::size_of::<SparseClosing>() - 16usize];
    ["Alignment of SparseClosing"][::core::mem::align_of::<SparseClosing>() - 4usize];
    ["Offset of field: SparseClosing::page"][::core::mem::offset_of!(SparseClosing, page) - 0usize];
    ["Offset of field: SparseClosing::run"][::core::mem::offset_of!(SparseClosing, run) - 4usize];
    ["Offset of field: SparseClosing::slot"][::core::mem::offset_of!(SparseClosing, slot) - 8usize];
    ["Offset of field: SparseClosing::evicted"][::core::mem::offset_of!(SparseClosing, evicted) - 12usize];
};
#[doc = " Shape of one append of new tokens to open pages."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct SparseAppendParams {
    #[doc = " Requests."]
    pub requests: u32,
    #[doc = " New tokens of each request, aligned to the end of its keys."]
    pub tokens: u32,
    #[doc = " KV heads of a request."]
    pub kv_heads: u32,
    #[doc = " Bytes of a key, a multiple of 16."]
    pub k_bytes: u32,
    #[doc = " Bytes of a value, a multiple of 16."]
    pub v_bytes: u32,
    #[doc = " log2 of the tokens in a page."]
    pub page_shift: u32,
    #[doc = " Open pages that a row may have."]
    pub max_open: u32,
    #[doc = " Runs of device memory."]
    pub num_runs: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SparseAppendParams"][::core::mem::size_of::<SparseAppendParams>() - 32usize];
    ["Alignment of SparseAppendParams"][::core::mem::align_of::<SparseAppendParams>() - 4usize];
    ["Offset of field: SparseAppendParams::requests"]
        [::core::mem::offset_of!(SparseAppendParams, requests) - 0usize];
    ["Offset of field: SparseAppendParams::tokens"]
        [::core::mem::offset_of!(SparseAppendParams, tokens) - 4usize];
    ["Offset of field: SparseAppendParams::kv_heads"]
        [::core::mem::offset_of!(SparseAppendParams, kv_heads) - 8usize];
    ["Offset of field: SparseAppendParams::k_bytes"]
        [::core::mem::offset_of!(SparseAppendParams, k_bytes) - 12usize];
    ["Offset of field: SparseAppendParams::v_bytes"]
        [::core::mem::offset_of!(SparseAppendParams, v_bytes) - 16usize];
    ["Offset of field: SparseAppendParams::page_shift"]
        [::core::mem::offset_of!(SparseAppendParams, page_shift) - 20usize];
    ["Offset of field: SparseAppendParams::max_open"]
        [::core::mem::offset_of!(SparseAppendParams, max_open) - 24usize];
    ["Offset of field: SparseAppendParams::num_runs"]
        [::core::mem::offset_of!(SparseAppendParams, num_runs) - 28usize];
};
#[doc = " Shape and rule of one closing of open pages."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct SparseCloseParams {
    #[doc = " (Request, KV head) pairs: row = request * kv_heads + kv_head."]
    pub rows: u32,
    #[doc = " KV heads of a request."]
    pub kv_heads: u32,
    #[doc = " Slots of a row."]
    pub slots: u32,
    #[doc = " Open pages that a row may have."]
    pub max_open: u32,
    #[doc = " Pages that a request may have."]
    pub max_pages: u32,
    #[doc = " Entries that a row's list of closed pages can hold."]
    pub max_closing: u32,
    #[doc = " Pages of a partition."]
    pub partition_pages: u32,
    #[doc = " log2 of the tokens in a page."]
    pub page_shift: u32,
    #[doc = " Context up to which everything stays open."]
    pub dense_tokens: u32,
    #[doc = " Ages that replacement tells apart."]
    pub buckets: u32,
    #[doc = " 1 where any number of partitions may be closed, 0 where only the one that a decoded token fills."]
    pub bulk: u32,
    #[doc = " Pages of host memory."]
    pub host_pages: u32,
    #[doc = " Runs of device memory."]
    pub num_runs: u32,
    #[doc = " Explicit padding, always 0."]
    pub _pad: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SparseCloseParams"][::core::mem::size_of::<SparseCloseParams>() - 56usize];
    ["Alignment of SparseCloseParams"][::core::mem::align_of::<SparseCloseParams>() - 4usize];
    ["Offset of field: SparseCloseParams::rows"][::core::mem::offset_of!(SparseCloseParams, rows) - 0usize];
    ["Offset of field: SparseCloseParams::kv_heads"]
        [::core::mem::offset_of!(SparseCloseParams, kv_heads) - 4usize];
    ["Offset of field: SparseCloseParams::slots"][::core::mem::offset_of!(SparseCloseParams, slots) - 8usize];
    ["Offset of field: SparseCloseParams::max_open"]
        [::core::mem::offset_of!(SparseCloseParams, max_open) - 12usize];
    ["Offset of field: SparseCloseParams::max_pages"]
        [::core::mem::offset_of!(SparseCloseParams, max_pages) - 16usize];
    ["Offset of field: SparseCloseParams::max_closing"]
        [::core::mem::offset_of!(SparseCloseParams, max_closing) - 20usize];
    ["Offset of field: SparseCloseParams::partition_pages"]
        [::core::mem::offset_of!(SparseCloseParams, partition_pages) - 24usize];
    ["Offset of field: SparseCloseParams::page_shift"]
        [::core::mem::offset_of!(SparseCloseParams, page_shift) - 28usize];
    ["Offset of field: SparseCloseParams::dense_tokens"]
        [::core::mem::offset_of!(SparseCloseParams, dense_tokens) - 32usize];
    ["Offset of field: SparseCloseParams::buckets"]
        [::core::mem::offset_of!(SparseCloseParams, buckets) - 36usize];
    ["Offset of field: SparseCloseParams::bulk"][::core::mem::offset_of!(SparseCloseParams, bulk) - 40usize];
    ["Offset of field: SparseCloseParams::host_pages"]
        [::core::mem::offset_of!(SparseCloseParams, host_pages) - 44usize];
    ["Offset of field: SparseCloseParams::num_runs"]
        [::core::mem::offset_of!(SparseCloseParams, num_runs) - 48usize];
    ["Offset of field: SparseCloseParams::_pad"][::core::mem::offset_of!(SparseCloseParams, _pad) - 52usize];
};
#[doc = " Pools and tables of one write-back."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct SparseFlushParams {
    #[doc = " (Request, KV head) pairs."]
    pub rows: u32,
    #[doc = " KV heads of a request."]
    pub kv_heads: u32,
    #[doc = " Entries that a row's list of closed pages can hold."]
    pub max_closing: u32,
    #[doc = " Slots of a row."]
    pub slots: u32,
    #[doc = " Pages of a request's host table."]
    pub max_pages: u32,
    #[doc = " Pages of host memory, each of kv_heads runs."]
    pub host_pages: u32,
    #[doc = " Runs of device memory."]
    pub num_runs: u32,
    #[doc = " Bytes of a run, a multiple of 16."]
    pub run_bytes: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SparseFlushParams"][::core::mem::size_of::<SparseFlushParams>() - 32usize];
    ["Alignment of SparseFlushParams"][::core::mem::align_of::<SparseFlushParams>() - 4usize];
    ["Offset of field: SparseFlushParams::rows"][::core::mem::offset_of!(SparseFlushParams, rows) - 0usize];
    ["Offset of field: SparseFlushParams::kv_heads"]
        [::core::mem::offset_of!(SparseFlushParams, kv_heads) - 4usize];
    ["Offset of field: SparseFlushParams::max_closing"]
        [::core::mem::offset_of!(SparseFlushParams, max_closing) - 8usize];
    ["Offset of field: SparseFlushParams::slots"]
        [::core::mem::offset_of!(SparseFlushParams, slots) - 12usize];
    ["Offset of field: SparseFlushParams::max_pages"]
        [::core::mem::offset_of!(SparseFlushParams, max_pages) - 16usize];
    ["Offset of field: SparseFlushParams::host_pages"]
        [::core::mem::offset_of!(SparseFlushParams, host_pages) - 20usize];
    ["Offset of field: SparseFlushParams::num_runs"]
        [::core::mem::offset_of!(SparseFlushParams, num_runs) - 24usize];
    ["Offset of field: SparseFlushParams::run_bytes"]
        [::core::mem::offset_of!(SparseFlushParams, run_bytes) - 28usize];
};
#[doc = " No request: touches nothing, reads nothing."]
pub const SPARSE_ROW_IDLE: SparseRow = 0;
#[doc = " Pages are closed: selects among them."]
pub const SPARSE_ROW_SELECTS: SparseRow = 1;
#[doc = " Nothing is closed: reads its open pages, all of its tokens."]
pub const SPARSE_ROW_DENSE: SparseRow = 2;
#[doc = " Something is wrong with it: reads nothing."]
pub const SPARSE_ROW_BAD: SparseRow = 3;
#[doc = " What a row of the batch is at a step."]
pub type SparseRow = ::core::ffi::c_uint;
#[doc = " Shape of one step of bucketed LRU."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct SparseResolveParams {
    #[doc = " (Request, KV head) pairs, each with slots of its own."]
    pub rows: u32,
    #[doc = " Pages that a row may select; shorter selections are padded."]
    pub max_selected: u32,
    #[doc = " Slots of a row."]
    pub slots: u32,
    #[doc = " Ages that replacement tells apart."]
    pub buckets: u32,
    #[doc = " Entries of the hash table over the selection: a power of two, at least twice max_selected."]
    pub hash_entries: u32,
    #[doc = " 1 where pages are fetched ahead between steps: nothing ages, and pages that find no slot stay away."]
    pub prefetch: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SparseResolveParams"][::core::mem::size_of::<SparseResolveParams>() - 24usize];
    ["Alignment of SparseResolveParams"][::core::mem::align_of::<SparseResolveParams>() - 4usize];
    ["Offset of field: SparseResolveParams::rows"]
        [::core::mem::offset_of!(SparseResolveParams, rows) - 0usize];
    ["Offset of field: SparseResolveParams::max_selected"]
        [::core::mem::offset_of!(SparseResolveParams, max_selected) - 4usize];
    ["Offset of field: SparseResolveParams::slots"]
        [::core::mem::offset_of!(SparseResolveParams, slots) - 8usize];
    ["Offset of field: SparseResolveParams::buckets"]
        [::core::mem::offset_of!(SparseResolveParams, buckets) - 12usize];
    ["Offset of field: SparseResolveParams::hash_entries"]
        [::core::mem::offset_of!(SparseResolveParams, hash_entries) - 16usize];
    ["Offset of field: SparseResolveParams::prefetch"]
        [::core::mem::offset_of!(SparseResolveParams, prefetch) - 20usize];
};
#[doc = " A page that was not resident, and the slot it got."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct SparseMiss {
    #[doc = " Its place in the selection."]
    pub place: u32,
    #[doc = " The page."]
    pub page: u32,
    #[doc = " The slot."]
    pub slot: u32,
    #[doc = " The page that lost the slot; 0xffffffff if it was free."]
    pub evicted: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SparseMiss"][::core::mem::size_of::<SparseMiss>() - 16usize];
    ["Alignment of SparseMiss"][::core::mem::align_of::<SparseMiss>() - 4usize];
    ["Offset of field: SparseMiss::place"][::core::mem::offset_of!(SparseMiss, place) - 0usize];
    ["Offset of field: SparseMiss::page"][::core::mem::offset_of!(SparseMiss, page) - 4usize];
    ["Offset of field: SparseMiss::slot"][::core::mem::offset_of!(SparseMiss, slot) - 8usize];
    ["Offset of field: SparseMiss::evicted"][::core::mem::offset_of!(SparseMiss, evicted) - 12usize];
};
#[doc = " Counts of a row since the caller last cleared them."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct SparseCounts {
    #[doc = " Steps over a selection."]
    pub steps: u64,
    #[doc = " Pages selected."]
    pub selected: u64,
    #[doc = " Of these, resident."]
    pub hits: u64,
    #[doc = " Of these, not resident."]
    pub misses: u64,
    #[doc = " Pages that lost their slot."]
    pub evicted: u64,
    #[doc = " Pages fetched before they were selected."]
    pub prefetched: u64,
    #[doc = " Pages written to host memory."]
    pub written: u64,
    #[doc = " Explicit padding, always 0."]
    pub _pad: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SparseCounts"][::core::mem::size_of::<SparseCounts>() - 64usize];
    ["Alignment of SparseCounts"][::core::mem::align_of::<SparseCounts>() - 8usize];
    ["Offset of field: SparseCounts::steps"][::core::mem::offset_of!(SparseCounts, steps) - 0usize];
    ["Offset of field: SparseCounts::selected"][::core::mem::offset_of!(SparseCounts, selected) - 8usize];
    ["Offset of field: SparseCounts::hits"][::core::mem::offset_of!(SparseCounts, hits) - 16usize];
    ["Offset of field: SparseCounts::misses"][::core::mem::offset_of!(SparseCounts, misses) - 24usize];
    ["Offset of field: SparseCounts::evicted"][::core::mem::offset_of!(SparseCounts, evicted) - 32usize];
    ["Offset of field: SparseCounts::prefetched"]
        [::core::mem::offset_of!(SparseCounts, prefetched) - 40usize];
    ["Offset of field: SparseCounts::written"][::core::mem::offset_of!(SparseCounts, written) - 48usize];
    ["Offset of field: SparseCounts::_pad"][::core::mem::offset_of!(SparseCounts, _pad) - 56usize];
};
#[doc = " Minimum and maximum, with the negative and the positive part of the query."]
pub const SPARSE_MIN_MAX: SparseScorer = 0;
#[doc = " Centre of the box and mean distance from it, with the query and its size."]
pub const SPARSE_CUBOID_MEAN: SparseScorer = 1;
#[doc = " Mean and standard deviation, with the query and its weighted size."]
pub const SPARSE_MEAN_STD: SparseScorer = 2;
#[doc = " Mean alone."]
pub const SPARSE_MEAN: SparseScorer = 3;
#[doc = " What summarises a chunk of keys, and what its two vectors are multiplied with."]
pub type SparseScorer = ::core::ffi::c_uint;
#[doc = " Largest raw score."]
pub const SPARSE_RAW: SparseAggregation = 0;
#[doc = " Largest probability."]
pub const SPARSE_MAX: SparseAggregation = 1;
#[doc = " Mean probability."]
pub const SPARSE_AVERAGE: SparseAggregation = 2;
#[doc = " Sum of probabilities."]
pub const SPARSE_SUM: SparseAggregation = 3;
#[doc = " How the scores of a group become one."]
pub type SparseAggregation = ::core::ffi::c_uint;
#[doc = " Shape of one round of summaries."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct SparseSummariseParams {
    #[doc = " (Request, KV head) pairs."]
    pub rows: u32,
    #[doc = " Entries that a row's list of closed pages can hold."]
    pub max_closing: u32,
    #[doc = " Pages of a chunk."]
    pub chunk_pages: u32,
    #[doc = " log2 of the tokens in a page."]
    pub page_shift: u32,
    #[doc = " Elements of a key."]
    pub dim: u32,
    #[doc = " Elements of a run: keys, then values."]
    pub run_elements: u32,
    #[doc = " Runs of device memory."]
    pub num_runs: u32,
    #[doc = " Partitions that a row may have."]
    pub max_partitions: u32,
    #[doc = " A SparseScorer."]
    pub scorer: u32,
    #[doc = " Explicit padding, always 0."]
    pub _pad: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SparseSummariseParams"][::core::mem::size_of::<SparseSummariseParams>() - 40usize];
    ["Alignment of SparseSummariseParams"][::core::mem::align_of::<SparseSummariseParams>() - 4usize];
    ["Offset of field: SparseSummariseParams::rows"]
        [::core::mem::offset_of!(SparseSummariseParams, rows) - 0usize];
    ["Offset of field: SparseSummariseParams::max_closing"]
        [::core::mem::offset_of!(SparseSummariseParams, max_closing) - 4usize];
    ["Offset of field: SparseSummariseParams::chunk_pages"]
        [::core::mem::offset_of!(SparseSummariseParams, chunk_pages) - 8usize];
    ["Offset of field: SparseSummariseParams::page_shift"]
        [::core::mem::offset_of!(SparseSummariseParams, page_shift) - 12usize];
    ["Offset of field: SparseSummariseParams::dim"]
        [::core::mem::offset_of!(SparseSummariseParams, dim) - 16usize];
    ["Offset of field: SparseSummariseParams::run_elements"]
        [::core::mem::offset_of!(SparseSummariseParams, run_elements) - 20usize];
    ["Offset of field: SparseSummariseParams::num_runs"]
        [::core::mem::offset_of!(SparseSummariseParams, num_runs) - 24usize];
    ["Offset of field: SparseSummariseParams::max_partitions"]
        [::core::mem::offset_of!(SparseSummariseParams, max_partitions) - 28usize];
    ["Offset of field: SparseSummariseParams::scorer"]
        [::core::mem::offset_of!(SparseSummariseParams, scorer) - 32usize];
    ["Offset of field: SparseSummariseParams::_pad"]
        [::core::mem::offset_of!(SparseSummariseParams, _pad) - 36usize];
};
#[doc = " Shape of one round of scores."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct SparseScoreParams {
    #[doc = " (Request, KV head) pairs."]
    pub rows: u32,
    #[doc = " Queries of a row, 1 to 16."]
    pub group: u32,
    #[doc = " Partitions that a row may have."]
    pub max_partitions: u32,
    #[doc = " A SparseScorer: how queries meet summaries."]
    pub scorer: u32,
    #[doc = " Blocks of a row."]
    pub blocks: u32,
    #[doc = " How much a deviation counts, for SPARSE_MEAN_STD."]
    pub weight: f32,
    #[doc = " Scale of the softmax under which a group agrees."]
    pub scale: f32,
    #[doc = " Its soft-cap; 0 for none."]
    pub soft_cap: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SparseScoreParams"][::core::mem::size_of::<SparseScoreParams>() - 32usize];
    ["Alignment of SparseScoreParams"][::core::mem::align_of::<SparseScoreParams>() - 4usize];
    ["Offset of field: SparseScoreParams::rows"][::core::mem::offset_of!(SparseScoreParams, rows) - 0usize];
    ["Offset of field: SparseScoreParams::group"][::core::mem::offset_of!(SparseScoreParams, group) - 4usize];
    ["Offset of field: SparseScoreParams::max_partitions"]
        [::core::mem::offset_of!(SparseScoreParams, max_partitions) - 8usize];
    ["Offset of field: SparseScoreParams::scorer"]
        [::core::mem::offset_of!(SparseScoreParams, scorer) - 12usize];
    ["Offset of field: SparseScoreParams::blocks"]
        [::core::mem::offset_of!(SparseScoreParams, blocks) - 16usize];
    ["Offset of field: SparseScoreParams::weight"]
        [::core::mem::offset_of!(SparseScoreParams, weight) - 20usize];
    ["Offset of field: SparseScoreParams::scale"]
        [::core::mem::offset_of!(SparseScoreParams, scale) - 24usize];
    ["Offset of field: SparseScoreParams::soft_cap"]
        [::core::mem::offset_of!(SparseScoreParams, soft_cap) - 28usize];
};
#[doc = " Shape and rule of one selection."]
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct SparseSelectParams {
    #[doc = " Share of a row's partitions that is estimated, after those that are read."]
    pub estimate: f64,
    #[doc = " (Request, KV head) pairs."]
    pub rows: u32,
    #[doc = " Rows of scores of a row, 1 to 16."]
    pub columns: u32,
    #[doc = " Partitions that a row may have."]
    pub max_partitions: u32,
    #[doc = " Blocks of a row in the scores' partial sums."]
    pub blocks: u32,
    #[doc = " Pages that a row may select."]
    pub max_selected: u32,
    #[doc = " Partitions that a row may estimate."]
    pub max_estimated: u32,
    #[doc = " First partitions that are always kept."]
    pub sinks: u32,
    #[doc = " Last partitions that are always kept."]
    pub recent: u32,
    #[doc = " Pages of a partition, where all have the same number."]
    pub partition_pages: u32,
    #[doc = " A SparseAggregation."]
    pub aggregation: u32,
    #[doc = " Scale of the softmax under which a group agrees."]
    pub scale: f32,
    #[doc = " Its soft-cap; 0 for none."]
    pub soft_cap: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SparseSelectParams"][::core::mem::size_of::<SparseSelectParams>() - 56usize];
    ["Alignment of SparseSelectParams"][::core::mem::align_of::<SparseSelectParams>() - 8usize];
    ["Offset of field: SparseSelectParams::estimate"]
        [::core::mem::offset_of!(SparseSelectParams, estimate) - 0usize];
    ["Offset of field: SparseSelectParams::rows"][::core::mem::offset_of!(SparseSelectParams, rows) - 8usize];
    ["Offset of field: SparseSelectParams::columns"]
        [::core::mem::offset_of!(SparseSelectParams, columns) - 12usize];
    ["Offset of field: SparseSelectParams::max_partitions"]
        [::core::mem::offset_of!(SparseSelectParams, max_partitions) - 16usize];
    ["Offset of field: SparseSelectParams::blocks"]
        [::core::mem::offset_of!(SparseSelectParams, blocks) - 20usize];
    ["Offset of field: SparseSelectParams::max_selected"]
        [::core::mem::offset_of!(SparseSelectParams, max_selected) - 24usize];
    ["Offset of field: SparseSelectParams::max_estimated"]
        [::core::mem::offset_of!(SparseSelectParams, max_estimated) - 28usize];
    ["Offset of field: SparseSelectParams::sinks"]
        [::core::mem::offset_of!(SparseSelectParams, sinks) - 32usize];
    ["Offset of field: SparseSelectParams::recent"]
        [::core::mem::offset_of!(SparseSelectParams, recent) - 36usize];
    ["Offset of field: SparseSelectParams::partition_pages"]
        [::core::mem::offset_of!(SparseSelectParams, partition_pages) - 40usize];
    ["Offset of field: SparseSelectParams::aggregation"]
        [::core::mem::offset_of!(SparseSelectParams, aggregation) - 44usize];
    ["Offset of field: SparseSelectParams::scale"]
        [::core::mem::offset_of!(SparseSelectParams, scale) - 48usize];
    ["Offset of field: SparseSelectParams::soft_cap"]
        [::core::mem::offset_of!(SparseSelectParams, soft_cap) - 52usize];
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
#[doc = " What a row was given was made for an earlier state of it."]
pub const FAULT_STALE: FaultCode = 6;
#[doc = " What a kernel found wrong with one row: the high 32 bits of the status word. The low 32 bits are the row's index."]
pub type FaultCode = ::core::ffi::c_uint;
