//! Projected keys and values as codes: `homomorphic-quant` behind `kv-compress`, composed through shapes.
//!
//! Every KV head has ranks of its own, so every KV head is a quantized cache of its own sizes.

use attention::{AttentionSpec, HeadShape};
use homomorphic_quant::reference::Prefill;
use kv_compress::{LayerRanks, reference};
use ndarray::{Array2, s};

use super::super::hack::{Options, QuantizedLayer};
use super::store::{Store, columns};
use crate::Error;

/// One layer of one sequence.
pub(super) struct Quantized {
    /// `[kv_heads]`
    heads: Vec<QuantizedLayer>,
    prefill: Prefill,
    ranks: LayerRanks,
    group: usize,
}

impl Quantized {
    pub(super) fn new(
        options: &Options,
        layer: usize,
        spec: &AttentionSpec,
        ranks: &LayerRanks,
        capacity: usize,
    ) -> Result<Self, Error> {
        let group = spec.shape.group();
        let head = |ranks: &kv_compress::HeadRanks| {
            let shape = HeadShape::new(group, 1, ranks.k, ranks.v)?;
            QuantizedLayer::new(&options.config, layer, &AttentionSpec { shape, ..*spec }, capacity)
        };
        let heads = ranks.heads().iter().map(head).collect::<Result<_, _>>()?;
        Ok(Quantized { heads, prefill: options.prefill, ranks: ranks.clone(), group })
    }

    /// Keys and values of each head, and its queries where they are given.
    fn split<'a>(
        &'a self,
        q: &'a [f32],
        keys: &'a [f32],
        values: &'a [f32],
    ) -> impl Iterator<Item = [Vec<f32>; 3]> + 'a {
        let (k, v) = (reference::query_starts(&self.ranks, 1), reference::output_starts(&self.ranks, 1));
        let (k_row, v_row) = (k[self.heads.len()], v[self.heads.len()]);
        (0..self.heads.len()).map(move |head| {
            let group = k[head] * self.group..k[head + 1] * self.group;
            [
                columns(q, k_row * self.group, group),
                columns(keys, k_row, k[head]..k[head + 1]),
                columns(values, v_row, v[head]..v[head + 1]),
            ]
        })
    }
}

impl Store for Quantized {
    fn tokens(&self) -> usize {
        self.heads.last().map_or(0, QuantizedLayer::tokens)
    }

    fn append(&mut self, keys: &[f32], values: &[f32]) -> Result<(), Error> {
        let parts: Vec<_> = self.split(&[], keys, values).collect();
        self.heads.iter_mut().zip(parts).try_for_each(|(head, [_, keys, values])| head.append(&keys, &values))
    }

    fn forward(&mut self, q: &[f32], keys: &[f32], values: &[f32]) -> Result<Array2<f32>, Error> {
        let starts = reference::output_starts(&self.ranks, self.group);
        let new = q.len() / reference::query_starts(&self.ranks, self.group)[starts.len() - 1];
        let mut all = Array2::zeros((new, starts[starts.len() - 1]));
        let parts: Vec<_> = self.split(q, keys, values).collect();
        // A decoded token sees itself as the cache holds it.
        let prefill = if new == 1 { Prefill::Codes } else { self.prefill };
        for (kv_head, (head, [q, keys, values])) in self.heads.iter_mut().zip(parts).enumerate() {
            let out = head.forward(&q, &keys, &values, prefill)?;
            let columns = starts[kv_head * self.group]..starts[(kv_head + 1) * self.group];
            let out = Array2::from_shape_vec((new, columns.len()), out).expect("whole rows");
            all.slice_mut(s![.., columns]).assign(&out);
        }
        Ok(all)
    }

    fn bytes(&self) -> usize {
        self.heads.iter().map(QuantizedLayer::bytes).sum()
    }

    fn clear(&mut self) {
        self.heads.iter_mut().for_each(QuantizedLayer::clear);
    }

    fn scramble(&mut self, rng: &mut fastrand::Rng) {
        self.heads.iter_mut().for_each(|head| head.scramble(rng));
    }
}
