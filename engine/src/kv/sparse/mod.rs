//! A budget of the context instead of all of it, over a cache in two memories (`sparse-attn`).
//!
//! Prompts are attended densely. A decoded token reads the pages or clusters that its query scores highest, sinks and what is
//! recent; everything closed is in host memory, and the device keeps summaries and the pages that are used again and
//! again. A context that fits the budget stays on the device and is attended as `dense` does.

mod options;

use attention::Element;
use attention::rope::Rope;
use ndarray::{Array2, ArrayView3};
use sparse_attn::{Cache, Capacity, Plan, Queries, RequestId, Tokens};

use super::{Geometry, KvCache, KvMemory, KvTraffic, Step};
use crate::Error;
use crate::mode::Mode;
pub use options::Options;
pub(super) use options::{QUEST, RETRO, SHADOW_KV};

/// A sparse cache of one sequence, all layers.
pub struct Sparse<E> {
    rope: Rope,
    cache: Cache<E>,
    request: RequestId,
}

impl<E: Element> Sparse<E> {
    /// An empty cache.
    ///
    /// # Errors
    /// [`Error::Mode`] for a budget below what must always be read, [`Error::SparseAttn`] when the pools do not fit memory, a
    /// rotary embedding out of range.
    pub fn new(mode: &Mode, options: &Options, geometry: &Geometry) -> Result<Self, Error> {
        let plan = options.plan(mode, &geometry.layers, geometry.capacity)?;
        let capacity = Capacity::of_requests(&plan, 1, geometry.capacity);
        let mut cache = Cache::new(plan, capacity)?;
        let request = cache.try_admit()?;
        Ok(Sparse { rope: Rope::new(geometry.rope.clone(), geometry.capacity)?, cache, request })
    }

    /// The cache, and the one request in it.
    pub fn parts(&self) -> (&Cache<E>, RequestId) {
        (&self.cache, self.request)
    }

    fn plan(&self) -> &Plan {
        self.cache.plan()
    }

    fn rotated(&self, x: ArrayView3<'_, f32>, positions: &[u32]) -> Result<Vec<f32>, Error> {
        let mut rotated: Vec<f32> = x.iter().copied().collect();
        self.rope.apply(&mut rotated, x.dim().1, positions)?;
        Ok(rotated)
    }

    /// Checks layer and positions: masks count keys from the start of the sequence, so nothing may be left out.
    fn check(&self, step: &Step<'_>) -> Result<(), Error> {
        let held = self.cache.tokens(self.request, step.layer)?;
        if !step.positions.iter().copied().eq((held as u32..).take(step.positions.len())) {
            let found = format!("{:?}", step.positions);
            return Err(Error::argument("positions", format!("consecutive from {held}"), found));
        }
        Ok(())
    }
}

impl<E: Element> KvCache for Sparse<E> {
    fn forward(&mut self, step: &Step<'_>) -> Result<Array2<f32>, Error> {
        self.check(step)?;
        let shape = self.plan().layers()[step.layer].shape;
        let new = step.positions.len();
        let (q, k) = (self.rotated(step.q, step.positions)?, self.rotated(step.k, step.positions)?);
        let v: Vec<f32> = step.v.iter().copied().collect();
        let (queries, tokens) =
            (Queries { q: &q, q_unrotated: None }, Tokens { k: &k, k_unrotated: None, v: &v });
        let mut out = Array2::zeros((new, shape.q_heads() * shape.v_dim()));
        let mut lse = vec![0.0; new * shape.q_heads()];
        let to = out.as_slice_mut().expect("a new array");
        match new {
            1 => self.cache.decode(self.request, step.layer, &queries, &tokens, to, &mut lse)?,
            _ => self.cache.prefill(self.request, step.layer, &queries, &tokens, to, &mut lse)?,
        }
        step.w_o.forward(out.view())
    }

    fn append(&mut self, step: &Step<'_>) -> Result<(), Error> {
        self.check(step)?;
        let k = self.rotated(step.k, step.positions)?;
        let v: Vec<f32> = step.v.iter().copied().collect();
        let tokens = Tokens { k: &k, k_unrotated: None, v: &v };
        Ok(self.cache.append(self.request, step.layer, &tokens)?)
    }

    fn len(&self) -> usize {
        // The last layer is the last to see a token.
        let last = self.plan().layers().len() - 1;
        self.cache.tokens(self.request, last).expect("the request is this cache's")
    }

    fn memory(&self) -> KvMemory {
        let memory = self.cache.memory();
        KvMemory { device: memory.device(), host: memory.host }
    }

    fn traffic(&self) -> Option<KvTraffic> {
        let counters = self.cache.counters();
        Some(KvTraffic {
            device_share: self.cache.device_share(),
            hit_rate: counters.hit_rate(),
            budget: self.plan().effective_budget().tokens,
            bytes_in: counters.bytes_in,
        })
    }

    fn clear(&mut self) {
        self.cache.free(self.request).expect("the request is this cache's");
        self.request = self.cache.try_admit().expect("room for the one request");
    }

    fn scramble(&mut self, rng: &mut fastrand::Rng) {
        let shape = self.plan().layers()[0].shape;
        let mut layers = Vec::new();
        for layer in 0..self.plan().layers().len() {
            // Each head's vectors in its own order of storage: noise has none.
            let mut noise = [Vec::new(), Vec::new()];
            for kv_head in 0..shape.kv_heads() {
                let (k, v) =
                    self.cache.read(self.request, layer, kv_head).expect("the request is this cache's");
                for (noise, values) in noise.iter_mut().zip([k, v]) {
                    let mean_square =
                        values.iter().map(|x| x.to_f32().powi(2)).sum::<f32>() / values.len().max(1) as f32;
                    // Uniform in ±a has a mean square of a² / 3.
                    let amplitude = (3.0 * mean_square).sqrt();
                    noise.extend(values.iter().map(|_| amplitude * (2.0 * rng.f32() - 1.0)));
                }
            }
            layers.push(noise);
        }
        self.clear();
        for (layer, [k, v]) in layers.iter().enumerate() {
            let tokens = Tokens { k, k_unrotated: None, v };
            self.cache.append(self.request, layer, &tokens).expect("as many tokens as before");
        }
    }
}
