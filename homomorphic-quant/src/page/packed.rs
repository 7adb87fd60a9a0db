//! The packed layout of a segment: codes in the order in which the decode kernel's matrix instructions read them.
//!
//! The fields are those of the [canonical] layout and as long, keys first, in the order in which a reader
//! needs them:
//!
//! | field | order | type |
//! |---|---|---|
//! | `k_scale` | `[D]`, by [`channel_of_scale`] | f16 or bf16 |
//! | `k_min` | `[D]`, by [`channel_of_min`] | f16 or bf16 |
//! | `k_sums` | `[8, P, Π / 8]`: token `8·j + g` at `(g, partition, j)` | u8 or u16 |
//! | `k_codes` | [`CodeMatrix`]: rows are tokens, columns are channels | `b`-bit codes |
//! | `v_scale` | `[8, R, Π / 8]`: token `8·j + g` at `(g, partition, j)` | f16 or bf16 |
//! | `v_min` | as `v_scale` | f16 or bf16 |
//! | `v_sums` | `[8, E / 8]`: channel `8·j + g` at `(g, j)` | u8 or u16 |
//! | `v_codes` | [`CodeMatrix`]: rows are channels, columns are tokens, by [`token_of_column`] | `c`-bit codes |
//!
//! `cuda/include/tile/hack_page.cuh` and `codes.cuh` are the same in device code. The layout is made for
//! [`Layout::PerChannelKey`] with cached sums and for dims that are multiples of 32.

use attention::DType;
use half::{bf16, f16};

use super::{HeadGeometry, SumType, canonical};
use crate::quantizer::Group;
use crate::{Bits, Error, HeadBlock, Layout};

/// A matrix of codes `[rows, columns]` in units of one k-step (32 columns) by a few tiles of 16 rows.
///
/// A unit holds the words of lane 0, then of lane 1, up to 31. A byte of a word holds a code of each of its `8 / bits` planes:
/// different row tiles, as far as their number allows, else the two halves of the k-step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CodeMatrix {
    bits: usize,
    rows: usize,
    columns: usize,
}

impl CodeMatrix {
    /// Rows are a multiple of 32, columns too.
    pub const fn new(bits: Bits, rows: usize, columns: usize) -> Self {
        CodeMatrix { bits: bits.count(), rows, columns }
    }

    /// Planes of a byte that are row tiles.
    const fn row_planes(&self) -> usize {
        let (planes, tiles) = (8 / self.bits, self.rows / 16);
        if planes.is_multiple_of(4) && tiles.is_multiple_of(4) {
            4
        } else if planes.is_multiple_of(2) && tiles.is_multiple_of(2) {
            2
        } else {
            1
        }
    }

    /// Bytes of the matrix.
    pub const fn bytes(&self) -> usize {
        self.rows * self.columns * self.bits / 8
    }

    /// Where a code lies: its byte, and its lowest bit there.
    pub const fn place(&self, row: usize, column: usize) -> (usize, usize) {
        let row_planes = self.row_planes();
        let half_planes = 8 / self.bits / row_planes;
        let words = 4 / half_planes;
        let (group, row_plane) = (row / 16 / row_planes, row / 16 % row_planes);
        let (step, half) = (column / 32, column / 16 % 2);
        let (word, plane) = if half_planes == 1 {
            (row / 8 % 2 + 2 * half, row_plane)
        } else {
            (row / 8 % 2, row_plane + row_planes * half)
        };
        let lane = row % 8 * 4 + column % 16 / 4;
        let unit = group * (self.columns / 32) + step;
        (((unit * 32 + lane) * words + word) * 4 + column % 4, self.bits * plane)
    }
}

/// Channel whose key scale lies at `position`: a lane's four channels of both halves of a k-step lie side by side.
pub const fn channel_of_scale(position: usize) -> usize {
    position / 32 * 32 + position / 4 % 2 * 16 + position / 8 % 4 * 4 + position % 4
}

/// Channel whose key minimum lies at `position`: a lane's pairs of every 8 channels of a k-step lie side by side.
pub const fn channel_of_min(position: usize) -> usize {
    position / 32 * 32 + position / 2 % 4 * 8 + position / 8 % 4 * 2 + position % 2
}

/// Token of the block behind a column of the value codes: tokens 2t, 2t + 8, 2t + 1, 2t + 9 of every 16 are neighbours.
pub const fn token_of_column(column: usize) -> usize {
    column / 16 * 16 + column / 4 % 4 * 2 + column / 2 % 2 + column % 2 * 8
}

/// Place of element `index` of `rows` (tokens or channels) in a field `[8, partitions, rows / 8]`.
const fn row_position(index: usize, partition: usize, rows: usize, partitions: usize) -> usize {
    (index % 8 * partitions + partition) * (rows / 8) + index / 8
}

/// Refuses heads that the layout is not made for.
///
/// # Errors
/// [`Error::Argument`] names what does not fit.
pub fn check(head: &HeadGeometry) -> Result<(), Error> {
    if head.layout != Layout::PerChannelKey {
        return Err(Error::argument("layout", "PerChannelKey in packed pages", format!("{:?}", head.layout)));
    }
    if !head.cached_sums {
        return Err(Error::argument("cached_sums", "true in packed pages", false));
    }
    for (argument, dim) in [("qk_dim", head.qk_dim), ("v_dim", head.v_dim)] {
        if !dim.is_multiple_of(32) {
            return Err(Error::argument(argument, "a multiple of 32 in packed pages", dim));
        }
    }
    Ok(())
}

/// Bytes of a head's segment: those of the canonical layout.
pub(super) fn bytes(head: &HeadGeometry) -> usize {
    canonical::Fields::new(head).bytes
}

/// Reads a segment.
pub(super) fn read(head: &HeadGeometry, segment: &[u8]) -> Result<HeadBlock, Error> {
    check(head)?;
    let mut reader = Fields { bytes: checked(head, segment.len()).map(|()| segment)? };
    let (tokens, keys, values) = (head.partition, head.k_partitions(), head.v_partitions());

    let mut k_groups = vec![Group { scale: 0.0, min: 0.0 }; head.qk_dim];
    let scales = reader.halves(head.qk_dim, head.dtype);
    let minima = reader.halves(head.qk_dim, head.dtype);
    for position in 0..head.qk_dim {
        k_groups[channel_of_scale(position)].scale = scales[position];
        k_groups[channel_of_min(position)].min = minima[position];
    }
    let sums = reader.sums(tokens * keys, head.k_sum_type());
    let k_sums = (0..tokens * keys).map(|i| sums[row_position(i / keys, i % keys, tokens, keys)]).collect();
    let matrix = CodeMatrix::new(head.bits.k, tokens, head.qk_dim);
    let k_codes = reader.codes(matrix, |row, column| row * head.qk_dim + column);

    let scales = reader.halves(tokens * values, head.dtype);
    let minima = reader.halves(tokens * values, head.dtype);
    let v_groups = (0..tokens * values)
        .map(|i| row_position(i / values, i % values, tokens, values))
        .map(|position| Group { scale: scales[position], min: minima[position] })
        .collect();
    let sums = reader.sums(head.v_dim, head.v_sum_type());
    let v_sums = (0..head.v_dim).map(|channel| sums[row_position(channel, 0, head.v_dim, 1)]).collect();
    let matrix = CodeMatrix::new(head.bits.v, head.v_dim, tokens);
    let v_codes = reader.codes(matrix, |row, column| token_of_column(column) * head.v_dim + row);
    Ok(HeadBlock { k_codes, k_groups, k_sums, v_codes, v_groups, v_sums })
}

/// Writes a segment, wholly.
pub(super) fn write(head: &HeadGeometry, block: &HeadBlock, segment: &mut [u8]) -> Result<(), Error> {
    check(head)?;
    checked(head, segment.len())?;
    block.check(head)?;
    segment.fill(0);
    let mut writer = FieldsMut { bytes: segment };
    let (tokens, keys, values) = (head.partition, head.k_partitions(), head.v_partitions());

    writer.halves(head.qk_dim, head.dtype, |position| {
        let channel = channel_of_scale(position);
        (position, block.k_groups[channel].scale)
    });
    writer
        .halves(head.qk_dim, head.dtype, |position| (position, block.k_groups[channel_of_min(position)].min));
    writer.sums(&block.k_sums, head.k_sum_type(), |i| row_position(i / keys, i % keys, tokens, keys));
    let matrix = CodeMatrix::new(head.bits.k, tokens, head.qk_dim);
    writer.codes(matrix, |row, column| block.k_codes[row * head.qk_dim + column]);

    let place = |i: usize| row_position(i / values, i % values, tokens, values);
    writer.halves(tokens * values, head.dtype, |i| (place(i), block.v_groups[i].scale));
    writer.halves(tokens * values, head.dtype, |i| (place(i), block.v_groups[i].min));
    writer.sums(&block.v_sums, head.v_sum_type(), |channel| row_position(channel, 0, head.v_dim, 1));
    let matrix = CodeMatrix::new(head.bits.v, head.v_dim, tokens);
    writer.codes(matrix, |row, column| block.v_codes[token_of_column(column) * head.v_dim + row]);
    Ok(())
}

fn checked(head: &HeadGeometry, found: usize) -> Result<(), Error> {
    let expected = bytes(head);
    if expected == found {
        return Ok(());
    }
    Err(Error::argument("segment", format!("{expected} bytes"), found))
}

/// The fields of a segment, taken from the front.
struct Fields<'a> {
    bytes: &'a [u8],
}

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> &'a [u8] {
        let (field, rest) = self.bytes.split_at(len);
        self.bytes = rest;
        field
    }

    fn halves(&mut self, count: usize, dtype: DType) -> Vec<f32> {
        let halves = self.take(2 * count).as_chunks::<2>().0.iter();
        halves
            .map(|&half| match dtype {
                DType::F16 => f16::from_le_bytes(half).to_f32(),
                _ => bf16::from_le_bytes(half).to_f32(),
            })
            .collect()
    }

    fn sums(&mut self, count: usize, of: SumType) -> Vec<u16> {
        let field = self.take(count * of.size());
        match of {
            SumType::U8 => field.iter().map(|&sum| u16::from(sum)).collect(),
            SumType::U16 => field.as_chunks::<2>().0.iter().map(|&sum| u16::from_le_bytes(sum)).collect(),
        }
    }

    /// Codes one per byte; the one at (row, column) goes to `index`.
    fn codes(&mut self, matrix: CodeMatrix, index: impl Fn(usize, usize) -> usize) -> Vec<u8> {
        let field = self.take(matrix.bytes());
        let mut codes = vec![0; matrix.rows * matrix.columns];
        for row in 0..matrix.rows {
            for column in 0..matrix.columns {
                let (byte, bit) = matrix.place(row, column);
                codes[index(row, column)] = field[byte] >> bit & (0xff >> (8 - matrix.bits));
            }
        }
        codes
    }
}

/// The fields of a segment of zeros, filled from the front.
struct FieldsMut<'a> {
    bytes: &'a mut [u8],
}

impl<'a> FieldsMut<'a> {
    fn take(&mut self, len: usize) -> &'a mut [u8] {
        let (field, rest) = std::mem::take(&mut self.bytes).split_at_mut(len);
        self.bytes = rest;
        field
    }

    /// `place` gives the position and value of each of `count` elements.
    fn halves(&mut self, count: usize, dtype: DType, place: impl Fn(usize) -> (usize, f32)) {
        let field = self.take(2 * count).as_chunks_mut::<2>().0;
        for (position, value) in (0..count).map(place) {
            // Exact: the values were rounded to this type when the group was fitted.
            field[position] = match dtype {
                DType::F16 => f16::from_f32(value).to_le_bytes(),
                _ => bf16::from_f32(value).to_le_bytes(),
            };
        }
    }

    fn sums(&mut self, sums: &[u16], of: SumType, place: impl Fn(usize) -> usize) {
        let field = self.take(sums.len() * of.size());
        for (i, &sum) in sums.iter().enumerate() {
            match of {
                SumType::U8 => field[place(i)] = sum as u8,
                SumType::U16 => field.as_chunks_mut::<2>().0[place(i)] = sum.to_le_bytes(),
            }
        }
    }

    fn codes(&mut self, matrix: CodeMatrix, code: impl Fn(usize, usize) -> u8) {
        let field = self.take(matrix.bytes());
        for row in 0..matrix.rows {
            for column in 0..matrix.columns {
                let (byte, bit) = matrix.place(row, column);
                field[byte] |= code(row, column) << bit;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_a_place_of_its_own() {
        for bits in Bits::ALL {
            for (rows, columns) in [(32, 64), (64, 128), (96, 32), (128, 96), (256, 128)] {
                let matrix = CodeMatrix::new(bits, rows, columns);
                let mut taken = vec![0u8; matrix.bytes()];
                for row in 0..rows {
                    for column in 0..columns {
                        let (byte, bit) = matrix.place(row, column);
                        let mask = (0xff >> (8 - bits.count())) << bit;
                        assert_eq!(taken[byte] & mask, 0, "{bits} {rows}×{columns}: ({row}, {column})");
                        taken[byte] |= mask;
                    }
                }
                assert!(taken.iter().all(|byte| *byte == 0xff), "{bits} {rows}×{columns} has gaps");
            }
        }
    }

    #[test]
    fn places_by_hand() {
        // 2 bits, 64 tokens: planes are tokens 0, 16, 32, 48; lane 5 is token 1, channels 4 … 7.
        let matrix = CodeMatrix::new(Bits::Two, 64, 128);
        assert_eq!(matrix.place(1, 4), (5 * 16, 0));
        assert_eq!(matrix.place(49, 5), (5 * 16 + 1, 6));
        assert_eq!(matrix.place(9, 20), (5 * 16 + 12, 0), "second half of the step, row g + 8: word 3");
        assert_eq!(matrix.place(1, 36), (512 + 5 * 16, 0), "the next step");
        // 32 tokens are two tiles: the upper planes are the step's second half.
        let matrix = CodeMatrix::new(Bits::Two, 32, 64);
        assert_eq!(matrix.place(17, 20), (5 * 8, 6));
        assert_eq!(matrix.place(25, 4), (5 * 8 + 4, 2));
    }

    #[test]
    fn orders_are_permutations() {
        for order in [channel_of_scale, channel_of_min, token_of_column] {
            let mut seen: Vec<_> = (0..128).map(order).collect();
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..128));
        }
    }
}
