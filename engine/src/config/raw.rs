//! The keys of `config.json` as they stand there, and the rules that turn them into a [`Config`].

use attention::HeadShape;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::{Architecture, Config};
use crate::Error;

/// The keys that matter, all optional: each architecture has its own defaults, those of its configuration class in
/// transformers. Sizes without which nothing runs (layers, heads, vocabulary, positions) must be there.
#[derive(Debug, Deserialize)]
pub(super) struct RawConfig {
    architectures: Option<Vec<String>>,
    model_type: Option<String>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    #[serde(default, deserialize_with = "given")]
    num_key_value_heads: Key<usize>,
    #[serde(default, deserialize_with = "given")]
    head_dim: Key<usize>,
    hidden_act: Option<String>,
    rms_norm_eps: Option<f64>,
    pub(super) max_position_embeddings: Option<usize>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    #[serde(default, deserialize_with = "given")]
    sliding_window: Key<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    pub(super) rope_theta: Option<f64>,
    pub(super) rope_scaling: Option<Map<String, Value>>,
    pub(super) rope_parameters: Option<Map<String, Value>>,
    pub(super) partial_rotary_factor: Option<f64>,
    #[serde(default, deserialize_with = "given")]
    eos_token_id: Key<OneOrMany>,
    quantization_config: Option<Value>,
}

/// A key that transformers gives a default where it is absent, and none where it is null.
type Key<T> = Option<Option<T>>;

fn given<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Key<T>, D::Error> {
    Option::deserialize(deserializer).map(Some)
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
        let kv_heads = match architecture {
            Architecture::Llama => q_heads,
            Architecture::Mistral => 8,
            Architecture::Qwen2 | Architecture::Qwen3 => 32,
        };
        let kv_heads = self.num_key_value_heads.unwrap_or(Some(kv_heads)).unwrap_or(q_heads);
        let kv_heads = size("num_key_value_heads", Some(kv_heads))?;
        let head_dim = match self.head_dim.flatten() {
            None if architecture == Architecture::Qwen3 => 128,
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
            eos_tokens: match (self.eos_token_id, architecture) {
                (Some(Some(OneOrMany::One(token))), _) => vec![token],
                (Some(Some(OneOrMany::Many(tokens))), _) => tokens,
                (None, Architecture::Llama | Architecture::Mistral) => vec![2],
                (None | Some(None), _) => Vec::new(),
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
        let window = self.sliding_window.unwrap_or(Some(4096)).filter(|_| on);
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(architecture: &str, changes: &Value) -> Result<Config, Error> {
        let mut keys = json!({
            "architectures": [architecture], "vocab_size": 40, "hidden_size": 2048, "intermediate_size": 64,
            "num_hidden_layers": 30, "num_attention_heads": 32, "max_position_embeddings": 8192
        });
        keys.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        Config::parse(&keys.to_string())
    }

    /// KV heads, head_dim, windows of the first and the last layer, ends of text.
    type Defaults<'a> = (usize, usize, [Option<usize>; 2], &'a [u32]);

    /// As the configuration classes of transformers have them.
    #[test]
    fn absent_keys_have_the_architectures_defaults_and_null_has_none() {
        let none = [None, None];
        let null = json!({
            "num_key_value_heads": null, "head_dim": null, "sliding_window": null, "eos_token_id": null,
            "use_sliding_window": true
        });
        let cases: &[(&str, &str, Value, Defaults<'_>)] = &[
            ("absent", "LlamaForCausalLM", json!({}), (32, 64, none, &[2])),
            ("absent", "MistralForCausalLM", json!({}), (8, 64, [Some(4096); 2], &[2])),
            ("absent", "Qwen2ForCausalLM", json!({}), (32, 64, none, &[])),
            ("absent", "Qwen3ForCausalLM", json!({}), (32, 128, none, &[])),
            (
                "a window in use",
                "Qwen2ForCausalLM",
                json!({"use_sliding_window": true}),
                (32, 64, [None, Some(4096)], &[]),
            ),
            (
                "a window in use",
                "Qwen3ForCausalLM",
                json!({"use_sliding_window": true, "max_window_layers": 0}),
                (32, 128, [Some(4096); 2], &[]),
            ),
            ("null", "LlamaForCausalLM", null.clone(), (32, 64, none, &[])),
            ("null", "MistralForCausalLM", null.clone(), (32, 64, none, &[])),
            ("null", "Qwen2ForCausalLM", null, (32, 64, none, &[])),
            (
                "given",
                "MistralForCausalLM",
                json!({"num_key_value_heads": 4, "head_dim": 16, "sliding_window": 7, "eos_token_id": [3, 5]}),
                (4, 16, [Some(7); 2], &[3, 5]),
            ),
        ];
        for (case, architecture, changes, expected) in cases {
            let config =
                parse(architecture, changes).unwrap_or_else(|e| panic!("{architecture}, {case}: {e}"));
            let windows = [config.sliding_windows[0], config.sliding_windows[29]];
            let found: Defaults<'_> =
                (config.heads.kv_heads(), config.heads.qk_dim(), windows, &config.eos_tokens);
            assert_eq!(found, *expected, "{architecture}, {case}");
        }
    }
}
