//! Context extension: how the frequencies change for contexts longer than those of training.
//!
//! Every rule here is the one that Hugging Face `transformers` applies for the `rope_type` of the same name, so that a
//! `config.json` means what its authors meant. Plane `j` of `dim / 2` has `inv_freq[j] = base^(-2j / dim)` at first.

use std::f64::consts::TAU;

use crate::Error;

/// Context extension of a rotary embedding. Positions are counted in tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// None: `rope_type` "default".
    None,
    /// Position interpolation (Chen et al., arXiv 2306.15595): every frequency divided by `factor`. "linear".
    Linear {
        /// Ratio of the new context to the trained one, at least 1.
        factor: f64,
    },
    /// NTK-aware base for a sequence of `sequence_length` tokens: "dynamic".
    ///
    /// `base · (factor · n / n0 - (factor - 1))^(dim / (dim - 2))` with `n = max(sequence_length, n0)` and
    /// `n0 = original_positions`. The frequencies depend on the length, so keys that were cached under another length
    /// do not fit: give the longest length that the cache will see.
    DynamicNtk {
        /// `factor` of the configuration, at least 1.
        factor: f64,
        /// Context of training.
        original_positions: usize,
        /// Length that the frequencies are made for.
        sequence_length: usize,
    },
    /// YaRN (Peng et al., arXiv 2309.00071, eq. 23 to 25 for the ramp): "yarn".
    ///
    /// Planes that turn more than `beta_fast` times over the trained context keep their frequency, planes that turn less
    /// than `beta_slow` times have it divided by `factor`, linear in the plane's index between.
    Yarn {
        /// Ratio of the new context to the trained one, at least 1.
        factor: f64,
        /// Context of training.
        original_positions: usize,
        /// Turns over the trained context above which a plane is left alone; 32 in the paper.
        beta_fast: f64,
        /// Turns over the trained context below which a plane is interpolated; 1 in the paper.
        beta_slow: f64,
        /// Factor on rotated queries and keys.
        attention: YarnAttention,
        /// Whether the ends of the ramp are rounded outwards to whole planes; true unless the configuration says
        /// `"truncate": false`.
        truncate: bool,
    },
    /// Llama 3.1: "llama3". Wavelengths below `original / high_freq_factor` keep their frequency, wavelengths above
    /// `original / low_freq_factor` have it divided by `factor`, smooth between.
    Llama3 {
        /// Divisor of the low frequencies, at least 1.
        factor: f64,
        /// 1 in Llama 3.1.
        low_freq_factor: f64,
        /// 4 in Llama 3.1; above `low_freq_factor`.
        high_freq_factor: f64,
        /// Context of training.
        original_positions: usize,
    },
}

/// Where YaRN's factor on rotated vectors comes from. Both q and k carry it, so scores carry its square.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum YarnAttention {
    /// `0.1 · ln(factor) + 1`, the paper's (eq. 22).
    Paper,
    /// `mscale(factor, mscale) / mscale(factor, mscale_all_dim)` with `mscale(s, m) = 0.1 · m · ln(s) + 1` (DeepSeek).
    Mscale {
        /// `mscale` of the configuration.
        mscale: f64,
        /// `mscale_all_dim` of the configuration.
        mscale_all_dim: f64,
    },
    /// `attention_factor` of the configuration.
    Fixed(f64),
}

impl RopeScaling {
    /// `[dim / 2]` radians per position, and the factor on rotated vectors.
    pub(super) fn frequencies(&self, dim: usize, base: f64) -> Result<(Vec<f64>, f64), Error> {
        self.check(dim)?;
        let plain = |base: f64| (0..dim / 2).map(move |j| base.powf(-2.0 * j as f64 / dim as f64));
        Ok(match *self {
            RopeScaling::None => (plain(base).collect(), 1.0),
            RopeScaling::Linear { factor } => (plain(base).map(|f| f / factor).collect(), 1.0),
            RopeScaling::DynamicNtk { factor, original_positions, sequence_length } => {
                let ratio = sequence_length.max(original_positions) as f64 / original_positions as f64;
                let grown = factor * ratio - (factor - 1.0);
                let exponent = dim as f64 / (dim as f64 - 2.0);
                (plain(base * grown.powf(exponent)).collect(), 1.0)
            }
            RopeScaling::Yarn { factor, original_positions, beta_fast, beta_slow, attention, truncate } => {
                let ramp = yarn_ramp(dim, base, original_positions as f64, beta_fast, beta_slow, truncate);
                let frequencies =
                    plain(base).zip(ramp).map(|(f, ramp)| f / factor * ramp + f * (1.0 - ramp)).collect();
                (frequencies, attention.factor(factor))
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
                let scaled = plain(base).map(|f| {
                    // Turns over the trained context, between the two factors in the smooth part.
                    let turns = original_positions as f64 * f / TAU;
                    let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let kept = kept.clamp(0.0, 1.0);
                    f / factor * (1.0 - kept) + f * kept
                });
                (scaled.collect(), 1.0)
            }
        })
    }

    fn check(&self, dim: usize) -> Result<(), Error> {
        let require = |holds: bool, argument, expected: &str, found: &dyn std::fmt::Display| {
            if holds { Ok(()) } else { Err(Error::argument(argument, expected, found)) }
        };
        let factor_in_range = |factor: f64| {
            require(factor.is_finite() && factor >= 1.0, "factor", "a finite number of at least 1", &factor)
        };
        let original_in_range =
            |positions: usize| require(positions > 0, "original_positions", "at least 1", &positions);
        match *self {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => factor_in_range(factor),
            RopeScaling::DynamicNtk { factor, original_positions, .. } => {
                factor_in_range(factor)?;
                original_in_range(original_positions)?;
                require(dim > 2, "rotary_dim", "above 2 with dynamic NTK scaling", &dim)
            }
            RopeScaling::Yarn { factor, original_positions, beta_fast, beta_slow, attention, .. } => {
                factor_in_range(factor)?;
                original_in_range(original_positions)?;
                require(beta_slow > 0.0, "beta_slow", "above 0", &beta_slow)?;
                require(
                    beta_fast.is_finite() && beta_fast >= beta_slow,
                    "beta_fast",
                    "finite and at least beta_slow",
                    &beta_fast,
                )?;
                let factor = attention.factor(factor);
                require(factor.is_finite() && factor > 0.0, "attention_factor", "finite and above 0", &factor)
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
                factor_in_range(factor)?;
                original_in_range(original_positions)?;
                require(low_freq_factor > 0.0, "low_freq_factor", "above 0", &low_freq_factor)?;
                require(
                    high_freq_factor.is_finite() && high_freq_factor > low_freq_factor,
                    "high_freq_factor",
                    "finite and above low_freq_factor",
                    &high_freq_factor,
                )
            }
        }
    }
}

impl YarnAttention {
    fn factor(&self, scaling: f64) -> f64 {
        let mscale = |m: f64| 0.1 * m * scaling.ln() + 1.0;
        match *self {
            YarnAttention::Paper => mscale(1.0),
            YarnAttention::Mscale { mscale: m, mscale_all_dim } => mscale(m) / mscale(mscale_all_dim),
            YarnAttention::Fixed(factor) => factor,
        }
    }
}

/// Share of interpolation per plane: 0 keeps the frequency, 1 divides it.
fn yarn_ramp(
    dim: usize,
    base: f64,
    original: f64,
    beta_fast: f64,
    beta_slow: f64,
    truncate: bool,
) -> impl Iterator<Item = f64> {
    // The plane that turns `turns` times over the trained context, as a real number.
    let plane = |turns: f64| dim as f64 * (original / (turns * TAU)).ln() / (2.0 * base.ln());
    let (mut low, mut high) = (plane(beta_fast), plane(beta_slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
    if low == high {
        high += 0.001; // transformers' guard against a ramp of no width
    }
    (0..dim / 2).map(move |j| ((j as f64 - low) / (high - low)).clamp(0.0, 1.0))
}
