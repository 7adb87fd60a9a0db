//! The ragged low-rank paged KV cache.

pub mod layout;

pub use layout::PageLayout;
