//! The packed layout: a weight tile is one contiguous run of bytes, swizzled before it crosses the link.
//!
//! W `[n, k]` is cut into tiles of [`TILE_ROWS`] output features × [`Tiling::tile_k`] inputs. Tiles are stored column tile by
//! column tile (a *column* is one of O, which is a row of W), and within one by rising K, so that a block which sweeps K
//! reads host memory in order and each tile is one bulk copy.
//!
//! Within a tile the codes come first: slabs of 64 rows × 128 bytes, in which the 16-byte chunk `c` of row `r` lies at chunk
//! `c ^ (r % 8)`. That is the 128-byte swizzle of TMA and wgmma, and `ldmatrix` reads it without bank conflicts. A slab covers
//! 64 inputs of f16 and bf16, 128 of int8 and fp8, 256 of int4, 32 of f32. Behind the codes of an int4 tile lie its scales, f16
//! `[groups, 64 rows]`. With zero points each slab's scales, f16 `[groups of the slab, 64 rows]`, are followed by its zero points
//! `[groups of the slab, 32 bytes]`: the lower half of byte `8 t + g` belongs to row `16 t + g`, the upper half to row `16 t + g + 8`,
//! the two rows of a thread that multiplies. Rows past n and inputs past k are zero; the last tile of a column has only the slabs it
//! needs.

mod tiling;

use half::f16;

use tiling::{CHUNK, chunk_offset, place_of_group, scale_offset, slab_scales_offset, zero_offset};
pub use tiling::{SLAB_BYTES, SLAB_ROW_BYTES, TILE_ROWS, Tiling, slab_elements};

use crate::codes::{Codes, Kind};
use crate::element::widen_bytes;
use crate::format::FP8_BLOCK;
use crate::quantized::{
    fp8_scale, pack_int4, pack_int4_from_0, quantize_fp8, quantize_int4, quantize_int4_zero_point,
    quantize_int8, unpack_int4,
};
use crate::{DType, Error, Format, e4m3};

/// A matrix `[rows, columns]`, row-major without gaps, in little-endian bytes that may start anywhere.
#[derive(Debug, Clone, Copy)]
pub struct RowMajor<'a> {
    bytes: &'a [u8],
    dtype: DType,
    shape: [usize; 2],
}

impl<'a> RowMajor<'a> {
    /// A matrix `shape` in the bytes of a file.
    ///
    /// # Errors
    /// [`Error::Argument`] when the length is not that of the shape.
    pub fn new(bytes: &'a [u8], dtype: DType, shape: [usize; 2]) -> Result<Self, Error> {
        let expected = shape[0].checked_mul(shape[1]).and_then(|len| len.checked_mul(dtype.size()));
        if expected != Some(bytes.len()) {
            let expected = format!("{} × {} values of {dtype}", shape[0], shape[1]);
            return Err(Error::argument("weights", expected, format!("{} bytes", bytes.len())));
        }
        Ok(RowMajor { bytes, dtype, shape })
    }

    /// A matrix `shape` in memory.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn from_slice<E: crate::Element>(values: &'a [E], shape: [usize; 2]) -> Result<Self, Error> {
        RowMajor::new(bytemuck::cast_slice(values), E::DTYPE, shape)
    }

    /// `[rows, columns]`
    pub const fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Type of the values.
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// Part of a row in f32.
    pub(crate) fn read(&self, row: usize, first: usize, out: &mut [f32]) {
        let size = self.dtype.size();
        let start = (row * self.shape[1] + first) * size;
        widen_bytes(self.dtype, &self.bytes[start..start + out.len() * size], out);
    }
}

/// What is packed.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Source<'a> {
    /// Values, which are quantised where the format says so.
    Values(RowMajor<'a>),
    /// Codes in the format.
    Codes(Codes<'a>),
}

/// Scales `[ceil(n / 128), ceil(k / 128)]` for values in blocks, each by the block's largest.
///
/// # Errors
/// [`Error::Argument`] for a value that is not finite.
pub(crate) fn block_scales(weights: &RowMajor<'_>) -> Result<Vec<f32>, Error> {
    let [n, k] = weights.shape;
    let blocks = k.div_ceil(FP8_BLOCK);
    let mut scales = vec![0.0f32; n.div_ceil(FP8_BLOCK) * blocks];
    let mut values = vec![0.0; k];
    for row in 0..n {
        weights.read(row, 0, &mut values);
        let of_row = &mut scales[row / FP8_BLOCK * blocks..][..blocks];
        for (scale, values) in of_row.iter_mut().zip(values.chunks(FP8_BLOCK)) {
            *scale = scale.max(fp8_scale(values)?);
        }
    }
    Ok(scales)
}

/// Packs column tile `column` of `source` into `out` `[column_bytes]`, quantising where the format says so. `scales` takes the scale of
/// each of the tile's 64 rows, in formats that have one; `blocks` holds those of [`block_scales`], for values in blocks.
///
/// # Errors
/// [`Error::Argument`] for values that the format cannot hold.
pub(crate) fn pack_column(
    tiling: &Tiling,
    source: &Source<'_>,
    column: usize,
    out: &mut [u8],
    scales: &mut [f32],
    blocks: &[f32],
) -> Result<(), Error> {
    out.fill(0);
    let slab = slab_elements(tiling.format());
    let padded = tiling.k().next_multiple_of(slab);
    let mut bytes = vec![0u8; padded * tiling.format().bits() / 8];
    let mut values = vec![0.0; if matches!(source, Source::Values(_)) { padded } else { 0 }];
    let mut signed =
        vec![0i8; if matches!(tiling.format(), Format::Int4 { .. } | Format::Int8) { padded } else { 0 }];
    let mut codes =
        vec![0u8; if matches!(tiling.format(), Format::Int4ZeroPoints { .. }) { padded } else { 0 }];
    for in_tile in 0..tiling.rows(column) {
        let row = column * TILE_ROWS + in_tile;
        if let Source::Values(weights) = source {
            weights.read(row, 0, &mut values[..tiling.k()]);
        }
        match (source, tiling.format()) {
            (Source::Values(_), Format::Float(DType::F32)) => {
                bytes.copy_from_slice(bytemuck::cast_slice(&values))
            }
            (Source::Values(_), Format::Float(DType::F16)) => {
                store_halves(&values, &mut bytes, |x| half::f16::from_f32(x).to_bits());
            }
            (Source::Values(_), Format::Float(DType::BF16)) => {
                store_halves(&values, &mut bytes, |x| half::bf16::from_f32(x).to_bits());
            }
            (Source::Values(_), Format::Int8) => {
                let scale = quantize_int8(&values, &mut signed)?;
                scales[in_tile..=in_tile].fill(scale);
                bytes.copy_from_slice(bytemuck::cast_slice(&signed));
            }
            (Source::Values(_), Format::Int4 { group }) => {
                let groups = values.chunks(group).zip(signed.chunks_mut(group)).enumerate();
                for (index, (values, codes)) in groups {
                    store_scale(tiling, out, in_tile, index, quantize_int4(values, codes)?);
                }
                for (codes, word) in signed.as_chunks().0.iter().zip(bytes.as_chunks_mut().0) {
                    *word = pack_int4(*codes).to_le_bytes();
                }
            }
            (Source::Values(_), Format::Int4ZeroPoints { group }) => {
                let groups = values.chunks(group).zip(codes.chunks_mut(group)).enumerate();
                for (index, (values, codes)) in groups {
                    let (scale, zero) = quantize_int4_zero_point(values, codes)?;
                    store_scale(tiling, out, in_tile, index, scale);
                    store_zero(tiling, out, in_tile, index, zero);
                }
                store_nibbles(&codes, &mut bytes);
            }
            (Source::Values(_), Format::Fp8Rows) => {
                let scale = fp8_scale(&values)?;
                scales[in_tile..=in_tile].fill(scale);
                quantize_fp8(&values, scale, &mut bytes);
            }
            (Source::Values(_), Format::Fp8Blocks) => {
                let of_row = &blocks[row / FP8_BLOCK * tiling.k().div_ceil(FP8_BLOCK)..];
                for ((values, bytes), scale) in
                    values.chunks(FP8_BLOCK).zip(bytes.chunks_mut(FP8_BLOCK)).zip(of_row)
                {
                    quantize_fp8(values, *scale, bytes);
                }
            }
            (Source::Codes(given), _) => {
                let of_row = row * tiling.k()..(row + 1) * tiling.k();
                match given.kind() {
                    Kind::Int4 { codes: given, scales, zeros, group } => {
                        codes[..tiling.k()].copy_from_slice(&given[of_row]);
                        let groups = tiling.k().div_ceil(group);
                        for index in 0..groups {
                            let zero = zeros[row * groups + index];
                            store_scale(tiling, out, in_tile, index, scales[row * groups + index]);
                            store_zero(tiling, out, in_tile, index, zero);
                            // Inputs past k weigh nothing.
                            let end = ((index + 1) * group).max(tiling.k());
                            codes[tiling.k()..end].fill(zero);
                        }
                        store_nibbles(&codes, &mut bytes);
                    }
                    Kind::Fp8 { codes, .. } => bytes[..tiling.k()].copy_from_slice(&codes[of_row]),
                }
            }
        }
        let tile_row_bytes = tiling.tile_k() * tiling.format().bits() / 8;
        for (chunk, bytes) in bytes.chunks_exact(CHUNK).enumerate() {
            let byte = chunk * CHUNK;
            let at = tiling.tile_offset(byte / tile_row_bytes) + chunk_offset(in_tile, byte % tile_row_bytes);
            out[at..at + CHUNK].copy_from_slice(bytes);
        }
    }
    Ok(())
}

fn store_halves(values: &[f32], bytes: &mut [u8], bits: impl Fn(f32) -> u16) {
    for (value, bytes) in values.iter().zip(bytes.as_chunks_mut().0) {
        *bytes = bits(*value).to_le_bytes();
    }
}

fn store_nibbles(codes: &[u8], bytes: &mut [u8]) {
    for (codes, word) in codes.as_chunks().0.iter().zip(bytes.as_chunks_mut().0) {
        *word = pack_int4_from_0(*codes).to_le_bytes();
    }
}

/// Stores the scale of row `row` and group `group` of a column.
fn store_scale(tiling: &Tiling, out: &mut [u8], row: usize, group: usize, scale: f16) {
    let (tile, at) = place_of_group(tiling, group);
    let at = tile + scale_offset(at, row);
    out[at..at + 2].copy_from_slice(&scale.to_le_bytes());
}

/// Stores its zero point.
fn store_zero(tiling: &Tiling, out: &mut [u8], row: usize, group: usize, zero: u8) {
    let (tile, at) = place_of_group(tiling, group);
    let (at, shift) = zero_offset(tiling, at, row);
    out[tile + at] |= zero << shift;
}

/// Decodes a packed tile to `out` `[64, inputs]`, rows past n as zeros. Scales that do not lie in the tile are left out: those of output
/// features belong to the epilogue, those of blocks to [`Weights`](crate::Weights).
pub(crate) fn unpack_tile(tiling: &Tiling, k_tile: usize, tile: &[u8], out: &mut [f32]) {
    let inputs = tiling.inputs(k_tile);
    let slab = slab_elements(tiling.format());
    // One row of one slab at a time, straightened.
    let mut bytes = [0u8; SLAB_ROW_BYTES];
    for (row, out) in out.chunks_exact_mut(inputs).enumerate() {
        for (index, out) in out.chunks_mut(slab).enumerate() {
            for chunk in 0..SLAB_ROW_BYTES / CHUNK {
                let at = chunk_offset(row, index * SLAB_ROW_BYTES + chunk * CHUNK);
                bytes[chunk * CHUNK..][..CHUNK].copy_from_slice(&tile[at..at + CHUNK]);
            }
            match tiling.format() {
                Format::Float(dtype) => widen_bytes(dtype, &bytes[..out.len() * dtype.size()], out),
                Format::Int8 => {
                    for (out, byte) in out.iter_mut().zip(bytes) {
                        *out = f32::from(byte as i8);
                    }
                }
                Format::Fp8Rows | Format::Fp8Blocks => {
                    for (out, byte) in out.iter_mut().zip(bytes) {
                        *out = e4m3::to_f32(byte);
                    }
                }
                Format::Int4 { group } | Format::Int4ZeroPoints { group } => {
                    for (word, out) in bytes.as_chunks().0.iter().zip(out.chunks_mut(8)) {
                        for (out, code) in out.iter_mut().zip(unpack_int4(u32::from_le_bytes(*word))) {
                            *out = f32::from(code);
                        }
                    }
                    let scales = slab_scales_offset(tiling, k_tile, index);
                    for (in_slab, out) in out.chunks_mut(group).enumerate() {
                        let at = scale_offset((scales, in_slab), row);
                        let scale = f16::from_le_bytes([tile[at], tile[at + 1]]).to_f32();
                        // Symmetric codes are stored 8 higher: that is their zero point.
                        let zero = match tiling.format() {
                            Format::Int4ZeroPoints { .. } => {
                                let (at, shift) = zero_offset(tiling, (scales, in_slab), row);
                                f32::from(tile[at] >> shift & 15) - 8.0
                            }
                            _ => 0.0,
                        };
                        out.iter_mut().for_each(|out| *out = (*out - zero) * scale);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    /// Packs a whole matrix and decodes it again, `[64 · column tiles, k]`; scales are multiplied in f64.
    fn round_trip(tiling: &Tiling, source: &Source<'_>) -> Vec<f64> {
        let (n, k, format) = (tiling.n(), tiling.k(), tiling.format());
        let mut decoded = vec![f64::NAN; tiling.column_tiles() * TILE_ROWS * k];
        let mut scales = vec![0.0; tiling.column_tiles() * TILE_ROWS];
        let mut packed = vec![0xff; tiling.column_bytes()];
        let blocks = match source {
            Source::Values(weights) if format == Format::Fp8Blocks => block_scales(weights).unwrap(),
            Source::Codes(codes) => codes.scales().to_vec(),
            _ => Vec::new(),
        };
        for column in 0..tiling.column_tiles() {
            let of_rows = &mut scales[column * TILE_ROWS..][..TILE_ROWS];
            pack_column(tiling, source, column, &mut packed, of_rows, &blocks).unwrap();
            for k_tile in 0..tiling.k_tiles() {
                let tile = &packed[tiling.tile_offset(k_tile)..][..tiling.tile_bytes(k_tile)];
                let inputs = tiling.inputs(k_tile);
                let mut out = vec![f32::NAN; TILE_ROWS * inputs];
                unpack_tile(tiling, k_tile, tile, &mut out);
                for (row, values) in out.chunks(inputs).enumerate() {
                    for (input, value) in values.iter().enumerate() {
                        let (row, input) = (column * TILE_ROWS + row, k_tile * tiling.tile_k() + input);
                        let scale = match (source, format) {
                            _ if row >= n => 1.0,
                            (_, Format::Fp8Blocks) => {
                                blocks[row / FP8_BLOCK * k.div_ceil(FP8_BLOCK) + input / FP8_BLOCK]
                            }
                            (Source::Codes(_), Format::Fp8Rows) => blocks[row],
                            _ if format.has_channel_scale() => scales[row],
                            _ => 1.0,
                        };
                        decoded[row * k + input] = f64::from(*value) * f64::from(scale);
                    }
                }
            }
        }
        decoded
    }

    #[test]
    fn every_format_comes_back() {
        for format in Format::ALL {
            let slab = slab_elements(format);
            for (n, k, tile_k) in [
                (1, 1, slab),
                (64, slab, slab),
                (65, slab + 1, slab),
                (72, 80, slab),
                (130, 3 * slab - 8, 2 * slab),
                (200, 5 * slab + 24, 4 * slab),
            ] {
                let case = format!("{format}, [{n}, {k}] in tiles of {tile_k}, seed 9");
                let mut rng = fastrand::Rng::with_seed(9);
                let values: Vec<bf16> = (0..n * k).map(|_| bf16::from_f32(rng.f32() - 0.5)).collect();
                let weights = RowMajor::from_slice(&values, [n, k]).unwrap();
                let tiling = Tiling::with_tile_k(n, k, format, tile_k).unwrap();
                let decoded = round_trip(&tiling, &Source::Values(weights));
                for (index, decoded) in decoded.iter().enumerate() {
                    let (row, value) = (index / k, values.get(index).map_or(0.0, |value| value.to_f64()));
                    // Half a step of a code, where there are codes; bf16 values of this size fit f16 up to its subnormals.
                    let bound = match format {
                        Format::Float(DType::F16) => 2f64.powi(-25),
                        Format::Float(_) => 0.0,
                        Format::Int8 => 0.5 / 254.0 * 1.001,
                        Format::Int4 { .. } => 0.5 / 14.0 * 1.01,
                        Format::Int4ZeroPoints { .. } => 0.5 / 15.0 * 1.02,
                        Format::Fp8Rows | Format::Fp8Blocks => {
                            1.001 * (value.abs() / 16.0).max(0.5 / 448.0 / 1024.0)
                        }
                    };
                    assert!(
                        (decoded - value).abs() <= bound,
                        "{case}: [{row}, {}] is {decoded} for {value}",
                        index % k
                    );
                }
            }
        }
    }

    /// Random scales, among them 0, infinity and NaN; and every code of fp8, NaN too.
    fn scales(rng: &mut fastrand::Rng, len: usize) -> Vec<f32> {
        let scale = |rng: &mut fastrand::Rng| match rng.u32(..40) {
            0 => 0.0,
            1 => f32::INFINITY,
            2 => f32::NAN,
            _ => rng.f32() - 0.3,
        };
        (0..len).map(|_| scale(rng)).collect()
    }

    /// Codes of checkpoints are packed as they are, whatever their scales: what is decoded is what they say, bit by bit.
    #[test]
    fn codes_come_back_exactly() {
        for format in Format::ALL {
            let slab = slab_elements(format);
            for (n, k, tile_k) in [
                (1, 1, slab),
                (65, slab + 1, slab),
                (72, 80, slab),
                (200, 5 * slab + 24, 4 * slab),
                (130, 3 * slab - 8, 2 * slab),
            ] {
                let case = format!("{format}, [{n}, {k}] in tiles of {tile_k}, seed 10");
                let mut rng = fastrand::Rng::with_seed(10);
                let most = if format.bits() == 4 { 15 } else { 255 };
                let codes: Vec<u8> = (0..n * k).map(|_| rng.u8(0..=most)).collect();
                let beside = scales(&mut rng, format.scales(n, k));
                let (groups, zeros): (Vec<f16>, Vec<u8>);
                let given = match format {
                    Format::Int4ZeroPoints { group } => {
                        let len = n * k.div_ceil(group);
                        groups = scales(&mut rng, len).into_iter().map(f16::from_f32).collect();
                        zeros = (0..len).map(|_| rng.u8(0..16)).collect();
                        Codes::int4(&codes, &groups, &zeros, [n, k], group).unwrap()
                    }
                    Format::Fp8Rows => Codes::fp8_rows(&codes, &beside, [n, k]).unwrap(),
                    Format::Fp8Blocks => Codes::fp8_blocks(&codes, &beside, [n, k]).unwrap(),
                    _ => continue,
                };
                let tiling = Tiling::with_tile_k(n, k, format, tile_k).unwrap();
                for (index, decoded) in round_trip(&tiling, &Source::Codes(given)).iter().enumerate() {
                    let (row, input) = (index / k, index % k);
                    let expected = if row < n { given.weight(row, input) } else { 0.0 };
                    let same = *decoded == expected || decoded.is_nan() && expected.is_nan();
                    assert!(same, "{case}: [{row}, {input}] is {decoded}, not {expected}");
                }
            }
        }
    }

    /// Symmetric codes are codes with a zero point of 8: the same slabs, the same scales.
    #[test]
    fn a_zero_point_of_eight_is_symmetric() {
        let (n, k, group) = (70, 300, 64);
        let mut rng = fastrand::Rng::with_seed(11);
        let values: Vec<bf16> = (0..n * k).map(|_| bf16::from_f32(rng.f32() - 0.5)).collect();
        let weights = RowMajor::from_slice(&values, [n, k]).unwrap();
        let symmetric = Tiling::new(n, k, Format::Int4 { group }).unwrap();
        let expected = round_trip(&symmetric, &Source::Values(weights));
        let groups = k.div_ceil(group);
        let mut scales = vec![f16::ZERO; n * groups];
        let mut codes = vec![0u8; n * k];
        let mut signed = vec![0i8; group];
        for (row, values) in values.chunks(k).enumerate() {
            for (index, values) in values.chunks(group).enumerate() {
                let values: Vec<f32> = values.iter().map(|value| value.to_f32()).collect();
                scales[row * groups + index] = quantize_int4(&values, &mut signed).unwrap();
                for (code, signed) in codes[row * k + index * group..].iter_mut().zip(&signed[..values.len()])
                {
                    *code = (signed + 8) as u8;
                }
            }
        }
        let zeros = vec![8; n * groups];
        let given = Codes::int4(&codes, &scales, &zeros, [n, k], group).unwrap();
        let tiling = Tiling::new(n, k, given.format()).unwrap();
        assert_eq!(round_trip(&tiling, &Source::Codes(given)), expected, "seed 11");
    }

    /// The layout is a contract with kernels and files: these addresses must never move.
    #[test]
    fn addresses_are_fixed() {
        for (row, byte, offset) in [
            (0, 0, 0),
            (0, 112, 112),
            (1, 0, 128 + 16),
            (7, 112, 7 * 128),
            (9, 32, 9 * 128 + 48),
            (3, 128, 8192 + 384 + 48),
        ] {
            assert_eq!(chunk_offset(row, byte), offset, "row {row}, byte {byte}");
        }
        // Eight rows of one chunk column cover all 32 banks: `ldmatrix` reads them at once.
        for chunk in 0..8 {
            let mut banks: Vec<_> = (0..8).map(|row| chunk_offset(row, chunk * CHUNK) / CHUNK % 8).collect();
            banks.sort_unstable();
            assert_eq!(banks, (0..8).collect::<Vec<_>>(), "chunk {chunk}");
        }
        let values: Vec<bf16> = (0..64 * 64).map(|i| bf16::from_bits(i as u16)).collect();
        let tiling = Tiling::new(64, 64, Format::Float(DType::BF16)).unwrap();
        let mut packed = vec![0; tiling.packed_bytes()];
        let source = Source::Values(RowMajor::from_slice(&values, [64, 64]).unwrap());
        pack_column(&tiling, &source, 0, &mut packed, &mut [], &[]).unwrap();
        // Row 5, inputs 16 to 23 are chunk 2, stored at chunk 7.
        let at = 5 * 128 + 7 * 16;
        let expected: Vec<u8> = (5 * 64 + 16..5 * 64 + 24).flat_map(|i: u16| i.to_le_bytes()).collect();
        assert_eq!(&packed[at..at + 16], expected);
        // Two slabs of int4 in groups of 128 with zero points: behind the codes 256 bytes of scales and 64 of zero points for each.
        let (k, group) = (512, 128);
        let scales: Vec<f16> = (0..64 * 4).map(|i| f16::from_bits(i as u16)).collect();
        let zeros: Vec<u8> = (0..64 * 4).map(|i| (i / 4 + i % 4) as u8 % 16).collect();
        let codes = vec![0; 64 * k];
        let given = Codes::int4(&codes, &scales, &zeros, [64, k], group).unwrap();
        let tiling = Tiling::new(64, k, given.format()).unwrap();
        let mut packed = vec![0; tiling.packed_bytes()];
        pack_column(&tiling, &Source::Codes(given), 0, &mut packed, &mut [], &[]).unwrap();
        for (row, of_row, slab, in_slab) in [(0, 0, 0, 0), (5, 1, 0, 1), (26, 2, 1, 0), (63, 3, 1, 1)] {
            let slab_scales = 2 * 8192 + slab * 320;
            let at = slab_scales + in_slab * 128 + 2 * row;
            assert_eq!(packed[at..at + 2], ((4 * row + of_row) as u16).to_le_bytes(), "scale of row {row}");
            let byte = packed[slab_scales + 256 + in_slab * 32 + row / 16 * 8 + row % 8];
            let zero = if row % 16 < 8 { byte & 15 } else { byte >> 4 };
            assert_eq!(usize::from(zero), (row + of_row) % 16, "zero point of row {row}");
        }
    }

    #[test]
    fn sizes_of_real_layers() {
        let bf16 = Format::Float(DType::BF16);
        for (case, n, k, format, tiles, tile_bytes, packed) in [
            ("8B gate and up", 28672, 4096, bf16, (448, 16), 32768, 28672 * 4096 * 2),
            ("8B, int8", 4096, 4096, Format::Int8, (64, 8), 32768, 4096 * 4096),
            (
                "8B, int4",
                4096,
                4096,
                Format::Int4 { group: 128 },
                (64, 4),
                32768 + 1024,
                4096 * 4096 / 2 + 4096 * 4096 / 128 * 2,
            ),
            (
                "8B, int4 with zero points",
                4096,
                4096,
                Format::Int4ZeroPoints { group: 128 },
                (64, 4),
                32768 + 1024 + 256,
                4096 * 4096 / 2 + 4096 * 4096 / 128 * 5 / 2,
            ),
            ("DeepSeek-V3 expert, fp8", 2048, 7168, Format::Fp8Blocks, (32, 14), 32768, 2048 * 7168),
            ("no multiple of anything", 1000, 1000, bf16, (16, 4), 32768, 16 * 64 * 1024 * 2),
            ("smaller than a tile", 8, 16, bf16, (1, 1), 8192, 8192),
        ] {
            let tiling = Tiling::new(n, k, format).unwrap();
            assert_eq!((tiling.column_tiles(), tiling.k_tiles()), tiles, "{case}");
            assert_eq!(tiling.tile_bytes(0), tile_bytes, "{case}");
            assert_eq!(tiling.packed_bytes(), packed, "{case}");
        }
    }

    #[test]
    fn refusals_name_the_argument() {
        let bf16 = Format::Float(DType::BF16);
        for (case, result, named) in [
            ("no rows", Tiling::new(0, 4, bf16), "`n`"),
            ("no inputs", Tiling::new(4, 0, bf16), "`k`"),
            ("odd groups", Tiling::new(4, 4, Format::Int4 { group: 48 }), "groups of 48"),
            ("odd zero points", Tiling::new(4, 4, Format::Int4ZeroPoints { group: 16 }), "groups of 16"),
            ("half a slab", Tiling::with_tile_k(4, 64, bf16, 32), "`tile_k`"),
            ("no tile", Tiling::with_tile_k(4, 64, bf16, 0), "`tile_k`"),
        ] {
            let error = result.expect_err(case).to_string();
            assert!(error.contains(named), "{case}: {error}");
        }
        assert!(RowMajor::new(&[0; 7], DType::BF16, [2, 2]).is_err());
        assert!(RowMajor::new(&[], DType::BF16, [usize::MAX, 2]).is_err());
    }
}
