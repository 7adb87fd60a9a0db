//! Rebuilding dense keys and values from the low-rank cache, as methods do whose attention runs in the full dimension (Palu
//! rebuilds its keys for every token at every step). Decode never needs it: it is a baseline, and a way out of the cache.

use attention::{DType, HeadShape};
use cuda::kernels::kv_compress as kernels;
use cuda::launch::{Device, Function};
use cuda::memory::{View, ViewMut};
use cuda::params::FdcReconstructParams;
use cuda::storage::Storage;

use super::{head_dim, heads, page_shift, to_u32};
use crate::Error;
use crate::cache::PageLayout;

/// Grid and parameters of a rebuilding. It needs no workspace.
#[derive(Debug, Clone)]
pub struct ReconstructPlan {
    head_dim: usize,
    params: FdcReconstructParams,
}

impl ReconstructPlan {
    /// Plans the rebuilding of every page of a pool. Needs no device.
    ///
    /// # Errors
    /// [`Error::Argument`] for a shape or pool that the kernel does not support.
    pub fn new(shape: HeadShape, layout: &PageLayout, pages: usize) -> Result<Self, Error> {
        let params = FdcReconstructParams {
            page_stride: layout.page_elements() as i64,
            num_pages: to_u32("pages", pages)?,
            page_shift: page_shift(layout),
            heads: heads(shape, layout.ranks())?,
        };
        Ok(Self { head_dim: head_dim("fdc_reconstruct", shape)?, params })
    }

    /// Elements of the keys, and of the values, that a run writes: `[pages, kv_heads, page_size, head_dim]`.
    pub fn dense_elements(&self) -> usize {
        let tokens = (self.params.num_pages as usize) << self.params.page_shift;
        tokens * self.params.heads.count as usize * self.head_dim
    }

    /// Bytes that a run reads from the cache and writes.
    pub fn bytes_moved(&self, dtype: DType) -> u64 {
        let read = self.params.num_pages as usize * self.params.page_stride as usize;
        ((read + 2 * self.dense_elements()) * dtype.size()) as u64
    }
}

/// A prepared rebuilding. `E` is the storage type of cache, projections and dense vectors.
#[derive(Debug, Clone)]
pub struct Reconstruct<F, E> {
    plan: ReconstructPlan,
    kernel: kernels::FdcReconstruct<F, E>,
}

/// Arguments of [`Reconstruct::run`].
#[derive(Debug)]
pub struct ReconstructArgs<'a, E> {
    /// The cache's pages `[pages, page_elements]`.
    pub pages: &'a View<'a, E>,
    /// From reduced keys to keys: per KV head `[r_k, head_dim]`, head after head.
    pub back_k: &'a View<'a, E>,
    /// From reduced values to values: per KV head `[r_v, head_dim]`, head after head.
    pub back_v: &'a View<'a, E>,
    /// Out: keys `[pages, kv_heads, page_size, head_dim]`, the dense kernels' pages under the same ids.
    pub k: ViewMut<'a, E>,
    /// Out: values `[pages, kv_heads, page_size, head_dim]`.
    pub v: ViewMut<'a, E>,
}

impl<F: Function, E: Storage> Reconstruct<F, E> {
    /// Compiles and loads. May block.
    ///
    /// # Errors
    /// [`Error::Cuda`] when the kernel cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &ReconstructPlan) -> Result<Self, Error> {
        let kernel = kernels::FdcReconstruct::prepare(device, plan.head_dim)?;
        Ok(Self { plan: plan.clone(), kernel })
    }

    /// Enqueues the rebuilding and returns.
    ///
    /// # Errors
    /// [`Error::Cuda`] names an argument that does not fit.
    pub fn run(&self, queue: &F::Queue, args: ReconstructArgs<'_, E>) -> Result<(), Error> {
        let args = kernels::FdcReconstructArgs {
            params: &self.plan.params,
            pages: args.pages,
            back_k: args.back_k,
            back_v: args.back_v,
            k: args.k,
            v: args.v,
        };
        Ok(self.kernel.launch(queue, args)?)
    }
}
