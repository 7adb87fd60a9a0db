//! Every key and value, as they are: the reference of the KV seam.

use attention::rope::Rope;
use attention::{DType, Element, HeadsView, cpu};
use ndarray::{Array2, ArrayView3};

use super::{Geometry, KvCache, KvMemory, Step};
use crate::Error;

/// Keys after RoPE and values, stored as `T`, in memory.
pub struct Dense<T> {
    geometry: Geometry,
    rope: Rope,
    layers: Vec<Layer<T>>,
}

/// One layer's keys and values, each `[tokens, kv_heads, head_dim]`.
struct Layer<T> {
    k: Vec<T>,
    v: Vec<T>,
}

impl<T: Element> Dense<T> {
    /// An empty cache.
    ///
    /// # Errors
    /// A rotary embedding out of range.
    pub fn new(geometry: Geometry) -> Result<Self, Error> {
        let rope = Rope::new(geometry.rope.clone(), geometry.capacity)?;
        // Memory is taken as tokens come: a capacity may be far more than a sequence ever fills.
        let layers = geometry.layers.iter().map(|_| Layer { k: Vec::new(), v: Vec::new() }).collect();
        Ok(Dense { geometry, rope, layers })
    }

    fn tokens(&self, layer: usize) -> usize {
        let shape = self.geometry.layers[layer].shape;
        self.layers[layer].v.len() / (shape.kv_heads() * shape.v_dim())
    }

    fn rotated(&self, x: ArrayView3<'_, f32>, positions: &[u32]) -> Result<Vec<f32>, Error> {
        let mut rotated: Vec<f32> = x.iter().copied().collect();
        self.rope.apply(&mut rotated, x.dim().1, positions)?;
        Ok(rotated)
    }
}

impl<T: Element> KvCache for Dense<T> {
    fn forward(&mut self, step: &Step<'_>) -> Result<Array2<f32>, Error> {
        self.append(step)?;
        let spec = &self.geometry.layers[step.layer];
        let (shape, new, held) = (spec.shape, step.positions.len(), self.tokens(step.layer));
        let q = self.rotated(step.q, step.positions)?;
        let Layer { k, v } = &self.layers[step.layer];
        let mut out = Array2::zeros((new, shape.q_heads() * shape.v_dim()));
        let mut lse = vec![0.0; new * shape.q_heads()];
        cpu::attend(
            spec,
            HeadsView::nhd(&q, new, shape.q_heads(), shape.qk_dim())?,
            HeadsView::nhd(k, held, shape.kv_heads(), shape.qk_dim())?,
            HeadsView::nhd(v, held, shape.kv_heads(), shape.v_dim())?,
            out.as_slice_mut().expect("a new array"),
            &mut lse,
        )?;
        step.w_o.forward(out.view())
    }

    fn append(&mut self, step: &Step<'_>) -> Result<(), Error> {
        if step.layer >= self.layers.len() {
            return Err(Error::argument("layer", format!("below {}", self.layers.len()), step.layer));
        }
        // Masks count keys from the start of the sequence, so nothing may be left out.
        let held = self.tokens(step.layer);
        if !step.positions.iter().copied().eq((held as u32..).take(step.positions.len())) {
            let found = format!("{:?}", step.positions);
            return Err(Error::argument("positions", format!("consecutive from {held}"), found));
        }
        let k = self.rotated(step.k, step.positions)?;
        let layer = &mut self.layers[step.layer];
        for (held, new) in [(&mut layer.k, k.len()), (&mut layer.v, step.v.len())] {
            held.try_reserve(new)
                .map_err(|error| Error::argument("tokens", "keys and values that fit memory", error))?;
        }
        layer.k.extend(k.iter().map(|&x| T::from_f32(x)));
        layer.v.extend(step.v.iter().map(|&x| T::from_f32(x)));
        Ok(())
    }

    fn stored(&self) -> DType {
        T::DTYPE
    }

    fn len(&self) -> usize {
        // The last layer is the last to see a token.
        self.layers.len().checked_sub(1).map_or(0, |last| self.tokens(last))
    }

    fn memory(&self) -> KvMemory {
        let elements: usize = self.layers.iter().map(|layer| layer.k.len() + layer.v.len()).sum();
        KvMemory { device: elements * T::DTYPE.size(), host: 0 }
    }

    fn clear(&mut self) {
        for layer in &mut self.layers {
            layer.k.clear();
            layer.v.clear();
        }
    }

    fn scramble(&mut self, rng: &mut fastrand::Rng) {
        for values in self.layers.iter_mut().flat_map(|layer| [&mut layer.k, &mut layer.v]) {
            scramble(values, rng);
        }
    }
}

/// Noise of like magnitude in the place of these values.
pub(super) fn scramble<T: Element>(values: &mut [T], rng: &mut fastrand::Rng) {
    let mean_square = values.iter().map(|x| x.to_f32().powi(2)).sum::<f32>() / values.len().max(1) as f32;
    // Uniform in ±a has a mean square of a² / 3.
    let amplitude = (3.0 * mean_square).sqrt();
    values.fill_with(|| T::from_f32(amplitude * (2.0 * rng.f32() - 1.0)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use attention::rope::RopeConfig;
    use attention::{AttentionSpec, HeadShape, Mask, Score};

    #[test]
    fn an_empty_cache_takes_no_memory_for_its_capacity() {
        let spec = AttentionSpec {
            shape: HeadShape::new(4, 2, 8, 8).unwrap(),
            score: Score::new(1.0).unwrap(),
            mask: Mask::Causal,
        };
        let geometry = Geometry { layers: vec![spec; 3], rope: RopeConfig::new(8, 1e4), capacity: 1000 };
        let cache = Dense::<f32>::new(geometry).unwrap();
        for (l, layer) in cache.layers.iter().enumerate() {
            assert_eq!((layer.k.capacity(), layer.v.capacity()), (0, 0), "layer {l}");
        }
    }
}
