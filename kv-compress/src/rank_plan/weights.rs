//! What a loss of each head is worth: equal, given, or measured on the model.

use std::ops::Range;

use super::{Profile, RankPlan, Rule, Side, finite};
use crate::{Error, LayerRanks, RANK_STEP};

/// How much the model suffers per unit of a head's loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadWeight {
    /// Of lost keys.
    pub keys: f64,
    /// Of lost values.
    pub values: f64,
}

/// Weights of every head, `[layers][kv_heads]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Weights(pub(super) Vec<Vec<HeadWeight>>);

impl Weights {
    /// All alike.
    pub fn equal(profile: &Profile) -> Self {
        let one = HeadWeight { keys: 1.0, values: 1.0 };
        Weights(profile.layers.iter().map(|heads| vec![one; heads.len()]).collect())
    }

    /// Weights of the caller's.
    ///
    /// # Errors
    /// [`Error::Argument`] when there is not one per KV head, or one is negative or not finite.
    pub fn new(profile: &Profile, weights: Vec<Vec<HeadWeight>>) -> Result<Self, Error> {
        let counts = |heads: &[usize]| format!("{heads:?} KV heads");
        let expected: Vec<usize> = profile.layers.iter().map(Vec::len).collect();
        let found: Vec<usize> = weights.iter().map(Vec::len).collect();
        if expected != found {
            return Err(Error::argument("weights", counts(&expected), counts(&found)));
        }
        for weight in weights.iter().flatten().flat_map(|weight| [weight.keys, weight.values]) {
            if !(weight.is_finite() && weight >= 0.0) {
                return Err(Error::argument("weights", "finite numbers of at least 0", weight));
            }
        }
        Ok(Weights(weights))
    }

    /// Measures how the model suffers: each side of each head in turn is cut to `rank` dimensions, everything else stays
    /// whole, and the rise of `measure` (a loss of the model, such as nats per token) over that of the whole model is set
    /// against the profile's loss. `2 · heads + 1` calls.
    ///
    /// A measure is noisy where a side loses little, so slopes are drawn to the common slope of their kind, keys or values:
    /// with w̄ = Σ rise / Σ loss of the kind and ρ the mean of its losses squared, a side's weight is
    /// `(rise · loss + w̄ · ρ) / (loss² + ρ)`, and at least a tenth of w̄. A kind that did not suffer counts a hundredth of the
    /// other, so that no head is worth nothing; where neither did, the measure says nothing and all weigh the same.
    ///
    /// # Errors
    /// [`Error::Measure`] carries what `measure` said, also when it is not a finite number; [`Error::Argument`] for a rank
    /// that is no multiple of [`RANK_STEP`] or leaves nothing to cut.
    pub fn measured(
        profile: &Profile,
        rank: usize,
        measure: impl FnMut(&RankPlan) -> Result<f64, Box<dyn std::error::Error + Send + Sync>>,
    ) -> Result<Self, Error> {
        let head =
            |(layer, heads): (usize, usize)| (0..heads).map(move |head| (layer, head..head + 1)).collect();
        Weights::measured_over(profile, rank, head, measure)
    }

    /// [`measured`](Self::measured) with all heads of a layer cut together, for models of many heads: the keys, then the values
    /// of each layer. `2 · layers + 1` calls.
    ///
    /// # Errors
    /// As [`measured`](Self::measured).
    pub fn measured_by_layer(
        profile: &Profile,
        rank: usize,
        measure: impl FnMut(&RankPlan) -> Result<f64, Box<dyn std::error::Error + Send + Sync>>,
    ) -> Result<Self, Error> {
        Weights::measured_over(profile, rank, |(layer, heads)| vec![(layer, 0..heads)], measure)
    }

    /// Cuts the heads of each group together; `groups` tells those of a (layer, number of heads).
    fn measured_over(
        profile: &Profile,
        rank: usize,
        groups: impl Fn((usize, usize)) -> Vec<(usize, Range<usize>)>,
        mut measure: impl FnMut(&RankPlan) -> Result<f64, Box<dyn std::error::Error + Send + Sync>>,
    ) -> Result<Self, Error> {
        let whole = RankPlan::full(&profile.shapes)?;
        let dense = finite(measure(&whole))?;
        let heads_of = profile.layers.iter().map(Vec::len).enumerate();
        let groups: Vec<(usize, Range<usize>)> = heads_of.flat_map(groups).collect();
        // (rise, loss) of keys and of values, in the order of groups.
        let mut seen = [Vec::new(), Vec::new()];
        for ((layer, heads), side) in
            groups.iter().flat_map(|group| [Side::Keys, Side::Values].map(|side| (group, side)))
        {
            let mut ranks = whole.layers[*layer].heads().to_vec();
            for ranks in &mut ranks[heads.clone()] {
                match side {
                    Side::Keys => ranks.k = rank,
                    Side::Values => ranks.v = rank,
                }
            }
            let mut layers = whole.layers.clone();
            layers[*layer] = LayerRanks::new(&profile.shapes[*layer], ranks)?;
            let cut = RankPlan { rule: Rule::Given, layers, reasons: Vec::new() };
            if cut.layers == whole.layers {
                return Err(Error::argument("rank", "less than every dimension", rank));
            }
            let rise = finite(measure(&cut))? - dense;
            let loss =
                heads.clone().map(|head| profile.losses(*layer, head, side)[rank / RANK_STEP]).sum::<f64>();
            seen[side as usize].push((rise, loss));
        }
        let common = seen.each_ref().map(|seen| {
            let (rise, loss) = seen.iter().fold((0.0, 0.0), |(a, b), (rise, loss)| (a + rise, b + loss));
            if rise > 0.0 && loss > 0.0 { rise / loss } else { 0.0 }
        });
        let least = 0.01 * common[0].max(common[1]);
        if least == 0.0 {
            return Ok(Weights::equal(profile));
        }
        let [keys, values] = [0, 1].map(|kind| {
            let spread =
                seen[kind].iter().map(|(_, loss)| loss * loss).sum::<f64>() / seen[kind].len().max(1) as f64;
            let common = common[kind].max(least);
            let weight = |&(rise, loss): &(f64, f64)| {
                let drawn = (rise * loss + common * spread) / (loss * loss + spread);
                if spread > 0.0 { drawn.max(0.1 * common) } else { common }
            };
            seen[kind].iter().map(weight).collect::<Vec<f64>>()
        });
        let mut weights = vec![Vec::new(); profile.layers.len()];
        for ((layer, heads), (keys, values)) in groups.into_iter().zip(keys.into_iter().zip(values)) {
            weights[layer].extend(heads.map(|_| HeadWeight { keys, values }));
        }
        Ok(Weights(weights))
    }

    pub(super) fn of(&self, layer: usize, head: usize, side: Side) -> f64 {
        let weight = self.0[layer][head];
        match side {
            Side::Keys => weight.keys,
            Side::Values => weight.values,
        }
    }
}
