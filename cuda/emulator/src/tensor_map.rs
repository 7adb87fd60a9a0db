//! Tensor maps as the emulator understands them.

use bytemuck::Pod;
use cuda::Error;
use cuda::memory::{Space, View};

/// `TENSOR_MAP_MAGIC` of `runtime/emulator_api.h`.
const MAGIC: u64 = 0x7061_6d72_6f73_6e74;

/// A two-dimensional tensor map for `tma_load_2d`: 128 bytes, passed to kernels by value like the driver's.
///
/// The map holds the tensor's address and extent; the emulator trusts them, so the tensor must outlive every launch with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct TensorMap {
    words: [u64; 16],
}

// SAFETY: sixteen words without padding; any bits are valid.
unsafe impl bytemuck::Zeroable for TensorMap {}
// SAFETY: as above.
unsafe impl Pod for TensorMap {}

/// How a tensor in memory is cut into boxes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorShape {
    /// Elements in a row, the x direction.
    pub columns: u64,
    /// Rows, the y direction.
    pub rows: u64,
    /// Distance of two rows in bytes, divisible by 16.
    pub row_bytes: u64,
    /// Columns of a box, up to 256; with `swizzle_128` at most 128 bytes of them.
    pub box_columns: u32,
    /// Rows of a box, up to 256.
    pub box_rows: u32,
    /// Whether 16-byte chunk c of a box's 128-byte row r is stored at chunk c ^ (r % 8).
    pub swizzle_128: bool,
}

impl TensorMap {
    /// The map of a tensor `[rows, columns]` in host memory. The same demands as the driver's `cuTensorMapEncodeTiled`.
    pub fn new<T: Pod>(tensor: &View<'_, T>, shape: &TensorShape) -> Result<Self, Error> {
        let wrong = |argument, expected: &str, found: String| {
            Err(Error::argument("TensorMap", argument, expected, found))
        };
        let element = size_of::<T>() as u64;
        let box_row = u64::from(shape.box_columns) * element;
        if tensor.space() != Space::Host {
            return wrong("tensor", "host memory", tensor.space().to_string());
        }
        if !tensor.address().is_multiple_of(16) {
            return wrong("tensor", "an address divisible by 16", format!("{:#x}", tensor.address()));
        }
        if !shape.row_bytes.is_multiple_of(16) || shape.row_bytes < shape.columns * element {
            return wrong("row_bytes", "a multiple of 16 that holds a row", shape.row_bytes.to_string());
        }
        let end = shape.rows.saturating_sub(1) * shape.row_bytes + shape.columns * element;
        if shape.rows == 0 || shape.columns == 0 || end > tensor.bytes() as u64 {
            return wrong(
                "tensor",
                "at least one row and column, all in the view",
                format!("{} bytes of {end}", tensor.bytes()),
            );
        }
        if !(1..=256).contains(&shape.box_columns)
            || !(1..=256).contains(&shape.box_rows)
            || !box_row.is_multiple_of(16)
        {
            return wrong(
                "box",
                "1 to 256 rows and columns, a multiple of 16 bytes wide",
                format!("{} × {}", shape.box_rows, shape.box_columns),
            );
        }
        if shape.swizzle_128 && box_row > 128 {
            return wrong(
                "box_columns",
                "at most 128 bytes with the 128-byte swizzle",
                format!("{box_row} bytes"),
            );
        }
        let mut words = [0; 16];
        words[0] = MAGIC;
        words[1] = tensor.address();
        words[2] = shape.columns;
        words[3] = shape.rows;
        words[4] = shape.row_bytes;
        words[5] = u64::from(shape.box_columns) | u64::from(shape.box_rows) << 32;
        words[6] = element | u64::from(shape.swizzle_128) << 32;
        Ok(Self { words })
    }
}
