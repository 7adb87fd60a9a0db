//! The knobs of the modes `hack2`, `hack4` and `hack8`.

use attention::DType;
use homomorphic_quant::reference::Prefill;
use homomorphic_quant::{Bits, Config, Layout, Rounding};

use crate::Error;
use crate::mode::Mode;

/// The options of the quantized modes.
pub(crate) const OPTIONS: &[&str] =
    &["k-bits", "v-bits", "partition", "sinks", "dtype", "layout", "rounding", "seed", "prefill"];

/// How a quantized cache was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// How keys and values are quantized.
    pub config: Config,
    /// How prompts are computed.
    pub prefill: Prefill,
}

impl Options {
    /// Reads a mode's options, on top of codes of `bits` bits.
    ///
    /// # Errors
    /// [`Error::Mode`] for a value that is none of those expected.
    pub fn new(mode: &Mode, bits: usize) -> Result<Self, Error> {
        let refuse = |error: homomorphic_quant::Error| mode.refuse(error.to_string());
        let width = |key| Bits::new(mode.option(key, bits, "2, 4 or 8")?).map_err(refuse);
        let config = Config::new(width("k-bits")?, width("v-bits")?);
        let partition = mode.option("partition", config.partition(), "32, 64 or 128")?;
        let sinks = mode.option("sinks", config.sinks(), "a number of tokens")?;
        let config = config.with_partition(partition).and_then(|c| c.with_sinks(sinks)).map_err(refuse)?;
        let dtype = one_of(mode, "dtype", &[("bf16", DType::BF16), ("f16", DType::F16)])?;
        let layout =
            one_of(mode, "layout", &[("channel", Layout::PerChannelKey), ("token", Layout::PerTokenKey)])?;
        let seed = mode.option("seed", 0, "a number")?;
        let stochastic = Rounding::Stochastic { seed };
        let rounding =
            one_of(mode, "rounding", &[("nearest", Rounding::Nearest), ("stochastic", stochastic)])?;
        let prefill = one_of(mode, "prefill", &[("exact", Prefill::Exact), ("codes", Prefill::Codes)])?;
        let config = config.with_dtype(dtype).map_err(refuse)?.with_layout(layout).with_rounding(rounding);
        Ok(Options { config, prefill })
    }
}

/// The value of an option with named values, the first of which is the default.
fn one_of<T: Copy>(mode: &Mode, key: &str, values: &[(&str, T)]) -> Result<T, Error> {
    let name = mode.option(key, values[0].0.to_string(), "a name")?;
    values.iter().find(|(known, _)| *known == name).map(|&(_, value)| value).ok_or_else(|| {
        let known: Vec<_> = values.iter().map(|(name, _)| *name).collect();
        mode.refuse(format!("{key}: expected {}, found {name:?}", known.join(" or ")))
    })
}
