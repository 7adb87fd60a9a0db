//! Maps of a layer at its ranks: what is applied to every new token.

use std::ops::Range;

use attention::HeadShape;

use crate::error::{check_finite, check_len};
use crate::projection::HeadBasis;
use crate::{Error, LayerRanks};

/// Maps of one KV head, each row-major `[rank, dim]` as the weight of a linear layer.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadMaps {
    /// Queries of the group: `[r_k, qk_dim]`.
    pub query: Vec<f32>,
    /// Keys: `[r_k, qk_dim]`.
    pub key: Vec<f32>,
    /// Values: `[r_v, v_dim]`.
    pub value: Vec<f32>,
    /// Outputs: `[r_v, v_dim]`, which lifts an output õ to `outputᵀ·õ`, or folds into W_O.
    pub output: Vec<f32>,
}

/// Maps of all KV heads of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerProjection {
    shape: HeadShape,
    ranks: LayerRanks,
    heads: Vec<HeadMaps>,
}

impl LayerProjection {
    /// The maps of bases `[kv_heads]` at these ranks. A side that keeps every dimension gets the identity, which is exact in
    /// any precision.
    ///
    /// # Errors
    /// [`Error::Argument`] when heads or dimensions do not fit the shape.
    pub fn new(shape: HeadShape, ranks: LayerRanks, bases: &[HeadBasis]) -> Result<Self, Error> {
        if bases.len() != shape.kv_heads() {
            return Err(Error::argument("bases", format!("{} KV heads", shape.kv_heads()), bases.len()));
        }
        let mut heads = Vec::new();
        for (basis, ranks) in bases.iter().zip(ranks.heads()) {
            let pair = |basis: &crate::projection::Basis, rank: usize| {
                if rank == basis.dim() {
                    return Ok((identity(rank), identity(rank)));
                }
                let round = |map: Vec<f64>| map.into_iter().map(|x| x as f32).collect();
                Ok::<(Vec<f32>, Vec<f32>), Error>((round(basis.left(rank)?), round(basis.right(rank)?)))
            };
            let (query, key) = pair(&basis.scores, ranks.k)?;
            let (value, output) = pair(&basis.values, ranks.v)?;
            heads.push(HeadMaps { query, key, value, output });
        }
        LayerProjection::from_maps(shape, ranks, heads)
    }

    /// Maps that come from elsewhere.
    ///
    /// # Errors
    /// [`Error::Argument`] when heads or sizes do not fit, [`Error::NotFinite`] for NaN and infinities.
    pub fn from_maps(shape: HeadShape, ranks: LayerRanks, heads: Vec<HeadMaps>) -> Result<Self, Error> {
        let ranks = LayerRanks::new(&shape, ranks.heads().to_vec())?;
        if heads.len() != shape.kv_heads() {
            return Err(Error::argument("heads", format!("{} KV heads", shape.kv_heads()), heads.len()));
        }
        for (maps, ranks) in heads.iter().zip(ranks.heads()) {
            for (argument, map, rank, dim) in [
                ("query", &maps.query, ranks.k, shape.qk_dim()),
                ("key", &maps.key, ranks.k, shape.qk_dim()),
                ("value", &maps.value, ranks.v, shape.v_dim()),
                ("output", &maps.output, ranks.v, shape.v_dim()),
            ] {
                check_len(argument, map.len(), &[rank, dim])?;
            }
        }
        check_finite("query", heads.iter().flat_map(|maps| &maps.query))?;
        check_finite("key", heads.iter().flat_map(|maps| &maps.key))?;
        check_finite("value", heads.iter().flat_map(|maps| &maps.value))?;
        check_finite("output", heads.iter().flat_map(|maps| &maps.output))?;
        Ok(LayerProjection { shape, ranks, heads })
    }

    /// Heads of the model's layer.
    pub fn shape(&self) -> &HeadShape {
        &self.shape
    }

    /// Ranks of its KV heads.
    pub fn ranks(&self) -> &LayerRanks {
        &self.ranks
    }

    /// Maps by KV head.
    pub fn heads(&self) -> &[HeadMaps] {
        &self.heads
    }

    pub(crate) fn heads_mut(&mut self) -> &mut [HeadMaps] {
        &mut self.heads
    }

    /// The maps of some of the KV heads, with their query heads: one rank of a tensor-parallel group.
    ///
    /// # Errors
    /// [`Error::Argument`] when the range is empty or out of bounds.
    pub fn slice(&self, kv_heads: Range<usize>) -> Result<Self, Error> {
        let ranks = self.ranks.slice(kv_heads.clone())?;
        let (heads, shape) = (self.heads[kv_heads].to_vec(), &self.shape);
        let shape = HeadShape::new(shape.group() * heads.len(), heads.len(), shape.qk_dim(), shape.v_dim())?;
        Ok(LayerProjection { shape, ranks, heads })
    }

    /// Queries `[tokens, q_heads, qk_dim]`, after RoPE, to `[tokens, Σ r_k]`, query head after query head.
    ///
    /// # Errors
    /// [`Error::Argument`] for a length that does not fit.
    pub fn queries(&self, q: &[f32]) -> Result<Vec<f32>, Error> {
        let maps = |head: usize| self.heads[head].query.as_slice();
        self.apply("q", q, self.shape.qk_dim(), self.shape.group(), maps)
    }

    /// Keys `[tokens, kv_heads, qk_dim]`, after RoPE, to `[tokens, Σ r_k]`, KV head after KV head.
    ///
    /// # Errors
    /// [`Error::Argument`] for a length that does not fit.
    pub fn keys(&self, k: &[f32]) -> Result<Vec<f32>, Error> {
        let maps = |head: usize| self.heads[head].key.as_slice();
        self.apply("k", k, self.shape.qk_dim(), 1, maps)
    }

    /// Values `[tokens, kv_heads, v_dim]` to `[tokens, Σ r_v]`, KV head after KV head.
    ///
    /// # Errors
    /// [`Error::Argument`] for a length that does not fit.
    pub fn values(&self, v: &[f32]) -> Result<Vec<f32>, Error> {
        let maps = |head: usize| self.heads[head].value.as_slice();
        self.apply("v", v, self.shape.v_dim(), 1, maps)
    }

    /// Outputs `[tokens, Σ r_v]`, query head after query head, back to `[tokens, q_heads, v_dim]`: for whoever does not
    /// [fold](crate::merge) the maps into W_O.
    ///
    /// # Errors
    /// [`Error::Argument`] for a length that does not fit.
    pub fn lift(&self, out: &[f32]) -> Result<Vec<f32>, Error> {
        let (group, dim) = (self.shape.group(), self.shape.v_dim());
        let row: usize = self.ranks.heads().iter().map(|ranks| ranks.v * group).sum();
        let tokens = out.len() / row;
        check_len("out", out.len(), &[tokens, row])?;
        let mut lifted = vec![0.0; tokens * self.shape.q_heads() * dim];
        for (out, lifted) in out.chunks_exact(row).zip(lifted.chunks_exact_mut(self.shape.q_heads() * dim)) {
            let mut rest = out;
            for (q_head, lifted) in lifted.chunks_exact_mut(dim).enumerate() {
                let head = self.shape.kv_head_of(q_head);
                let (out, others) = rest.split_at(self.ranks.heads()[head].v);
                for (&x, row) in out.iter().zip(self.heads[head].output.chunks_exact(dim)) {
                    lifted.iter_mut().zip(row).for_each(|(sum, &y)| *sum += x * y);
                }
                rest = others;
            }
        }
        Ok(lifted)
    }

    fn apply<'a>(
        &'a self,
        argument: &'static str,
        x: &[f32],
        dim: usize,
        group: usize,
        map: impl Fn(usize) -> &'a [f32],
    ) -> Result<Vec<f32>, Error> {
        let heads = self.shape.kv_heads() * group;
        let tokens = x.len() / (heads * dim);
        check_len(argument, x.len(), &[tokens, heads, dim])?;
        let row: usize = (0..heads).map(|head| map(head / group).len() / dim).sum();
        let mut projected = Vec::with_capacity(tokens * row);
        for token in x.chunks_exact(heads * dim) {
            for (head, x) in token.chunks_exact(dim).enumerate() {
                projected.extend(map(head / group).chunks_exact(dim).map(|row| dot(row, x)));
            }
        }
        Ok(projected)
    }
}

/// Dot product in independent lanes, which the compiler turns into vector code without leave to reorder sums.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [0.0f32; LANES];
    let ((a, a_tail), (b, b_tail)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    let tail: f32 = a_tail.iter().zip(b_tail).map(|(x, y)| x * y).sum();
    lanes.iter().sum::<f32>() + tail
}

fn identity(dim: usize) -> Vec<f32> {
    (0..dim * dim).map(|i| if i / dim == i % dim { 1.0 } else { 0.0 }).collect()
}
