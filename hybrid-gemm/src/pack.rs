//! The packed layout: a weight tile is one contiguous run of bytes, swizzled before it crosses the link.
//!
//! W `[n, k]` is cut into tiles of [`TILE_ROWS`] output features × [`Tiling::tile_k`] inputs. Tiles are stored column tile by
//! column tile (a *column* is one of O, which is a row of W), and within one by rising K, so that a block which sweeps K
//! reads host memory in order and each tile is one bulk copy.
//!
//! Within a tile the codes come first: slabs of 64 rows × 128 bytes, in which the 16-byte chunk `c` of row `r` lies at chunk
//! `c ^ (r % 8)`. That is the 128-byte swizzle of TMA and wgmma, and `ldmatrix` reads it without bank conflicts. A slab covers
//! 64 inputs of f16 and bf16, 128 of int8, 256 of int4, 32 of f32. Behind the codes of an int4 tile lie its scales, f16
//! `[groups, 64 rows]`. Rows past n and inputs past k are zero; the last tile of a column has only the slabs it needs.

use crate::element::widen_bytes;
use crate::quantized::{pack_int4, quantize_int4, quantize_int8, unpack_int4};
use crate::{DType, Error, Format};

/// Output features of a tile.
pub const TILE_ROWS: usize = 64;
/// Bytes of a row of a slab.
pub const SLAB_ROW_BYTES: usize = 128;
/// Bytes of a slab.
pub const SLAB_BYTES: usize = TILE_ROWS * SLAB_ROW_BYTES;
/// Bytes that a tile has by default, scales left out: two or three of them in flight cover PCIe's latency.
const DEFAULT_TILE_BYTES: usize = 32 * 1024;
const CHUNK: usize = 16;

/// How a weight matrix is cut into tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tiling {
    n: usize,
    k: usize,
    format: Format,
    tile_k: usize,
}

impl Tiling {
    /// Tiles of up to 32 KiB of codes.
    ///
    /// # Errors
    /// [`Error::Argument`] for an empty matrix, one past 2³² rows or inputs, or groups that no kernel knows.
    pub fn new(n: usize, k: usize, format: Format) -> Result<Self, Error> {
        let slab = slab_elements(format);
        let slabs = (DEFAULT_TILE_BYTES / SLAB_BYTES).min(k.div_ceil(slab)).max(1);
        Tiling::with_tile_k(n, k, format, slabs * slab)
    }

    /// Tiles of `tile_k` inputs.
    ///
    /// # Errors
    /// As [`new`](Self::new), and [`Error::Argument`] for a `tile_k` that is no multiple of a slab's inputs.
    pub fn with_tile_k(n: usize, k: usize, format: Format, tile_k: usize) -> Result<Self, Error> {
        format.check()?;
        for (argument, size) in [("n", n), ("k", k)] {
            if size == 0 || u32::try_from(size).is_err() {
                return Err(Error::argument(argument, format!("1 to {}", u32::MAX), size));
            }
        }
        let slab = slab_elements(format);
        if tile_k == 0 || !tile_k.is_multiple_of(slab) {
            return Err(Error::argument("tile_k", format!("a multiple of {slab} for {format}"), tile_k));
        }
        Ok(Tiling { n, k, format, tile_k })
    }

    /// Output features of the matrix.
    pub const fn n(&self) -> usize {
        self.n
    }

    /// Inputs of the matrix.
    pub const fn k(&self) -> usize {
        self.k
    }

    /// Storage format.
    pub const fn format(&self) -> Format {
        self.format
    }

    /// Inputs of a tile.
    pub const fn tile_k(&self) -> usize {
        self.tile_k
    }

    /// Column tiles: `ceil(n / 64)`.
    pub const fn column_tiles(&self) -> usize {
        self.n.div_ceil(TILE_ROWS)
    }

    /// Tiles of a column: `ceil(k / tile_k)`.
    pub const fn k_tiles(&self) -> usize {
        self.k.div_ceil(self.tile_k)
    }

    /// Output features of column tile `column` that the matrix has: 64, fewer in the last.
    pub const fn rows(&self, column: usize) -> usize {
        let left = self.n.saturating_sub(column * TILE_ROWS);
        if left < TILE_ROWS { left } else { TILE_ROWS }
    }

    /// Inputs of K tile `k_tile` that the matrix has: `tile_k`, fewer in the last.
    pub const fn inputs(&self, k_tile: usize) -> usize {
        let left = self.k.saturating_sub(k_tile * self.tile_k);
        if left < self.tile_k { left } else { self.tile_k }
    }

    /// Bytes of packed tile `k_tile` of any column, a multiple of 128.
    pub const fn tile_bytes(&self, k_tile: usize) -> usize {
        let slabs = self.inputs(k_tile).div_ceil(slab_elements(self.format));
        slabs * SLAB_BYTES + self.groups(slabs) * TILE_ROWS * size_of::<half::f16>()
    }

    /// Where packed tile `k_tile` starts in its column, in bytes.
    pub const fn tile_offset(&self, k_tile: usize) -> usize {
        k_tile * self.tile_bytes(0)
    }

    /// Bytes of a packed column.
    pub const fn column_bytes(&self) -> usize {
        let last = self.k_tiles() - 1;
        self.tile_offset(last) + self.tile_bytes(last)
    }

    /// Bytes of the whole packed matrix.
    pub const fn packed_bytes(&self) -> usize {
        self.column_tiles() * self.column_bytes()
    }

    /// Groups of inputs with a scale of their own in `slabs` slabs.
    const fn groups(&self, slabs: usize) -> usize {
        match self.format {
            Format::Int4 { group } => slabs * slab_elements(self.format) / group,
            _ => 0,
        }
    }
}

/// Inputs that a row of a slab holds.
pub const fn slab_elements(format: Format) -> usize {
    8 * SLAB_ROW_BYTES / format.bits()
}

/// Where the chunk with byte `byte` of row `row`'s codes lies in a tile: the swizzle. `byte` is a multiple of 16.
const fn chunk_offset(row: usize, byte: usize) -> usize {
    let (slab, chunk) = (byte / SLAB_ROW_BYTES, byte % SLAB_ROW_BYTES / CHUNK);
    slab * SLAB_BYTES + row * SLAB_ROW_BYTES + (chunk ^ (row % 8)) * CHUNK
}

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

/// Packs column tile `column` of `weights` into `out` `[column_bytes]`, quantising where the format says so. `scales` takes
/// the scale of each of the tile's 64 rows, in formats that have one.
///
/// # Errors
/// [`Error::Argument`] for values that the format cannot hold.
pub(crate) fn pack_column(
    tiling: &Tiling,
    weights: &RowMajor<'_>,
    column: usize,
    out: &mut [u8],
    scales: &mut [f32],
) -> Result<(), Error> {
    out.fill(0);
    let slab = slab_elements(tiling.format);
    let mut row_values = vec![0.0; tiling.k.next_multiple_of(slab)];
    let mut codes = vec![0i8; row_values.len()];
    let mut bytes = vec![0u8; row_values.len() * tiling.format.bits() / 8];
    for row in 0..tiling.rows(column) {
        weights.read(column * TILE_ROWS + row, 0, &mut row_values[..tiling.k]);
        match tiling.format {
            Format::Float(DType::F32) => bytes.copy_from_slice(bytemuck::cast_slice(&row_values)),
            Format::Float(DType::F16) => {
                store_halves(&row_values, &mut bytes, |x| half::f16::from_f32(x).to_bits())
            }
            Format::Float(DType::BF16) => {
                store_halves(&row_values, &mut bytes, |x| half::bf16::from_f32(x).to_bits());
            }
            Format::Int8 => {
                let scale = quantize_int8(&row_values, &mut codes)?;
                scales[row..=row].fill(scale);
                bytes.copy_from_slice(bytemuck::cast_slice(&codes));
            }
            Format::Int4 { group } => {
                let groups = row_values.chunks(group).zip(codes.chunks_mut(group)).enumerate();
                for (index, (values, codes)) in groups {
                    let scale = quantize_int4(values, codes)?;
                    // Every tile but the last is full, so a group's tile follows from its index.
                    let per_tile = tiling.tile_k / group;
                    let (k_tile, index) = (index / per_tile, index % per_tile);
                    let at = tiling.tile_offset(k_tile) + scale_offset(tiling, k_tile, index, row);
                    out[at..at + 2].copy_from_slice(&scale.to_le_bytes());
                }
                for (codes, word) in codes.as_chunks().0.iter().zip(bytes.as_chunks_mut().0) {
                    *word = pack_int4(*codes).to_le_bytes();
                }
            }
        }
        let tile_row_bytes = tiling.tile_k * tiling.format.bits() / 8;
        for (chunk, bytes) in bytes.chunks_exact(CHUNK).enumerate() {
            let byte = chunk * CHUNK;
            let at = tiling.tile_offset(byte / tile_row_bytes) + chunk_offset(row, byte % tile_row_bytes);
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

/// Where the scale of row `row` and group `group` of a tile lies in it, in bytes.
fn scale_offset(tiling: &Tiling, k_tile: usize, group: usize, row: usize) -> usize {
    let slabs = tiling.inputs(k_tile).div_ceil(slab_elements(tiling.format));
    slabs * SLAB_BYTES + (group * TILE_ROWS + row) * size_of::<half::f16>()
}

/// Decodes a packed tile to `out` `[64, inputs]`, rows past n as zeros. Codes of int8 come without their scale, which
/// belongs to the epilogue.
pub(crate) fn unpack_tile(tiling: &Tiling, k_tile: usize, tile: &[u8], out: &mut [f32]) {
    let inputs = tiling.inputs(k_tile);
    let slab = slab_elements(tiling.format);
    let slabs = inputs.div_ceil(slab);
    // One row of one slab at a time, straightened.
    let mut bytes = [0u8; SLAB_ROW_BYTES];
    for (row, out) in out.chunks_exact_mut(inputs).enumerate() {
        for (index, out) in out.chunks_mut(slab).enumerate() {
            for chunk in 0..SLAB_ROW_BYTES / CHUNK {
                let at = chunk_offset(row, index * SLAB_ROW_BYTES + chunk * CHUNK);
                bytes[chunk * CHUNK..][..CHUNK].copy_from_slice(&tile[at..at + CHUNK]);
            }
            match tiling.format {
                Format::Float(dtype) => widen_bytes(dtype, &bytes[..out.len() * dtype.size()], out),
                Format::Int8 => {
                    for (out, byte) in out.iter_mut().zip(bytes) {
                        *out = f32::from(byte as i8);
                    }
                }
                Format::Int4 { group } => {
                    for (word, out) in bytes.as_chunks().0.iter().zip(out.chunks_mut(8)) {
                        for (out, code) in out.iter_mut().zip(unpack_int4(u32::from_le_bytes(*word))) {
                            *out = f32::from(code);
                        }
                    }
                    for (in_slab, out) in out.chunks_mut(group).enumerate() {
                        let group = index * (slab / group) + in_slab;
                        let at = slabs * SLAB_BYTES + (group * TILE_ROWS + row) * 2;
                        let scale = half::f16::from_le_bytes([tile[at], tile[at + 1]]).to_f32();
                        out.iter_mut().for_each(|out| *out *= scale);
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

    const FORMATS: [Format; 7] = [
        Format::Float(DType::F32),
        Format::Float(DType::F16),
        Format::Float(DType::BF16),
        Format::Int8,
        Format::Int4 { group: 32 },
        Format::Int4 { group: 64 },
        Format::Int4 { group: 128 },
    ];

    /// Packs a whole matrix and decodes it again, `[64 · column tiles, k]`.
    fn round_trip(tiling: &Tiling, weights: &RowMajor<'_>) -> (Vec<f32>, Vec<f32>) {
        let mut decoded = vec![f32::NAN; tiling.column_tiles() * TILE_ROWS * tiling.k()];
        let mut scales = vec![0.0; tiling.column_tiles() * TILE_ROWS];
        let mut packed = vec![0xff; tiling.column_bytes()];
        for column in 0..tiling.column_tiles() {
            let scales = &mut scales[column * TILE_ROWS..][..TILE_ROWS];
            pack_column(tiling, weights, column, &mut packed, scales).unwrap();
            for k_tile in 0..tiling.k_tiles() {
                let tile = &packed[tiling.tile_offset(k_tile)..][..tiling.tile_bytes(k_tile)];
                let inputs = tiling.inputs(k_tile);
                let mut out = vec![f32::NAN; TILE_ROWS * inputs];
                unpack_tile(tiling, k_tile, tile, &mut out);
                for (row, values) in out.chunks(inputs).enumerate() {
                    let at = (column * TILE_ROWS + row) * tiling.k() + k_tile * tiling.tile_k();
                    decoded[at..at + inputs].copy_from_slice(values);
                }
            }
        }
        (decoded, scales)
    }

    #[test]
    fn every_format_comes_back() {
        for format in FORMATS {
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
                let (decoded, scales) = round_trip(&tiling, &weights);
                for (index, decoded) in decoded.iter().enumerate() {
                    let (row, value) = (index / k, values.get(index).map_or(0.0, |value| value.to_f32()));
                    // Half a step of a code, where there are codes; bf16 values of this size fit f16 up to its subnormals.
                    let (decoded, bound) = match format {
                        Format::Float(DType::F16) => (*decoded, 2f32.powi(-25)),
                        Format::Float(_) => (*decoded, 0.0),
                        Format::Int8 => (*decoded * scales[row], 0.5 / 254.0 * 1.001),
                        Format::Int4 { .. } => (*decoded, 0.5 / 14.0 * 1.01),
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
        pack_column(&tiling, &RowMajor::from_slice(&values, [64, 64]).unwrap(), 0, &mut packed, &mut [])
            .unwrap();
        // Row 5, inputs 16 to 23 are chunk 2, stored at chunk 7.
        let at = 5 * 128 + 7 * 16;
        let expected: Vec<u8> = (5 * 64 + 16..5 * 64 + 24).flat_map(|i: u16| i.to_le_bytes()).collect();
        assert_eq!(&packed[at..at + 16], expected);
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
