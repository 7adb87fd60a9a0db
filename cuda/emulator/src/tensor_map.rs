//! Tensor maps as the emulator understands them.

use cuda::tensor_map::Tensor;

/// `TENSOR_MAP_MAGIC` of `runtime/emulator_api.h`.
const MAGIC: u64 = 0x7061_6d72_6f73_6e74;

/// The 128 bytes of `TensorMap` of `runtime/emulator_api.h`, which stand for the driver's; zeros for a tensor without elements.
pub(crate) fn encode(address: u64, tensor: &Tensor) -> [u64; 16] {
    let mut words = [0; 16];
    let shape = &tensor.shape;
    if !shape.is_empty() {
        words[0] = MAGIC;
        words[1] = address;
        words[2] = shape.columns;
        words[3] = shape.rows;
        words[4] = shape.row_bytes;
        words[5] = u64::from(shape.box_columns) | u64::from(shape.box_rows) << 32;
        words[6] = tensor.element_bytes() | u64::from(shape.swizzle_128) << 32;
        if let Some(planes) = shape.planes {
            (words[7], words[8]) = (planes.count, planes.bytes);
        }
    }
    words
}
