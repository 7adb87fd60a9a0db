//! Hybrid GEMM for few tokens: `hybrid_small_m`.

use std::marker::PhantomData;

use super::args::{HybridGemmArgs, WeightFormat, launch};
use crate::Error;
use crate::launch::{Device, Function, LaunchConfig};
use crate::params::{HYBRID_SLAB_BYTES, HYBRID_SMALL_PANEL};
use crate::storage::Storage;
use crate::table::Instance;

const KERNEL: &str = "hybrid_small_m";
const THREADS: u32 = 128;
const RING_BYTES: usize = 96 * 1024;
const MOST_STAGES: usize = 10;
/// The receipt of the block, its place among the products, and a flag, aligned to 8.
const TAIL_BYTES: usize = 224;

/// Tokens that the kernel for `max_tokens` is compiled for: with more than 64, panels of 64.
pub const fn small_tokens(max_tokens: usize) -> usize {
    match max_tokens {
        0..=8 => 8,
        9..=16 => 16,
        17..=32 => 32,
        _ => 64,
    }
}

/// `hybrid_small_m`: products with few tokens. `X` is the storage type of activations and of unquantised weights.
#[derive(Debug, Clone)]
pub struct HybridSmallM<F, X> {
    function: F,
    format: WeightFormat,
    tokens: usize,
    _element: PhantomData<X>,
}

impl<F: Function, X: Storage> HybridSmallM<F, X> {
    /// Compiles and loads the kernel for calls of up to `max_tokens` tokens.
    ///
    /// # Errors
    /// [`Error::Constant`] for an f32 `X` or groups that no kernel knows.
    pub fn prepare<D: Device<Function = F>>(
        device: &D,
        format: WeightFormat,
        max_tokens: usize,
    ) -> Result<Self, Error> {
        let tokens = small_tokens(max_tokens);
        let constants = [("TOKENS", tokens as i64), ("FORMAT", format.constant()), ("X_DTYPE", X::DTYPE)];
        let function = device.load(&Instance::new(KERNEL, &constants)?)?;
        Ok(Self { function, format, tokens, _element: PhantomData })
    }

    /// Enqueues one product.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short, misaligned or does not fit the kernel.
    pub fn launch<O: Storage>(&self, queue: &F::Queue, args: HybridGemmArgs<'_, X, O>) -> Result<(), Error> {
        let panel = HYBRID_SMALL_PANEL as usize;
        if self.tokens < panel && args.params.max_tokens as usize > self.tokens {
            let expected = format_args!("at most {}, the kernel's", self.tokens);
            return Err(Error::argument(KERNEL, "max_tokens", expected, args.params.max_tokens));
        }
        let inputs = self.format.slab_inputs();
        let stage =
            HYBRID_SLAB_BYTES as usize + self.format.scale_room() + self.tokens * inputs * size_of::<X>();
        let shared = (RING_BYTES / stage).min(MOST_STAGES) * stage + TAIL_BYTES;
        let grid = (args.blocks, args.params.k_splits);
        let config = LaunchConfig::new(grid, THREADS).shared(shared as u32);
        launch(&self.function, queue, (KERNEL, self.format, panel), config, args)
    }
}
