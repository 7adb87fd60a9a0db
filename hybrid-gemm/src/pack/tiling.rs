//! How a matrix is cut into tiles, and where everything lies in one.

use half::f16;

use crate::{Error, Format};

/// Output features of a tile.
pub const TILE_ROWS: usize = 64;
/// Bytes of a row of a slab.
pub const SLAB_ROW_BYTES: usize = 128;
/// Bytes of a slab.
pub const SLAB_BYTES: usize = TILE_ROWS * SLAB_ROW_BYTES;
/// Bytes that a tile has by default, scales left out: two or three of them in flight cover PCIe's latency.
const DEFAULT_TILE_BYTES: usize = 32 * 1024;
pub(super) const CHUNK: usize = 16;
/// Bytes of the scales of a group, and of its zero points.
const GROUP_SCALE_BYTES: usize = TILE_ROWS * size_of::<f16>();
const GROUP_ZERO_BYTES: usize = TILE_ROWS / 2;

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

    /// Slabs of K tile `k_tile`.
    pub const fn slabs(&self, k_tile: usize) -> usize {
        self.inputs(k_tile).div_ceil(slab_elements(self.format))
    }

    /// Bytes of packed tile `k_tile` of any column, a multiple of 64.
    pub const fn tile_bytes(&self, k_tile: usize) -> usize {
        self.slabs(k_tile) * (SLAB_BYTES + slab_scale_bytes(self.format))
    }

    /// Bytes of the scales of tile `k_tile` of any column that lie beside the matrix: one f32 for each slab of fp8 in blocks, 0 in
    /// other formats. Vectors of length n are not counted.
    pub const fn block_scale_bytes(&self, k_tile: usize) -> usize {
        match self.format {
            Format::Fp8Blocks => self.slabs(k_tile) * size_of::<f32>(),
            _ => 0,
        }
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
}

/// Inputs that a row of a slab holds.
pub const fn slab_elements(format: Format) -> usize {
    8 * SLAB_ROW_BYTES / format.bits()
}

/// Groups of a slab with scales of their own in the tile.
pub(super) const fn slab_groups(format: Format) -> usize {
    match format {
        Format::Int4 { group } | Format::Int4ZeroPoints { group } => slab_elements(format) / group,
        _ => 0,
    }
}

/// Bytes of a slab's scales and zero points.
const fn slab_scale_bytes(format: Format) -> usize {
    let zeros = if matches!(format, Format::Int4ZeroPoints { .. }) { GROUP_ZERO_BYTES } else { 0 };
    slab_groups(format) * (GROUP_SCALE_BYTES + zeros)
}

/// Where the chunk with byte `byte` of row `row`'s codes lies in a tile: the swizzle. `byte` is a multiple of 16.
pub(super) const fn chunk_offset(row: usize, byte: usize) -> usize {
    let (slab, chunk) = (byte / SLAB_ROW_BYTES, byte % SLAB_ROW_BYTES / CHUNK);
    slab * SLAB_BYTES + row * SLAB_ROW_BYTES + (chunk ^ (row % 8)) * CHUNK
}

/// Where the tile of a column's group starts, and where in it the scales of the group's slab start, with its number in the slab.
pub(super) fn place_of_group(tiling: &Tiling, group: usize) -> (usize, (usize, usize)) {
    // Every tile but the last is full, so a group's tile follows from its index.
    let in_slab = slab_groups(tiling.format);
    let per_tile = tiling.tile_k / slab_elements(tiling.format) * in_slab;
    let (k_tile, group) = (group / per_tile, group % per_tile);
    (tiling.tile_offset(k_tile), (slab_scales_offset(tiling, k_tile, group / in_slab), group % in_slab))
}

/// Where the scales of slab `slab` of a tile lie in it, in bytes.
pub(super) const fn slab_scales_offset(tiling: &Tiling, k_tile: usize, slab: usize) -> usize {
    tiling.slabs(k_tile) * SLAB_BYTES + slab * slab_scale_bytes(tiling.format)
}

/// Where the scale of row `row` and a group lies, the group being number `.1` of the slab whose scales start at `.0`.
pub(super) const fn scale_offset(group: (usize, usize), row: usize) -> usize {
    group.0 + group.1 * GROUP_SCALE_BYTES + row * size_of::<f16>()
}

/// The same of its zero point: the byte, and by how many bits it is shifted there.
pub(super) const fn zero_offset(tiling: &Tiling, group: (usize, usize), row: usize) -> (usize, u32) {
    let zeros = group.0 + slab_groups(tiling.format) * GROUP_SCALE_BYTES + group.1 * GROUP_ZERO_BYTES;
    (zeros + row / 16 * 8 + row % 8, (row / 8 % 2 * 4) as u32)
}
