//! Hybrid GEMM for many tokens: `hybrid_large_m`.

use std::marker::PhantomData;

use super::args::{HybridGemmArgs, WeightFormat, launch};
use crate::Error;
use crate::launch::{Device, Function, LaunchConfig};
use crate::params::{HYBRID_LARGE_PANEL, HYBRID_SLAB_BYTES};
use crate::storage::Storage;
use crate::table::Instance;

const KERNEL: &str = "hybrid_large_m";
const THREADS: u32 = 256;
const X_STAGES: usize = 2;
const X_CHUNK_BYTES: usize = HYBRID_LARGE_PANEL as usize * 128;
/// Slabs of weights that a block holds: a tile has as many at most.
const SLAB_SLOTS: usize = 4;
/// The receipt of the block, and its place among the products.
const TAIL_BYTES: usize = 216;

/// Whether [`HybridLargeM`] has a kernel for weights in tiles of so many slabs.
pub const fn large_m_supports(format: WeightFormat, tile_slabs: usize) -> bool {
    let small_groups =
        matches!(format, WeightFormat::Int4 { group: 0..64 } | WeightFormat::Int4ZeroPoints { group: 0..64 });
    !small_groups && tile_slabs <= SLAB_SLOTS
}

/// `hybrid_large_m`: products with many tokens. `X` is the storage type of activations and of unquantised weights.
#[derive(Debug, Clone)]
pub struct HybridLargeM<F, X> {
    function: F,
    format: WeightFormat,
    _element: PhantomData<X>,
}

impl<F: Function, X: Storage> HybridLargeM<F, X> {
    /// Compiles and loads the kernel.
    ///
    /// # Errors
    /// [`Error::Constant`] for an f32 `X` or a format that the kernel has not.
    pub fn prepare<D: Device<Function = F>>(device: &D, format: WeightFormat) -> Result<Self, Error> {
        let constants = [("FORMAT", format.constant()), ("X_DTYPE", X::DTYPE)];
        let function = device.load(&Instance::new(KERNEL, &constants)?)?;
        Ok(Self { function, format, _element: PhantomData })
    }

    /// Enqueues one product.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short, misaligned or does not fit the kernel.
    pub fn launch<O: Storage>(&self, queue: &F::Queue, args: HybridGemmArgs<'_, X, O>) -> Result<(), Error> {
        let params = args.params;
        if params.tile_slabs as usize > SLAB_SLOTS {
            let expected = format_args!("at most {SLAB_SLOTS}");
            return Err(Error::argument(KERNEL, "tile_slabs", expected, params.tile_slabs));
        }
        if params.k_splits != 1 {
            return Err(Error::argument(KERNEL, "k_splits", 1, params.k_splits));
        }
        let slabs = SLAB_SLOTS * (HYBRID_SLAB_BYTES as usize + self.format.scale_room());
        let shared = X_STAGES * X_CHUNK_BYTES + slabs + TAIL_BYTES;
        let config = LaunchConfig::new(args.blocks, THREADS).shared(shared as u32);
        launch(&self.function, queue, (KERNEL, self.format, HYBRID_LARGE_PANEL as usize), config, args)
    }
}
