//! What a model is: `config.json` of a Hugging Face checkpoint, read and checked.

mod raw;
mod rope;

use std::path::Path;

use attention::rope::RopeConfig;
use attention::{AttentionSpec, HeadShape, Mask, Score};

use crate::Error;
use raw::RawConfig;

/// The architectures that the engine runs: all are Llama with small differences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `LlamaForCausalLM`.
    Llama,
    /// `MistralForCausalLM`: a sliding window on every layer.
    Mistral,
    /// `Qwen2ForCausalLM`: biases on the q, k and v projections.
    Qwen2,
    /// `Qwen3ForCausalLM`: RMS norms on q and k, before RoPE.
    Qwen3,
}

impl Architecture {
    /// Every architecture, by the name that checkpoints give it.
    pub const ALL: [(&'static str, Architecture); 4] = [
        ("LlamaForCausalLM", Architecture::Llama),
        ("MistralForCausalLM", Architecture::Mistral),
        ("Qwen2ForCausalLM", Architecture::Qwen2),
        ("Qwen3ForCausalLM", Architecture::Qwen3),
    ];

    fn from_name(name: &str) -> Result<Self, Error> {
        Self::ALL.iter().find(|(known, _)| *known == name).map(|(_, architecture)| *architecture).ok_or_else(
            || Error::UnsupportedArchitecture {
                found: name.to_string(),
                supported: Self::ALL.map(|(known, _)| known).join(", "),
            },
        )
    }
}

/// Shape and constants of a model, checked to be consistent.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Which of the known architectures.
    pub architecture: Architecture,
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Size of the residual stream.
    pub hidden_size: usize,
    /// Inner size of the feed-forward block.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads, KV heads, and the size of their vectors (`head_dim`, given or `hidden_size / q_heads`).
    pub heads: HeadShape,
    /// ε of every RMS norm.
    pub rms_norm_eps: f32,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Longest context that the model was made for, in tokens.
    pub max_positions: usize,
    /// Whether the output projection is the embedding table.
    pub tied_embeddings: bool,
    /// Whether the q, k and v projections have biases.
    pub qkv_bias: bool,
    /// Whether the output projection of attention has a bias.
    pub o_bias: bool,
    /// Whether the feed-forward projections have biases.
    pub mlp_bias: bool,
    /// Whether q and k pass an RMS norm per head before RoPE.
    pub qk_norm: bool,
    /// Keys that a query sees, its own included, per layer; `None` for all. `[layers]`
    pub sliding_windows: Vec<Option<usize>>,
    /// Tokens that end a generation.
    pub eos_tokens: Vec<u32>,
}

impl Config {
    /// Reads `config.json` of a checkpoint's folder.
    ///
    /// # Errors
    /// An unreadable file, a missing key, an architecture, RoPE type or activation without code here, or sizes that do
    /// not fit each other.
    pub fn read(checkpoint: &Path) -> Result<Self, Error> {
        let path = checkpoint.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(Error::reading(&path))?;
        let raw: RawConfig = serde_json::from_str(&text).map_err(|error| Error::malformed(&path, error))?;
        raw.check()
    }

    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn parse(text: &str) -> Result<Self, Error> {
        let raw: RawConfig =
            serde_json::from_str(text).map_err(|error| Error::malformed(Path::new("config.json"), error))?;
        raw.check()
    }

    /// What attention computes in a layer: heads, scale `1 / sqrt(head_dim)`, causal mask with the layer's window.
    ///
    /// # Errors
    /// [`Error::Argument`] when there is no such layer.
    pub fn attention(&self, layer: usize) -> Result<AttentionSpec, Error> {
        let window = self
            .sliding_windows
            .get(layer)
            .ok_or_else(|| Error::argument("layer", format!("below {}", self.layers), layer))?;
        Ok(AttentionSpec {
            shape: self.heads,
            score: Score::new((self.heads.qk_dim() as f32).sqrt().recip())?,
            mask: match *window {
                Some(window) => Mask::sliding_window(window, 0)?,
                None => Mask::Causal,
            },
        })
    }

    /// Elements of K and V of one token in all layers.
    pub fn kv_elements_per_token(&self) -> usize {
        self.layers * self.heads.kv_heads() * (self.heads.qk_dim() + self.heads.v_dim())
    }

    /// Checks that a sequence fits the model.
    ///
    /// # Errors
    /// [`Error::Context`] when `tokens` is over [`max_positions`](Self::max_positions).
    pub fn check_context(&self, tokens: usize) -> Result<(), Error> {
        if tokens > self.max_positions {
            return Err(Error::Context { asked: tokens, maximum: self.max_positions });
        }
        Ok(())
    }

    /// Checks that tokens are in the vocabulary.
    ///
    /// # Errors
    /// [`Error::Token`] for the first that is not.
    pub fn check_tokens(&self, tokens: &[u32]) -> Result<(), Error> {
        match tokens.iter().find(|&&token| token as usize >= self.vocab_size) {
            Some(&token) => Err(Error::Token { token, vocab_size: self.vocab_size }),
            None => Ok(()),
        }
    }
}
