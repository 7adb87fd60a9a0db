//! Host memory: every closed page of every request, reference-counted.
//!
//! A head's part of a page never changes once it is closed, so requests with a common prefix share its pages, and what a
//! fork adds goes into pages of its own. A page is copied only where a head that lags behind the others, because its
//! clusters took fewer pages, fills its part of a page that is shared by then. On a machine with a GPU the pool's memory is pinned and mapped, and kernels read
//! it over the link.

use std::marker::PhantomData;

use attention::Element;
use attention::page_pool::{PagePool, PageRef, PoolUsage};

use crate::Error;
use crate::page::PageSpec;

/// Pages `[kv_head][K|V][tokens][dim]` of one layer each.
#[derive(Debug)]
pub struct HostPool<E> {
    spec: PageSpec,
    kv_heads: usize,
    pool: PagePool,
    element: PhantomData<E>,
}

impl<E: Element> HostPool<E> {
    /// `capacity` pages of `kv_heads` runs each. Memory of pages that were never used is not touched.
    ///
    /// # Errors
    /// [`Error::Argument`] when the pages hold another type than `E`, [`Error::Attention`] when they do not fit memory.
    pub fn new(spec: PageSpec, kv_heads: usize, capacity: usize) -> Result<Self, Error> {
        check_type::<E>(&spec)?;
        Ok(HostPool {
            spec,
            kv_heads,
            pool: PagePool::new(capacity, kv_heads * spec.bytes())?,
            element: PhantomData,
        })
    }

    /// What the pool holds.
    pub fn usage(&self) -> PoolUsage {
        self.pool.usage()
    }

    /// Takes `count` pages, or none.
    ///
    /// # Errors
    /// [`Error::Attention`] with [`OutOfPages`](attention::Error::OutOfPages).
    pub fn allocate(&mut self, count: usize) -> Result<Vec<PageRef>, Error> {
        Ok(self.pool.allocate_many(count)?)
    }

    /// Another owner for pages, or for none of them.
    ///
    /// # Errors
    /// [`Error::Attention`] when a page is not the pool's.
    pub fn share(&mut self, pages: &[PageRef]) -> Result<(), Error> {
        for (i, &page) in pages.iter().enumerate() {
            if let Err(error) = self.pool.share(page) {
                self.release(&pages[..i])?;
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// A page with the same bytes and one owner: the page itself, or a copy.
    ///
    /// # Errors
    /// [`Error::Attention`] when the page is not the pool's, or no page is free for a copy.
    pub fn make_unique(&mut self, page: PageRef) -> Result<PageRef, Error> {
        Ok(self.pool.make_unique(page)?)
    }

    /// One owner less for pages.
    ///
    /// # Errors
    /// [`Error::Attention`] when a page is not the pool's.
    pub fn release(&mut self, pages: &[PageRef]) -> Result<(), Error> {
        for &page in pages {
            self.pool.release(page)?;
        }
        Ok(())
    }

    /// One head's run `[K|V][tokens][dim]` of a page.
    ///
    /// # Errors
    /// [`Error::Attention`] when the page is not the pool's.
    pub fn run(&self, page: PageRef, kv_head: usize) -> Result<&[E], Error> {
        let run = self.spec.elements();
        Ok(&bytemuck::cast_slice(self.pool.bytes(page)?)[kv_head * run..][..run])
    }

    /// One head's run of a page that has one owner, to write.
    ///
    /// # Errors
    /// [`Error::Attention`] when the page is not the pool's, or has other owners.
    pub fn run_mut(&mut self, page: PageRef, kv_head: usize) -> Result<&mut [E], Error> {
        debug_assert!(kv_head < self.kv_heads, "head {kv_head} of {}", self.kv_heads);
        let run = self.spec.elements();
        Ok(&mut bytemuck::cast_slice_mut(self.pool.bytes_mut(page)?)[kv_head * run..][..run])
    }
}

/// Checks that pages hold elements of this type.
pub(crate) fn check_type<E: Element>(spec: &PageSpec) -> Result<(), Error> {
    if spec.dtype() == E::DTYPE {
        return Ok(());
    }
    Err(Error::argument("dtype", format!("{}, as the pages", spec.dtype()), E::DTYPE))
}
