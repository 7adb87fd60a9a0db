//! A layer's maps in the order in which the kernels read them.

use attention::Element;

use crate::error::check_finite;
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
    /// [`Error::NotFinite`] for an element that the storage type does not hold.
    pub fn new(projection: &LayerProjection) -> Result<Self, Error> {
        let shape = projection.shape();
        let mut packed = PackedMaps {
            project_q: Vec::new(),
            project_k: Vec::new(),
            project_v: Vec::new(),
            back_k: Vec::new(),
            back_v: Vec::new(),
        };
        for maps in projection.heads() {
            for (argument, to, map, dim) in [
                ("query", &mut packed.project_q, &maps.query, shape.qk_dim()),
                ("key", &mut packed.project_k, &maps.key, shape.qk_dim()),
                ("value", &mut packed.project_v, &maps.value, shape.v_dim()),
            ] {
                let rank = map.len() / dim;
                let transposed: Vec<f32> = (0..map.len()).map(|i| map[i % rank * dim + i / rank]).collect();
                push(argument, to, &transposed)?;
            }
            // QKᵀ ≈ Q·A·(K·B)ᵀ = Q·(K̃·Aᵀ)ᵀ: what scores see of a key is K̃·Aᵀ.
            push("query", &mut packed.back_k, &maps.query)?;
            push("output", &mut packed.back_v, &maps.output)?;
        }
        Ok(packed)
    }
}

/// Appends values rounded to the storage type.
fn push<E: Element>(argument: &'static str, to: &mut Vec<E>, values: &[f32]) -> Result<(), Error> {
    let first = to.len();
    to.extend(values.iter().map(|&x| E::from_f32(x)));
    let stored: Vec<f32> = to[first..].iter().map(|x| x.to_f64() as f32).collect();
    check_finite(argument, &stored)
}
