//! The ranks seam: who computes a prompt.
//!
//! A method implements [`Ranks`] and gets a line in [`METHODS`] and in [`open`]. Ranks may be this one process, threads
//! that share a prompt, or processes on other machines; afterwards the whole prompt's keys and values are in the KV cache
//! of the rank that decodes ([`KvCache::append`] takes what other ranks computed).

mod single;

use ndarray::Array1;

use crate::kv::KvCache;
use crate::mode::{Method, Mode};
use crate::{Error, Model};
pub use single::Single;

/// The methods of this seam.
pub const METHODS: &[Method] = &[Method {
    name: "single",
    summary: "one rank computes the whole prompt",
    file: false,
    options: &[],
    with: &[],
}];

/// Those who compute a prompt together.
pub trait Ranks: Send {
    /// How many they are.
    fn count(&self) -> usize;

    /// Runs a prompt, which continues whatever `kv` already holds, and leaves its keys and values there. Gives the last
    /// token's hidden state after the final norm, `[hidden]`.
    ///
    /// # Errors
    /// An empty prompt, tokens out of range, or a sequence over the model's maximum.
    fn prefill(&mut self, model: &Model, tokens: &[u32], kv: &mut dyn KvCache) -> Result<Array1<f32>, Error>;
}

/// Makes the ranks of a mode.
///
/// # Errors
/// An unknown mode, or one that the method refuses.
pub fn open(mode: &Mode) -> Result<Box<dyn Ranks>, Error> {
    match mode.accept("ranks", METHODS)?.name {
        "single" => Ok(Box::new(Single)),
        name => unreachable!("method {name} is listed but not built"),
    }
}
