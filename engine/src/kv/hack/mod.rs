//! Keys and values as 2, 4 or 8-bit codes, attended without dequantization (`homomorphic-quant`).
//!
//! Keys are quantized after RoPE. A prompt's tokens see each other in 16 bits and the past as codes; decoded tokens see
//! everything as the cache holds it.

mod layer;
mod options;
mod transfer;

use attention::rope::Rope;
use homomorphic_quant::reference::Prefill;
use ndarray::{Array2, ArrayView3};

use super::{Geometry, KvCache, KvMemory, Step};
use crate::Error;
pub use layer::QuantizedLayer;
pub(super) use options::OPTIONS;
pub use options::Options;

/// A quantized cache of one sequence, all layers.
pub struct Hack {
    rope: Rope,
    layers: Vec<QuantizedLayer>,
    prefill: Prefill,
}

impl Hack {
    /// An empty cache.
    ///
    /// # Errors
    /// A rotary embedding or head size out of range.
    pub fn new(geometry: &Geometry, options: &Options) -> Result<Self, Error> {
        let rope = Rope::new(geometry.rope.clone(), geometry.capacity)?;
        let layers = geometry.layers.iter().enumerate();
        let layers = layers
            .map(|(layer, spec)| QuantizedLayer::new(&options.config, layer, spec, geometry.capacity))
            .collect::<Result<_, _>>()?;
        Ok(Hack { rope, layers, prefill: options.prefill })
    }

    /// The layers.
    pub fn layers(&self) -> &[QuantizedLayer] {
        &self.layers
    }

    /// The layers, for a cache that was received from elsewhere.
    pub fn layers_mut(&mut self) -> &mut [QuantizedLayer] {
        &mut self.layers
    }

    fn rotated(&self, x: ArrayView3<'_, f32>, positions: &[u32]) -> Result<Vec<f32>, Error> {
        let mut rotated: Vec<f32> = x.iter().copied().collect();
        self.rope.apply(&mut rotated, x.dim().1, positions)?;
        Ok(rotated)
    }

    /// Checks layer and positions: masks count keys from the start of the sequence, so nothing may be left out.
    fn check(&self, step: &Step<'_>) -> Result<(), Error> {
        let Some(layer) = self.layers.get(step.layer) else {
            return Err(Error::argument("layer", format!("below {}", self.layers.len()), step.layer));
        };
        let held = layer.tokens();
        if !step.positions.iter().copied().eq((held as u32..).take(step.positions.len())) {
            let found = format!("{:?}", step.positions);
            return Err(Error::argument("positions", format!("consecutive from {held}"), found));
        }
        Ok(())
    }
}

impl KvCache for Hack {
    fn forward(&mut self, step: &Step<'_>) -> Result<Array2<f32>, Error> {
        self.check(step)?;
        let (q, k) = (self.rotated(step.q, step.positions)?, self.rotated(step.k, step.positions)?);
        let v: Vec<f32> = step.v.iter().copied().collect();
        // A decoded token sees itself as the cache holds it: the token that fills a block closes it first.
        let prefill = if step.positions.len() == 1 { Prefill::Codes } else { self.prefill };
        let layer = &mut self.layers[step.layer];
        let out = layer.forward(&q, &k, &v, prefill)?;
        let width = out.len() / step.positions.len().max(1);
        let out = Array2::from_shape_vec((step.positions.len(), width), out).expect("whole rows");
        step.w_o.forward(out.view())
    }

    fn append(&mut self, step: &Step<'_>) -> Result<(), Error> {
        self.check(step)?;
        let k = self.rotated(step.k, step.positions)?;
        let v: Vec<f32> = step.v.iter().copied().collect();
        self.layers[step.layer].append(&k, &v)
    }

    fn len(&self) -> usize {
        // The last layer is the last to see a token.
        self.layers.last().map_or(0, QuantizedLayer::tokens)
    }

    fn memory(&self) -> KvMemory {
        KvMemory { device: self.layers.iter().map(QuantizedLayer::bytes).sum(), host: 0 }
    }

    fn clear(&mut self) {
        self.layers.iter_mut().for_each(QuantizedLayer::clear);
    }

    fn scramble(&mut self, rng: &mut fastrand::Rng) {
        self.layers.iter_mut().for_each(|layer| layer.scramble(rng));
    }
}
