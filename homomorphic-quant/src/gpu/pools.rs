//! Where quantized sequences lie on the device.

use attention::HeadShape;
use cuda::memory::View;

use super::to_u32;
use crate::page::{HeadGeometry, PageLayout, SidePage, packed};
use crate::{Config, Error, OpenBlock, Rounding};

/// How much a layer's pools hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Counts {
    /// Pages of closed blocks.
    pub pages: usize,
    /// Pages of sinks.
    pub sink_pages: usize,
    /// Pages of open blocks.
    pub open_pages: usize,
    /// Entries of the block table for one sequence.
    pub max_pages: usize,
}

/// Shape of a layer's quantized cache on the device.
///
/// Three pools, which the caller allocates: packed pages `[pages, kv_heads, segment]` u8, sinks
/// `[sink_pages, kv_heads, sinks · (qk_dim + v_dim)]` and open blocks `[open_pages, kv_heads, Π · (qk_dim + v_dim)]` of the
/// 16-bit type, each a [`SidePage`] per page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pools {
    geometry: HeadGeometry,
    kv_heads: usize,
    sinks: usize,
    counts: Counts,
}

impl Pools {
    /// The cache of one layer.
    ///
    /// # Errors
    /// [`Error::Argument`] for what only the CPU does: stochastic rounding, a requantized open block, heads of different
    /// widths, and what [`PageLayout::Packed`] is not made for; or a count that the device cannot index.
    pub fn new(config: &Config, layer: usize, shape: HeadShape, counts: Counts) -> Result<Self, Error> {
        if config.rounding() != Rounding::Nearest {
            return Err(Error::argument("rounding", "Nearest", format!("{:?}", config.rounding())));
        }
        if config.open_block() != OpenBlock::Exact {
            return Err(Error::argument("open_block", "Exact", format!("{:?}", config.open_block())));
        }
        let bits = config.head_bits(layer, 0);
        if let Some(head) = (1..shape.kv_heads()).find(|&head| config.head_bits(layer, head) != bits) {
            let found = format!("{:?} in head {head}", config.head_bits(layer, head));
            return Err(Error::argument("bits", format!("{bits:?} in every KV head, as in head 0"), found));
        }
        let geometry = HeadGeometry::new(config, bits, shape.qk_dim(), shape.v_dim())?;
        packed::check(&geometry)?;
        for (argument, count) in [
            ("pages", counts.pages),
            ("sink_pages", counts.sink_pages),
            ("open_pages", counts.open_pages),
            ("max_pages", counts.max_pages),
        ] {
            to_u32(argument, count)?;
        }
        Ok(Pools { geometry, kv_heads: shape.kv_heads(), sinks: config.sinks(), counts })
    }

    /// One KV head of a page.
    pub const fn geometry(&self) -> &HeadGeometry {
        &self.geometry
    }

    /// KV heads.
    pub const fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Tokens at the start of a sequence that stay in 16 bits.
    pub const fn sinks(&self) -> usize {
        self.sinks
    }

    /// How much the pools hold.
    pub const fn counts(&self) -> Counts {
        self.counts
    }

    /// Bytes of one KV head of a page.
    pub fn segment_bytes(&self) -> usize {
        PageLayout::Packed.segment_bytes(&self.geometry)
    }

    /// Bytes of a packed page.
    pub fn page_bytes(&self) -> usize {
        self.kv_heads * self.segment_bytes()
    }

    /// A page of sinks.
    pub const fn sink_page(&self) -> SidePage {
        self.side_page(self.sinks)
    }

    /// A page of an open block.
    pub const fn open_page(&self) -> SidePage {
        self.side_page(self.geometry.partition)
    }

    const fn side_page(&self, tokens: usize) -> SidePage {
        let HeadGeometry { qk_dim, v_dim, .. } = self.geometry;
        SidePage { tokens, kv_heads: self.kv_heads, qk_dim, v_dim }
    }

    /// Closed blocks and 16-bit tokens of a sequence of `len` tokens.
    pub const fn split(&self, len: usize) -> (usize, usize) {
        let behind_sinks = len.saturating_sub(self.sinks);
        let closed = behind_sinks / self.geometry.partition;
        (closed, len - closed * self.geometry.partition)
    }
}

/// Where each sequence's tokens lie.
#[derive(Debug, Clone, Copy)]
pub struct Places<'a> {
    /// Page of each closed block `[batch, max_pages]`. Block `b` holds tokens `S + b·Π … S + (b + 1)·Π − 1`.
    pub block_table: &'a View<'a, u32>,
    /// Page of each sequence's sinks `[batch]`.
    pub sink_page: &'a View<'a, u32>,
    /// Page of each sequence's open block `[batch]`. An append asks for a valid one of every sequence that gets tokens, also
    /// where all of them go to the sinks or complete blocks.
    pub open_page: &'a View<'a, u32>,
}
