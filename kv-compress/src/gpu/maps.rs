//! A layer's maps in the order in which the kernels read them.

use attention::Element;

use crate::error::stored;
use crate::{Error, LayerProjection};

/// The maps of a layer, rounded to the storage type, head after head: what goes to the device once, when a plan is loaded.
///
/// The append multiplies rows of vectors from the right, so that its projections are the transposes of [`HeadMaps`]; outputs come
/// back by W_O with the maps [folded in](crate::merge::fold_output), or by `back_v` where nobody folded them.
///
/// [`HeadMaps`]: crate::HeadMaps
#[derive(Debug, Clone, PartialEq)]
pub struct PackedMaps<E> {
    /// R_q of each KV head `[head_dim, r_k]`: [`Queries::project`](super::Queries::project).
    pub project_q: Vec<E>,
    /// R_k of each KV head `[head_dim, r_k]`: [`AppendArgs::project_k`](super::AppendArgs::project_k).
    pub project_k: Vec<E>,
    /// R_v of each KV head `[head_dim, r_v]`: [`AppendArgs::project_v`](super::AppendArgs::project_v). Nobody needs it where W_V has
    /// the maps [folded in](crate::merge::fold_values): values then come reduced.
    pub project_v: Vec<E>,
    /// From reduced keys to keys, per KV head `[r_k, head_dim]`: [`ReconstructArgs::back_k`](super::ReconstructArgs::back_k).
    pub back_k: Vec<E>,
    /// From reduced values, and outputs, to those of the head `[r_v, head_dim]`:
    /// [`ReconstructArgs::back_v`](super::ReconstructArgs::back_v).
    pub back_v: Vec<E>,
}

impl<E: Element> PackedMaps<E> {
    /// Packs the maps of a layer.
    ///
    /// # Errors
    /// [`Error::NotFinite`] for an element that the storage type does not hold; its index counts through the maps of all KV heads,
    /// head after head, each row-major `[rank, dim]`.
    pub fn new(projection: &LayerProjection) -> Result<Self, Error> {
        let (shape, heads) = (projection.shape(), projection.heads());
        let query = stored("query", heads.iter().flat_map(|maps| &maps.query))?;
        let key = stored("key", heads.iter().flat_map(|maps| &maps.key))?;
        let value = stored("value", heads.iter().flat_map(|maps| &maps.value))?;
        let output = stored("output", heads.iter().flat_map(|maps| &maps.output))?;
        let ranks = projection.ranks().heads().iter();
        let (k, v) = (ranks.clone().map(|ranks| ranks.k), ranks.map(|ranks| ranks.v));
        Ok(PackedMaps {
            project_q: transposed(&query, shape.qk_dim(), k.clone()),
            project_k: transposed(&key, shape.qk_dim(), k),
            project_v: transposed(&value, shape.v_dim(), v),
            // QKᵀ ≈ Q·A·(K·B)ᵀ = Q·(K̃·Aᵀ)ᵀ: what scores see of a key is K̃·Aᵀ.
            back_k: query,
            back_v: output,
        })
    }
}

/// Maps `[rank, dim]`, one after the other, each as `[dim, rank]`.
fn transposed<E: Copy>(mut maps: &[E], dim: usize, ranks: impl Iterator<Item = usize>) -> Vec<E> {
    let mut packed = Vec::with_capacity(maps.len());
    for rank in ranks {
        let (map, others) = maps.split_at(rank * dim);
        packed.extend((0..map.len()).map(|i| map[i % rank * dim + i / rank]));
        maps = others;
    }
    packed
}
