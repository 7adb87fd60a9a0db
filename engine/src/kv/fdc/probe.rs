//! A dense cache that finds out what each rank would cost: the error in a layer's attention output, on activations as they pass.

use attention::rope::Rope;
use attention::{AttentionSpec, HeadShape};
use kv_compress::RANK_STEP;
use kv_compress::projection::{Basis, HeadBasis};
use kv_compress::rank_plan::{HeadProfile, Profile};
use ndarray::{Array2, ArrayView2, ArrayView3, Axis, s};
use rayon::prelude::*;

use super::super::{Dense, Geometry, KvCache, KvMemory, Step};
use crate::Error;

/// Dense attention in f32 that measures, beside, what bases would lose of its outputs after W_O: keys and values of each KV head at
/// each rank, everything else whole. Sequences pass in one piece each.
pub struct Probe<'b> {
    dense: Dense<f32>,
    rope: Rope,
    specs: Vec<AttentionSpec>,
    /// `[layers][kv_heads]`
    bases: &'b [Vec<HeadBasis>],
    /// Energies of errors, by rank: `[layers][kv_heads]`.
    lost: Vec<Vec<HeadProfile>>,
    /// Energies of the layers' outputs.
    output: Vec<f64>,
}

impl<'b> Probe<'b> {
    /// Nothing seen yet.
    ///
    /// # Errors
    /// A rotary embedding out of range.
    pub fn new(geometry: Geometry, bases: &'b [Vec<HeadBasis>]) -> Result<Self, Error> {
        let zero = |basis: &HeadBasis| HeadProfile {
            keys: vec![0.0; basis.scores.lost_energy().len()],
            values: vec![0.0; basis.values.lost_energy().len()],
        };
        Ok(Probe {
            rope: Rope::new(geometry.rope.clone(), geometry.capacity)?,
            specs: geometry.layers.clone(),
            bases,
            lost: bases.iter().map(|heads| heads.iter().map(zero).collect()).collect(),
            output: vec![0.0; bases.len()],
            dense: Dense::new(geometry)?,
        })
    }

    /// What was found, as parts of the energy of each layer's output.
    ///
    /// # Errors
    /// Sizes that make no profile, and errors that are not finite.
    pub fn finish(self) -> Result<Profile, Error> {
        let Probe { specs, lost, output, .. } = self;
        let share = |losses: Vec<f64>, output: f64| {
            losses.into_iter().map(|loss| if output > 0.0 { loss / output } else { 0.0 }).collect()
        };
        let layers = lost.into_iter().zip(output).map(|(heads, output)| {
            let head = |head: HeadProfile| HeadProfile {
                keys: share(head.keys, output),
                values: share(head.values, output),
            };
            heads.into_iter().map(head).collect()
        });
        let shapes: Vec<HeadShape> = specs.iter().map(|spec| spec.shape).collect();
        Ok(Profile::from_losses(shapes, layers.collect())?)
    }
}

/// Rows of one head.
fn of_head(x: ArrayView3<'_, f32>, head: usize) -> Array2<f32> {
    x.index_axis(Axis(1), head).to_owned()
}

/// The first `rank` columns of a map `[dim, rank]`.
fn columns(basis: &Basis, right: bool, rank: usize) -> Result<Array2<f32>, Error> {
    let map = if right { basis.right(rank)? } else { basis.left(rank)? };
    let map = Array2::from_shape_vec((rank, basis.dim()), map).expect("whole rows");
    Ok(map.t().mapv(|x| x as f32))
}

/// Probabilities `[tokens, tokens]` of queries and keys `[tokens, rank]`.
fn probabilities(spec: &AttentionSpec, q: &Array2<f32>, k: &Array2<f32>) -> Array2<f32> {
    let tokens = q.nrows();
    let mut p = q.dot(&k.t());
    for (query, mut row) in p.axis_iter_mut(Axis(0)).enumerate() {
        let seen = spec.mask.keys(query, tokens, tokens);
        let mut weights = vec![0.0f32; tokens];
        let score = |key: usize| spec.score.apply_f32(row[key]);
        let max = seen.keys().map(score).fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        for key in seen.keys() {
            weights[key] = (score(key) - max).exp();
            sum += weights[key];
        }
        row.iter_mut().zip(weights).for_each(|(p, weight)| *p = if sum > 0.0 { weight / sum } else { 0.0 });
    }
    p
}

/// Σ ‖e·W‖² over rows e `[tokens, dim]`, given W·Wᵀ `[dim, dim]`.
fn energy(rows: ArrayView2<'_, f32>, gram: &Array2<f32>) -> f64 {
    let weighed = rows.dot(gram);
    rows.iter().zip(&weighed).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>().max(0.0)
}

impl Probe<'_> {
    /// What every rank of one KV head loses, and the energy of its part of the output.
    fn head(
        &self,
        (layer, head): (usize, usize),
        [q, k, v]: [ArrayView3<'_, f32>; 3],
        w_o: ArrayView2<'_, f32>,
    ) -> Result<(HeadProfile, f64), Error> {
        let (spec, basis) = (&self.specs[layer], &self.bases[layer][head]);
        let dim = spec.shape.v_dim();
        let (key, value) = (of_head(k, head), of_head(v, head));
        let mut lost = HeadProfile {
            keys: vec![0.0; basis.scores.lost_energy().len()],
            values: vec![0.0; basis.values.lost_energy().len()],
        };
        let mut output = 0.0;
        for q_head in spec.shape.q_heads_of(head) {
            let block = w_o.slice(s![.., q_head * dim..(q_head + 1) * dim]);
            let gram = block.t().dot(&block);
            let query = of_head(q, q_head);
            let out = probabilities(spec, &query, &key).dot(&value);
            output += energy(out.view(), &gram);
            let full = lost.keys.len() - 1;
            for (i, lost) in lost.keys[..full].iter_mut().enumerate() {
                let rank = i * RANK_STEP;
                let query = query.dot(&columns(&basis.scores, false, rank)?);
                let key = key.dot(&columns(&basis.scores, true, rank)?);
                let error = probabilities(spec, &query, &key).dot(&value) - &out;
                *lost += energy(error.view(), &gram);
            }
            let full = lost.values.len() - 1;
            for (i, lost) in lost.values[..full].iter_mut().enumerate() {
                let rank = i * RANK_STEP;
                let reduced = out.dot(&columns(&basis.values, false, rank)?);
                let error = reduced.dot(&columns(&basis.values, true, rank)?.t()) - &out;
                *lost += energy(error.view(), &gram);
            }
        }
        Ok((lost, output))
    }
}

impl KvCache for Probe<'_> {
    fn forward(&mut self, step: &Step<'_>) -> Result<Array2<f32>, Error> {
        if step.positions.first() != Some(&0) {
            return Err(Error::argument("positions", "a sequence in one piece", "one that goes on"));
        }
        let mut rotated = [step.q.to_owned(), step.k.to_owned()];
        for x in &mut rotated {
            let heads = x.dim().1;
            self.rope.apply(x.as_slice_mut().expect("standard layout"), heads, step.positions)?;
        }
        let vectors = [rotated[0].view(), rotated[1].view(), step.v];
        let (layer, w_o) = (step.layer, step.w_o.matrix());
        let w_o = w_o.view();
        let heads = (0..self.bases[layer].len())
            .into_par_iter()
            .map(|head| self.head((layer, head), vectors, w_o))
            .collect::<Result<Vec<_>, Error>>()?;
        for (sum, (lost, output)) in self.lost[layer].iter_mut().zip(heads) {
            sum.keys.iter_mut().zip(lost.keys).for_each(|(sum, x)| *sum += x);
            sum.values.iter_mut().zip(lost.values).for_each(|(sum, x)| *sum += x);
            self.output[layer] += output;
        }
        self.dense.forward(step)
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

    /// Forgets the sequence, not what was found.
    fn clear(&mut self) {
        self.dense.clear();
    }

    fn scramble(&mut self, rng: &mut fastrand::Rng) {
        self.dense.scramble(rng);
    }
}
