//! Where a low-rank key or value lies in a page: the layout that cache, kernels and tests share.
//!
//! A page holds [`page_size`](PageLayout::page_size) tokens of one layer, all its KV heads. Head after head, first the
//! head's keys, then its values, each a **region** of 16-bit elements with rows of exactly r elements:
//!
//! ```text
//! page = [ keys of head 0: page_size × r_k(0) ][ values of head 0: page_size × r_v(0) ]
//!        [ keys of head 1: page_size × r_k(1) ][ values of head 1: page_size × r_v(1) ] …
//! ```
//!
//! - There is no padding anywhere: ranks are multiples of 16, so rows are whole pairs of 16-byte chunks, regions start at
//!   multiples of `32 · page_size` bytes of their page, and a page is `2 · page_size · Σ (r_k + r_v)` bytes.
//! - A region is contiguous, hence one bulk copy; a tile of constant bytes is the regions of one or more consecutive pages
//!   of the block table (16 KiB are one page of 64 tokens at rank 128, eight pages at rank 16).
//! - Within a row, 16-byte chunks are swapped by [`swizzled_chunk`], the map of `tile/swizzle.cuh`, so that a tile in shared
//!   memory is read without bank conflicts and copied without computing addresses.
//! - Page `p` of a pool starts at byte `p · page_bytes` (64-bit); token `t` of a sequence is row `t % page_size` of page
//!   `block_table[t / page_size]`. Rows past the end of a sequence hold anything, NaN included.

use std::ops::Range;

use attention::page_pool::PAGE_ALIGNMENT;

use crate::{Error, HeadRanks, LayerRanks};

/// Bytes of an element.
const ELEMENT_BYTES: usize = 2;
/// 16-bit elements of a chunk of 16 bytes.
pub const CHUNK: usize = 8;
/// Tokens of a page unless asked otherwise.
pub const DEFAULT_PAGE_SIZE: usize = 64;

/// Places of keys and values in the pages of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageLayout {
    ranks: LayerRanks,
    page_size: usize,
    /// First element of each region, `[2 · kv_heads + 1]`: keys and values of each head in turn, then the end.
    starts: Vec<usize>,
}

impl PageLayout {
    /// Tokens that a page may have: powers of two from 16 to 1024.
    pub const PAGE_SIZES: Range<usize> = 16..1025;

    /// Pages of `page_size` tokens of a layer.
    ///
    /// # Errors
    /// [`Error::Argument`] when `page_size` is no power of two from 16 to 1024.
    pub fn new(ranks: &LayerRanks, page_size: usize) -> Result<Self, Error> {
        if !page_size.is_power_of_two() || !Self::PAGE_SIZES.contains(&page_size) {
            return Err(Error::argument("page_size", "a power of two from 16 to 1024", page_size));
        }
        let mut starts = vec![0];
        for head in ranks.heads() {
            for rank in [head.k, head.v] {
                starts.push(starts[starts.len() - 1] + page_size * rank);
            }
        }
        debug_assert!((starts[starts.len() - 1] * ELEMENT_BYTES).is_multiple_of(PAGE_ALIGNMENT));
        Ok(PageLayout { ranks: ranks.clone(), page_size, starts })
    }

    /// Ranks of the heads.
    pub fn ranks(&self) -> &LayerRanks {
        &self.ranks
    }

    /// Tokens of a page.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// 16-bit elements of a page.
    pub fn page_elements(&self) -> usize {
        self.starts[self.starts.len() - 1]
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> usize {
        self.page_elements() * ELEMENT_BYTES
    }

    /// Bytes of one token in a full page: `2 · Σ (r_k + r_v)`.
    pub fn bytes_per_token(&self) -> usize {
        self.ranks.elements() * ELEMENT_BYTES
    }

    /// First element of each region `[2 · kv_heads + 1]`, in elements from the start of the page: keys of head h at
    /// `2h`, its values at `2h + 1`, the end of the page last. What a kernel reads beside the ranks.
    pub fn region_starts(&self) -> &[usize] {
        &self.starts
    }

    /// Elements of a head's keys in the page, `[page_size, r_k]`.
    ///
    /// # Panics
    /// When there is no such head.
    pub fn keys(&self, kv_head: usize) -> Region {
        self.region(2 * kv_head, self.ranks.heads()[kv_head].k)
    }

    /// Elements of a head's values in the page, `[page_size, r_v]`.
    ///
    /// # Panics
    /// When there is no such head.
    pub fn values(&self, kv_head: usize) -> Region {
        self.region(2 * kv_head + 1, self.ranks.heads()[kv_head].v)
    }

    fn region(&self, index: usize, rank: usize) -> Region {
        Region { start: self.starts[index], page_size: self.page_size, rank }
    }

    /// Ranks of a head.
    ///
    /// # Panics
    /// When there is no such head.
    pub fn head(&self, kv_head: usize) -> HeadRanks {
        self.ranks.heads()[kv_head]
    }
}

/// Rows of one head's keys or values in a page: `[page_size, rank]`, chunks of a row swapped by [`swizzled_chunk`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    start: usize,
    page_size: usize,
    rank: usize,
}

impl Region {
    /// Elements of a row.
    pub const fn rank(&self) -> usize {
        self.rank
    }

    /// Elements of the region, from the start of the page.
    pub const fn elements(&self) -> Range<usize> {
        self.start..self.start + self.page_size * self.rank
    }

    /// Element of the page that holds element `i` of the row of token `token` of the page.
    pub const fn element(&self, token: usize, i: usize) -> usize {
        self.start + token * self.rank + swizzled_chunk(self.rank, token, i / CHUNK) * CHUNK + i % CHUNK
    }

    /// Writes a row `[rank]`.
    ///
    /// # Panics
    /// When page, row or token are out of range.
    pub fn write<T: Copy>(&self, page: &mut [T], token: usize, row: &[T]) {
        assert!(row.len() == self.rank && token < self.page_size, "row {token} of {} elements", row.len());
        for (chunk, elements) in row.chunks_exact(CHUNK).enumerate() {
            let at = self.element(token, chunk * CHUNK);
            page[at..at + CHUNK].copy_from_slice(elements);
        }
    }

    /// Reads a row `[rank]`.
    ///
    /// # Panics
    /// When page, row or token are out of range.
    pub fn read<T: Copy>(&self, page: &[T], token: usize, row: &mut [T]) {
        assert!(row.len() == self.rank && token < self.page_size, "row {token} of {} elements", row.len());
        for (chunk, elements) in row.chunks_exact_mut(CHUNK).enumerate() {
            let at = self.element(token, chunk * CHUNK);
            elements.copy_from_slice(&page[at..at + CHUNK]);
        }
    }
}

/// Chunk of the row at which logical chunk `chunk` of the row of `token` is stored, in rows of `rank` elements; its own
/// inverse.
///
/// With 2ⁿ the largest power of two that divides the chunks of a row, at most 8: `chunk ^ (token / (8 / 2ⁿ) % 2ⁿ)`, as
/// `cuda/include/tile/swizzle.cuh` computes it.
pub const fn swizzled_chunk(rank: usize, token: usize, chunk: usize) -> usize {
    let chunks = rank / CHUNK;
    let period = if chunks.is_multiple_of(8) {
        8
    } else if chunks.is_multiple_of(4) {
        4
    } else if chunks.is_multiple_of(2) {
        2
    } else {
        1
    };
    chunk ^ (token / (8 / period) % period)
}

#[cfg(test)]
mod tests {
    use super::*;
    use attention::HeadShape;

    fn layout(page_size: usize) -> PageLayout {
        let shape = HeadShape::new(8, 4, 128, 128).unwrap();
        let heads = [(16, 48), (128, 16), (96, 112), (32, 64)].map(|(k, v)| HeadRanks { k, v });
        PageLayout::new(&LayerRanks::new(&shape, heads.to_vec()).unwrap(), page_size).unwrap()
    }

    #[test]
    fn regions_tile_the_page() {
        for page_size in [16, 64, 1024] {
            let layout = layout(page_size);
            assert_eq!(layout.page_elements(), page_size * layout.ranks().elements());
            assert_eq!(layout.page_bytes(), page_size * layout.bytes_per_token());
            let mut owners = vec![0; layout.page_elements()];
            for head in 0..4 {
                for region in [layout.keys(head), layout.values(head)] {
                    assert_eq!(region.elements().start * 2 % (32 * page_size), 0, "regions are aligned");
                    for token in 0..page_size {
                        for i in 0..region.rank() {
                            let at = region.element(token, i);
                            assert_eq!((at - region.start) / region.rank(), token, "rows stay rows");
                            owners[at] += 1;
                        }
                    }
                }
            }
            assert!(owners.iter().all(|&owners| owners == 1), "page size {page_size}");
        }
    }

    #[test]
    fn equal_chunks_of_eight_rows_lie_in_eight_columns() {
        // What ldmatrix reads: the same chunk of eight consecutive rows. 128 bytes are eight columns of 16.
        for rank in (16..=256).step_by(16) {
            for first in [0, 8, 56] {
                for chunk in 0..rank / CHUNK {
                    let mut columns: Vec<usize> = (first..first + 8)
                        .map(|token| (token * rank / CHUNK + swizzled_chunk(rank, token, chunk)) % 8)
                        .collect();
                    columns.sort_unstable();
                    assert_eq!(
                        columns,
                        [0, 1, 2, 3, 4, 5, 6, 7],
                        "rank {rank}, rows {first}.., chunk {chunk}"
                    );
                }
            }
        }
    }

    #[test]
    fn rows_come_back() {
        let layout = layout(32);
        let mut page = vec![0u16; layout.page_elements()];
        let value = |head: usize, token: usize, i: usize| (head * 5000 + token * 130 + i) as u16;
        for head in 0..4 {
            let region = layout.values(head);
            for token in 0..32 {
                let row: Vec<u16> = (0..region.rank()).map(|i| value(head, token, i)).collect();
                region.write(&mut page, token, &row);
            }
        }
        for head in 0..4 {
            let region = layout.values(head);
            let mut row = vec![0; region.rank()];
            for token in 0..32 {
                region.read(&page, token, &mut row);
                for (i, &found) in row.iter().enumerate() {
                    assert_eq!(found, value(head, token, i), "head {head}, token {token}, element {i}");
                }
            }
        }
    }

    #[test]
    fn page_sizes() {
        let ranks = layout(64).ranks().clone();
        for size in [0, 8, 24, 100, 2048] {
            assert!(
                matches!(PageLayout::new(&ranks, size), Err(Error::Argument { argument: "page_size", .. })),
                "{size}"
            );
        }
    }
}
