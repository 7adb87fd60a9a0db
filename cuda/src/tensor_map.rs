//! Tensor maps: how a tensor lies in memory that kernels load box by box (TMA, sm_90 and later).
//!
//! A kernel takes a map by value, as `const __grid_constant__ TensorMap`; a launch describes it by an [`Arg::tensor`], and the
//! driver or the emulator encodes it then. Encoding is a matter of the host alone: nothing is allocated, nothing waits, and a
//! captured launch keeps the map that it was captured with.
//!
//! [`Arg::tensor`]: crate::launch::Arg::tensor

use crate::Error;

/// A tensor `[rows, columns]` or `[planes, rows, columns]`, and the boxes of it that one instruction loads into shared memory.
///
/// Elements of a box outside of the tensor arrive as zeros. The demands are those of the driver's `cuTensorMapEncodeTiled`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorShape {
    /// Elements in a row, the x direction; at most 2³¹ − 1.
    pub columns: u64,
    /// Rows, the y direction; at most 2³¹ − 1. A tensor without rows has an empty map, from which nothing can be loaded.
    pub rows: u64,
    /// Distance of two rows in bytes: a multiple of 16 below 2⁴⁰ that holds a row.
    pub row_bytes: u64,
    /// Columns of a box: 1 to 256 that take a multiple of 16 bytes, with `swizzle_128` at most 128.
    pub box_columns: u32,
    /// Rows of a box, 1 to 256.
    pub box_rows: u32,
    /// Whether 16-byte chunk c of a box's 128-byte row r is stored at chunk c ^ (r % 8).
    pub swizzle_128: bool,
    /// The third dimension, z, where there is one: boxes are of one plane, and kernels load them by three coordinates.
    pub planes: Option<Planes>,
}

/// The third dimension of a tensor, such as the pages of a cache; planes may lie between the rows of one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planes {
    /// How many; at most 2³¹ − 1. A tensor without planes has an empty map.
    pub count: u64,
    /// Distance of two planes in bytes: a multiple of 16 above 0 and below 2⁴⁰.
    pub bytes: u64,
}

impl TensorShape {
    /// Checks everything but the tensor's address and memory, for elements of so many bytes.
    ///
    /// # Errors
    /// [`Error::Argument`] names `argument` and the field that no map can hold.
    pub fn check(&self, kernel: &str, argument: &'static str, element_bytes: u64) -> Result<(), Error> {
        const EXTENT: u64 = i32::MAX as u64;
        let refuse = |expected: &str, found: String| Err(Error::argument(kernel, argument, expected, found));
        let TensorShape { columns, rows, row_bytes, box_columns, box_rows, swizzle_128, planes } = *self;
        if columns == 0 || columns > EXTENT || rows > EXTENT {
            return refuse("1 to 2³¹ − 1 columns and at most as many rows", format!("{rows} × {columns}"));
        }
        if !row_bytes.is_multiple_of(16) || row_bytes < columns * element_bytes || row_bytes >= 1 << 40 {
            return refuse(
                "rows apart by a multiple of 16 bytes below 2⁴⁰ that holds one",
                format!("{row_bytes} bytes for {columns} columns"),
            );
        }
        if let Some(Planes { count, bytes }) = planes
            && (count > EXTENT || bytes == 0 || !bytes.is_multiple_of(16) || bytes >= 1 << 40)
        {
            return refuse(
                "at most 2³¹ − 1 planes, apart by a multiple of 16 bytes above 0 and below 2⁴⁰",
                format!("{count} planes of {bytes} bytes"),
            );
        }
        let box_row = u64::from(box_columns) * element_bytes;
        if !(1..=256).contains(&box_columns) || !(1..=256).contains(&box_rows) || !box_row.is_multiple_of(16)
        {
            return refuse(
                "boxes of 1 to 256 rows and columns, a multiple of 16 bytes wide",
                format!("{box_rows} × {box_columns}"),
            );
        }
        if swizzle_128 && box_row > 128 {
            return refuse(
                "boxes at most 128 bytes wide with the 128-byte swizzle",
                format!("{box_row} bytes"),
            );
        }
        Ok(())
    }

    /// Bytes from the first element to one past the last.
    pub fn bytes(&self, element_bytes: u64) -> u64 {
        if self.is_empty() {
            return 0;
        }
        let last_plane =
            self.planes.map_or(0, |planes| planes.count.saturating_sub(1).saturating_mul(planes.bytes));
        let last_row = self.rows.saturating_sub(1).saturating_mul(self.row_bytes);
        last_plane.saturating_add(last_row).saturating_add(self.columns.saturating_mul(element_bytes))
    }

    /// Whether there is nothing to load.
    pub fn is_empty(&self) -> bool {
        self.rows == 0 || self.planes.is_some_and(|planes| planes.count == 0)
    }
}

/// A tensor and where it lies; of 16-bit or 32-bit elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tensor {
    /// Extent and boxes.
    pub shape: TensorShape,
    /// Element type, a number of [`table::dtype`](crate::table::dtype).
    pub dtype: i64,
}

impl Tensor {
    /// Bytes of an element.
    pub fn element_bytes(&self) -> u64 {
        if self.dtype == crate::table::dtype::F32 { 4 } else { 2 }
    }

    /// Checks the shape, and that `bytes` bytes from `address` on hold the tensor.
    ///
    /// # Errors
    /// [`Error::Argument`] names `argument` and what a map cannot hold.
    pub fn check(
        &self,
        kernel: &str,
        argument: &'static str,
        address: u64,
        bytes: usize,
    ) -> Result<(), Error> {
        self.shape.check(kernel, argument, self.element_bytes())?;
        let needed = self.shape.bytes(self.element_bytes());
        if needed > bytes as u64 {
            let expected = format!("at least {needed} bytes, the extent of the tensor");
            return Err(Error::argument(kernel, argument, expected, format_args!("{bytes} bytes")));
        }
        if needed > 0 && (address == 0 || !address.is_multiple_of(16)) {
            let found = format!("{address:#x}");
            return Err(Error::argument(kernel, argument, "an address divisible by 16", found));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::dtype;

    const GOOD: TensorShape = TensorShape {
        columns: 64,
        rows: 128,
        row_bytes: 128,
        box_columns: 64,
        box_rows: 64,
        swizzle_128: true,
        planes: None,
    };

    #[test]
    fn what_no_map_can_hold_is_refused() {
        let check =
            |shape, address, bytes| Tensor { shape, dtype: dtype::BF16 }.check("kernel", "k", address, bytes);
        assert_eq!(check(GOOD, 0x1000, 128 * 128), Ok(()));
        assert_eq!(check(TensorShape { rows: 0, ..GOOD }, 0, 0), Ok(()), "nothing to load");
        let planes = |count, bytes| TensorShape { rows: 32, planes: Some(Planes { count, bytes }), ..GOOD };
        assert_eq!(check(planes(4, 32 * 128), 0x1000, 128 * 128), Ok(()), "planes one after another");
        assert_eq!(check(planes(3, 128), 0x1000, 34 * 128), Ok(()), "planes between the rows of one another");
        assert_eq!(check(planes(0, 128), 0, 0), Ok(()), "no planes");
        let widest = TensorShape { columns: 1 << 20, row_bytes: 1 << 39, rows: 2, ..GOOD };
        assert_eq!(check(widest, 0x1000, usize::MAX), Ok(()), "the widest rows");
        let cases = [
            ("unaligned rows", TensorShape { row_bytes: 136, ..GOOD }, "multiple of 16"),
            ("rows that overlap", TensorShape { row_bytes: 112, ..GOOD }, "holds one"),
            ("rows too far apart", TensorShape { row_bytes: 1 << 40, ..GOOD }, "below 2⁴⁰"),
            ("a row too many", TensorShape { rows: 129, ..GOOD }, "at least 16512 bytes"),
            ("a plane too many", planes(5, 32 * 128), "at least 20480 bytes"),
            ("planes too far apart", planes(4, 32 * 128 + 16), "at least 16432 bytes"),
            ("unaligned planes", planes(4, 32 * 128 - 8), "planes, apart by a multiple of 16"),
            ("planes in one place", planes(4, 0), "above 0"),
            ("planes out of reach", planes(2, 1 << 40), "below 2⁴⁰"),
            ("too many planes", planes(1 << 31, 128), "at most 2³¹ − 1 planes"),
            ("no columns", TensorShape { columns: 0, ..GOOD }, "columns"),
            ("too many rows", TensorShape { rows: 1 << 31, ..GOOD }, "columns"),
            ("too many columns", TensorShape { columns: 1 << 31, ..GOOD }, "columns"),
            ("a box too high", TensorShape { box_rows: 257, ..GOOD }, "1 to 256"),
            ("a box of 8 bytes", TensorShape { box_columns: 4, ..GOOD }, "16 bytes wide"),
            ("a box wider than the swizzle", TensorShape { box_columns: 72, ..GOOD }, "128-byte swizzle"),
        ];
        for (name, shape, expected) in cases {
            match check(shape, 0x1000, 128 * 128) {
                Err(Error::Argument { kernel, argument: "k", expected: found, .. }) => {
                    assert_eq!(kernel, "kernel", "{name}");
                    assert!(found.contains(expected), "{name}: {found}");
                }
                other => panic!("{name}: {other:?}"),
            }
        }
        assert!(check(GOOD, 0x1008, 128 * 128).is_err(), "an unaligned tensor");
        assert!(check(GOOD, 0, 128 * 128).is_err(), "no tensor");
        // Of f32 a box of 64 columns is 256 bytes wide.
        let wide = Tensor { shape: TensorShape { row_bytes: 256, ..GOOD }, dtype: dtype::F32 };
        assert!(wide.check("kernel", "k", 0x1000, 1 << 20).is_err(), "f32");
    }
}
