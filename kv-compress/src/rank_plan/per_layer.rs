//! Allocations of others, per layer instead of per head: what this crate's own is compared with.

use attention::HeadShape;

use super::{Profile, RankPlan, Rule, bytes, over_budget};
use crate::{Error, HeadRanks, LayerRanks, RANK_STEP};

/// One energy threshold for all layers, as EigenAttention (arXiv 2408.05646) has it: every head of a layer gets the largest rank
/// that any of them needs to keep that part of its energy. The threshold is the highest that the budget allows, where
/// EigenAttention lowers it until a layer's output error reaches a limit.
///
/// # Errors
/// [`Error::Argument`] when even [`RANK_STEP`] everywhere is over the budget.
pub fn layer_threshold(profile: &Profile, bytes_per_token: usize) -> Result<RankPlan, Error> {
    // A threshold matters only where it changes a rank: try every part of energy that some rank keeps.
    let mut parts: Vec<f64> = profile
        .layers()
        .iter()
        .flatten()
        .flat_map(|head| [&head.keys, &head.values])
        .flat_map(|losses| kept(losses))
        .collect();
    parts.push(0.0);
    parts.sort_by(|a, b| b.total_cmp(a));
    for part in parts {
        let rank = |losses: &[f64]| {
            let kept = kept(losses).iter().position(|kept| *kept >= part);
            kept.unwrap_or(losses.len() - 2) * RANK_STEP + RANK_STEP
        };
        let layers = profile
            .shapes()
            .iter()
            .zip(profile.layers())
            .map(|(shape, heads)| {
                let k = heads.iter().map(|head| rank(&head.keys)).max().unwrap_or(RANK_STEP);
                let v = heads.iter().map(|head| rank(&head.values)).max().unwrap_or(RANK_STEP);
                LayerRanks::uniform(shape, HeadRanks { k, v })
            })
            .collect::<Result<Vec<_>, _>>()?;
        if bytes(&layers) <= bytes_per_token {
            return Ok(RankPlan { rule: Rule::LayerThreshold, layers, reasons: Vec::new() });
        }
    }
    Err(over_budget(profile.shapes(), bytes_per_token))
}

/// Parts of the energy that ranks [`RANK_STEP`], 2 · [`RANK_STEP`], … keep.
fn kept(losses: &[f64]) -> Vec<f64> {
    losses[1..].iter().map(|loss| if losses[0] > 0.0 { 1.0 - loss / losses[0] } else { 1.0 }).collect()
}

/// Ranks in proportion to weights, as Palu (arXiv 2407.21118) has it: each layer's keys and values get a share of the budget
/// that goes with their weight (Palu's is the mean Fisher information of the projection), the same for all heads of a layer.
/// Shares are rounded down to [`RANK_STEP`]; what is left goes, a step at a time, to the side furthest below its share.
///
/// `weights` are those of keys and values `[layers]`.
///
/// # Errors
/// [`Error::Argument`] when there is not one pair of weights per layer, one is negative or not finite, or even [`RANK_STEP`]
/// everywhere is over the budget.
pub fn layer_proportional(
    shapes: &[HeadShape],
    weights: &[(f64, f64)],
    bytes_per_token: usize,
) -> Result<RankPlan, Error> {
    if weights.len() != shapes.len() {
        return Err(Error::argument("weights", format!("{} layers", shapes.len()), weights.len()));
    }
    if let Some(bad) = weights.iter().flat_map(|&(k, v)| [k, v]).find(|w| !(w.is_finite() && *w >= 0.0)) {
        return Err(Error::argument("weights", "finite numbers of at least 0", bad));
    }
    let mut ranks = vec![HeadRanks { k: RANK_STEP, v: RANK_STEP }; shapes.len()];
    let cut = |ranks: &[HeadRanks]| -> Result<Vec<LayerRanks>, Error> {
        shapes.iter().zip(ranks).map(|(shape, &ranks)| LayerRanks::uniform(shape, ranks)).collect()
    };
    if bytes(&cut(&ranks)?) > bytes_per_token {
        return Err(over_budget(shapes, bytes_per_token));
    }
    let total: f64 = weights.iter().map(|&(k, v)| k + v).sum();
    let elements = bytes_per_token as f64 / 2.0;
    let wanted = |layer: usize, weight: f64| {
        if total > 0.0 { elements * weight / total / shapes[layer].kv_heads() as f64 } else { 0.0 }
    };
    // The side furthest below its share that still fits, until none does.
    loop {
        let mut best: Option<(f64, usize, bool)> = None;
        for (layer, shape) in shapes.iter().enumerate() {
            for (keys, weight, rank, dim) in [
                (true, weights[layer].0, ranks[layer].k, shape.qk_dim()),
                (false, weights[layer].1, ranks[layer].v, shape.v_dim()),
            ] {
                let more = shape.kv_heads() * RANK_STEP * 2;
                if rank + RANK_STEP > dim || bytes(&cut(&ranks)?) + more > bytes_per_token {
                    continue;
                }
                let missing = wanted(layer, weight) - rank as f64;
                if best.is_none_or(|(most, ..)| missing > most) {
                    best = Some((missing, layer, keys));
                }
            }
        }
        match best {
            Some((_, layer, true)) => ranks[layer].k += RANK_STEP,
            Some((_, layer, false)) => ranks[layer].v += RANK_STEP,
            None => break,
        }
    }
    Ok(RankPlan { rule: Rule::LayerProportional, layers: cut(&ranks)?, reasons: Vec::new() })
}
