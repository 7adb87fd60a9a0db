//! One rank computes the whole prompt: the reference of the ranks seam.

use ndarray::Array1;

use super::Ranks;
use crate::kv::KvCache;
use crate::{Error, Model};

/// This process alone.
pub struct Single;

impl Ranks for Single {
    fn count(&self) -> usize {
        1
    }

    fn prefill(&mut self, model: &Model, tokens: &[u32], kv: &mut dyn KvCache) -> Result<Array1<f32>, Error> {
        let start = kv.len();
        let hidden = model.forward(tokens, start, kv)?;
        match hidden.rows().into_iter().next_back() {
            Some(last) => Ok(last.to_owned()),
            None => Err(Error::argument("prompt", "at least 1 token", "none")),
        }
    }
}
