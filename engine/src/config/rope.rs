//! RoPE keys of `config.json`: `rope_theta` and `rope_scaling` (with `type` or `rope_type`), or `rope_parameters`.

use attention::rope::{RopeConfig, RopeScaling, YarnAttention};
use serde_json::{Map, Value};

use super::raw::{RawConfig, size};
use crate::Error;

/// The `rope_type`s that the engine knows.
const SUPPORTED: &str = "default, linear, dynamic, yarn, llama3";

impl RawConfig {
    /// The rotary embedding, and the longest context it serves.
    pub(super) fn rope(&self, head_dim: usize) -> Result<(RopeConfig, usize), Error> {
        let max_positions = size("max_position_embeddings", self.max_position_embeddings)?;
        let empty = Map::new();
        let (section, map) = match (&self.rope_parameters, &self.rope_scaling) {
            (Some(map), _) => ("rope_parameters", map),
            (None, Some(map)) => ("rope_scaling", map),
            (None, None) => ("rope_scaling", &empty),
        };
        let keys = Keys { section, map };
        if let Some((key, _)) = map.iter().find(|(_, value)| value.is_object()) {
            return Err(Error::config(
                format!("{section}.{key}"),
                "one embedding for all layers",
                "one per layer type",
            ));
        }
        let partial = keys.number("partial_rotary_factor")?.or(self.partial_rotary_factor);
        if let Some(partial) = partial.filter(|&partial| partial != 1.0) {
            return Err(Error::config("partial_rotary_factor", 1, partial));
        }

        let base = keys.number("rope_theta")?.or(self.rope_theta).unwrap_or(10_000.0);
        let original = keys.whole("original_max_position_embeddings")?;
        let kind = match map.get("rope_type").or_else(|| map.get("type")) {
            None | Some(Value::Null) => "default",
            Some(Value::String(kind)) => kind,
            Some(other) => return Err(Error::config(format!("{section}.rope_type"), "a name", other)),
        };
        let mut longest = max_positions;
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: keys.required("factor")? },
            // The base grows only past the trained context, and cached keys would not fit the new base: the engine stays
            // within it.
            "dynamic" => {
                longest = original.unwrap_or(max_positions).min(max_positions);
                RopeScaling::DynamicNtk {
                    factor: keys.required("factor")?,
                    original_positions: longest,
                    sequence_length: longest,
                }
            }
            "yarn" => {
                let factor = keys.required("factor")?;
                if let Some(original) = original {
                    // Some checkpoints leave max_position_embeddings at the trained context.
                    longest = longest.max((original as f64 * factor) as usize);
                }
                RopeScaling::Yarn {
                    factor,
                    original_positions: original.unwrap_or(max_positions),
                    beta_fast: keys.number("beta_fast")?.unwrap_or(32.0),
                    beta_slow: keys.number("beta_slow")?.unwrap_or(1.0),
                    attention: keys.yarn_attention()?,
                    truncate: map.get("truncate").and_then(Value::as_bool).unwrap_or(true),
                }
            }
            "llama3" => RopeScaling::Llama3 {
                factor: keys.required("factor")?,
                low_freq_factor: keys.required("low_freq_factor")?,
                high_freq_factor: keys.required("high_freq_factor")?,
                original_positions: original
                    .ok_or_else(|| keys.missing("original_max_position_embeddings"))?,
            },
            unknown => {
                return Err(Error::UnsupportedRope {
                    found: unknown.to_string(),
                    supported: SUPPORTED.to_string(),
                });
            }
        };
        let rope = RopeConfig { scaling, ..RopeConfig::new(head_dim, base) };
        rope.frequencies().map_err(|error| Error::config(section, "a rotary embedding in range", error))?;
        Ok((rope, longest))
    }
}

/// The object that holds the keys, and its name for errors.
struct Keys<'a> {
    section: &'static str,
    map: &'a Map<String, Value>,
}

impl Keys<'_> {
    fn number(&self, key: &str) -> Result<Option<f64>, Error> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) => Ok(Some(number)),
                None => Err(Error::config(format!("{}.{key}", self.section), "a number", value)),
            },
        }
    }

    fn whole(&self, key: &str) -> Result<Option<usize>, Error> {
        match self.number(key)? {
            None => Ok(None),
            Some(number) if number >= 1.0 && number.fract() == 0.0 => Ok(Some(number as usize)),
            Some(number) => {
                Err(Error::config(format!("{}.{key}", self.section), "a whole number of at least 1", number))
            }
        }
    }

    fn required(&self, key: &str) -> Result<f64, Error> {
        self.number(key)?.ok_or_else(|| self.missing(key))
    }

    fn missing(&self, key: &str) -> Error {
        Error::config(format!("{}.{key}", self.section), "a number", "nothing")
    }

    /// The order in which transformers looks: an explicit factor, then both mscale keys, then the paper's formula.
    fn yarn_attention(&self) -> Result<YarnAttention, Error> {
        if let Some(factor) = self.number("attention_factor")? {
            return Ok(YarnAttention::Fixed(factor));
        }
        let used = |key| Ok::<_, Error>(self.number(key)?.filter(|&mscale| mscale != 0.0));
        Ok(match (used("mscale")?, used("mscale_all_dim")?) {
            (Some(mscale), Some(mscale_all_dim)) => YarnAttention::Mscale { mscale, mscale_all_dim },
            _ => YarnAttention::Paper,
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::Config;
    use serde_json::json;

    /// Dynamic NTK scaling (transformers, `_compute_dynamic_ntk_parameters`) leaves the base as it is up to the trained
    /// context, and the engine stays within it: frequencies are θ^(-2i/d), whatever the factor.
    #[test]
    fn dynamic_scaling_is_none_within_the_trained_context() {
        for (case, original, longest) in [
            ("trained on all positions", None, 4096),
            ("extended", Some(1024), 1024),
            ("short", Some(9000), 4096),
        ] {
            let config = json!({
                "architectures": ["LlamaForCausalLM"], "vocab_size": 40, "hidden_size": 64, "intermediate_size": 64,
                "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 4096, "rope_theta": 500.0,
                "rope_scaling":
                    {"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": original}
            });
            let config = Config::parse(&config.to_string()).unwrap_or_else(|error| panic!("{case}: {error}"));
            assert_eq!(config.max_positions, longest, "{case}");
            assert!(config.check_context(longest + 1).is_err(), "{case}");
            let (frequencies, factor) = config.rope.frequencies().unwrap();
            assert_eq!((frequencies.len(), factor), (8, 1.0), "{case}");
            for (i, found) in frequencies.iter().enumerate() {
                let expected = 500f64.powf(-2.0 * i as f64 / 16.0);
                assert!((found / expected - 1.0).abs() < 1e-12, "{case}, plane {i}: {found}, not {expected}");
            }
        }
    }
}
