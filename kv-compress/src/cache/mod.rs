//! The ragged low-rank paged KV cache of one layer.
//!
//! Sequences are lists of reference-counted pages (`attention::page_pool`). A fork shares its prefix's pages; the last,
//! partly filled one is copied when either side writes. Pages lie in one array whose bytes are those a kernel reads: see
//! [`layout`].

pub mod layout;

use attention::page_pool::{PagePool, PagedSequence};
use attention::{BlockTable, DType, Element};

pub use layout::PageLayout;

use crate::Error;
use crate::error::{check_len, stored};

/// Handle of a sequence of a [`LayerCache`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SequenceId(u64);

/// Bytes that a cache holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheUsage {
    /// Tokens of all sequences; a token that two sequences share counts twice.
    pub tokens: usize,
    /// Pages in use.
    pub pages: usize,
    /// Of these, pages that several sequences share.
    pub shared_pages: usize,
    /// Bytes of the pages in use, rows that hold no token yet included.
    pub bytes: usize,
    /// Bytes of all pages, used or not.
    pub capacity_bytes: usize,
    /// Pages copied because a sequence wrote to a shared one.
    pub copies: u64,
}

/// Low-rank keys and values of one layer, any number of sequences. `T` is a 16-bit type.
#[derive(Debug)]
pub struct LayerCache<T> {
    layout: PageLayout,
    pool: PagePool,
    sequences: std::collections::BTreeMap<u64, PagedSequence>,
    next: u64,
    storage: std::marker::PhantomData<T>,
}

impl<T: Element> LayerCache<T> {
    /// An empty cache of `pages` pages. Memory of pages never used is not touched.
    ///
    /// # Errors
    /// [`Error::Argument`] when `T` has not 16 bits, [`Error::Attention`] when the pages do not fit memory.
    pub fn new(layout: PageLayout, pages: usize) -> Result<Self, Error> {
        if !matches!(T::DTYPE, DType::F16 | DType::BF16) {
            return Err(Error::argument("T", "f16 or bf16", T::DTYPE));
        }
        let pool = PagePool::new(pages, layout.page_bytes())?;
        Ok(LayerCache {
            layout,
            pool,
            sequences: Default::default(),
            next: 0,
            storage: std::marker::PhantomData,
        })
    }

    /// Places of keys and values in a page.
    pub fn layout(&self) -> &PageLayout {
        &self.layout
    }

    /// A new, empty sequence.
    ///
    /// # Errors
    /// None in practice: the page size was checked.
    pub fn create(&mut self) -> Result<SequenceId, Error> {
        let sequence = PagedSequence::new(self.layout.page_size())?;
        Ok(self.insert(sequence))
    }

    fn insert(&mut self, sequence: PagedSequence) -> SequenceId {
        self.sequences.insert(self.next, sequence);
        self.next += 1;
        SequenceId(self.next - 1)
    }

    fn sequence(&self, id: SequenceId) -> Result<&PagedSequence, Error> {
        self.sequences.get(&id.0).ok_or_else(|| unknown(id))
    }

    /// A second sequence with the same tokens, over the same pages. Costs no page until one of the two writes.
    ///
    /// # Errors
    /// [`Error::Argument`] for an unknown sequence.
    pub fn fork(&mut self, id: SequenceId) -> Result<SequenceId, Error> {
        let sequence = self.sequences.get(&id.0).ok_or_else(|| unknown(id))?.fork(&mut self.pool)?;
        Ok(self.insert(sequence))
    }

    /// Keeps the first `tokens` tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] for an unknown sequence.
    pub fn truncate(&mut self, id: SequenceId, tokens: usize) -> Result<(), Error> {
        let sequence = self.sequences.get_mut(&id.0).ok_or_else(|| unknown(id))?;
        Ok(sequence.truncate(&mut self.pool, tokens)?)
    }

    /// Forgets a sequence; pages that no other shares become free.
    ///
    /// # Errors
    /// [`Error::Argument`] for an unknown sequence.
    pub fn release(&mut self, id: SequenceId) -> Result<(), Error> {
        let sequence = self.sequences.remove(&id.0).ok_or_else(|| unknown(id))?;
        Ok(sequence.release(&mut self.pool)?)
    }

    /// Tokens of a sequence.
    ///
    /// # Errors
    /// [`Error::Argument`] for an unknown sequence.
    pub fn tokens(&self, id: SequenceId) -> Result<usize, Error> {
        Ok(self.sequence(id)?.tokens())
    }

    /// Appends projected tokens, rounded to `T`: `keys` `[tokens, Σ r_k]` and `values` `[tokens, Σ r_v]`, KV head after KV
    /// head.
    ///
    /// # Errors
    /// [`Error::Argument`] for lengths that do not fit or an unknown sequence, [`Error::NotFinite`] for an element that `T` does
    /// not hold, [`Error::Attention`] when pages run out; the sequence then has the tokens it had.
    pub fn append(&mut self, id: SequenceId, keys: &[f32], values: &[f32]) -> Result<(), Error> {
        let heads = self.layout.ranks().heads();
        let (key_row, value_row) =
            (heads.iter().map(|r| r.k).sum::<usize>(), heads.iter().map(|r| r.v).sum::<usize>());
        let tokens = keys.len() / key_row;
        check_len("keys", keys.len(), &[tokens, key_row])?;
        check_len("values", values.len(), &[tokens, value_row])?;
        let (keys, values): (Vec<T>, Vec<T>) = (stored("keys", keys)?, stored("values", values)?);
        let sequence = self.sequences.get_mut(&id.0).ok_or_else(|| unknown(id))?;
        let before = sequence.tokens();
        for (keys, values) in keys.chunks_exact(key_row).zip(values.chunks_exact(value_row)) {
            let slot = match sequence.append(&mut self.pool) {
                Ok(slot) => slot,
                Err(error) => {
                    sequence.truncate(&mut self.pool, before)?;
                    return Err(error.into());
                }
            };
            let page: &mut [T] = bytemuck::cast_slice_mut(self.pool.bytes_mut(slot.page)?);
            let (mut keys, mut values) = (keys, values);
            for (head, ranks) in heads.iter().enumerate() {
                for (from, rank, region) in [
                    (&mut keys, ranks.k, self.layout.keys(head)),
                    (&mut values, ranks.v, self.layout.values(head)),
                ] {
                    let (row, rest) = from.split_at(rank);
                    region.write(page, slot.index, row);
                    *from = rest;
                }
            }
        }
        Ok(())
    }

    /// Keys `[tokens, r_k]` and values `[tokens, r_v]` of one KV head of a sequence, in order of tokens, into vectors that are
    /// overwritten.
    ///
    /// # Errors
    /// [`Error::Argument`] for an unknown sequence or head.
    pub fn gather(
        &self,
        id: SequenceId,
        kv_head: usize,
        keys: &mut Vec<T>,
        values: &mut Vec<T>,
    ) -> Result<(), Error> {
        let sequence = self.sequence(id)?;
        let heads = self.layout.ranks().kv_heads();
        if kv_head >= heads {
            return Err(Error::argument("kv_head", format!("below {heads}"), kv_head));
        }
        for (region, out) in [(self.layout.keys(kv_head), keys), (self.layout.values(kv_head), values)] {
            out.resize(sequence.tokens() * region.rank(), T::from_f32(0.0));
            for (rows, &page) in out.chunks_mut(self.layout.page_size() * region.rank()).zip(sequence.pages())
            {
                let page: &[T] = bytemuck::cast_slice(self.pool.bytes(page)?);
                for (token, row) in rows.chunks_exact_mut(region.rank()).enumerate() {
                    region.read(page, token, row);
                }
            }
        }
        Ok(())
    }

    /// All pages `[pages, page_elements]`, as a kernel reads them.
    ///
    /// # Errors
    /// None in practice: pages are whole elements.
    pub fn pages(&self) -> Result<&[T], Error> {
        Ok(self.pool.elements()?)
    }

    /// Changes every cached element, in every page in use; rows past the end of a sequence too.
    ///
    /// # Errors
    /// [`Error::Attention`] when a page is shared: its other owners would see the change.
    pub fn modify(&mut self, mut change: impl FnMut(T) -> T) -> Result<(), Error> {
        for page in self.sequences.values().flat_map(|sequence| sequence.pages()) {
            for element in bytemuck::cast_slice_mut::<u8, T>(self.pool.bytes_mut(*page)?) {
                *element = change(*element);
            }
        }
        Ok(())
    }

    /// Page ids `[sequences, max_pages]`, row-major, padded with 0, and tokens `[sequences]` of some sequences.
    ///
    /// # Errors
    /// [`Error::Argument`] for an unknown sequence, or one whose pages are more than `max_pages`.
    pub fn block_table(&self, ids: &[SequenceId], max_pages: usize) -> Result<(Vec<u32>, Vec<u32>), Error> {
        let (mut table, mut tokens) = (Vec::new(), Vec::new());
        for &id in ids {
            let sequence = self.sequence(id)?;
            let pages = sequence.pages();
            if pages.len() > max_pages {
                return Err(Error::argument("max_pages", format!("at least {}", pages.len()), max_pages));
            }
            table.extend(pages.iter().map(|page| page.index()));
            table.resize(tokens.len() * max_pages + max_pages, 0);
            tokens.push(sequence.tokens() as u32);
        }
        Ok((table, tokens))
    }

    /// What the cache holds.
    pub fn usage(&self) -> CacheUsage {
        let pool = self.pool.usage();
        CacheUsage {
            tokens: self.sequences.values().map(PagedSequence::tokens).sum(),
            pages: pool.used,
            shared_pages: pool.shared,
            bytes: pool.used_bytes(),
            capacity_bytes: pool.capacity * pool.page_bytes,
            copies: pool.copies,
        }
    }
}

fn unknown(id: SequenceId) -> Error {
    Error::argument("sequence", "a sequence of this cache", format!("{id:?}"))
}

/// Pages of a layer and what is needed to read them: the same whether a cache, a test or a device copy owns them.
#[derive(Debug, Clone, Copy)]
pub struct PagedView<'a, T> {
    /// Places of keys and values in a page.
    pub layout: &'a PageLayout,
    /// Pages `[pages, page_elements]`.
    pub pages: &'a [T],
    /// Page ids `[batch, max_pages]`, shared by all heads.
    pub block_table: BlockTable<'a>,
    /// Tokens of each sequence `[batch]`.
    pub lengths: &'a [u32],
}
