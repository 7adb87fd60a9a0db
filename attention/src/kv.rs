//! What the oracle asks of a KV cache.

use crate::{Error, Fault, HeadShape};

/// What a KV cache holds of one token, for one KV head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KeyValue<'a, T> {
    /// The key `[qk_dim]`.
    pub key: &'a [T],
    /// The value `[v_dim]`.
    pub value: &'a [T],
}

/// Keys and values of a batch of sequences, wherever they are stored.
pub trait KeyValues<T>: Sync {
    /// Sequences in the batch.
    fn sequences(&self) -> usize;

    /// Checks that heads and vector sizes are those of a shape.
    ///
    /// # Errors
    /// [`Error::Argument`] when they are not.
    fn check(&self, shape: &HeadShape) -> Result<(), Error>;

    /// Every token that one KV head keeps of a sequence, in order.
    ///
    /// # Errors
    /// A [`Fault`] when the row's lengths or page ids make no sense; a kernel would skip it.
    fn tokens(&self, sequence: usize, kv_head: usize) -> Result<Vec<KeyValue<'_, T>>, Fault>;
}
