//! Pages of 16-bit vectors: sinks and open blocks.

use std::ops::Range;

/// Byte layout of a page of `tokens` 16-bit keys and values.
///
/// A segment per KV head, in order: `k[tokens, qk_dim] · v[tokens, v_dim]`, elements of the cache's 16-bit type,
/// little-endian. Every segment is a multiple of 16 bytes, since the dims are multiples of 16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SidePage {
    /// Tokens that the page has room for: S of a sink page, Π of an open block.
    pub tokens: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Channels of a key.
    pub qk_dim: usize,
    /// Channels of a value.
    pub v_dim: usize,
}

impl SidePage {
    /// Bytes of one head's segment.
    pub const fn segment_bytes(&self) -> usize {
        self.tokens * self.token_bytes()
    }

    /// Bytes of one token of one head.
    pub const fn token_bytes(&self) -> usize {
        (self.qk_dim + self.v_dim) * 2
    }

    /// Bytes of the page.
    pub const fn bytes(&self) -> usize {
        self.kv_heads * self.segment_bytes()
    }

    /// Where a head's segment lies in the page.
    pub const fn segment(&self, kv_head: usize) -> Range<usize> {
        kv_head * self.segment_bytes()..(kv_head + 1) * self.segment_bytes()
    }

    /// Where the keys of some tokens lie in a head's segment.
    pub const fn keys(&self, tokens: Range<usize>) -> Range<usize> {
        tokens.start * self.qk_dim * 2..tokens.end * self.qk_dim * 2
    }

    /// Where the values of some tokens lie in a head's segment.
    pub const fn values(&self, tokens: Range<usize>) -> Range<usize> {
        let base = self.tokens * self.qk_dim * 2;
        base + tokens.start * self.v_dim * 2..base + tokens.end * self.v_dim * 2
    }
}
