//! Pages: the bytes of a closed block, of the sinks and of the open block.
//!
//! A closed block of Π tokens is one page, a segment per KV head, so that one (page, head) is contiguous: one bulk
//! copy for a kernel, one unit for a receiver that holds other heads. Inside a segment the bytes follow a
//! [`PageLayout`]: [`canonical`] is the stable, documented one that travels; others are made for a reader and are
//! converted by [`transcode`].
//!
//! Sinks and open block are [`SidePage`]s of 16-bit vectors.

pub mod canonical;
mod geometry;
pub mod packed;
mod side;

pub use geometry::{HeadGeometry, PageGeometry, SumType};
pub use side::SidePage;

use crate::{Error, HeadBlock};

/// How the bytes of a segment are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PageLayout {
    /// [`canonical`]: stable, documented, what goes over the wire.
    Canonical,
    /// [`packed`]: what the GPU's kernels read and write.
    Packed,
}

impl PageLayout {
    /// Every layout.
    pub const ALL: &[PageLayout] = &[PageLayout::Canonical, PageLayout::Packed];

    /// The layout's number in files and streams.
    pub const fn id(self) -> u16 {
        match self {
            PageLayout::Canonical => 1,
            PageLayout::Packed => 2,
        }
    }

    /// The layout with this number.
    pub fn from_id(id: u16) -> Option<Self> {
        Self::ALL.iter().copied().find(|layout| layout.id() == id)
    }

    /// Bytes of a head's segment: a multiple of 16.
    pub fn segment_bytes(self, head: &HeadGeometry) -> usize {
        match self {
            PageLayout::Canonical => canonical::Fields::new(head).bytes,
            PageLayout::Packed => packed::bytes(head),
        }
    }

    /// Refuses heads that the layout is not made for.
    ///
    /// # Errors
    /// [`Error::Argument`] names what does not fit.
    pub fn check(self, head: &HeadGeometry) -> Result<(), Error> {
        match self {
            PageLayout::Canonical => Ok(()),
            PageLayout::Packed => packed::check(head),
        }
    }

    /// Reads a segment.
    ///
    /// # Errors
    /// [`Error::Argument`] when it has another length, or the layout is not made for the head.
    pub fn read(self, head: &HeadGeometry, segment: &[u8]) -> Result<HeadBlock, Error> {
        match self {
            PageLayout::Canonical => canonical::read(head, segment),
            PageLayout::Packed => packed::read(head, segment),
        }
    }

    /// Writes a segment, wholly.
    ///
    /// # Errors
    /// [`Error::Argument`] when the segment has another length or the block another shape, or the layout is not made
    /// for the head.
    pub fn write(self, head: &HeadGeometry, block: &HeadBlock, segment: &mut [u8]) -> Result<(), Error> {
        match self {
            PageLayout::Canonical => canonical::write(head, block, segment),
            PageLayout::Packed => packed::write(head, block, segment),
        }
    }
}

/// Rewrites one head's segment in another layout.
///
/// # Errors
/// [`Error::Argument`] when a segment has another length than its layout says.
pub fn transcode(
    head: &HeadGeometry,
    from: (PageLayout, &[u8]),
    to: (PageLayout, &mut [u8]),
) -> Result<(), Error> {
    let (from, source) = from;
    let (to, target) = to;
    if from == to && source.len() == from.segment_bytes(head) && source.len() == target.len() {
        target.copy_from_slice(source);
        return Ok(());
    }
    to.write(head, &from.read(head, source)?, target)
}
