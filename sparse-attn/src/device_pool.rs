//! Device memory: the slots of every request, layer and KV head, drawn from one pool.
//!
//! A slot holds one head's run of a page, `[K|V][tokens][dim]`. Which request may hold how many is for
//! [`budget`](crate::budget) to say; a slot takes its page of the pool when it is first filled.

use std::marker::PhantomData;

use attention::Element;
use attention::page_pool::{PagePool, PageRef, PoolUsage};

use crate::Error;
use crate::host_pool::check_type;
use crate::page::PageSpec;

/// Runs `[K|V][tokens][dim]` on the device (here: in memory).
#[derive(Debug)]
pub struct DevicePool<E> {
    pool: PagePool,
    element: PhantomData<E>,
}

impl<E: Element> DevicePool<E> {
    /// `capacity` runs.
    ///
    /// # Errors
    /// [`Error::Argument`] when the pages hold another type than `E`, [`Error::Attention`] when they do not fit memory.
    pub fn new(spec: PageSpec, capacity: usize) -> Result<Self, Error> {
        check_type::<E>(&spec)?;
        Ok(DevicePool { pool: PagePool::new(capacity, spec.bytes())?, element: PhantomData })
    }

    /// What the pool holds.
    pub fn usage(&self) -> PoolUsage {
        self.pool.usage()
    }

    /// Takes a run.
    ///
    /// # Errors
    /// [`Error::Attention`] when all are taken.
    pub fn allocate(&mut self) -> Result<PageRef, Error> {
        Ok(self.pool.allocate()?)
    }

    /// Gives a run back.
    ///
    /// # Errors
    /// [`Error::Attention`] when it is not the pool's.
    pub fn release(&mut self, page: PageRef) -> Result<(), Error> {
        self.pool.release(page)?;
        Ok(())
    }

    /// The elements of a run.
    ///
    /// # Errors
    /// [`Error::Attention`] when it is not the pool's.
    pub fn run(&self, page: PageRef) -> Result<&[E], Error> {
        Ok(bytemuck::cast_slice(self.pool.bytes(page)?))
    }

    /// The elements of a run, to write.
    ///
    /// # Errors
    /// [`Error::Attention`] when it is not the pool's.
    pub fn run_mut(&mut self, page: PageRef) -> Result<&mut [E], Error> {
        Ok(bytemuck::cast_slice_mut(self.pool.bytes_mut(page)?))
    }
}
