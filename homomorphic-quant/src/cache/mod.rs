//! The cache of one layer: sinks, closed blocks and an open block per sequence, in pages that sequences share.
//!
//! A sequence is `[S sink tokens, 16 bits] ++ [closed blocks of exactly Π tokens, codes] ++ [open block of < Π
//! tokens, 16 bits]`: block `b` holds the tokens `S + bΠ .. S + (b + 1)Π`. Tokens fill the sinks first, then the open
//! block; the token that fills it closes it, before the attention of that step, so that a block is read as codes as
//! soon as it is whole. Whatever the chunks in which tokens arrive, the bytes are the same.
//!
//! Sinks, closed blocks and open blocks come from three pools of [`PagePool`]. All pages are counted: a sequence that
//! was [forked](Cache::fork) shares everything with its parent, one that was forked [at a block](Cache::fork_prefix)
//! shares sinks and leading blocks; closed blocks never change, and sinks and open block are copied when one of their
//! owners writes.

mod append;
mod read;

use attention::page_pool::{PagePool, PageRef, PoolUsage};

use crate::page::{PageGeometry, PageLayout, SidePage};
use crate::{Config, Error};

pub use read::{Dense, Segment};

/// Sizes of a layer's vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KvShape {
    /// KV heads.
    pub kv_heads: usize,
    /// Channels of a key: a multiple of 16.
    pub qk_dim: usize,
    /// Channels of a value: a multiple of 16.
    pub v_dim: usize,
}

/// How many pages a cache has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Closed blocks of all sequences, shared ones counted once.
    pub blocks: usize,
    /// Sequences: each may have a page of sinks and one open block.
    pub sequences: usize,
}

impl Capacity {
    /// Room for `sequences` sequences of up to `tokens` tokens each that share nothing.
    pub fn of_tokens(config: &Config, sequences: usize, tokens: usize) -> Self {
        let blocks = tokens.saturating_sub(config.sinks()) / config.partition();
        Capacity { blocks: blocks.saturating_mul(sequences), sequences }
    }
}

/// What the pools of a cache hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheUsage {
    /// Closed blocks.
    pub blocks: PoolUsage,
    /// Open blocks, each with room for Π tokens.
    pub open: PoolUsage,
    /// Sinks; a pool of nothing when the configuration has none.
    pub sinks: Option<PoolUsage>,
}

impl CacheUsage {
    /// Bytes of all pages that some sequence owns: codes, scales, minima, sums, sinks and open blocks, shared ones
    /// once.
    pub fn bytes(&self) -> usize {
        self.blocks.used_bytes() + self.open.used_bytes() + self.sinks.map_or(0, |sinks| sinks.used_bytes())
    }
}

/// One sequence of a cache. It belongs to the cache that made it, which releases it: dropping it does not.
#[derive(Debug)]
pub struct Sequence {
    sinks: Option<PageRef>,
    blocks: Vec<PageRef>,
    open: Option<PageRef>,
    tokens: usize,
}

impl Sequence {
    /// Tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The page of the sinks, once there is a token.
    pub fn sinks(&self) -> Option<PageRef> {
        self.sinks
    }

    /// The pages of the closed blocks, in order: a row of the block table.
    pub fn blocks(&self) -> &[PageRef] {
        &self.blocks
    }

    /// The page of the open block, if that has tokens.
    pub fn open(&self) -> Option<PageRef> {
        self.open
    }
}

/// The keys and values of one layer, of any number of sequences.
#[derive(Debug)]
pub struct Cache {
    config: Config,
    layer: u32,
    first_kv_head: u32,
    shape: KvShape,
    geometry: PageGeometry,
    sink_page: SidePage,
    open_page: SidePage,
    blocks: PagePool,
    open: PagePool,
    /// None without sinks.
    sinks: Option<PagePool>,
}

impl Cache {
    /// An empty cache for layer `layer`, with closed blocks in the [canonical](PageLayout::Canonical) layout.
    ///
    /// # Errors
    /// [`Error::Argument`] when the shape makes no pages (see [`PageGeometry::new`]); [`Error::Attention`] when the
    /// pages do not fit memory.
    pub fn new(config: &Config, layer: u32, shape: KvShape, capacity: Capacity) -> Result<Self, Error> {
        Self::shard(config, layer, 0, shape, capacity, PageLayout::Canonical)
    }

    /// A cache of some KV heads of a layer, those from the model's head `first_kv_head` on, with closed blocks in any
    /// layout. Widths, noise and the wire count the model's heads.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn shard(
        config: &Config,
        layer: u32,
        first_kv_head: u32,
        shape: KvShape,
        capacity: Capacity,
        page_layout: PageLayout,
    ) -> Result<Self, Error> {
        let KvShape { kv_heads, qk_dim, v_dim } = shape;
        let heads = first_kv_head as usize..(first_kv_head as usize).saturating_add(kv_heads);
        let geometry = PageGeometry::shard(config, page_layout, layer as usize, heads, qk_dim, v_dim)?;
        let side = |tokens| SidePage { tokens, kv_heads, qk_dim, v_dim };
        let (sink_page, open_page) = (side(config.sinks()), side(config.partition()));
        let sinks = match config.sinks() {
            0 => None,
            _ => Some(PagePool::new(capacity.sequences, sink_page.bytes())?),
        };
        Ok(Cache {
            config: config.clone(),
            layer,
            first_kv_head,
            shape,
            blocks: PagePool::new(capacity.blocks, geometry.bytes())?,
            open: PagePool::new(capacity.sequences, open_page.bytes())?,
            sinks,
            geometry,
            sink_page,
            open_page,
        })
    }

    /// How keys and values are quantized.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The layer that the cache belongs to.
    pub fn layer(&self) -> u32 {
        self.layer
    }

    /// The model's number of the first KV head.
    pub fn first_kv_head(&self) -> u32 {
        self.first_kv_head
    }

    /// Sizes of keys and values.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// What a page of a closed block looks like.
    pub fn geometry(&self) -> &PageGeometry {
        &self.geometry
    }

    /// What a page of sinks looks like.
    pub fn sink_page(&self) -> SidePage {
        self.sink_page
    }

    /// What a page of an open block looks like.
    pub fn open_page(&self) -> SidePage {
        self.open_page
    }

    /// The pool of closed blocks.
    pub fn block_pool(&self) -> &PagePool {
        &self.blocks
    }

    /// The pool of open blocks.
    pub fn open_pool(&self) -> &PagePool {
        &self.open
    }

    /// The pool of sinks; none when the configuration has no sinks.
    pub fn sink_pool(&self) -> Option<&PagePool> {
        self.sinks.as_ref()
    }

    /// Pages in use.
    pub fn usage(&self) -> CacheUsage {
        CacheUsage {
            blocks: self.blocks.usage(),
            open: self.open.usage(),
            sinks: self.sinks.as_ref().map(PagePool::usage),
        }
    }

    /// A sequence without tokens. It takes no page until it has some.
    pub fn sequence(&self) -> Sequence {
        Sequence { sinks: None, blocks: Vec::new(), open: None, tokens: 0 }
    }

    /// A sequence of so many tokens whose pages hold anything, for whoever fills them.
    pub(crate) fn reserve(&mut self, tokens: usize) -> Result<Sequence, Error> {
        let mut sequence = self.sequence();
        let taken = (|| {
            sequence.blocks = self.blocks.allocate_many(self.closed_blocks(tokens))?;
            if self.sink_tokens(tokens) > 0
                && let Some(pool) = &mut self.sinks
            {
                sequence.sinks = Some(pool.allocate()?);
            }
            if self.open_tokens(tokens) > 0 {
                sequence.open = Some(self.open.allocate()?);
            }
            Ok::<_, attention::Error>(())
        })();
        match taken {
            Ok(()) => Ok(Sequence { tokens, ..sequence }),
            Err(error) => {
                self.release(sequence)?;
                Err(error.into())
            }
        }
    }

    /// One head's segment of a closed block that one sequence owns, to write.
    pub(crate) fn block_segment_mut(&mut self, page: PageRef, kv_head: usize) -> Result<&mut [u8], Error> {
        Ok(&mut self.blocks.bytes_mut(page)?[self.geometry.segment(kv_head)])
    }

    /// The sinks or open block of a sequence that alone owns it, to write; empty when there is none.
    pub(crate) fn side_bytes_mut(&mut self, sequence: &Sequence, sinks: bool) -> Result<&mut [u8], Error> {
        match (sinks, sequence.sinks, sequence.open, &mut self.sinks) {
            (true, Some(page), _, Some(pool)) => Ok(pool.bytes_mut(page)?),
            (false, _, Some(page), _) => Ok(self.open.bytes_mut(page)?),
            _ => Ok(&mut []),
        }
    }

    /// Tokens of a sequence that are sinks.
    pub fn sink_tokens(&self, tokens: usize) -> usize {
        tokens.min(self.config.sinks())
    }

    /// Closed blocks of a sequence of so many tokens.
    pub fn closed_blocks(&self, tokens: usize) -> usize {
        (tokens - self.sink_tokens(tokens)) / self.config.partition()
    }

    /// Tokens of the open block of a sequence of so many tokens.
    pub fn open_tokens(&self, tokens: usize) -> usize {
        (tokens - self.sink_tokens(tokens)) % self.config.partition()
    }

    /// Bytes of what a sequence of so many tokens holds, not counting room for tokens to come: what goes over the wire.
    pub fn content_bytes(&self, tokens: usize) -> usize {
        let side = self.sink_tokens(tokens) + self.open_tokens(tokens);
        self.closed_blocks(tokens) * self.geometry.bytes()
            + side * self.sink_page.token_bytes() * self.shape.kv_heads
    }

    /// A second sequence with the same tokens. Nothing is copied until one of the two grows.
    ///
    /// # Errors
    /// [`Error::Attention`] when the sequence is not the cache's; nothing is shared then.
    pub fn fork(&mut self, sequence: &Sequence) -> Result<Sequence, Error> {
        let forked = self.share(sequence, sequence.blocks.len(), sequence.tokens)?;
        let Some(open) = sequence.open else { return Ok(forked) };
        match self.open.share(open) {
            Ok(()) => Ok(Sequence { open: Some(open), ..forked }),
            Err(error) => {
                self.release(forked)?;
                Err(error.into())
            }
        }
    }

    /// A second sequence of the first `S + blocks · Π` tokens: it shares the sinks and that many closed blocks, and
    /// goes on from there.
    ///
    /// # Errors
    /// [`Error::Argument`] when the sequence has fewer closed blocks; [`Error::Attention`] when it is not the cache's.
    /// Nothing is shared then.
    pub fn fork_prefix(&mut self, sequence: &Sequence, blocks: usize) -> Result<Sequence, Error> {
        if blocks > sequence.blocks.len() {
            let expected = format!("at most the {} closed blocks of the sequence", sequence.blocks.len());
            return Err(Error::argument("blocks", expected, blocks));
        }
        let tokens = self.sink_tokens(sequence.tokens) + blocks * self.config.partition();
        self.share(sequence, blocks, tokens)
    }

    /// Shares sinks and leading blocks.
    fn share(&mut self, sequence: &Sequence, blocks: usize, tokens: usize) -> Result<Sequence, Error> {
        self.check_parts(sequence)?;
        let mut forked = self.sequence();
        let shared = (|| {
            if let (Some(page), Some(pool)) = (sequence.sinks, &mut self.sinks) {
                pool.share(page)?;
                forked.sinks = Some(page);
            }
            for &page in &sequence.blocks[..blocks] {
                self.blocks.share(page)?;
                forked.blocks.push(page);
            }
            Ok::<_, attention::Error>(())
        })();
        match shared {
            Ok(()) => Ok(Sequence { tokens, ..forked }),
            Err(error) => {
                self.release(forked)?;
                Err(error.into())
            }
        }
    }

    /// Gives up a sequence's share of its pages.
    ///
    /// # Errors
    /// [`Error::Attention`] when the sequence is not the cache's.
    pub fn release(&mut self, sequence: Sequence) -> Result<(), Error> {
        if let (Some(page), Some(pool)) = (sequence.sinks, &mut self.sinks) {
            pool.release(page)?;
        }
        for page in sequence.blocks {
            self.blocks.release(page)?;
        }
        if let Some(page) = sequence.open {
            self.open.release(page)?;
        }
        Ok(())
    }
}
