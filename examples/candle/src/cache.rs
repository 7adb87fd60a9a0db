//! Paged caches in candle tensors.

use attention::page_pool::{PAGE_ALIGNMENT, PagePool, PagedSequence, PoolUsage};
use candle_core::{DType, Device, Result, Tensor};

use crate::error::{argument, ours};

const OP: &str = "paged cache";

/// Sizes of a [`PagedCache`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheShape {
    /// Layers; all share the same page numbers.
    pub layers: usize,
    /// Pages of each layer.
    pub pages: usize,
    /// Tokens per page: a power of two, 8 or more.
    pub page_size: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Channels of keys and values.
    pub head_dim: usize,
}

/// Keys and values of every layer in pages, one tensor `[2, pages, page_size, kv_heads, head_dim]` to a layer, keys at 0 and
/// values at 1.
///
/// Page numbers, their owners and copy-on-write come from [`PagePool`]; the bytes lie in candle's tensors.
#[derive(Debug)]
pub struct PagedCache {
    shape: CacheShape,
    layers: Vec<Tensor>,
    /// Numbers alone: its own pages are as small as it makes them.
    pool: PagePool,
}

impl PagedCache {
    /// A cache of zeros.
    ///
    /// # Errors
    /// A size of 0, a page size that is no power of two from 8 on, more memory than there is.
    pub fn new(shape: CacheShape, dtype: DType, device: &Device) -> Result<Self> {
        let CacheShape { layers, pages, page_size, kv_heads, head_dim } = shape;
        let sizes = [("layers", layers), ("pages", pages), ("kv_heads", kv_heads), ("head_dim", head_dim)];
        for (name, value) in sizes {
            if value == 0 {
                return Err(argument(OP, name, "at least 1", 0));
            }
        }
        if !page_size.is_power_of_two() || page_size < 8 {
            return Err(argument(OP, "page_size", "a power of two from 8 on", page_size));
        }
        let pool = PagePool::new(pages, PAGE_ALIGNMENT).map_err(ours(OP))?;
        let layer = || Tensor::zeros((2, pages, page_size, kv_heads, head_dim), dtype, device);
        Ok(PagedCache { shape, layers: (0..layers).map(|_| layer()).collect::<Result<_>>()?, pool })
    }

    /// The sizes.
    pub fn shape(&self) -> CacheShape {
        self.shape
    }

    /// Pages in use, shared, copied.
    pub fn usage(&self) -> PoolUsage {
        self.pool.usage()
    }

    /// Keys and values of a layer `[2, pages, page_size, kv_heads, head_dim]`, for [`PagedAppend`](crate::PagedAppend).
    ///
    /// # Errors
    /// There is no such layer.
    pub fn kv(&self, layer: usize) -> Result<&Tensor> {
        let expected = || argument(OP, "layer", format!("below {}", self.shape.layers), layer);
        self.layers.get(layer).ok_or_else(expected)
    }

    /// Keys of a layer `[pages, page_size, kv_heads, head_dim]`: a view.
    ///
    /// # Errors
    /// There is no such layer.
    pub fn k(&self, layer: usize) -> Result<Tensor> {
        self.kv(layer)?.get(0)
    }

    /// Values of a layer `[pages, page_size, kv_heads, head_dim]`: a view.
    ///
    /// # Errors
    /// There is no such layer.
    pub fn v(&self, layer: usize) -> Result<Tensor> {
        self.kv(layer)?.get(1)
    }

    /// An empty sequence. [Release](Self::release) it in the end: dropping it keeps its pages.
    ///
    /// # Errors
    /// None that a cache of valid sizes could meet.
    pub fn sequence(&self) -> Result<PagedSequence> {
        PagedSequence::new(self.shape.page_size).map_err(ours(OP))
    }

    /// Makes room for `new_tokens` more tokens of each sequence and tells their slots, i64 `[sum of new_tokens]`, sequence by
    /// sequence. A page that another sequence shares is copied before this one writes to it, in every layer.
    ///
    /// # Errors
    /// Too few free pages, or as many `new_tokens` as sequences are not given; the sequences are then as long as before.
    pub fn grow(&mut self, sequences: &mut [PagedSequence], new_tokens: &[usize]) -> Result<Tensor> {
        if sequences.len() != new_tokens.len() {
            return Err(argument(OP, "new_tokens", format!("{} numbers", sequences.len()), new_tokens.len()));
        }
        let before: Vec<usize> = sequences.iter().map(PagedSequence::tokens).collect();
        let mut slots = Vec::with_capacity(new_tokens.iter().sum());
        let grown = sequences.iter_mut().zip(new_tokens).try_for_each(|(sequence, &tokens)| {
            (0..tokens).try_for_each(|_| self.append(sequence).map(|slot| slots.push(slot)))
        });
        if let Err(error) = grown {
            for (sequence, tokens) in sequences.iter_mut().zip(before) {
                sequence.truncate(&mut self.pool, tokens).map_err(ours(OP))?;
            }
            return Err(error);
        }
        let tokens = slots.len();
        Tensor::from_vec(slots, tokens, self.layers[0].device())
    }

    /// One more token: its slot.
    fn append(&mut self, sequence: &mut PagedSequence) -> Result<i64> {
        let last = sequence.pages().last().copied();
        let slot = sequence.append(&mut self.pool).map_err(ours(OP))?;
        if let Some(last) = last.filter(|last| slot.index > 0 && *last != slot.page) {
            for layer in &self.layers {
                let page = layer.narrow(1, last.index() as usize, 1)?.contiguous()?;
                layer.slice_set(&page, 1, slot.page.index() as usize)?;
            }
        }
        Ok(i64::from(slot.page.index()) * self.shape.page_size as i64 + slot.index as i64)
    }

    /// A second sequence over the same pages.
    ///
    /// # Errors
    /// The sequence belongs to another cache.
    pub fn fork(&mut self, sequence: &PagedSequence) -> Result<PagedSequence> {
        sequence.fork(&mut self.pool).map_err(ours(OP))
    }

    /// Ends a sequence: pages that no other one shares become free.
    ///
    /// # Errors
    /// The sequence belongs to another cache.
    pub fn release(&mut self, sequence: PagedSequence) -> Result<()> {
        sequence.release(&mut self.pool).map_err(ours(OP))
    }

    /// Lengths `[batch]` and block table `[batch, max_pages]` of a batch, u32, for [`PagedDecode`](crate::PagedDecode).
    ///
    /// # Errors
    /// A sequence has more than `max_pages` pages.
    pub fn tables(&self, sequences: &[PagedSequence], max_pages: usize) -> Result<(Tensor, Tensor)> {
        let mut ids = Vec::with_capacity(sequences.len() * max_pages);
        for sequence in sequences {
            let pages = sequence.pages();
            if pages.len() > max_pages {
                return Err(argument(
                    OP,
                    "sequences",
                    format!("at most {max_pages} pages each"),
                    pages.len(),
                ));
            }
            ids.extend(pages.iter().map(|page| page.index()));
            ids.resize(ids.len() + max_pages - pages.len(), 0);
        }
        let lengths: Vec<u32> = sequences.iter().map(|sequence| sequence.tokens() as u32).collect();
        let (batch, device) = (sequences.len(), self.layers[0].device());
        Ok((Tensor::from_vec(lengths, batch, device)?, Tensor::from_vec(ids, (batch, max_pages), device)?))
    }
}
