//! Partitions: what an algorithm selects as a whole, over pages.
//!
//! A chunk or a gated block is a partition of a fixed number of full pages; a cluster has as many pages as its tokens
//! take, the last of them perhaps in part. Attention therefore takes a valid length per page. Pages of a head are numbered
//! from 0 in the order in which they were closed, and a partition is a run of them.

use std::ops::Range;

use crate::page::PageSpec;

/// A run of pages of one KV head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Partition {
    /// Its first page.
    pub first_page: u32,
    /// How many pages it has.
    pub pages: u32,
    /// Tokens of its last page: 1 to the tokens of a page.
    pub last_len: u32,
}

impl Partition {
    /// The pages.
    pub const fn range(&self) -> Range<u32> {
        self.first_page..self.first_page + self.pages
    }

    /// Tokens.
    pub const fn tokens(&self, spec: &PageSpec) -> usize {
        (self.pages as usize - 1) * spec.tokens() + self.last_len as usize
    }
}

/// The partitions of one KV head, in the order of their pages.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Partitions {
    list: Vec<Partition>,
    /// Valid tokens of each page.
    page_lengths: Vec<u8>,
}

impl Partitions {
    /// Adds a partition of `tokens` tokens after the others. One of no token is left out.
    pub fn push(&mut self, spec: &PageSpec, tokens: usize) {
        if tokens == 0 {
            return;
        }
        let pages = spec.pages_of(tokens);
        let last_len = tokens - (pages - 1) * spec.tokens();
        self.list.push(Partition {
            first_page: self.page_lengths.len() as u32,
            pages: pages as u32,
            last_len: last_len as u32,
        });
        self.page_lengths.extend(std::iter::repeat_n(spec.tokens() as u8, pages - 1));
        self.page_lengths.push(last_len as u8);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// All of them.
    pub fn as_slice(&self) -> &[Partition] {
        &self.list
    }

    /// Valid tokens of each page `[pages]`.
    pub fn page_lengths(&self) -> &[u8] {
        &self.page_lengths
    }

    /// Pages of all partitions.
    pub fn pages(&self) -> usize {
        self.page_lengths.len()
    }

    /// Bytes that a device needs of this table: nothing for full pages of partitions of one size, else an offset per
    /// partition and a length per page.
    pub fn bytes(&self, spec: &PageSpec) -> usize {
        let fixed = self.list.windows(2).all(|pair| pair[0].pages == pair[1].pages);
        if fixed && self.page_lengths.iter().all(|&length| usize::from(length) == spec.tokens()) {
            return 0;
        }
        self.list.len() * size_of::<u32>() + self.page_lengths.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use attention::DType;

    #[test]
    fn partitions_follow_one_another() {
        let spec = PageSpec::new(8, 64, 64, DType::F16).unwrap();
        let mut partitions = Partitions::default();
        for tokens in [4, 0, 16, 17, 8, 1] {
            partitions.push(&spec, tokens);
        }
        let found: Vec<_> = partitions.as_slice().iter().map(|p| (p.range(), p.tokens(&spec))).collect();
        assert_eq!(found, [(0..1, 4), (1..3, 16), (3..6, 17), (6..7, 8), (7..8, 1)]);
        assert_eq!(partitions.page_lengths(), [4, 8, 8, 8, 8, 1, 8, 1]);
        assert_eq!(partitions.bytes(&spec), 5 * 4 + 8);

        let mut fixed = Partitions::default();
        (0..3).for_each(|_| fixed.push(&spec, 16));
        assert_eq!(fixed.bytes(&spec), 0, "offsets of equal partitions are a multiplication");
    }
}
