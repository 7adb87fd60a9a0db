//! Reference-counted byte pages for KV caches.
//!
//! A cache allocates pages, writes its bytes into them and puts their numbers into block tables. Sequences that share a
//! prefix share its pages; a page is copied when one of its owners wants to write (copy-on-write). The pool knows nothing
//! of what the bytes mean.
//!
//! Handles carry their pool and a generation, so that a handle of another pool, or one that outlives its page, is an error and
//! never reads another sequence's bytes.

use std::sync::atomic::{AtomicU32, Ordering};

use bytemuck::Pod;

use crate::Error;

/// Bytes at which every page is aligned.
pub const PAGE_ALIGNMENT: usize = 16;

/// Handle of an allocated page. Copying the handle does not make another owner: see [`PagePool::share`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRef {
    pool: u32,
    index: u32,
    generation: u32,
}

impl PageRef {
    /// The page number, as block tables hold it.
    pub const fn index(self) -> u32 {
        self.index
    }
}

/// What a pool holds and has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolUsage {
    /// Bytes of a page.
    pub page_bytes: usize,
    /// Pages in the pool.
    pub capacity: usize,
    /// Pages with at least one owner.
    pub used: usize,
    /// Pages with more than one owner.
    pub shared: usize,
    /// Largest `used` so far.
    pub peak: usize,
    /// Pages ever copied because an owner of a shared page wanted to write.
    pub copies: u64,
}

impl PoolUsage {
    /// Pages that can be allocated.
    pub const fn free(&self) -> usize {
        self.capacity - self.used
    }

    /// Bytes with at least one owner.
    pub const fn used_bytes(&self) -> usize {
        self.used * self.page_bytes
    }
}

/// A fixed number of byte pages in host memory.
#[derive(Debug)]
pub struct PagePool {
    /// Tells the pools of a process apart.
    id: u32,
    words_per_page: usize,
    /// `[capacity, words_per_page]`: words, so that pages are aligned.
    words: Box<[u128]>,
    /// Owners of each page; 0 when free.
    owners: Vec<u32>,
    /// Generation of each page: counts how often it was freed.
    generations: Vec<u32>,
    /// Freed pages, last freed first; then the pages from `untouched` on, which were never allocated.
    free: Vec<u32>,
    untouched: u32,
    shared: usize,
    peak: usize,
    copies: u64,
}

impl PagePool {
    /// `capacity` pages of `page_bytes` bytes, zero at first. Memory of pages that were never allocated is not touched.
    ///
    /// # Errors
    /// [`Error::Argument`] when `page_bytes` is 0 or no multiple of [`PAGE_ALIGNMENT`], `capacity` is past `u32`, or the
    /// pages do not fit memory.
    pub fn new(capacity: usize, page_bytes: usize) -> Result<Self, Error> {
        if page_bytes == 0 || !page_bytes.is_multiple_of(PAGE_ALIGNMENT) {
            return Err(Error::argument(
                "page_bytes",
                format!("a multiple of {PAGE_ALIGNMENT} above 0"),
                page_bytes,
            ));
        }
        if u32::try_from(capacity).is_err() {
            return Err(Error::argument("capacity", format!("at most {}", u32::MAX), capacity));
        }
        let words_per_page = page_bytes / size_of::<u128>();
        let words = capacity
            .checked_mul(words_per_page)
            .and_then(|words| bytemuck::allocation::try_zeroed_slice_box(words).ok())
            .ok_or_else(|| {
                let found = format!("{capacity} pages of {page_bytes} bytes");
                Error::argument("capacity", "pages that fit memory", found)
            })?;
        static POOLS: AtomicU32 = AtomicU32::new(0);
        Ok(PagePool {
            id: POOLS.fetch_add(1, Ordering::Relaxed),
            words_per_page,
            words,
            owners: vec![0; capacity],
            generations: vec![0; capacity],
            free: Vec::new(),
            untouched: 0,
            shared: 0,
            peak: 0,
            copies: 0,
        })
    }

    /// What the pool holds and has done.
    pub fn usage(&self) -> PoolUsage {
        PoolUsage {
            page_bytes: self.words_per_page * size_of::<u128>(),
            capacity: self.owners.len(),
            used: self.used(),
            shared: self.shared,
            peak: self.peak,
            copies: self.copies,
        }
    }

    fn used(&self) -> usize {
        self.untouched as usize - self.free.len()
    }

    /// Takes a free page; the caller is its one owner. Its bytes are those of its last owner: write before reading.
    ///
    /// # Errors
    /// [`Error::OutOfPages`].
    pub fn allocate(&mut self) -> Result<PageRef, Error> {
        let index = match self.free.pop() {
            Some(index) => index,
            None if (self.untouched as usize) < self.owners.len() => {
                self.untouched += 1;
                self.untouched - 1
            }
            None => return Err(self.out_of_pages(1)),
        };
        self.owners[index as usize] = 1;
        self.peak = self.peak.max(self.used());
        Ok(PageRef { pool: self.id, index, generation: self.generations[index as usize] })
    }

    /// Takes `count` free pages, or none.
    ///
    /// # Errors
    /// [`Error::OutOfPages`]; the pool is then unchanged.
    pub fn allocate_many(&mut self, count: usize) -> Result<Vec<PageRef>, Error> {
        if count > self.usage().free() {
            return Err(self.out_of_pages(count));
        }
        (0..count).map(|_| self.allocate()).collect()
    }

    fn out_of_pages(&self, requested: usize) -> Error {
        let usage = self.usage();
        Error::OutOfPages { requested, free: usage.free(), capacity: usage.capacity }
    }

    /// Index of a live page.
    fn live(&self, page: PageRef) -> Result<usize, Error> {
        let index = page.index as usize;
        let live = page.pool == self.id
            && self.owners.get(index).is_some_and(|&owners| owners > 0)
            && self.generations[index] == page.generation;
        if live { Ok(index) } else { Err(Error::StalePage { page: page.index, generation: page.generation }) }
    }

    /// Owners of a page.
    ///
    /// # Errors
    /// [`Error::StalePage`].
    pub fn owners(&self, page: PageRef) -> Result<u32, Error> {
        Ok(self.owners[self.live(page)?])
    }

    /// Adds an owner.
    ///
    /// # Errors
    /// [`Error::StalePage`]; [`Error::Argument`] when the page has `u32::MAX` owners.
    pub fn share(&mut self, page: PageRef) -> Result<(), Error> {
        let index = self.live(page)?;
        let Some(owners) = self.owners[index].checked_add(1) else {
            return Err(Error::argument("page", format!("fewer than {} owners", u32::MAX), page.index));
        };
        self.owners[index] = owners;
        self.shared += usize::from(owners == 2);
        Ok(())
    }

    /// Removes an owner; returns whether that freed the page.
    ///
    /// # Errors
    /// [`Error::StalePage`].
    pub fn release(&mut self, page: PageRef) -> Result<bool, Error> {
        let index = self.live(page)?;
        self.owners[index] -= 1;
        self.shared -= usize::from(self.owners[index] == 1);
        if self.owners[index] > 0 {
            return Ok(false);
        }
        self.generations[index] = self.generations[index].wrapping_add(1);
        self.free.push(page.index);
        Ok(true)
    }

    /// A page that the caller may write and that holds the bytes of `page`: `page` itself when it has one owner, else a
    /// copy, for which the caller gives up its share of `page`.
    ///
    /// # Errors
    /// [`Error::StalePage`]; [`Error::OutOfPages`] when a copy is needed and no page is free. The pool is then unchanged.
    pub fn make_unique(&mut self, page: PageRef) -> Result<PageRef, Error> {
        let from = self.live(page)?;
        if self.owners[from] == 1 {
            return Ok(page);
        }
        let copy = self.allocate()?;
        let (from, to) = (from * self.words_per_page, copy.index as usize * self.words_per_page);
        self.words.copy_within(from..from + self.words_per_page, to);
        self.copies += 1;
        self.release(page)?;
        Ok(copy)
    }

    /// The bytes of a page `[page_bytes]`.
    ///
    /// # Errors
    /// [`Error::StalePage`].
    pub fn bytes(&self, page: PageRef) -> Result<&[u8], Error> {
        let start = self.live(page)? * self.words_per_page;
        Ok(bytemuck::cast_slice(&self.words[start..start + self.words_per_page]))
    }

    /// The bytes of a page `[page_bytes]`, for its one owner to write.
    ///
    /// # Errors
    /// [`Error::StalePage`]; [`Error::SharedPage`] when others own it too: see [`make_unique`](Self::make_unique).
    pub fn bytes_mut(&mut self, page: PageRef) -> Result<&mut [u8], Error> {
        let index = self.live(page)?;
        if self.owners[index] != 1 {
            return Err(Error::SharedPage { page: page.index, owners: self.owners[index] });
        }
        let start = index * self.words_per_page;
        Ok(bytemuck::cast_slice_mut(&mut self.words[start..start + self.words_per_page]))
    }

    /// All pages, free ones included, as elements `[capacity, page_bytes / size_of::<E>()]`: what a
    /// [`PageStore`](crate::PageStore) is made over.
    ///
    /// # Errors
    /// [`Error::Argument`] when a page is no whole number of elements, or the type needs more than [`PAGE_ALIGNMENT`].
    pub fn elements<E: Pod>(&self) -> Result<&[E], Error> {
        let page_bytes = self.words_per_page * size_of::<u128>();
        let whole = size_of::<E>() > 0 && page_bytes.is_multiple_of(size_of::<E>());
        let cast = if whole { bytemuck::try_cast_slice(&self.words).ok() } else { None };
        cast.ok_or_else(|| {
            Error::argument(
                "E",
                format!("elements that divide {page_bytes} bytes and align to {PAGE_ALIGNMENT}"),
                format!("{} bytes aligned to {}", size_of::<E>(), align_of::<E>()),
            )
        })
    }
}

/// Where a token of a [`PagedSequence`] lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// The page.
    pub page: PageRef,
    /// The token's place in the page, below the page size.
    pub index: usize,
}

/// The pages of one growing sequence, a fixed number of tokens to a page. Owned by a cache that releases it: dropping it
/// does not.
#[derive(Debug)]
pub struct PagedSequence {
    page_size: usize,
    pages: Vec<PageRef>,
    tokens: usize,
}

impl PagedSequence {
    /// An empty sequence of `page_size` tokens to a page.
    ///
    /// # Errors
    /// [`Error::Argument`] when `page_size` is 0.
    pub fn new(page_size: usize) -> Result<Self, Error> {
        if page_size == 0 {
            return Err(Error::argument("page_size", "at least 1", 0));
        }
        Ok(PagedSequence { page_size, pages: Vec::new(), tokens: 0 })
    }

    /// Tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Pages, in order; all but the last are full.
    pub fn pages(&self) -> &[PageRef] {
        &self.pages
    }

    /// Where a token lies; `None` past the end.
    pub fn slot(&self, token: usize) -> Option<Slot> {
        let index = token % self.page_size;
        (token < self.tokens).then(|| Slot { page: self.pages[token / self.page_size], index })
    }

    /// Makes room for one more token, in a page that this sequence alone owns: a new page when the last is full, a copy
    /// when the last is shared.
    ///
    /// # Errors
    /// [`Error::OutOfPages`]; [`Error::StalePage`] when the pool is not the sequence's. Nothing changes then.
    pub fn append(&mut self, pool: &mut PagePool) -> Result<Slot, Error> {
        let index = self.tokens % self.page_size;
        let page = match self.pages.last_mut() {
            Some(last) if index > 0 => {
                *last = pool.make_unique(*last)?;
                *last
            }
            last => {
                if let Some(last) = last {
                    pool.live(*last)?;
                }
                let page = pool.allocate()?;
                self.pages.push(page);
                page
            }
        };
        self.tokens += 1;
        Ok(Slot { page, index })
    }

    /// A second sequence over the same pages, each shared until one of the two writes to it.
    ///
    /// # Errors
    /// [`Error::StalePage`] when the pool is not the sequence's; nothing is shared then.
    pub fn fork(&self, pool: &mut PagePool) -> Result<PagedSequence, Error> {
        for (done, &page) in self.pages.iter().enumerate() {
            if let Err(error) = pool.share(page) {
                for &page in &self.pages[..done] {
                    pool.release(page)?;
                }
                return Err(error);
            }
        }
        Ok(PagedSequence { page_size: self.page_size, pages: self.pages.clone(), tokens: self.tokens })
    }

    /// Keeps the first `tokens` tokens and releases the pages past them; no effect when there are fewer.
    ///
    /// # Errors
    /// [`Error::StalePage`] when the pool is not the sequence's.
    pub fn truncate(&mut self, pool: &mut PagePool, tokens: usize) -> Result<(), Error> {
        if tokens >= self.tokens {
            return Ok(());
        }
        let keep = tokens.div_ceil(self.page_size);
        while self.pages.len() > keep {
            pool.release(self.pages[self.pages.len() - 1])?;
            self.pages.pop();
        }
        self.tokens = tokens;
        Ok(())
    }

    /// Releases every page.
    ///
    /// # Errors
    /// [`Error::StalePage`] when the pool is not the sequence's.
    pub fn release(mut self, pool: &mut PagePool) -> Result<(), Error> {
        self.truncate(pool, 0)
    }
}
