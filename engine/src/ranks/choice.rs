//! How a prompt is shared, and why: what the cost model says of every way.

use std::fmt;

use attention::DType;
use seq_parallel::cost_model::{Layer, Mlp, Profile, Scheme};
use seq_parallel::ring::{Direction, Rates};
use seq_parallel::select::{self, Way};

use crate::{Config, Error};

/// The choice for one prompt.
#[derive(Debug, Clone)]
pub struct Choice {
    profile: Profile,
    ranks: usize,
    region: usize,
    tokens: usize,
    /// The fastest first.
    considered: Vec<Way>,
    direction: Direction,
}

impl Choice {
    /// Asks the cost model how ranks of a profile share a prompt of `tokens` tokens: so many ranks, and so many of a region that weights are
    /// split over. Stages compute in f32, keys and values are stored as `stored`.
    ///
    /// # Errors
    /// No ranks, or ranks that are not whole regions.
    pub fn new(
        config: &Config,
        profile: Profile,
        [ranks, region]: [usize; 2],
        tokens: usize,
        stored: DType,
    ) -> Result<Self, Error> {
        let heads = &config.heads;
        let layer = Layer {
            hidden: config.hidden_size as f64,
            q_heads: heads.q_heads() as f64,
            kv_heads: heads.kv_heads() as f64,
            head_dim: heads.qk_dim() as f64,
            mlp: Mlp::SwiGlu { inner: config.intermediate_size as f64 },
        };
        // On the profile's machines keys and values take their share of the bytes that stages compute in.
        let kv_bytes = profile.rates.element_bytes.min(stored.size() as f64);
        let rates = seq_parallel::cost_model::corrected::Rates { kv_bytes, ..profile.rates };
        let profile = Profile { rates, ..profile };
        let considered = select::ways(&layer, &profile, ranks, region, tokens)?;
        let ring = considered.first().map_or(1, |way| way.ring);
        let link = if ranks <= profile.node { profile.rates.intra } else { profile.rates.inter };
        let rates = Rates {
            ranks: ring,
            q_heads: heads.q_heads(),
            kv_heads: heads.kv_heads(),
            q_bytes: profile.rates.element_bytes as usize,
            kv_bytes: kv_bytes as usize,
            flops_per_s: profile.rates.attention_flops_per_s,
            bytes_per_s: link.bytes_per_s,
        };
        // A prompt that starts a sequence has no cached tokens.
        let direction = if ring > 1 { rates.choose(tokens, 0) } else { Direction::PassKv };
        Ok(Choice { profile, ranks, region, tokens, considered, direction })
    }

    /// Adjacent ranks that deal out heads; rings go over these groups.
    pub fn group(&self) -> usize {
        self.considered.first().map_or(1, |way| way.group)
    }

    /// The schemes of the attention stage and of the MLP stage.
    pub fn schemes(&self) -> [Scheme; 2] {
        self.considered.first().map_or([Scheme::Ulysses; 2], |way| [way.attention, way.mlp])
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
        match self.region {
            1 => writeln!(
                f,
                "  every rank has all weights: Megatron has nothing to split, and the MLP needs no exchange"
            )?,
            region => writeln!(
                f,
                "  weights are split over regions of {region} ranks: what a stage of Ulysses lacks is gathered"
            )?,
        }
        for (i, way) in self.considered.iter().enumerate() {
            let Way { attention, mlp, group, ring, estimate } = way;
            match self.region {
                1 => write!(f, "  {attention} {group} × ring {ring:<3} ")?,
                _ => write!(f, "  {attention} {group} × ring {ring}, MLP {mlp:<8} ")?,
            }
            match estimate {
                Err(error) => writeln!(f, "cannot be: {error}")?,
                Ok([attention, mlp]) => {
                    let us = |seconds: f64| 1e6 * seconds;
                    write!(
                        f,
                        "{:>9.1} µs of a layer: {:.1} computing, {:.1} in collectives, {:.1} waiting for the ring",
                        us(way.seconds()),
                        us(attention.compute + mlp.compute),
                        us(attention.intra + mlp.intra),
                        us(attention.exposed_ring),
                    )?;
                    if self.region > 1 {
                        write!(
                            f,
                            ", {:.1} for weights",
                            us(attention.exposed_weights + mlp.exposed_weights)
                        )?;
                    }
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
