//! Rebuilding dense keys and values from a low-rank cache: `fdc_reconstruct`.

use std::marker::PhantomData;

use crate::Error;
use crate::kernels::attention::cache::elements;
use crate::launch::{Arg, Device, Function, LaunchConfig};
use crate::memory::{View, ViewMut};
use crate::params::{FDC_GROUP, FdcReconstructParams};
use crate::storage::Storage;
use crate::table::Instance;

use super::heads::{check_heads, check_page, k_channels, pages_len, v_channels};

const KERNEL: &str = "fdc_reconstruct";
const THREADS: u32 = 128;
/// Tokens of a block: 16 for each of four warps.
const TOKENS: u64 = 4 * FDC_GROUP as u64;

/// `fdc_reconstruct`: dense keys and values of every page. `E` is the storage type of all arguments.
#[derive(Debug, Clone)]
pub struct FdcReconstruct<F, E> {
    function: F,
    head_dim: usize,
    _element: PhantomData<E>,
}

/// Arguments of [`FdcReconstruct`].
#[derive(Debug)]
pub struct FdcReconstructArgs<'a, E> {
    /// Shape and layout.
    pub params: &'a FdcReconstructParams,
    /// The low-rank cache's pages, 16-byte aligned.
    pub pages: &'a View<'a, E>,
    /// Head after head `[r_k, head_dim]`, 16-byte aligned.
    pub back_k: &'a View<'a, E>,
    /// Head after head `[r_v, head_dim]`, 16-byte aligned.
    pub back_v: &'a View<'a, E>,
    /// Out: keys `[pages, kv_heads, page size, head_dim]`, 16-byte aligned.
    pub k: ViewMut<'a, E>,
    /// Out: values `[pages, kv_heads, page size, head_dim]`, 16-byte aligned.
    pub v: ViewMut<'a, E>,
}

impl<F: Function, E: Storage> FdcReconstruct<F, E> {
    /// Compiles and loads the kernel.
    pub fn prepare<D: Device<Function = F>>(device: &D, head_dim: usize) -> Result<Self, Error> {
        let constants = [("HEAD_DIM", head_dim as i64), ("KV_DTYPE", E::DTYPE)];
        let function = device.load(&Instance::new(KERNEL, &constants)?)?;
        Ok(Self { function, head_dim, _element: PhantomData })
    }

    /// Enqueues the rebuilding of all pages.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short, misaligned or in the wrong space.
    pub fn launch(&self, queue: &F::Queue, mut args: FdcReconstructArgs<'_, E>) -> Result<(), Error> {
        let params = args.params;
        let heads = &params.heads;
        check_heads(KERNEL, heads, self.head_dim)?;
        let page = check_page(KERNEL, heads, params.page_shift, params.page_stride, size_of::<E>())?;
        let (pages, count) = (params.num_pages as usize, heads.count as usize);
        args.pages.check(KERNEL, "pages", pages_len(pages, params.page_stride, page), 16)?;
        args.back_k.check(KERNEL, "back_k", k_channels(heads) * self.head_dim, 16)?;
        args.back_v.check(KERNEL, "back_v", v_channels(heads) * self.head_dim, 16)?;
        let dense = elements(&[pages, count, 1 << params.page_shift, self.head_dim]);
        args.k.check(KERNEL, "k", dense, 16)?;
        args.v.check(KERNEL, "v", dense, 16)?;
        let tiles = (u64::from(params.num_pages) << params.page_shift).div_ceil(TOKENS);
        let blocks = u32::try_from(tiles * 2 * count as u64).ok().filter(|blocks| *blocks <= i32::MAX as u32);
        let blocks = blocks.ok_or_else(|| {
            Error::argument(KERNEL, "num_pages", format_args!("at most {} blocks", i32::MAX), pages)
        })?;

        let shared = (TOKENS as usize + self.head_dim) * self.head_dim * size_of::<E>();
        let config = LaunchConfig::new(blocks, THREADS).shared(shared as u32);
        let kernel_args = [
            Arg::read("pages", args.pages),
            Arg::constant("back_k", Some(args.back_k)),
            Arg::constant("back_v", Some(args.back_v)),
            Arg::write("k", &mut args.k),
            Arg::write("v", &mut args.v),
            Arg::value("params", params),
        ];
        // SAFETY: the arguments are the kernel's parameters in order and type, and the checks above made every buffer as
        // long as the kernel's index range; it reads no index from device memory.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }
}
