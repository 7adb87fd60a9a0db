//! Ranks as threads of this process, that share the model's weights.

use ndarray::Array1;
use seq_parallel::transport::local;

use super::prefill::of_all;
use super::sharded::extend_on_threads;
use super::{Choice, Holdings, Ranks, Sharing, Single, prefill_shared};
use crate::kv::{self, KvCache, ShardedKv};
use crate::mode::Mode;
use crate::{Error, Model};

/// Threads that share a prompt.
pub struct Threads {
    sharing: Sharing,
    choice: Option<Choice>,
}

impl Threads {
    /// As many threads as the sharing has ranks; they live as long as a prompt, or a token.
    pub fn new(sharing: Sharing) -> Self {
        Threads { sharing, choice: None }
    }
}

impl Ranks for Threads {
    fn count(&self) -> usize {
        self.sharing.ranks()
    }

    fn cache(&self, mode: &Mode, model: &Model, capacity: usize) -> Result<Box<dyn KvCache>, Error> {
        self.sharing.check(model.config())?;
        let ranks = self.count();
        match self.sharing.is_sharded() {
            true => Ok(Box::new(ShardedKv::new(mode, model, capacity, ranks, 0..ranks)?)),
            false => kv::open(mode, model, capacity),
        }
    }

    /// A prompt that continues a cache which is not sharded is computed by one rank: only the cache's own method can read what it holds.
    fn prefill(&mut self, model: &Model, tokens: &[u32], kv: &mut dyn KvCache) -> Result<Array1<f32>, Error> {
        if kv.is_empty() {
            let choice = self.sharing.choose(model.config(), tokens.len(), kv.stored())?;
            super::remember(&mut self.choice, choice);
        }
        if let Some(kv) = kv.sharded_mut() {
            return extend_on_threads(model, &self.sharing, tokens, kv);
        }
        if !kv.is_empty() {
            return Single.prefill(model, tokens, kv);
        }
        let (sharing, stored) = (&self.sharing, kv.stored());
        let results =
            local::run(self.count(), |mut end| prefill_shared(model, sharing, tokens, stored, &mut end))?;
        // All ranks have it all; the first hands it to the cache.
        let prompt = of_all(results)?.swap_remove(0);
        prompt.append_to(model, kv)
    }

    fn decode(&mut self, model: &Model, token: u32, kv: &mut dyn KvCache) -> Result<Array1<f32>, Error> {
        match kv.sharded_mut() {
            Some(kv) => extend_on_threads(model, &self.sharing, &[token], kv),
            None => Single.decode(model, token, kv),
        }
    }

    fn choice(&self) -> Option<&Choice> {
        self.choice.as_ref()
    }

    fn holdings(&self, kv: &dyn KvCache) -> Option<Holdings> {
        match kv.sharded() {
            Some(kv) => Some(Holdings::sharded(kv)),
            // The first rank hands what was gathered to the cache.
            None => (self.count() > 1).then(|| Holdings::gathered(kv, self.count(), [0])),
        }
    }
}
