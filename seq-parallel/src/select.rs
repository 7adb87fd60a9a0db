//! Selection: the cheapest of the four combinations of schemes for attention and MLP (PecSched §5.3).
//!
//! "We compute and estimate total communication time and computation time, and select the one with the lowest overall latency"; what
//! decides is the length of the segment.

use crate::Error;
use crate::cost_model::corrected::{self, Rates, Seconds};
use crate::cost_model::{Cluster, Layer, Mlp, Profile, Scheme, paper};

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
            if let Err(error) = deal(attention, layer, cluster).and_then(|()| deal_mlp(mlp, layer, cluster)) {
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

/// A way to share a prompt among ranks: schemes inside a node, a ring between.
#[derive(Debug, Clone, PartialEq)]
pub struct Way {
    /// Of the attention stage.
    pub attention: Scheme,
    /// Of the MLP stage.
    pub mlp: Scheme,
    /// Adjacent ranks that the attention stage is shared among: a node where it is Ulysses, a region where it is Megatron.
    pub group: usize,
    /// Members of a ring, which goes over the groups.
    pub ring: usize,
    /// Estimated seconds of a layer's attention stage and of its MLP stage, or why something cannot be dealt to such groups.
    pub estimate: Result<[Seconds; 2], Error>,
}

impl Way {
    /// Estimated seconds of a layer; infinite where it cannot be.
    pub fn seconds(&self) -> f64 {
        self.estimate.as_ref().map_or(f64::INFINITY, |stages| stages.iter().map(Seconds::total).sum())
    }
}

/// Estimates every way by the corrected model, for a prompt of `tokens` tokens over ranks whose weights are split over regions of `region`
/// adjacent ranks: the fastest first, those that cannot be last.
///
/// Where a region is one rank, it has all weights: there is nothing for Megatron to split, and the MLP needs no exchange. Else a stage is
/// Megatron's in its region, or Ulysses' in a group of one or more regions, which has to gather the weights first. Groups that fit a node of
/// the profile use its links, others the network.
///
/// # Errors
/// [`Error::Argument`] for no ranks or an empty region; [`Error::Divisibility`] for ranks that are not whole regions.
pub fn ways(
    layer: &Layer,
    profile: &Profile,
    ranks: usize,
    region: usize,
    tokens: usize,
) -> Result<Vec<Way>, Error> {
    if ranks == 0 {
        return Err(Error::argument("ranks", "at least 1", 0));
    }
    if region == 0 {
        return Err(Error::argument("region", "at least 1 rank", 0));
    }
    if !ranks.is_multiple_of(region) {
        let rule = "regions must divide the ranks";
        return Err(Error::Divisibility {
            scheme: "fast SP",
            what: "ranks",
            count: ranks,
            ranks: region,
            rule,
        });
    }
    let estimate = |attention: Scheme, mlp: Scheme, group: usize| -> Result<[Seconds; 2], Error> {
        let cluster = Cluster { nodes: ranks / group, gpus: group, region };
        cluster.check()?;
        deal(attention, layer, &cluster)?;
        deal_mlp(mlp, layer, &cluster)?;
        let link = |fits| if fits { profile.rates.intra } else { profile.rates.inter };
        let rates = Rates {
            intra: link(profile.holds(group, ranks)),
            inter: link(ranks <= profile.node),
            ..profile.rates
        };
        Ok(corrected_stages(attention, mlp, layer, &cluster, &rates, tokens as f64 / ranks as f64))
    };
    let groups: Vec<usize> =
        (region..=ranks).step_by(region).filter(|group| ranks.is_multiple_of(*group)).collect();
    let mut ways = Vec::new();
    for attention in SCHEMES {
        // A stage that Megatron splits is shared in its region, whatever the node.
        let groups = if attention == Scheme::Megatron { &[region][..] } else { &groups[..] };
        for (group, mlp) in groups.iter().flat_map(|&group| SCHEMES.map(|mlp| (group, mlp))) {
            if region > 1 || [attention, mlp] == [Scheme::Ulysses; 2] {
                let estimate = estimate(attention, mlp, group);
                ways.push(Way { attention, mlp, group, ring: ranks / group, estimate });
            }
        }
    }
    ways.sort_by(|a, b| a.seconds().total_cmp(&b.seconds()));
    Ok(ways)
}

/// Checks that an MLP stage can be dealt.
fn deal_mlp(mlp: Scheme, layer: &Layer, cluster: &Cluster) -> Result<(), Error> {
    match (mlp, layer.mlp) {
        (Scheme::Megatron, Mlp::SwiGlu { inner }) => {
            crate::megatron::part("the MLP's inner dimension", inner as usize, cluster.region, 0).map(drop)
        }
        _ => Ok(()),
    }
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

fn corrected_seconds(
    attention: Scheme,
    mlp: Scheme,
    layer: &Layer,
    cluster: &Cluster,
    rates: &Rates,
    s: f64,
) -> f64 {
    corrected_stages(attention, mlp, layer, cluster, rates, s).iter().map(Seconds::total).sum()
}

/// Each stage may hide the weights of the other: layers follow each other.
fn corrected_stages(
    attention: Scheme,
    mlp: Scheme,
    layer: &Layer,
    cluster: &Cluster,
    rates: &Rates,
    s: f64,
) -> [Seconds; 2] {
    let alone = corrected::mlp(mlp, layer, cluster, rates, s, 0.0);
    let before = alone.compute + alone.intra;
    let attention = corrected::attention(attention, layer, cluster, rates, s, before);
    let mlp = corrected::mlp(mlp, layer, cluster, rates, s, attention.total() - attention.exposed_weights);
    [attention, mlp]
}
