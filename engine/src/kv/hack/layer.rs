//! One layer's quantized keys and values.

use std::borrow::Cow;

use attention::{AttentionSpec, HeadShape, HeadsView};
use homomorphic_quant::reference::{self, Prefill};
use homomorphic_quant::{Cache, Capacity, Config, KvShape, Sequence};

use crate::Error;

/// Pages hold vectors of whole 16 channels; others are filled up with zeros, which count as bytes held.
const CHANNELS: usize = 16;

/// The quantized cache of one sequence in one layer, for vectors of any size: keys and values may differ in size, and
/// neither has to be the model's head size.
pub struct QuantizedLayer {
    /// As the caller sees it.
    spec: AttentionSpec,
    /// With padded vectors.
    padded: AttentionSpec,
    cache: Cache,
    sequence: Sequence,
}

impl QuantizedLayer {
    /// An empty cache of one layer, for up to `capacity` tokens.
    ///
    /// # Errors
    /// A head size out of range, or a cache that does not fit memory.
    pub fn new(config: &Config, layer: usize, spec: &AttentionSpec, capacity: usize) -> Result<Self, Error> {
        let shape = spec.shape;
        let up = |dim: usize| dim.next_multiple_of(CHANNELS);
        let (qk_dim, v_dim) = (up(shape.qk_dim()), up(shape.v_dim()));
        let padded = HeadShape::new(shape.q_heads(), shape.kv_heads(), qk_dim, v_dim)?;
        let kv = KvShape { kv_heads: shape.kv_heads(), qk_dim, v_dim };
        let cache = Cache::new(config, layer as u32, kv, Capacity::of_tokens(config, 1, capacity))?;
        let sequence = cache.sequence();
        Ok(QuantizedLayer { spec: *spec, padded: AttentionSpec { shape: padded, ..*spec }, cache, sequence })
    }

    /// Tokens held.
    pub fn tokens(&self) -> usize {
        self.sequence.tokens()
    }

    /// Bytes of the pages held: codes, scales, minima, sums, sinks and the whole open block.
    pub fn bytes(&self) -> usize {
        self.cache.usage().bytes()
    }

    /// The cache and its sequence.
    pub fn parts(&self) -> (&Cache, &Sequence) {
        (&self.cache, &self.sequence)
    }

    /// The cache and its sequence, for a receiver that fills it.
    pub fn parts_mut(&mut self) -> (&mut Cache, &mut Sequence) {
        (&mut self.cache, &mut self.sequence)
    }

    /// Appends tokens: `k` `[tokens, kv_heads, qk_dim]` after RoPE, `v` `[tokens, kv_heads, v_dim]`.
    ///
    /// # Errors
    /// Values that are not finite in the cache's type, or a cache that is full. Nothing changes then.
    pub fn append(&mut self, k: &[f32], v: &[f32]) -> Result<(), Error> {
        let (from, to) = (self.spec.shape, self.padded.shape);
        let tokens = k.len() / (from.kv_heads() * from.qk_dim());
        let (k, v) = (padded(k, from.qk_dim(), to.qk_dim()), padded(v, from.v_dim(), to.v_dim()));
        let k = HeadsView::nhd(&k, tokens, to.kv_heads(), to.qk_dim())?;
        let v = HeadsView::nhd(&v, tokens, to.kv_heads(), to.v_dim())?;
        Ok(self.cache.append(&mut self.sequence, k, v)?)
    }

    /// Appends tokens and attends from them: `q` `[tokens, q_heads, qk_dim]`, `k` and `v` as for
    /// [`append`](Self::append). Gives `[tokens, q_heads, v_dim]`.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    pub fn forward(&mut self, q: &[f32], k: &[f32], v: &[f32], mode: Prefill) -> Result<Vec<f32>, Error> {
        let (from, to) = (self.spec.shape, self.padded.shape);
        let tokens = q.len() / (from.q_heads() * from.qk_dim());
        let (q, k) = (padded(q, from.qk_dim(), to.qk_dim()), padded(k, from.qk_dim(), to.qk_dim()));
        let v = padded(v, from.v_dim(), to.v_dim());
        let mut out = vec![0.0; tokens * to.q_heads() * to.v_dim()];
        let mut lse = vec![0.0; tokens * to.q_heads()];
        reference::prefill(
            &self.padded,
            &mut self.cache,
            &mut self.sequence,
            HeadsView::nhd(&q, tokens, to.q_heads(), to.qk_dim())?,
            HeadsView::nhd(&k, tokens, to.kv_heads(), to.qk_dim())?,
            HeadsView::nhd(&v, tokens, to.kv_heads(), to.v_dim())?,
            mode,
            &mut out,
            &mut lse,
        )?;
        if from.v_dim() < to.v_dim() {
            out = out.chunks_exact(to.v_dim()).flat_map(|row| &row[..from.v_dim()]).copied().collect();
        }
        Ok(out)
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        let sequence = std::mem::replace(&mut self.sequence, self.cache.sequence());
        self.cache.release(sequence).expect("the sequence is this cache's");
    }

    /// Replaces everything held by noise of like magnitude, through the quantizer.
    pub fn scramble(&mut self, rng: &mut fastrand::Rng) {
        let shape = self.padded.shape;
        let tokens = self.tokens();
        let mut all = self.cache.dequantize(&self.sequence).expect("the sequence is this cache's");
        for values in [&mut all.k, &mut all.v] {
            let mean_square = values.iter().map(|x| x.powi(2)).sum::<f32>() / values.len().max(1) as f32;
            // Uniform in ±a has a mean square of a² / 3.
            let amplitude = (3.0 * mean_square).sqrt();
            values.fill_with(|| amplitude * (2.0 * rng.f32() - 1.0));
        }
        self.clear();
        let k = HeadsView::nhd(&all.k, tokens, shape.kv_heads(), shape.qk_dim());
        let v = HeadsView::nhd(&all.v, tokens, shape.kv_heads(), shape.v_dim());
        let appended = k
            .and_then(|k| Ok((k, v?)))
            .map_err(Into::into)
            .and_then(|(k, v)| self.cache.append(&mut self.sequence, k, v));
        appended.expect("finite values, as many as before");
    }
}

/// Vectors `[.., from]` filled up with zeros to `[.., to]`.
fn padded(values: &[f32], from: usize, to: usize) -> Cow<'_, [f32]> {
    if from == to {
        return Cow::Borrowed(values);
    }
    let mut padded = vec![0.0; values.len() / from * to];
    for (to, from) in padded.chunks_exact_mut(to).zip(values.chunks_exact(from)) {
        to[..from.len()].copy_from_slice(from);
    }
    Cow::Owned(padded)
}
