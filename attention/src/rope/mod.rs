//! Rotary position embedding (RoFormer, arXiv 2104.09864), with the context extensions in use.
//!
//! Each frequency plane is a pair of channels of a query or key; at position `p` plane `j` turns by the angle
//! `p · inv_freq[j]`. Angles, sines and cosines are computed in f64, kept in f32 and applied in f32.

mod scaling;

pub use scaling::{RopeScaling, YarnAttention};

use crate::Error;
use crate::error::check_len;

/// Which two channels make a frequency plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RopeLayout {
    /// Channels `j` and `j + rotary_dim / 2` (GPT-NeoX, Llama in the Hugging Face layout, Qwen, Mistral).
    HalfSplit,
    /// Channels `2j` and `2j + 1` (RoFormer, GPT-J, Llama in Meta's layout).
    Interleaved,
}

/// What a model's configuration says of its rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Channels of a head.
    pub head_dim: usize,
    /// Leading channels of a head that turn; the others pass unchanged (partial rotary). Even, at most `head_dim`.
    pub rotary_dim: usize,
    /// Base of the frequencies, `rope_theta`.
    pub base: f64,
    /// Which channels pair up.
    pub layout: RopeLayout,
    /// Context extension.
    pub scaling: RopeScaling,
}

impl RopeConfig {
    /// The plain embedding of Llama-like models: all `head_dim` channels, half-split, no scaling.
    pub fn new(head_dim: usize, base: f64) -> Self {
        RopeConfig {
            head_dim,
            rotary_dim: head_dim,
            base,
            layout: RopeLayout::HalfSplit,
            scaling: RopeScaling::None,
        }
    }

    /// Radians per position of each plane, `[rotary_dim / 2]`, and the factor on the rotated vector (1 but for YaRN).
    ///
    /// # Errors
    /// [`Error::Argument`] when a field is out of range.
    pub fn frequencies(&self) -> Result<(Vec<f64>, f64), Error> {
        if self.rotary_dim == 0 || !self.rotary_dim.is_multiple_of(2) || self.rotary_dim > self.head_dim {
            return Err(Error::argument(
                "rotary_dim",
                format!("an even number from 2 to head_dim = {}", self.head_dim),
                self.rotary_dim,
            ));
        }
        if !(self.base.is_finite() && self.base > 1.0) {
            return Err(Error::argument("base", "a finite number above 1", self.base));
        }
        self.scaling.frequencies(self.rotary_dim, self.base)
    }
}

/// Sines and cosines of a [`RopeConfig`] for the first positions of a sequence.
#[derive(Debug, Clone)]
pub struct Rope {
    config: RopeConfig,
    inv_freq: Vec<f64>,
    attention_factor: f64,
    positions: usize,
    /// `[positions, rotary_dim / 2]`, times the attention factor.
    cos: Vec<f32>,
    /// As `cos`.
    sin: Vec<f32>,
}

impl Rope {
    /// Tables for positions `0..positions`: 4 · `rotary_dim` bytes each.
    ///
    /// # Errors
    /// [`Error::Argument`] when the configuration is out of range or the tables do not fit memory.
    pub fn new(config: RopeConfig, positions: usize) -> Result<Self, Error> {
        let (inv_freq, attention_factor) = config.frequencies()?;
        let planes = inv_freq.len();
        let table = || {
            let mut table = Vec::new();
            let reserved = positions.checked_mul(planes).map(|len| table.try_reserve_exact(len).is_ok());
            let too_many = || Error::argument("positions", "tables that fit memory", positions);
            if reserved == Some(true) { Ok(table) } else { Err(too_many()) }
        };
        let (mut cos, mut sin) = (table()?, table()?);
        for position in 0..positions {
            for &frequency in &inv_freq {
                let (s, c) = (position as f64 * frequency).sin_cos();
                cos.push((c * attention_factor) as f32);
                sin.push((s * attention_factor) as f32);
            }
        }
        Ok(Rope { config, inv_freq, attention_factor, positions, cos, sin })
    }

    /// The configuration that the tables were made from.
    pub fn config(&self) -> &RopeConfig {
        &self.config
    }

    /// Positions in the tables.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Radians per position of each plane, `[rotary_dim / 2]`.
    pub fn inv_freq(&self) -> &[f64] {
        &self.inv_freq
    }

    /// Factor on every rotated vector, already in the tables: 1, or YaRN's attention factor.
    pub fn attention_factor(&self) -> f64 {
        self.attention_factor
    }

    /// Cosines `[positions, rotary_dim / 2]`, times the attention factor: what a kernel reads.
    pub fn cos(&self) -> &[f32] {
        &self.cos
    }

    /// Sines `[positions, rotary_dim / 2]`, times the attention factor: what a kernel reads.
    pub fn sin(&self) -> &[f32] {
        &self.sin
    }

    /// Turns queries or keys `x` `[tokens, heads, head_dim]` in place; `positions` `[tokens]`, in any order.
    ///
    /// # Errors
    /// [`Error::Argument`] when the lengths do not fit or a position is past the tables; `x` is then unchanged.
    pub fn apply(&self, x: &mut [f32], heads: usize, positions: &[u32]) -> Result<(), Error> {
        check_len("x", x.len(), &[positions.len(), heads, self.config.head_dim])?;
        if let Some(&past) = positions.iter().find(|&&p| p as usize >= self.positions) {
            return Err(Error::argument("positions", format!("below {}", self.positions), past));
        }
        if x.is_empty() {
            return Ok(());
        }
        let planes = self.inv_freq.len();
        let token_len = heads * self.config.head_dim;
        for (token, &position) in x.chunks_exact_mut(token_len).zip(positions) {
            let table = position as usize * planes..(position as usize + 1) * planes;
            let (cos, sin) = (&self.cos[table.clone()], &self.sin[table]);
            for head in token.chunks_exact_mut(self.config.head_dim) {
                rotate(&mut head[..self.config.rotary_dim], self.config.layout, cos, sin);
            }
        }
        Ok(())
    }
}

/// Turns the planes of one head `[rotary_dim]`: `(a, b) -> (a·cos - b·sin, b·cos + a·sin)`.
fn rotate(x: &mut [f32], layout: RopeLayout, cos: &[f32], sin: &[f32]) {
    let turn = |a: &mut f32, b: &mut f32, c: f32, s: f32| {
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    };
    match layout {
        RopeLayout::HalfSplit => {
            let (low, high) = x.split_at_mut(x.len() / 2);
            for (((a, b), &c), &s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                turn(a, b, c, s);
            }
        }
        RopeLayout::Interleaved => {
            for ((pair, &c), &s) in x.chunks_exact_mut(2).zip(cos).zip(sin) {
                let [a, b] = pair else { unreachable!("chunks of two") };
                turn(a, b, c, s);
            }
        }
    }
}
