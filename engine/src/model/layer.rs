//! One decoder layer: attention and a SwiGLU feed-forward block, each after an RMS norm and around a residual.

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
        let normed = self.attention_norm.apply(x.view());
        *x += &self.attention(normed.view(), positions, kv)?;
        let normed = self.mlp_norm.apply(x.view());
        *x += &self.mlp(normed.view())?;
        Ok(())
    }

    fn attention(
        &self,
        x: ArrayView2<'_, f32>,
        positions: &[u32],
        kv: &mut dyn KvCache,
    ) -> Result<Array2<f32>, Error> {
        let (q_heads, kv_heads, _) = self.heads;
        let [q, k, v] = self.project(x)?;
        let (q, k, v) = (by_head(&q, q_heads)?, by_head(&k, kv_heads)?, by_head(&v, kv_heads)?);
        kv.forward(&Step { layer: self.index, positions, q, k, v, w_o: &*self.o })
    }

    /// Queries, keys and values of normed rows, each `[tokens, heads · head_dim]`, before RoPE.
    fn project(&self, x: ArrayView2<'_, f32>) -> Result<[Array2<f32>; 3], Error> {
        let (mut q, mut k, v) = (self.q.forward(x)?, self.k.forward(x)?, self.v.forward(x)?);
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            q = per_head(q_norm, q, self.heads.2);
            k = per_head(k_norm, k, self.heads.2);
        }
        Ok([q, k, v])
    }

    /// [`forward`](Self::forward) with attention by somebody else: `attend` gets queries, keys and values, each
    /// `[tokens, heads · head_dim]` before RoPE, and gives `[tokens, q_heads · head_dim]`, the input of W_O.
    pub(crate) fn forward_with(
        &self,
        x: &mut Array2<f32>,
        attend: impl FnOnce(Array2<f32>, Array2<f32>, Array2<f32>) -> Result<Array2<f32>, Error>,
    ) -> Result<(), Error> {
        let normed = self.attention_norm.apply(x.view());
        let [q, k, v] = self.project(normed.view())?;
        *x += &self.o.forward(attend(q, k, v)?.view())?;
        let normed = self.mlp_norm.apply(x.view());
        *x += &self.mlp(normed.view())?;
        Ok(())
    }

    /// The output projection W_O.
    pub(crate) fn output(&self) -> &dyn Linear {
        &*self.o
    }

    /// `down(silu(gate(x)) · up(x))`
    fn mlp(&self, x: ArrayView2<'_, f32>) -> Result<Array2<f32>, Error> {
        let mut inner = self.gate.forward(x)?;
        Zip::from(&mut inner).and(&self.up.forward(x)?).for_each(|gate, &up| {
            *gate = *gate / (1.0 + (-*gate).exp()) * up;
        });
        self.down.forward(inner.view())
    }
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
