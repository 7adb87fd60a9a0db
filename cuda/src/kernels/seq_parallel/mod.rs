//! Kernels of `cuda/kernels/seq-parallel`.

mod pack;

pub use pack::{Pack, PackArgs};
