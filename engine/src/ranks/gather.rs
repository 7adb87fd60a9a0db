//! A shared prompt whose keys and values every rank gets all of.

use attention::DType;
use ndarray::{Array1, Array2, Array3};
use seq_parallel::transport::Transport;

use super::Sharing;
use super::prefill::compute;
use crate::kv::{KvCache, Step};
use crate::{Error, Model};

/// A prompt that was computed, as every rank has it.
#[derive(Debug)]
pub struct SharedPrompt {
    /// Keys before RoPE and values of each layer, `[tokens, kv_heads, head_dim]`.
    layers: Vec<(Array3<f32>, Array3<f32>)>,
    /// The last token's hidden state after the final norm `[hidden]`.
    last: Array1<f32>,
}

impl SharedPrompt {
    /// Puts keys and values into an empty cache and gives the last token's hidden state.
    ///
    /// # Errors
    /// Whatever the cache refuses.
    pub fn append_to(self, model: &Model, kv: &mut dyn KvCache) -> Result<Array1<f32>, Error> {
        for (index, ((k, v), layer)) in self.layers.iter().zip(model.layers()).enumerate() {
            let tokens = k.dim().0;
            let positions: Vec<u32> = (0..tokens as u32).collect();
            let heads = &model.config().heads;
            let q = Array3::zeros((tokens, heads.q_heads(), heads.qk_dim()));
            let step = Step {
                layer: index,
                positions: &positions,
                q: q.view(),
                k: k.view(),
                v: v.view(),
                w_o: layer.output(),
            };
            kv.append(&step)?;
        }
        Ok(self.last)
    }
}

/// Runs one rank's part of a prompt that starts a sequence. Every rank calls it with the same arguments and gets the same result: all keys
/// and values, before RoPE as the KV seam wants them.
///
/// `stored` is the type in which keys and values are attended to and travel.
///
/// # Errors
/// An empty prompt, tokens out of range or too many; heads that cannot be dealt; ranks that are set up differently or have failed.
pub fn prefill_shared<X: Transport + ?Sized>(
    model: &Model,
    sharing: &Sharing,
    tokens: &[u32],
    stored: DType,
    transport: &mut X,
) -> Result<SharedPrompt, Error> {
    let mut kept: Vec<f32> = Vec::new();
    let (layout, last) = compute(model, sharing, tokens, stored, transport, |_, own| {
        kept.extend(own.k);
        kept.extend(own.v);
        Ok(())
    })?;
    let heads = &model.config().heads;
    let (kv_heads, k_dim, v_dim) = (heads.kv_heads(), heads.qk_dim(), heads.v_dim());
    let (k_width, v_width) = (kv_heads * k_dim, kv_heads * v_dim);
    let per_token = 4 * model.layers().len() * (k_width + v_width);
    let lens: Vec<usize> = layout.tokens().into_iter().map(|tokens| tokens * per_token).collect();
    let gathered: Vec<f32> =
        bytemuck::pod_collect_to_vec(&transport.all_gather_v(bytemuck::cast_slice(&kept), &lens)?);
    let mut layers: Vec<_> = (0..model.layers().len())
        .map(|_| (Array2::zeros((tokens.len(), k_width)), Array2::zeros((tokens.len(), v_width))))
        .collect();
    let mut rest = gathered.as_slice();
    for rank in 0..sharing.ranks() {
        let positions = layout.positions(rank);
        for (k, v) in &mut layers {
            for (matrix, width) in [(k, k_width), (v, v_width)] {
                let (rows, after) = rest.split_at(positions.len() * width);
                rest = after;
                for (row, &position) in rows.chunks_exact(width).zip(&positions) {
                    matrix.row_mut(position as usize).assign(&ndarray::aview1(row));
                }
            }
        }
    }
    let by_head = |matrix: Array2<f32>, dim| {
        matrix.into_shape_with_order((tokens.len(), kv_heads, dim)).expect("rows of heads")
    };
    let layers = layers.into_iter().map(|(k, v)| (by_head(k, k_dim), by_head(v, v_dim))).collect();
    Ok(SharedPrompt { layers, last })
}
