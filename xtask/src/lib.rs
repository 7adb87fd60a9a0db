//! What a GPU bundle carries and what comes back from the machine it ran on.
//!
//! The commands and the runner, which travels with the bundle, share these types.

#[cfg(feature = "gpu")]
pub mod results;
