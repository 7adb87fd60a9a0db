//! Kernels of `cuda/kernels/kv-compress`.

mod append;
mod decode;
mod heads;
mod reconstruct;

pub use append::{FdcAppend, FdcAppendArgs, FdcQueries, append_tiles};
pub use decode::{FdcDecode, FdcDecodeArgs, FdcDecodeVariant, columns, max_parts, part_slots};
pub use heads::{fdc_heads, k_channels, page_blocks, v_channels};
pub use reconstruct::{FdcReconstruct, FdcReconstructArgs};
