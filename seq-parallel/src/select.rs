//! Selection: the cheapest of the four combinations of schemes for attention and MLP (PecSched §5.3).
//!
//! "We compute and estimate total communication time and computation time, and select the one with the lowest overall latency"; what
//! decides is the length of the segment.

use crate::Error;
use crate::cost_model::corrected::{self, Rates, Seconds};
use crate::cost_model::{Cluster, Layer, Profile, Scheme, paper};

/// A scheme for each stage, and what a layer takes with it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// Of the attention stage.
    pub attention: Scheme,
    /// Of the MLP stage.
    pub mlp: Scheme,
    /// Estimated seconds of a layer.
    pub seconds: f64,
}

/// Which formulas decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Model {
    /// The paper's, as printed.
    Paper,
    /// The corrected ones.
    #[default]
    Corrected,
}

const SCHEMES: [Scheme; 2] = [Scheme::Megatron, Scheme::Ulysses];

/// Estimates all four combinations for `s` tokens per GPU, the fastest first. Megatron needs tensor parallelism: with regions of one GPU
/// there is one combination.
///
/// # Errors
/// As [`Cluster::check`]; [`Error::Divisibility`] when heads cannot be dealt: Megatron deals them to a region, Ulysses to a node.
pub fn combinations(
    model: Model,
    layer: &Layer,
    cluster: &Cluster,
    rates: &Rates,
    s: f64,
) -> Result<Vec<Choice>, Error> {
    cluster.check()?;
    let mut choices = Vec::new();
    let mut refused = None;
    for attention in SCHEMES {
        for mlp in SCHEMES {
            if cluster.region == 1 && [attention, mlp].contains(&Scheme::Megatron) {
                continue;
            }
            if let Err(error) = deal(attention, layer, cluster) {
                refused = Some(error);
                continue;
            }
            let seconds = match model {
                Model::Paper => paper_seconds(attention, mlp, layer, cluster, rates, s),
                Model::Corrected => corrected_seconds(attention, mlp, layer, cluster, rates, s),
            };
            choices.push(Choice { attention, mlp, seconds });
        }
    }
    choices.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    match (choices.is_empty(), refused) {
        (true, Some(error)) => Err(error),
        _ => Ok(choices),
    }
}

/// The fastest combination.
///
/// # Errors
/// As [`combinations`].
pub fn fastest(
    model: Model,
    layer: &Layer,
    cluster: &Cluster,
    rates: &Rates,
    s: f64,
) -> Result<Choice, Error> {
    let choices = combinations(model, layer, cluster, rates, s)?;
    choices
        .first()
        .copied()
        .ok_or_else(|| Error::argument("region", "a region that some scheme fits", cluster.region))
}

/// How a prompt over replicas of the whole model is shared: Ulysses in groups of ranks, a ring over the groups.
#[derive(Debug, Clone, PartialEq)]
pub struct Degrees {
    /// Ranks of a group.
    pub ulysses: usize,
    /// Groups, which are the members of a ring.
    pub ring: usize,
    /// Estimated seconds of a layer's attention stage, or why heads cannot be dealt to such groups.
    pub estimate: Result<Seconds, Error>,
}

/// Estimates every pair of degrees u · r = `ranks` by the corrected model, for a prompt of `tokens` tokens: the fastest first, those that
/// cannot be last.
///
/// Every rank has all weights, so there is nothing for Megatron to split, and the MLP takes the same with all of them. What fits a node of
/// the profile uses its links, what does not the network.
///
/// # Errors
/// [`Error::Argument`] for no ranks.
pub fn degrees(layer: &Layer, profile: &Profile, ranks: usize, tokens: usize) -> Result<Vec<Degrees>, Error> {
    if ranks == 0 {
        return Err(Error::argument("ranks", "at least 1", 0));
    }
    let estimate = |ulysses: usize| -> Result<Seconds, Error> {
        let cluster = Cluster { nodes: ranks / ulysses, gpus: ulysses, region: 1 };
        cluster.check()?;
        deal(Scheme::Ulysses, layer, &cluster)?;
        let link = |fits| if fits { profile.rates.intra } else { profile.rates.inter };
        let rates = Rates {
            intra: link(ulysses <= profile.node),
            inter: link(ranks <= profile.node),
            ..profile.rates
        };
        let s = tokens as f64 / ranks as f64;
        Ok(corrected::attention(Scheme::Ulysses, layer, &cluster, &rates, s, 0.0))
    };
    let divisors = (1..=ranks).filter(|ulysses| ranks.is_multiple_of(*ulysses));
    let mut all: Vec<Degrees> = divisors
        .map(|ulysses| Degrees { ulysses, ring: ranks / ulysses, estimate: estimate(ulysses) })
        .collect();
    let seconds = |degrees: &Degrees| degrees.estimate.as_ref().map_or(f64::INFINITY, Seconds::total);
    all.sort_by(|a, b| seconds(a).total_cmp(&seconds(b)));
    Ok(all)
}

fn deal(attention: Scheme, layer: &Layer, cluster: &Cluster) -> Result<(), Error> {
    let (scheme, ranks) = match attention {
        Scheme::Megatron => ("Megatron", cluster.region),
        Scheme::Ulysses => ("Ulysses", cluster.gpus),
    };
    let (q_heads, kv_heads) = (layer.q_heads as usize, layer.kv_heads as usize);
    let error = |what, count, rule| Err(Error::Divisibility { scheme, what, count, ranks, rule });
    if !q_heads.is_multiple_of(ranks) {
        return error("q_heads", q_heads, "they must be a multiple of the ranks");
    }
    if !kv_heads.is_multiple_of(ranks) && !ranks.is_multiple_of(kv_heads) {
        return error(
            "kv_heads",
            kv_heads,
            "they must be a multiple of the ranks, or the ranks a multiple of them",
        );
    }
    Ok(())
}

/// The paper adds times of communication and of compute. Volumes are per node, so a GPU moves a G-th of them.
fn paper_seconds(
    attention: Scheme,
    mlp: Scheme,
    layer: &Layer,
    cluster: &Cluster,
    rates: &Rates,
    s: f64,
) -> f64 {
    let stages = [
        (paper::attention(attention, layer, cluster, s), rates.attention_flops_per_s),
        (paper::mlp(mlp, layer, cluster, s), rates.matmul_flops_per_s),
    ];
    let seconds = |(volumes, flops_per_s): (paper::Volumes, f64)| {
        let bytes = volumes.elements / cluster.gpus as f64 * rates.element_bytes;
        bytes / rates.intra.bytes_per_s + volumes.flops / flops_per_s
    };
    stages.into_iter().map(seconds).sum()
}

/// Each stage may hide the weights of the other: layers follow each other.
fn corrected_seconds(
    attention: Scheme,
    mlp: Scheme,
    layer: &Layer,
    cluster: &Cluster,
    rates: &Rates,
    s: f64,
) -> f64 {
    let alone = corrected::mlp(mlp, layer, cluster, rates, s, 0.0);
    let before = alone.compute + alone.intra;
    let attention = corrected::attention(attention, layer, cluster, rates, s, before);
    let mlp = corrected::mlp(mlp, layer, cluster, rates, s, attention.total() - attention.exposed_weights);
    attention.total() + mlp.total()
}
