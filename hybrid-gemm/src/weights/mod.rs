//! Weights and where they live: host memory, HBM, or split by output features between the two.
//!
//! The first column tiles lie in host memory, the rest in HBM (notation of the cost model: a fraction f of the output
//! features in HBM). Splitting output features needs no reduction between the parts, and every output is computed whole by
//! one side. On the CPU, "HBM" is ordinary memory that is kept and counted apart.

mod file;
#[cfg(feature = "cuda")]
pub mod gpu;
mod placement;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

pub use file::{FileTensor, MappedFile};
pub use placement::Placement;

use crate::codes::Codes;
use crate::element::widen_bytes;
use crate::format::FP8_BLOCK;
use crate::pack::{RowMajor, Source, TILE_ROWS, Tiling, block_scales, pack_column, unpack_tile};
use crate::{DType, Error, Format};

/// Bytes at which kernels read host memory in place: a 16-byte vector, which is also what tensor maps ask for.
pub const IN_PLACE_ALIGNMENT: usize = 16;

/// Share of a weight matrix that lies in HBM.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Residency {
    /// All of it in host memory.
    Host,
    /// All of it in HBM.
    Hbm,
    /// This fraction of the output features in HBM, 0 to 1, rounded to whole column tiles.
    HbmFraction(f64),
}

impl Residency {
    /// How many of `column_tiles` lie in host memory.
    ///
    /// # Errors
    /// [`Error::Argument`] for a fraction outside 0..=1.
    pub fn host_columns(self, column_tiles: usize) -> Result<usize, Error> {
        let fraction = match self {
            Residency::Host => 0.0,
            Residency::Hbm => 1.0,
            Residency::HbmFraction(fraction) => fraction,
        };
        if !(0.0..=1.0).contains(&fraction) {
            return Err(Error::argument("hbm_fraction", "0 to 1", fraction));
        }
        Ok(column_tiles - (fraction * column_tiles as f64).round() as usize)
    }
}

/// Bytes in host memory that stay where they are, shared by whoever reads them.
#[derive(Clone)]
pub struct HostMemory {
    bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
    /// Where a device sees the first byte: its ordinal and the address there.
    device: Option<(usize, u64)>,
}

impl HostMemory {
    /// Takes ownership. `owner` must give the same bytes at the same address each time.
    pub fn new(owner: impl AsRef<[u8]> + Send + Sync + 'static) -> Self {
        HostMemory { bytes: Arc::new(owner), device: None }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        (*self.bytes).as_ref()
    }

    /// Where device `ordinal` sees the first byte.
    ///
    /// # Errors
    /// [`Error::NotMapped`] when it does not.
    pub fn device_address(&self, ordinal: usize) -> Result<u64, Error> {
        match self.device {
            Some((known, address)) if known == ordinal => Ok(address),
            _ => Err(Error::NotMapped {
                what: format!("a weight of {} bytes", self.bytes().len()),
                fix: "pin it first, with `weights::gpu::pin` or `weights::gpu::pin_file` (feature `cuda`)",
            }),
        }
    }
}

impl AsRef<[u8]> for HostMemory {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

impl fmt::Debug for HostMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostMemory")
            .field("bytes", &self.bytes().len())
            .field("device", &self.device)
            .finish()
    }
}

/// How a part of the weights is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// Tile by tile, see [`pack`](crate::pack).
    Packed,
    /// `[n, k]` row by row, as checkpoints have it.
    RowMajor(DType),
}

/// The columns on one side.
#[derive(Debug, Clone)]
struct Part {
    memory: HostMemory,
    /// Where the part's first byte lies in `memory`.
    start: usize,
}

/// A weight matrix W `[n, k]` (`[out_features, in_features]`), in one or two places. Cloning shares the memory.
#[derive(Debug, Clone)]
pub struct Weights {
    placement: Placement,
    host: Part,
    hbm: Part,
    /// Scales that lie beside the matrix, see [`Format::scales`].
    scales: Arc<[f32]>,
}

impl Weights {
    /// Packs a matrix, quantising where the format says so.
    ///
    /// # Errors
    /// [`Error::Argument`] for an empty matrix, values that the format cannot hold, or a fraction outside 0..=1.
    pub fn pack(matrix: RowMajor<'_>, format: Format, residency: Residency) -> Result<Self, Error> {
        let [n, k] = matrix.shape();
        Weights::pack_tiled(matrix, Tiling::new(n, k, format)?, residency)
    }

    /// Packs a matrix in tiles of the caller's choice.
    ///
    /// # Errors
    /// As [`pack`](Self::pack), and [`Error::Argument`] when the tiling is for another shape.
    pub fn pack_tiled(matrix: RowMajor<'_>, tiling: Tiling, residency: Residency) -> Result<Self, Error> {
        if matrix.shape() != [tiling.n(), tiling.k()] {
            let expected = format!("[{}, {}], the shape of the tiling", tiling.n(), tiling.k());
            return Err(Error::argument("weights", expected, format!("{:?}", matrix.shape())));
        }
        Weights::pack_source(&Source::Values(matrix), tiling, residency)
    }

    /// Packs a matrix that is quantised already, as it is.
    ///
    /// # Errors
    /// [`Error::Argument`] for an empty matrix or a fraction outside 0..=1.
    pub fn pack_codes(codes: Codes<'_>, residency: Residency) -> Result<Self, Error> {
        let [n, k] = codes.shape();
        Weights::pack_codes_tiled(codes, Tiling::new(n, k, codes.format())?, residency)
    }

    /// The same in tiles of the caller's choice.
    ///
    /// # Errors
    /// As [`pack_codes`](Self::pack_codes), and [`Error::Argument`] when the tiling is for another shape or format.
    pub fn pack_codes_tiled(codes: Codes<'_>, tiling: Tiling, residency: Residency) -> Result<Self, Error> {
        if (codes.shape(), codes.format()) != ([tiling.n(), tiling.k()], tiling.format()) {
            let expected = format!("[{}, {}] of {}, as the tiling", tiling.n(), tiling.k(), tiling.format());
            return Err(Error::argument(
                "codes",
                expected,
                format!("{:?} of {}", codes.shape(), codes.format()),
            ));
        }
        Weights::pack_source(&Source::Codes(codes), tiling, residency)
    }

    fn pack_source(source: &Source<'_>, tiling: Tiling, residency: Residency) -> Result<Self, Error> {
        let placement = Placement::packed(tiling, residency)?;
        let (columns, host_columns) = (tiling.column_tiles(), placement.host_columns());
        // Known before, or found column by column.
        let known = match source {
            Source::Codes(codes) => codes.scales().to_vec(),
            Source::Values(matrix) if tiling.format() == Format::Fp8Blocks => block_scales(matrix)?,
            Source::Values(_) => Vec::new(),
        };
        let mut found = match known.is_empty() && tiling.format().has_channel_scale() {
            true => vec![0.0; columns * TILE_ROWS],
            false => Vec::new(),
        };
        let host = pack_part(&tiling, source, 0..host_columns, &mut found, &known)?;
        let hbm = pack_part(&tiling, source, host_columns..columns, &mut found, &known)?;
        found.truncate(tiling.n());
        let scales = if known.is_empty() { found } else { known };
        Ok(Weights { placement, host, hbm, scales: scales.into() })
    }

    /// Uses a tensor of a mapped file in place for the host part; the HBM part is a packed copy.
    ///
    /// # Errors
    /// As [`pack`](Self::pack).
    pub fn in_place(tensor: &FileTensor, residency: Residency) -> Result<Self, Error> {
        let matrix = tensor.matrix()?;
        let [n, k] = matrix.shape();
        let tiling = Tiling::new(n, k, Format::Float(matrix.dtype()))?;
        let placement =
            Placement::packed(tiling, residency)?.with_host_layout(Layout::RowMajor(matrix.dtype()));
        let host = Part { memory: tensor.memory().clone(), start: tensor.start() };
        let columns = placement.host_columns()..tiling.column_tiles();
        let hbm = pack_part(&tiling, &Source::Values(matrix), columns, &mut [], &[])?;
        Ok(Weights { placement, host, hbm, scales: Arc::new([]) })
    }

    /// Tiles, and which of them lie in host memory.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// The memory of the host part, and where in it the part starts, in bytes.
    pub fn host_memory(&self) -> (&HostMemory, usize) {
        (&self.host.memory, self.host.start)
    }

    /// Scales that lie beside the matrix: of each output feature `[n]`, of each block `[ceil(n / 128), ceil(k / 128)]`, or none, as
    /// the format has it ([`Format::scales`]).
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// Scale of each output feature `[n]`; empty in formats that have none.
    pub fn channel_scales(&self) -> &[f32] {
        if self.placement.tiling().format().has_channel_scale() { &self.scales } else { &[] }
    }

    /// The matrix `[n, k]` in f32, scales applied.
    pub fn dequantize(&self) -> Vec<f32> {
        self.decode_all(|code, scale| code * scale)
    }

    /// The matrix `[n, k]` in f64, scales applied there.
    pub(crate) fn dequantize_f64(&self) -> Vec<f64> {
        self.decode_all(|code, scale| f64::from(code) * f64::from(scale))
    }

    fn decode_all<T: Clone + Default>(&self, scaled: impl Fn(f32, f32) -> T) -> Vec<T> {
        let tiling = self.placement.tiling();
        let k = tiling.k();
        let mut values = vec![T::default(); tiling.n() * k];
        let mut tile = Vec::new();
        for column in 0..tiling.column_tiles() {
            for k_tile in 0..tiling.k_tiles() {
                let inputs = tiling.inputs(k_tile);
                tile.resize(TILE_ROWS * inputs, 0.0);
                self.decode_tile(column, k_tile, &mut tile);
                for (row, tile) in tile.chunks_exact(inputs).take(tiling.rows(column)).enumerate() {
                    let (row, first) = (column * TILE_ROWS + row, k_tile * tiling.tile_k());
                    for (input, code) in tile.iter().enumerate() {
                        let scale = self.scale(row, first + input);
                        values[row * k + first + input] = scaled(*code, scale);
                    }
                }
            }
        }
        values
    }

    /// The scale beside the matrix that a weight has; 1 in formats without.
    fn scale(&self, row: usize, input: usize) -> f32 {
        let tiling = self.placement.tiling();
        match tiling.format() {
            Format::Fp8Blocks => {
                self.scales[row / FP8_BLOCK * tiling.k().div_ceil(FP8_BLOCK) + input / FP8_BLOCK]
            }
            format if format.has_channel_scale() => self.scales[row],
            _ => 1.0,
        }
    }

    /// The bytes of the columns in host memory, in the layout of [`Placement::host_layout`].
    pub fn host_bytes(&self) -> &[u8] {
        &self.host.memory.bytes()[self.host.start..][..self.placement.host_bytes() as usize]
    }

    /// The bytes of the columns in HBM, packed.
    pub fn hbm_bytes(&self) -> &[u8] {
        &self.hbm.memory.bytes()[self.hbm.start..][..self.placement.hbm_bytes() as usize]
    }

    /// Whether kernels can read the host part where it lies.
    ///
    /// # Errors
    /// [`Error::Misaligned`] for a row-major part whose start, or whose rows, are no multiple of 16 bytes.
    pub fn check_in_place(&self) -> Result<(), Error> {
        let Layout::RowMajor(dtype) = self.placement.host_layout() else { return Ok(()) };
        let address = self.host.memory.bytes().as_ptr() as usize + self.host.start;
        let pitch = self.placement.tiling().k() * dtype.size();
        for (what, offset) in [("the tensor", address), ("its second row", address + pitch)] {
            if !offset.is_multiple_of(IN_PLACE_ALIGNMENT) {
                let (what, alignment) = (what.to_string(), IN_PLACE_ALIGNMENT as u64);
                return Err(Error::Misaligned { what, offset: offset as u64, alignment });
            }
        }
        Ok(())
    }

    /// The same weights with the host part elsewhere.
    #[cfg(feature = "cuda")]
    fn with_host_memory(&self, memory: HostMemory, start: usize) -> Self {
        Weights { host: Part { memory, start }, ..self.clone() }
    }

    /// The bytes of whole columns, all on one side: what a copy engine brings.
    pub(crate) fn columns(&self, columns: Range<usize>) -> ColumnBytes<'_> {
        let host_columns = self.placement.host_columns();
        let (part, first) =
            if columns.start < host_columns { (&self.host, 0) } else { (&self.hbm, host_columns) };
        let start = part.start + self.placement.column_bytes(first..columns.start) as usize;
        let len = self.placement.column_bytes(columns.clone()) as usize;
        ColumnBytes { first: columns.start, bytes: &part.memory.bytes()[start..start + len] }
    }

    /// Multiplies a decoded tile `[64, inputs]` by the scales of its blocks, in the format that has them.
    pub(crate) fn scale_blocks(&self, column: usize, k_tile: usize, tile: &mut [f32]) {
        let tiling = self.placement.tiling();
        if tiling.format() != Format::Fp8Blocks {
            return;
        }
        // A column tile lies in one row of blocks.
        let (row, first) = (column * TILE_ROWS, k_tile * tiling.tile_k());
        for of_row in tile.chunks_exact_mut(tiling.inputs(k_tile)) {
            for (block, values) in of_row.chunks_mut(FP8_BLOCK).enumerate() {
                let scale = self.scale(row, first + block * FP8_BLOCK);
                values.iter_mut().for_each(|value| *value *= scale);
            }
        }
    }

    /// Decodes a tile to `out` `[64, inputs]`, rows past n as zeros, without the scales beside the matrix.
    pub(crate) fn decode_tile(&self, column: usize, k_tile: usize, out: &mut [f32]) {
        self.columns(column..column + 1).decode_tile(&self.placement, column, k_tile, out);
    }
}

/// Bytes of columns from `first` on, in the layout of their side.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ColumnBytes<'a> {
    pub(crate) first: usize,
    pub(crate) bytes: &'a [u8],
}

impl ColumnBytes<'_> {
    /// As [`Weights::decode_tile`].
    pub(crate) fn decode_tile(&self, placement: &Placement, column: usize, k_tile: usize, out: &mut [f32]) {
        let tiling = placement.tiling();
        match placement.layout(column) {
            Layout::Packed => {
                let at = (column - self.first) * tiling.column_bytes() + tiling.tile_offset(k_tile);
                unpack_tile(tiling, k_tile, &self.bytes[at..][..tiling.tile_bytes(k_tile)], out);
            }
            Layout::RowMajor(dtype) => {
                let (inputs, size, rows) = (tiling.inputs(k_tile), dtype.size(), tiling.rows(column));
                for (row, out) in out.chunks_exact_mut(inputs).enumerate() {
                    if row < rows {
                        let row = (column - self.first) * TILE_ROWS + row;
                        let at = row * tiling.k() + k_tile * tiling.tile_k();
                        widen_bytes(dtype, &self.bytes[at * size..(at + inputs) * size], out);
                    } else {
                        out.fill(0.0);
                    }
                }
            }
        }
    }
}

/// Memory of 16-byte units, so that packed tiles are aligned for vector reads.
struct Arena(Box<[u128]>);

impl AsRef<[u8]> for Arena {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

fn pack_part(
    tiling: &Tiling,
    source: &Source<'_>,
    columns: Range<usize>,
    scales: &mut [f32],
    blocks: &[f32],
) -> Result<Part, Error> {
    use rayon::prelude::*;
    let bytes = columns.len() * tiling.column_bytes();
    let mut arena = bytemuck::allocation::try_zeroed_slice_box::<u128>(bytes / size_of::<u128>())
        .map_err(|_| Error::argument("weights", "a matrix that fits memory", format!("{bytes} bytes")))?;
    let first = columns.start;
    // Formats without scales of output features get empty slices.
    let per_column: Vec<&mut [f32]> = match scales.is_empty() {
        true => columns.clone().map(|_| -> &mut [f32] { &mut [] }).collect(),
        false => scales[first * TILE_ROWS..columns.end * TILE_ROWS].chunks_mut(TILE_ROWS).collect(),
    };
    bytemuck::cast_slice_mut::<u128, u8>(&mut arena)
        .par_chunks_mut(tiling.column_bytes())
        .zip(per_column)
        .enumerate()
        .try_for_each(|(index, (out, scales))| {
            pack_column(tiling, source, first + index, out, scales, blocks)
        })?;
    Ok(Part { memory: HostMemory::new(Arena(arena)), start: 0 })
}
