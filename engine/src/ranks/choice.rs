//! How a prompt is shared, and why: what the cost model says of every pair of degrees.

use std::fmt;

use seq_parallel::cost_model::{Layer, Mlp, Profile};
use seq_parallel::ring::{Direction, Rates};
use seq_parallel::select::{self, Degrees};

use crate::{Config, Error};

/// The choice for one prompt.
#[derive(Debug, Clone)]
pub struct Choice {
    profile: Profile,
    ranks: usize,
    tokens: usize,
    /// The fastest first.
    considered: Vec<Degrees>,
    direction: Direction,
}

impl Choice {
    /// Asks the cost model how `ranks` ranks of a profile share a prompt of `tokens` tokens.
    ///
    /// # Errors
    /// No ranks.
    pub fn new(config: &Config, profile: Profile, ranks: usize, tokens: usize) -> Result<Self, Error> {
        let heads = &config.heads;
        let layer = Layer {
            hidden: config.hidden_size as f64,
            q_heads: heads.q_heads() as f64,
            kv_heads: heads.kv_heads() as f64,
            head_dim: heads.qk_dim() as f64,
            mlp: Mlp::SwiGlu { inner: config.intermediate_size as f64 },
        };
        let considered = select::degrees(&layer, &profile, ranks, tokens)?;
        let ring = considered.first().map_or(1, |degrees| degrees.ring);
        let link = if ranks <= profile.node { profile.rates.intra } else { profile.rates.inter };
        let rates = Rates {
            ranks: ring,
            q_heads: heads.q_heads(),
            kv_heads: heads.kv_heads(),
            element_bytes: profile.rates.element_bytes as usize,
            flops_per_s: profile.rates.attention_flops_per_s,
            bytes_per_s: link.bytes_per_s,
        };
        // A prompt that starts a sequence has no cached tokens.
        let direction = if ring > 1 { rates.choose(tokens, 0) } else { Direction::PassKv };
        Ok(Choice { profile, ranks, tokens, considered, direction })
    }

    /// Ranks of a group that deals out heads; rings go over the groups.
    pub fn group(&self) -> usize {
        self.considered.first().map_or(1, |degrees| degrees.ulysses)
    }

    /// What goes round the rings.
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// Tokens of the prompt.
    pub fn tokens(&self) -> usize {
        self.tokens
    }
}

impl fmt::Display for Choice {
    /// One line for what was chosen, one for each alternative.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "Sharing {} tokens among {} ranks, by the cost model (nothing was measured):",
            self.tokens, self.ranks
        )?;
        writeln!(f, "  profile {}: {}", self.profile.name, self.profile.summary)?;
        writeln!(
            f,
            "  every rank has all weights: Megatron has nothing to split, and the MLP needs no exchange"
        )?;
        for (i, Degrees { ulysses, ring, estimate }) in self.considered.iter().enumerate() {
            write!(f, "  Ulysses {ulysses} × ring {ring:<3} ")?;
            match estimate {
                Err(error) => writeln!(f, "cannot be: {error}")?,
                Ok(seconds) => {
                    let us = |seconds: f64| 1e6 * seconds;
                    write!(
                        f,
                        "{:>9.1} µs of attention in a layer: {:.1} computing, {:.1} in collectives, {:.1} waiting for the ring",
                        us(seconds.total()),
                        us(seconds.compute),
                        us(seconds.intra),
                        us(seconds.exposed_ring),
                    )?;
                    match i {
                        0 if *ring > 1 => writeln!(f, "; chosen, with {}", self.direction)?,
                        0 => writeln!(f, "; chosen")?,
                        _ => writeln!(f)?,
                    }
                }
            }
        }
        Ok(())
    }
}
