//! The keys of `config.json` as they stand there, and the rules that turn them into a [`Config`].

use attention::HeadShape;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Architecture, Config};
use crate::Error;

/// The keys that matter, all optional: each architecture has its own defaults.
#[derive(Debug, Deserialize)]
pub(super) struct RawConfig {
    architectures: Option<Vec<String>>,
    model_type: Option<String>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    hidden_act: Option<String>,
    rms_norm_eps: Option<f64>,
    pub(super) max_position_embeddings: Option<usize>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    pub(super) rope_theta: Option<f64>,
    pub(super) rope_scaling: Option<Map<String, Value>>,
    pub(super) rope_parameters: Option<Map<String, Value>>,
    pub(super) partial_rotary_factor: Option<f64>,
    eos_token_id: Option<OneOrMany>,
    quantization_config: Option<Value>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

/// Larger than any model's sizes, small enough that no product of two overflows.
const LARGEST: usize = 1 << 24;

/// A size that must be there, and neither 0 nor absurd.
pub(super) fn size(key: &str, value: Option<usize>) -> Result<usize, Error> {
    match value {
        Some(0) => Err(Error::config(key, "at least 1", 0)),
        Some(value) if value > LARGEST => Err(Error::config(key, format!("at most {LARGEST}"), value)),
        Some(value) => Ok(value),
        None => Err(Error::config(key, "a number", "nothing")),
    }
}

impl RawConfig {
    /// Applies the architecture's rules.
    pub(super) fn check(self) -> Result<Config, Error> {
        let architecture = self.architecture()?;
        if self.quantization_config.is_some() {
            return Err(Error::config(
                "quantization_config",
                "weights in f32, f16 or bf16",
                "quantized weights",
            ));
        }
        if let Some(act) = self.hidden_act.as_deref().filter(|act| *act != "silu") {
            return Err(Error::config("hidden_act", "silu", act));
        }
        let hidden_size = size("hidden_size", self.hidden_size)?;
        let q_heads = size("num_attention_heads", self.num_attention_heads)?;
        let kv_heads = size("num_key_value_heads", self.num_key_value_heads.or(Some(q_heads)))?;
        let head_dim = match self.head_dim {
            Some(given) => size("head_dim", Some(given))?,
            None if hidden_size.is_multiple_of(q_heads) => hidden_size / q_heads,
            None => {
                return Err(Error::config(
                    "hidden_size",
                    format!("a multiple of {q_heads} heads"),
                    hidden_size,
                ));
            }
        };
        let heads = HeadShape::new(q_heads, kv_heads, head_dim, head_dim)
            .map_err(|error| Error::config("num_attention_heads", "heads that fit", error))?;
        let layers = size("num_hidden_layers", self.num_hidden_layers)?;
        let eps = self.rms_norm_eps.unwrap_or(1e-6);
        if !(eps.is_finite() && eps >= 0.0) {
            return Err(Error::config("rms_norm_eps", "a finite number of at least 0", eps));
        }
        let (rope, max_positions) = self.rope(head_dim)?;
        let attention_bias = self.attention_bias.unwrap_or(false);
        let qwen2 = architecture == Architecture::Qwen2;
        Ok(Config {
            architecture,
            vocab_size: size("vocab_size", self.vocab_size)?,
            hidden_size,
            intermediate_size: size("intermediate_size", self.intermediate_size)?,
            layers,
            heads,
            rms_norm_eps: eps as f32,
            rope,
            max_positions,
            tied_embeddings: self.tie_word_embeddings.unwrap_or(false),
            // Qwen2 always has them and knows no such key.
            qkv_bias: qwen2 || attention_bias,
            o_bias: !qwen2 && attention_bias,
            mlp_bias: architecture == Architecture::Llama && self.mlp_bias.unwrap_or(false),
            qk_norm: architecture == Architecture::Qwen3,
            sliding_windows: self.sliding_windows(architecture, layers)?,
            eos_tokens: match self.eos_token_id {
                None => Vec::new(),
                Some(OneOrMany::One(token)) => vec![token],
                Some(OneOrMany::Many(tokens)) => tokens,
            },
        })
    }

    fn architecture(&self) -> Result<Architecture, Error> {
        match self.architectures.as_deref() {
            Some([name]) => Architecture::from_name(name),
            Some([]) | None => {
                Architecture::from_name(self.model_type.as_deref().unwrap_or("(none is named)"))
            }
            Some(several) => Architecture::from_name(&several.join(" + ")),
        }
    }

    /// The window of each layer. Mistral has one on every layer; Qwen has one only where `use_sliding_window` says so,
    /// and then on the layers from `max_window_layers` on. `layer_types` overrules which layers.
    fn sliding_windows(
        &self,
        architecture: Architecture,
        layers: usize,
    ) -> Result<Vec<Option<usize>>, Error> {
        let on = match architecture {
            Architecture::Llama => false,
            Architecture::Mistral => true,
            Architecture::Qwen2 | Architecture::Qwen3 => self.use_sliding_window.unwrap_or(false),
        };
        let window = self.sliding_window.filter(|_| on);
        if window == Some(0) {
            return Err(Error::config("sliding_window", "at least 1 token", 0));
        }
        let Some(types) = &self.layer_types else {
            let first = match architecture {
                Architecture::Mistral => 0,
                // The default of transformers.
                _ => self.max_window_layers.unwrap_or(28),
            };
            return Ok((0..layers).map(|layer| window.filter(|_| layer >= first)).collect());
        };
        if types.len() != layers {
            return Err(Error::config("layer_types", format!("{layers} entries"), types.len()));
        }
        types
            .iter()
            .map(|kind| match kind.as_str() {
                "full_attention" => Ok(None),
                "sliding_attention" if window.is_some() => Ok(window),
                "sliding_attention" => Err(Error::config(
                    "layer_types",
                    "a sliding_window in use",
                    "sliding_attention without one",
                )),
                other => Err(Error::config("layer_types", "full_attention or sliding_attention", other)),
            })
            .collect()
    }
}
