//! One decoder layer: attention and a SwiGLU feed-forward block, each after an RMS norm and around a residual.

use std::ops::Range;

use ndarray::{Array2, ArrayView2, ArrayView3, Zip};

use super::Loader;
use crate::kv::{KvCache, Step};
use crate::linear::{Linear, Projection, Role};
use crate::{Config, Error};

/// Root-mean-square norm: `x / sqrt(mean(x²) + ε) · weight`.
pub(super) struct RmsNorm {
    /// `[size]`
    pub(super) weight: Vec<f32>,
    pub(super) eps: f32,
}

impl RmsNorm {
    /// Norms each row of `[rows, size]`.
    pub(super) fn apply(&self, x: ArrayView2<'_, f32>) -> Array2<f32> {
        let mut y = x.to_owned();
        for mut row in y.rows_mut() {
            let mean_square = row.iter().map(|x| x * x).sum::<f32>() / row.len() as f32;
            let scale = (mean_square + self.eps).sqrt().recip();
            for (x, weight) in row.iter_mut().zip(&self.weight) {
                *x *= scale * weight;
            }
        }
        y
    }
}

/// The weights of one decoder layer.
pub(crate) struct Layer {
    index: usize,
    /// q_heads, kv_heads, head_dim
    heads: (usize, usize, usize),
    attention_norm: RmsNorm,
    q: Box<dyn Linear>,
    k: Box<dyn Linear>,
    v: Box<dyn Linear>,
    o: Box<dyn Linear>,
    /// Norms of q and k per head (Qwen3).
    qk_norm: Option<(RmsNorm, RmsNorm)>,
    mlp_norm: RmsNorm,
    gate: Box<dyn Linear>,
    up: Box<dyn Linear>,
    down: Box<dyn Linear>,
}

impl Layer {
    pub(super) fn load(config: &Config, index: usize, weights: &mut Loader<'_>) -> Result<Self, Error> {
        let (hidden, inner, eps) = (config.hidden_size, config.intermediate_size, config.rms_norm_eps);
        let heads = (config.heads.q_heads(), config.heads.kv_heads(), config.heads.qk_dim());
        let (q_size, kv_size) = (heads.0 * heads.2, heads.1 * heads.2);
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let role = |projection| Role::Layer { layer: index, projection };
        let qk_norm = match config.qk_norm {
            true => Some((
                weights.norm(&name("self_attn.q_norm"), heads.2, eps)?,
                weights.norm(&name("self_attn.k_norm"), heads.2, eps)?,
            )),
            false => None,
        };
        let attention_norm = weights.norm(&name("input_layernorm"), hidden, eps)?;
        let mlp_norm = weights.norm(&name("post_attention_layernorm"), hidden, eps)?;
        let mut linear =
            |part: &str, projection, shape, bias| weights.linear(&name(part), role(projection), shape, bias);
        Ok(Layer {
            index,
            heads,
            attention_norm,
            q: linear("self_attn.q_proj", Projection::Query, [q_size, hidden], config.qkv_bias)?,
            k: linear("self_attn.k_proj", Projection::Key, [kv_size, hidden], config.qkv_bias)?,
            v: linear("self_attn.v_proj", Projection::Value, [kv_size, hidden], config.qkv_bias)?,
            o: linear("self_attn.o_proj", Projection::AttentionOutput, [hidden, q_size], config.o_bias)?,
            qk_norm,
            mlp_norm,
            gate: linear("mlp.gate_proj", Projection::Gate, [inner, hidden], config.mlp_bias)?,
            up: linear("mlp.up_proj", Projection::Up, [inner, hidden], config.mlp_bias)?,
            down: linear("mlp.down_proj", Projection::Down, [hidden, inner], config.mlp_bias)?,
        })
    }

    /// All of the layer's matrices.
    pub(super) fn matrices(&self) -> [&dyn Linear; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down].map(|matrix| &**matrix)
    }

    /// Adds the layer's two blocks to the residual stream `x` `[tokens, hidden]`.
    pub(super) fn forward(
        &self,
        x: &mut Array2<f32>,
        positions: &[u32],
        kv: &mut dyn KvCache,
    ) -> Result<(), Error> {
        let normed = self.attention_normed(x.view());
        *x += &self.attention(normed.view(), positions, kv)?;
        let normed = self.mlp_normed(x.view());
        *x += &self.mlp(self.mlp_matrices(), normed.view())?;
        Ok(())
    }

    fn attention(
        &self,
        x: ArrayView2<'_, f32>,
        positions: &[u32],
        kv: &mut dyn KvCache,
    ) -> Result<Array2<f32>, Error> {
        let (q_heads, kv_heads, _) = self.heads;
        let [w_q, w_k, w_v, w_o] = self.attention_matrices();
        let [q, k, v] = self.project([w_q, w_k, w_v], x)?;
        let (q, k, v) = (by_head(&q, q_heads)?, by_head(&k, kv_heads)?, by_head(&v, kv_heads)?);
        kv.forward(&Step { layer: self.index, positions, q, k, v, w_o })
    }

    /// The norm before attention, of `[tokens, hidden]`.
    pub(crate) fn attention_normed(&self, x: ArrayView2<'_, f32>) -> Array2<f32> {
        self.attention_norm.apply(x)
    }

    /// The norm before the MLP, of `[tokens, hidden]`.
    pub(crate) fn mlp_normed(&self, x: ArrayView2<'_, f32>) -> Array2<f32> {
        self.mlp_norm.apply(x)
    }

    /// W_Q, W_K, W_V and W_O.
    pub(crate) fn attention_matrices(&self) -> [&dyn Linear; 4] {
        [&self.q, &self.k, &self.v, &self.o].map(|matrix| &**matrix)
    }

    /// The MLP's matrices: gate, up and down.
    pub(crate) fn mlp_matrices(&self) -> [&dyn Linear; 3] {
        [&self.gate, &self.up, &self.down].map(|matrix| &**matrix)
    }

    /// The output projection W_O.
    pub(crate) fn output(&self) -> &dyn Linear {
        &*self.o
    }

    /// Queries, keys and values of normed rows by W_Q, W_K and W_V, each `[tokens, heads · head_dim]`, before RoPE.
    pub(crate) fn project(
        &self,
        [q, k, v]: [&dyn Linear; 3],
        x: ArrayView2<'_, f32>,
    ) -> Result<[Array2<f32>; 3], Error> {
        Ok(self.normed_heads([q.forward(x)?, k.forward(x)?, v.forward(x)?]))
    }

    /// Queries of some heads, and keys and values of some, as [`project`](Self::project) gives them of all.
    pub(crate) fn project_heads(
        &self,
        x: ArrayView2<'_, f32>,
        q_heads: &Range<usize>,
        kv_heads: &Range<usize>,
    ) -> Result<[Array2<f32>; 3], Error> {
        let (q_rows, kv_rows) = (self.channels(q_heads), self.channels(kv_heads));
        let q = self.q.forward_rows(x, q_rows)?;
        Ok(self.normed_heads([q, self.k.forward_rows(x, kv_rows.clone())?, self.v.forward_rows(x, kv_rows)?]))
    }

    /// What some heads `[tokens, their heads · head_dim]` add to W_O's product, without its bias.
    pub(crate) fn output_of_heads(
        &self,
        x: ArrayView2<'_, f32>,
        q_heads: &Range<usize>,
    ) -> Result<Array2<f32>, Error> {
        self.o.forward_columns(x, self.channels(q_heads))
    }

    /// Channels of some heads.
    fn channels(&self, heads: &Range<usize>) -> Range<usize> {
        heads.start * self.heads.2..heads.end * self.heads.2
    }

    /// Norms of q and k, where the model has them.
    fn normed_heads(&self, [mut q, mut k, v]: [Array2<f32>; 3]) -> [Array2<f32>; 3] {
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            q = per_head(q_norm, q, self.heads.2);
            k = per_head(k_norm, k, self.heads.2);
        }
        [q, k, v]
    }

    /// `down(silu(gate(x)) · up(x))` of normed rows, by these matrices.
    pub(crate) fn mlp(
        &self,
        [gate, up, down]: [&dyn Linear; 3],
        x: ArrayView2<'_, f32>,
    ) -> Result<Array2<f32>, Error> {
        down.forward(gated(gate.forward(x)?, &up.forward(x)?).view())
    }

    /// What some inner channels add to the MLP of normed rows, without the bias of its last product.
    pub(crate) fn mlp_of_channels(
        &self,
        x: ArrayView2<'_, f32>,
        inner: &Range<usize>,
    ) -> Result<Array2<f32>, Error> {
        let gate = self.gate.forward_rows(x, inner.clone())?;
        let up = self.up.forward_rows(x, inner.clone())?;
        self.down.forward_columns(gated(gate, &up).view(), inner.clone())
    }
}

/// `silu(gate) · up`
fn gated(mut gate: Array2<f32>, up: &Array2<f32>) -> Array2<f32> {
    Zip::from(&mut gate).and(up).for_each(|gate, &up| {
        *gate = *gate / (1.0 + (-*gate).exp()) * up;
    });
    gate
}

/// `[tokens, heads · head_dim]` as `[tokens, heads, head_dim]`.
fn by_head(x: &Array2<f32>, heads: usize) -> Result<ArrayView3<'_, f32>, Error> {
    let (tokens, width) = x.dim();
    x.view().into_shape_with_order((tokens, heads, width / heads)).map_err(|error| {
        Error::argument("projection", format!("{tokens} rows of {heads} heads, contiguous"), error)
    })
}

/// Norms each head of `[tokens, heads · head_dim]` on its own.
fn per_head(norm: &RmsNorm, x: Array2<f32>, head_dim: usize) -> Array2<f32> {
    let (tokens, width) = x.dim();
    let heads =
        x.into_shape_with_order((tokens * width / head_dim, head_dim)).expect("a whole number of heads");
    norm.apply(heads.view()).into_shape_with_order((tokens, width)).expect("the shape it had")
}
