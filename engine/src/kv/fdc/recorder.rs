//! A dense cache that calibrates: it hands everything that passes to `kv-compress`.

use attention::rope::Rope;
use kv_compress::calibrate::Calibration;
use ndarray::Array2;

use super::super::{Dense, Geometry, KvCache, KvMemory, Step};
use crate::Error;

/// Dense attention in f32 that records queries and keys after RoPE, values, and W_O.
pub struct Recorder {
    dense: Dense<f32>,
    rope: Rope,
    calibration: Calibration,
    /// Layers whose W_O was seen.
    seen: Vec<bool>,
}

impl Recorder {
    /// Nothing recorded yet.
    ///
    /// # Errors
    /// A rotary embedding out of range.
    pub fn new(geometry: Geometry) -> Result<Self, Error> {
        Ok(Recorder {
            rope: Rope::new(geometry.rope.clone(), geometry.capacity)?,
            calibration: Calibration::new(geometry.layers.iter().map(|spec| spec.shape)),
            seen: vec![false; geometry.layers.len()],
            dense: Dense::new(geometry)?,
        })
    }

    /// What was recorded, over all sequences.
    pub fn finish(self) -> Calibration {
        self.calibration
    }
}

impl KvCache for Recorder {
    fn forward(&mut self, step: &Step<'_>) -> Result<Array2<f32>, Error> {
        let out = self.dense.forward(step)?;
        let mut rotated = [step.q, step.k].map(|x| x.iter().copied().collect::<Vec<f32>>());
        for (x, heads) in rotated.iter_mut().zip([step.q.dim().1, step.k.dim().1]) {
            self.rope.apply(x, heads, step.positions)?;
        }
        let [q, k] = rotated;
        let v: Vec<f32> = step.v.iter().copied().collect();
        let layer = self.calibration.layer_mut(step.layer)?;
        layer.add(&q, &k, &v)?;
        if !std::mem::replace(&mut self.seen[step.layer], true) {
            let matrix = step.w_o.matrix();
            let w_o = matrix.as_standard_layout();
            layer.set_w_o(w_o.as_slice().expect("standard layout"), matrix.nrows())?;
        }
        Ok(out)
    }

    fn append(&mut self, step: &Step<'_>) -> Result<(), Error> {
        self.forward(step).map(drop)
    }

    fn len(&self) -> usize {
        self.dense.len()
    }

    fn memory(&self) -> KvMemory {
        self.dense.memory()
    }

    /// Forgets the sequence, not what was recorded.
    fn clear(&mut self) {
        self.dense.clear();
    }

    fn scramble(&mut self, rng: &mut fastrand::Rng) {
        self.dense.scramble(rng);
    }
}
