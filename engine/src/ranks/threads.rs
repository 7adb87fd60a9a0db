//! Ranks as threads of this process, that share the model's weights.

use ndarray::Array1;
use seq_parallel::transport::local;

use super::{Choice, Ranks, Sharing, Single, prefill_shared};
use crate::kv::KvCache;
use crate::{Error, Model};

/// Threads that share a prompt.
pub struct Threads {
    sharing: Sharing,
    choice: Option<Choice>,
}

impl Threads {
    /// As many threads as the sharing has ranks; they live as long as a prompt.
    pub fn new(sharing: Sharing) -> Self {
        Threads { sharing, choice: None }
    }
}

impl Ranks for Threads {
    fn count(&self) -> usize {
        self.sharing.ranks()
    }

    /// A prompt that continues a cache is computed by one rank: only the cache's own method can read what it holds.
    fn prefill(&mut self, model: &Model, tokens: &[u32], kv: &mut dyn KvCache) -> Result<Array1<f32>, Error> {
        if !kv.is_empty() {
            return Single.prefill(model, tokens, kv);
        }
        super::remember(&mut self.choice, self.sharing.choose(model.config(), tokens.len())?);
        let (sharing, stored) = (&self.sharing, kv.stored());
        let mut results =
            local::run(self.count(), |mut end| prefill_shared(model, sharing, tokens, stored, &mut end))?;
        // All ranks have it all; the first hands it to the cache. What one rank refused, every rank did.
        let prompt = results.swap_remove(0)?;
        prompt.append_to(model, kv)
    }

    fn choice(&self) -> Option<&Choice> {
        self.choice.as_ref()
    }
}
