//! Where the columns of a matrix lie, without the bytes: all that planning needs.

use std::ops::Range;

use super::{Layout, Residency};
use crate::Error;
use crate::pack::{TILE_ROWS, Tiling};

/// Tiles, and which of them lie in host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    tiling: Tiling,
    host_columns: usize,
    host_layout: Layout,
}

impl std::fmt::Display for Placement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tiling = &self.tiling;
        write!(f, "[{}, {}] of {} in tiles of {}", tiling.n(), tiling.k(), tiling.format(), tiling.tile_k())?;
        let rows = if self.host_layout == Layout::Packed { "" } else { ", row by row" };
        write!(f, ", {} of {} columns in host memory{rows}", self.host_columns, tiling.column_tiles())
    }
}

impl Placement {
    /// A packed matrix.
    ///
    /// # Errors
    /// [`Error::Argument`] for a fraction outside 0..=1.
    pub fn packed(tiling: Tiling, residency: Residency) -> Result<Self, Error> {
        let host_columns = residency.host_columns(tiling.column_tiles())?;
        Ok(Placement { tiling, host_columns, host_layout: Layout::Packed })
    }

    pub(super) fn with_host_layout(self, host_layout: Layout) -> Self {
        Placement { host_layout, ..self }
    }

    /// How the matrix is cut into tiles.
    pub const fn tiling(&self) -> &Tiling {
        &self.tiling
    }

    /// Column tiles in host memory: the first ones.
    pub const fn host_columns(&self) -> usize {
        self.host_columns
    }

    /// Column tiles in HBM: the rest.
    pub const fn hbm_columns(&self) -> usize {
        self.tiling.column_tiles() - self.host_columns
    }

    /// Layout of the part in host memory. The part in HBM is always packed.
    pub const fn host_layout(&self) -> Layout {
        self.host_layout
    }

    /// Layout of a column.
    pub(crate) const fn layout(&self, column: usize) -> Layout {
        if column < self.host_columns { self.host_layout } else { Layout::Packed }
    }

    /// Bytes of a tile, as a kernel fetches it: padding of the packed layout included.
    pub const fn tile_bytes(&self, column: usize, k_tile: usize) -> u64 {
        let bytes = match self.layout(column) {
            Layout::Packed => self.tiling.tile_bytes(k_tile),
            Layout::RowMajor(dtype) => self.tiling.rows(column) * self.tiling.inputs(k_tile) * dtype.size(),
        };
        bytes as u64
    }

    /// Bytes of the scales that a kernel fetches from beside the matrix with a tile, from HBM wherever the tile lies.
    pub const fn block_scale_bytes(&self, k_tile: usize) -> u64 {
        self.tiling.block_scale_bytes(k_tile) as u64
    }

    /// The same for all tiles of a column.
    pub fn column_scale_bytes(&self) -> u64 {
        (0..self.tiling.k_tiles()).map(|k_tile| self.block_scale_bytes(k_tile)).sum()
    }

    /// Bytes of whole columns.
    pub fn column_bytes(&self, columns: Range<usize>) -> u64 {
        let columns = columns.start..columns.end.max(columns.start);
        let host = columns.start.min(self.host_columns)..columns.end.min(self.host_columns);
        let hbm = columns.len() - host.len();
        let host_bytes = match self.host_layout {
            Layout::Packed => host.len() * self.tiling.column_bytes(),
            Layout::RowMajor(dtype) => {
                let row = |column: usize| (column * TILE_ROWS).min(self.tiling.n());
                (row(host.end) - row(host.start)) * self.tiling.k() * dtype.size()
            }
        };
        (host_bytes + hbm * self.tiling.column_bytes()) as u64
    }

    /// Bytes in host memory.
    pub fn host_bytes(&self) -> u64 {
        self.column_bytes(0..self.host_columns)
    }

    /// Bytes in HBM. Scales that lie beside the matrix, in HBM too, are not counted: [`Format::scales`](crate::Format::scales) tells how
    /// many there are.
    pub fn hbm_bytes(&self) -> u64 {
        self.column_bytes(self.host_columns..self.tiling.column_tiles())
    }
}
