//! One sequence in progress: a model, the ranks that prefill and the KV cache that decodes.

use ndarray::{Array1, Axis};

use crate::kv::{KvCache, KvMemory, KvTraffic};
use crate::mode::Mode;
use crate::ranks::{Choice, Holdings, Ranks};
use crate::{Error, Model};

/// A sequence that grows: a prompt at once, then token by token.
pub struct Session<'m> {
    model: &'m Model,
    ranks: Box<dyn Ranks>,
    kv: Box<dyn KvCache>,
}

impl<'m> Session<'m> {
    /// An empty sequence of up to `capacity` tokens.
    ///
    /// # Errors
    /// An unknown KV mode, one that its method refuses, or a capacity over the model's maximum.
    pub fn new(model: &'m Model, kv: &Mode, ranks: Box<dyn Ranks>, capacity: usize) -> Result<Self, Error> {
        let kv = ranks.cache(kv, model, capacity)?;
        Ok(Session { model, ranks, kv })
    }

    /// The model.
    pub fn model(&self) -> &'m Model {
        self.model
    }

    /// Runs a prompt, or its continuation, at once. Gives the logits after its last token, `[vocab_size]`.
    ///
    /// # Errors
    /// An empty prompt, tokens out of range, a sequence that grows too long, or logits that are not finite.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<Array1<f32>, Error> {
        let hidden = self.ranks.prefill(self.model, tokens, &mut *self.kv)?;
        self.logits(hidden)
    }

    /// Runs one token through the KV mode's decode path. Gives the logits after it, `[vocab_size]`.
    ///
    /// # Errors
    /// A token out of range, a sequence that grows too long, or logits that are not finite.
    pub fn decode(&mut self, token: u32) -> Result<Array1<f32>, Error> {
        let hidden = self.ranks.decode(self.model, token, &mut *self.kv)?;
        self.logits(hidden)
    }

    /// Tokens so far.
    pub fn len(&self) -> usize {
        self.kv.len()
    }

    /// Whether there are none yet.
    pub fn is_empty(&self) -> bool {
        self.kv.is_empty()
    }

    /// Bytes that the KV cache holds.
    pub fn memory(&self) -> KvMemory {
        self.kv.memory()
    }

    /// What the KV cache moves between the memories; `None` if it is wholly on the device.
    pub fn traffic(&self) -> Option<KvTraffic> {
        self.kv.traffic()
    }

    /// How the longest prompt so far was shared, where the ranks had to choose.
    pub fn choice(&self) -> Option<&Choice> {
        self.ranks.choice()
    }

    /// What each of several ranks holds; `None` where there is one.
    pub fn holdings(&self) -> Option<Holdings> {
        self.ranks.holdings(&*self.kv)
    }

    /// The KV cache, for whoever wants to damage it.
    pub fn kv_mut(&mut self) -> &mut dyn KvCache {
        &mut *self.kv
    }

    /// Starts over.
    pub fn clear(&mut self) {
        self.kv.clear();
    }

    fn logits(&self, hidden: Array1<f32>) -> Result<Array1<f32>, Error> {
        let logits = self.model.logits(hidden.view().insert_axis(Axis(0)))?;
        Model::check_logits(logits.view(), self.len().saturating_sub(1))?;
        Ok(logits.index_axis_move(Axis(0), 0))
    }
}
