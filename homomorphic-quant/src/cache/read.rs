//! What a sequence holds, part by part.

use std::ops::Range;

use attention::page_pool::PageRef;

use super::{Cache, Sequence};
use crate::page::SidePage;
use crate::page::canonical::unpack_halves;
use crate::{Error, HeadBlock};

/// A run of a sequence's tokens that are stored alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// Tokens in 16 bits: the sinks or the open block.
    Dense {
        /// Positions in the sequence.
        tokens: Range<usize>,
        /// Whether these are the sinks.
        sinks: bool,
    },
    /// A closed block.
    Codes {
        /// Positions in the sequence.
        tokens: Range<usize>,
        /// Which closed block, from 0.
        block: usize,
    },
}

impl Segment {
    /// Positions in the sequence.
    pub fn tokens(&self) -> Range<usize> {
        match self {
            Segment::Dense { tokens, .. } | Segment::Codes { tokens, .. } => tokens.clone(),
        }
    }
}

/// 16-bit keys and values of one KV head, as f32.
#[derive(Debug, Clone, PartialEq)]
pub struct Dense {
    /// Keys `[tokens, qk_dim]`.
    pub k: Vec<f32>,
    /// Values `[tokens, v_dim]`.
    pub v: Vec<f32>,
}

impl Cache {
    /// The parts of a sequence, in order.
    pub fn segments(&self, sequence: &Sequence) -> Vec<Segment> {
        let tokens = sequence.tokens();
        let sinks = self.sink_tokens(tokens);
        let mut segments = Vec::with_capacity(sequence.blocks().len() + 2);
        if sinks > 0 {
            segments.push(Segment::Dense { tokens: 0..sinks, sinks: true });
        }
        let partition = self.config.partition();
        for block in 0..sequence.blocks().len() {
            let start = sinks + block * partition;
            segments.push(Segment::Codes { tokens: start..start + partition, block });
        }
        let open = self.open_tokens(tokens);
        if open > 0 {
            segments.push(Segment::Dense { tokens: tokens - open..tokens, sinks: false });
        }
        segments
    }

    /// The bytes of one KV head of a closed block, in the page layout of [`geometry`](Self::geometry).
    ///
    /// # Errors
    /// [`Error::Argument`] when there is no such block or head; [`Error::Attention`] when the sequence is not the
    /// cache's.
    pub fn block_bytes(&self, sequence: &Sequence, block: usize, kv_head: usize) -> Result<&[u8], Error> {
        self.check_head(kv_head)?;
        let Some(&page) = sequence.blocks().get(block) else {
            let expected = format!("below the {} closed blocks", sequence.blocks().len());
            return Err(Error::argument("block", expected, block));
        };
        Ok(&self.blocks.bytes(page)?[self.geometry.segment(kv_head)])
    }

    /// One KV head of a closed block.
    ///
    /// # Errors
    /// As [`block_bytes`](Self::block_bytes).
    pub fn block(&self, sequence: &Sequence, block: usize, kv_head: usize) -> Result<HeadBlock, Error> {
        let bytes = self.block_bytes(sequence, block, kv_head)?;
        self.geometry.layout().read(self.geometry.head(kv_head), bytes)
    }

    /// The sinks of one KV head.
    ///
    /// # Errors
    /// [`Error::Argument`] when there is no such head; [`Error::Attention`] when the sequence is not the cache's.
    pub fn sinks(&self, sequence: &Sequence, kv_head: usize) -> Result<Dense, Error> {
        let bytes = self.sink_bytes(sequence)?;
        self.dense(&self.sink_page, bytes, self.sink_tokens(sequence.tokens()), kv_head)
    }

    /// The open block of one KV head.
    ///
    /// # Errors
    /// As [`sinks`](Self::sinks).
    pub fn open_block(&self, sequence: &Sequence, kv_head: usize) -> Result<Dense, Error> {
        let bytes = self.open_bytes(sequence)?;
        self.dense(&self.open_page, bytes, self.open_tokens(sequence.tokens()), kv_head)
    }

    /// Refuses a sequence that has not the parts that its tokens make in this cache. Where one of another cache has the same parts, their
    /// pages are refused: these know their pool.
    pub(crate) fn check_parts(&self, sequence: &Sequence) -> Result<(), Error> {
        type Parts = (usize, bool, bool);
        let tokens = sequence.tokens();
        let expected: Parts =
            (self.closed_blocks(tokens), self.sink_tokens(tokens) > 0, self.open_tokens(tokens) > 0);
        let found: Parts = (sequence.blocks().len(), sequence.sinks().is_some(), sequence.open().is_some());
        if found == expected {
            return Ok(());
        }
        let text = |(blocks, sinks, open): Parts| {
            let of = |there| if there { "" } else { "no " };
            format!("{}sinks, {blocks} closed blocks and {}open block", of(sinks), of(open))
        };
        let expected = format!("one of this cache, which keeps {tokens} tokens as {}", text(expected));
        Err(attention::Error::argument("sequence", expected, text(found)).into())
    }

    /// The page of the sinks; empty when they have no token.
    pub(crate) fn sink_bytes(&self, sequence: &Sequence) -> Result<&[u8], Error> {
        self.check_parts(sequence)?;
        match (sequence.sinks(), &self.sinks) {
            (Some(page), Some(pool)) => Ok(pool.bytes(page)?),
            _ => Ok(&[]),
        }
    }

    /// The page of the open block; empty when it has no token.
    pub(crate) fn open_bytes(&self, sequence: &Sequence) -> Result<&[u8], Error> {
        self.check_parts(sequence)?;
        sequence.open().map_or(Ok(&[]), |page: PageRef| Ok(self.open.bytes(page)?))
    }

    fn dense(&self, side: &SidePage, bytes: &[u8], tokens: usize, kv_head: usize) -> Result<Dense, Error> {
        self.check_head(kv_head)?;
        if tokens == 0 {
            return Ok(Dense { k: Vec::new(), v: Vec::new() });
        }
        let segment = &bytes[side.segment(kv_head)];
        let dtype = self.config.dtype();
        Ok(Dense {
            k: unpack_halves(&segment[side.keys(0..tokens)], dtype).collect(),
            v: unpack_halves(&segment[side.values(0..tokens)], dtype).collect(),
        })
    }

    fn check_head(&self, kv_head: usize) -> Result<(), Error> {
        if kv_head < self.shape.kv_heads {
            return Ok(());
        }
        Err(Error::argument("kv_head", format!("below {}", self.shape.kv_heads), kv_head))
    }

    /// Everything that a sequence holds, as the f32 nearest to what its codes stand for: keys `[tokens, kv_heads,
    /// qk_dim]` and values `[tokens, kv_heads, v_dim]`. For tests and tools; attention never does this.
    ///
    /// # Errors
    /// [`Error::Attention`] when the sequence is not the cache's.
    pub fn dequantize(&self, sequence: &Sequence) -> Result<Dense, Error> {
        self.check_parts(sequence)?;
        let super::KvShape { kv_heads, qk_dim, v_dim } = self.shape;
        let tokens = sequence.tokens();
        let mut all =
            Dense { k: vec![0.0; tokens * kv_heads * qk_dim], v: vec![0.0; tokens * kv_heads * v_dim] };
        for kv_head in 0..kv_heads {
            let head = self.geometry.head(kv_head);
            for segment in self.segments(sequence) {
                let part = match segment {
                    Segment::Dense { sinks: true, .. } => self.sinks(sequence, kv_head)?,
                    Segment::Dense { sinks: false, .. } => self.open_block(sequence, kv_head)?,
                    Segment::Codes { block, .. } => {
                        let block = self.block(sequence, block, kv_head)?;
                        let round = |values: Vec<f64>| values.into_iter().map(|x| x as f32).collect();
                        Dense { k: round(block.keys(head)), v: round(block.values(head)) }
                    }
                };
                for (i, token) in segment.tokens().enumerate() {
                    let at = token * kv_heads + kv_head;
                    all.k[at * qk_dim..][..qk_dim].copy_from_slice(&part.k[i * qk_dim..][..qk_dim]);
                    all.v[at * v_dim..][..v_dim].copy_from_slice(&part.v[i * v_dim..][..v_dim]);
                }
            }
        }
        Ok(all)
    }
}
