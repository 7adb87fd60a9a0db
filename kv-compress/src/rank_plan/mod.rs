//! Rank plans: which head gets which ranks, and why.
//!
//! Every head of every layer starts at [`RANK_STEP`] dimensions of keys and of values. A **step** adds [`RANK_STEP`] more to
//! one side of one head; all steps cost the same bytes. The [`Planner`] orders all of them by what they save: the one whose
//! [`Profile`] loses most goes first (greedy by marginal gain, which is optimal where gains fall, as they do for
//! [`Projection::Optimal`](crate::projection::Projection::Optimal)). Every plan is a prefix of that one order, so plans are
//! deterministic and nested: more bytes, or a tighter accuracy target, never take a dimension away.

mod per_layer;
mod weights;

use std::fmt::Write;

use attention::HeadShape;
use serde::{Deserialize, Serialize};

pub use per_layer::{layer_proportional, layer_threshold};
pub use weights::{HeadWeight, Weights};

use crate::calibrate::Calibration;
use crate::projection::HeadBasis;
use crate::{Error, HeadRanks, LayerRanks, RANK_STEP};

/// Bytes of a cached element.
const ELEMENT_BYTES: usize = 2;

/// Keys or values of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// Keys, rank r_k.
    Keys,
    /// Values, rank r_v.
    Values,
}

/// What a head loses at rank `i · RANK_STEP`, from 0 to its dimension: mean energy of the error in the layer's output, as a
/// part of the energy of that output.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadProfile {
    /// By r_k.
    pub keys: Vec<f64>,
    /// By r_v.
    pub values: Vec<f64>,
}

/// What every head of a model loses at every rank.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    shapes: Vec<HeadShape>,
    /// `[layers][kv_heads]`
    layers: Vec<Vec<HeadProfile>>,
}

impl Profile {
    /// The profile of bases `[layers][kv_heads]` on what was calibrated. `scales` are the layers' softmax scales. It needs no more than
    /// Gram matrices, and so counts scores of all pairs of tokens alike; whoever has activations can measure the outputs' errors
    /// themselves, which the softmax decides, and bring them by [`from_losses`](Self::from_losses).
    ///
    /// - Values: an error in V·W_O goes to the output as it is; its energy is ‖VW_O - ṼW̃_O‖² per token.
    /// - Keys: an error δ in a score moves the output by about δ times the value it weighs, so the energy is that of the
    ///   scaled scores' error, per pair of query and key, times the energy of a value after W_O.
    ///
    /// # Errors
    /// [`Error::Argument`] when layers or heads differ in number or a dimension is no multiple of [`RANK_STEP`],
    /// [`Error::EmptyCalibration`].
    pub fn new(calibration: &Calibration, bases: &[Vec<HeadBasis>], scales: &[f32]) -> Result<Self, Error> {
        let layers = calibration.layers();
        if bases.len() != layers.len() || scales.len() != layers.len() {
            let found = format!("{} bases, {} scales", bases.len(), scales.len());
            return Err(Error::argument("bases", format!("those of {} layers", layers.len()), found));
        }
        let mut profile = Profile { shapes: Vec::new(), layers: Vec::new() };
        for (l, ((layer, bases), &scale)) in layers.iter().zip(bases).zip(scales).enumerate() {
            let shape = *layer.shape();
            if layer.heads(l)?.len() != bases.len() {
                return Err(Error::argument(
                    "bases",
                    format!("{} heads of layer {l}", shape.kv_heads()),
                    bases.len(),
                ));
            }
            // Ranks of such heads would end between steps.
            LayerRanks::full(&shape)?;
            if !scale.is_finite() {
                return Err(Error::argument("scales", "finite numbers", format!("{scale} of layer {l}")));
            }
            let dims = [shape.qk_dim(), shape.v_dim()];
            if let Some(basis) = bases.iter().find(|basis| [basis.scores.dim(), basis.values.dim()] != dims) {
                let found = format!("{} and {}", basis.scores.dim(), basis.values.dim());
                let expected =
                    format!("keys of {} and values of {} dimensions in layer {l}", dims[0], dims[1]);
                return Err(Error::argument("bases", expected, found));
            }
            let tokens = layer.tokens() as f64;
            let output: f64 = bases.iter().map(|basis| basis.values.lost_energy()[0] / tokens).sum();
            let share = |energy: f64| if output > 0.0 { energy / output } else { 0.0 };
            let heads = bases.iter().map(|basis| {
                let value = basis.values.lost_energy()[0] / (tokens * shape.group() as f64);
                let per_score = f64::from(scale).powi(2) * value / (tokens * tokens);
                HeadProfile {
                    keys: basis.scores.lost_energy().iter().map(|lost| share(lost * per_score)).collect(),
                    values: basis.values.lost_energy().iter().map(|lost| share(lost / tokens)).collect(),
                }
            });
            profile.layers.push(heads.collect());
            profile.shapes.push(shape);
        }
        Ok(profile)
    }

    /// A profile of the caller's making: one [`HeadProfile`] per KV head, each of `dim / RANK_STEP + 1` numbers.
    ///
    /// # Errors
    /// [`Error::Argument`] when sizes do not fit the shapes, a dimension is no multiple of [`RANK_STEP`], or a loss is
    /// negative or not finite.
    pub fn from_losses(shapes: Vec<HeadShape>, layers: Vec<Vec<HeadProfile>>) -> Result<Self, Error> {
        if shapes.len() != layers.len() {
            return Err(Error::argument("layers", shapes.len(), layers.len()));
        }
        for (shape, heads) in shapes.iter().zip(&layers) {
            if heads.len() != shape.kv_heads() {
                return Err(Error::argument("layers", format!("{} KV heads", shape.kv_heads()), heads.len()));
            }
            for head in heads {
                for (losses, dim) in [(&head.keys, shape.qk_dim()), (&head.values, shape.v_dim())] {
                    if losses.len() != dim / RANK_STEP + 1 || !dim.is_multiple_of(RANK_STEP) {
                        let expected = format!("one loss per {RANK_STEP} of {dim} dimensions and one for 0");
                        return Err(Error::argument("layers", expected, losses.len()));
                    }
                    if let Some(loss) = losses.iter().find(|loss| !(loss.is_finite() && **loss >= 0.0)) {
                        return Err(Error::argument("layers", "finite losses of at least 0", loss));
                    }
                }
            }
        }
        Ok(Profile { shapes, layers })
    }

    /// Heads of each layer.
    pub fn shapes(&self) -> &[HeadShape] {
        &self.shapes
    }

    /// Losses `[layers][kv_heads]`.
    pub fn layers(&self) -> &[Vec<HeadProfile>] {
        &self.layers
    }

    fn losses(&self, layer: usize, head: usize, side: Side) -> &[f64] {
        let head = &self.layers[layer][head];
        match side {
            Side::Keys => &head.keys,
            Side::Values => &head.values,
        }
    }
}

/// Every (layer, KV head, side), in the order of layers.
fn sides(profile: &Profile) -> Vec<(usize, usize, Side)> {
    let heads = |layer: usize| (0..profile.layers[layer].len()).map(move |head| (layer, head));
    (0..profile.layers.len())
        .flat_map(heads)
        .flat_map(|(layer, head)| [Side::Keys, Side::Values].map(|side| (layer, head, side)))
        .collect()
}

fn finite(measured: Result<f64, Box<dyn std::error::Error + Send + Sync>>) -> Result<f64, Error> {
    match measured.map_err(Error::Measure)? {
        loss if loss.is_finite() => Ok(loss),
        loss => Err(Error::Measure(format!("a loss of {loss}").into())),
    }
}

/// How a plan came about.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// Ranks of the caller's choice.
    Given,
    /// The same ranks everywhere.
    Uniform,
    /// By marginal gain, within a budget of bytes per token.
    Budget,
    /// By marginal gain, the fewest bytes that meet an accuracy target.
    Accuracy,
    /// Per layer, one energy threshold for all (EigenAttention, arXiv 2408.05646).
    LayerThreshold,
    /// Per layer, in proportion to weights (Palu, arXiv 2407.21118).
    LayerProportional,
}

/// Why one side of one head has its rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reason {
    /// The layer.
    pub layer: usize,
    /// The KV head.
    pub head: usize,
    /// Keys or values.
    pub side: Side,
    /// Its rank.
    pub rank: usize,
    /// Its dimension without compression.
    pub dim: usize,
    /// Part of the head's energy that the rank keeps, 0 to 1.
    pub kept: f64,
    /// Weight of its losses.
    pub weight: f64,
    /// Weighted loss that its last step saved; `None` where it stands at the first step, which every head gets.
    pub last_gain: Option<f64>,
    /// Weighted loss that one more step would save; `None` where there is none left.
    pub next_gain: Option<f64>,
}

/// Ranks of every head of a model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RankPlan {
    rule: Rule,
    layers: Vec<LayerRanks>,
    reasons: Vec<Reason>,
}

impl RankPlan {
    /// Ranks of the caller's choice, per layer.
    ///
    /// # Errors
    /// [`Error::Argument`] when there are no layers.
    pub fn new(layers: Vec<LayerRanks>) -> Result<Self, Error> {
        if layers.is_empty() {
            return Err(Error::argument("layers", "at least 1", 0));
        }
        Ok(RankPlan { rule: Rule::Given, layers, reasons: Vec::new() })
    }

    /// Everything: nothing is lost.
    ///
    /// # Errors
    /// [`Error::Argument`] for dimensions that are no multiples of [`RANK_STEP`].
    pub fn full(shapes: &[HeadShape]) -> Result<Self, Error> {
        RankPlan::new(shapes.iter().map(LayerRanks::full).collect::<Result<_, _>>()?)
    }

    /// The same ranks for every head: the largest, keys before values, whose bytes per token are within the budget.
    ///
    /// # Errors
    /// [`Error::Argument`] when even [`RANK_STEP`] everywhere is over the budget.
    pub fn uniform(shapes: &[HeadShape], bytes_per_token: usize) -> Result<Self, Error> {
        let dim = shapes.iter().map(|shape| shape.qk_dim().max(shape.v_dim())).max().unwrap_or(0);
        let cut = |k: usize, v: usize| -> Result<Vec<LayerRanks>, Error> {
            let ranks = |shape: &HeadShape| HeadRanks { k: k.min(shape.qk_dim()), v: v.min(shape.v_dim()) };
            shapes.iter().map(|shape| LayerRanks::uniform(shape, ranks(shape))).collect()
        };
        let mut best = None;
        for rank in (RANK_STEP..=dim).step_by(RANK_STEP) {
            for (k, v) in [(rank, rank), (rank + RANK_STEP, rank)] {
                let layers = cut(k, v)?;
                if bytes(&layers) <= bytes_per_token {
                    best = Some(layers);
                }
            }
        }
        let layers = best.ok_or_else(|| over_budget(shapes, bytes_per_token))?;
        Ok(RankPlan { rule: Rule::Uniform, layers, reasons: Vec::new() })
    }

    /// How the plan came about.
    pub fn rule(&self) -> &Rule {
        &self.rule
    }

    /// Ranks by layer.
    pub fn layers(&self) -> &[LayerRanks] {
        &self.layers
    }

    /// Why each side of each head has its rank; empty for plans that no profile was asked for.
    pub fn reasons(&self) -> &[Reason] {
        &self.reasons
    }

    /// Bytes that one token costs in all layers, in 16 bits.
    pub fn bytes_per_token(&self) -> usize {
        bytes(&self.layers)
    }

    /// Reasons as a table, a line per side of a head.
    pub fn table(reasons: &[Reason]) -> String {
        let mut text = String::from(
            "layer  head  side    rank  energy kept  weight     last step saved  next would save\n",
        );
        let gain = |gain: Option<f64>| gain.map_or("–".to_string(), |gain| format!("{gain:.3e}"));
        for r in reasons {
            let side = match r.side {
                Side::Keys => "keys",
                Side::Values => "values",
            };
            let (rank, kept) = (format!("{}/{}", r.rank, r.dim), 100.0 * r.kept);
            let (last, next) = (gain(r.last_gain), gain(r.next_gain));
            let _ = writeln!(
                text,
                "{:>5}  {:>4}  {side:<6}  {rank:>7}  {kept:>8.3} %  {:<9.3e}  {last:>15}  {next:>15}",
                r.layer, r.head, r.weight
            );
        }
        text
    }

    /// The plan and its reasons as JSON.
    pub fn to_json(&self) -> String {
        // Strings, numbers and lists of them: nothing that can fail.
        serde_json::to_string_pretty(self).unwrap_or_default()
    }
}

/// The reasons as a table, a line per head; where there are none, the ranks alone.
impl std::fmt::Display for RankPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{} bytes per token", self.bytes_per_token())?;
        if self.reasons.is_empty() {
            for (layer, ranks) in self.layers.iter().enumerate() {
                for (head, ranks) in ranks.heads().iter().enumerate() {
                    writeln!(
                        f,
                        "layer {layer:>3}  KV head {head:>3}  r_k {:>4}  r_v {:>4}",
                        ranks.k, ranks.v
                    )?;
                }
            }
            return Ok(());
        }
        f.write_str(&RankPlan::table(&self.reasons))
    }
}

fn bytes(layers: &[LayerRanks]) -> usize {
    layers.iter().map(|ranks| ranks.elements() * ELEMENT_BYTES).sum()
}

fn over_budget(shapes: &[HeadShape], budget: usize) -> Error {
    let least: usize = shapes.iter().map(|shape| shape.kv_heads() * 2 * RANK_STEP * ELEMENT_BYTES).sum();
    Error::argument("bytes_per_token", format!("at least {least}, rank {RANK_STEP} everywhere"), budget)
}

/// One more [`RANK_STEP`] for one side of one head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// The layer.
    pub layer: usize,
    /// The KV head.
    pub head: usize,
    /// Keys or values.
    pub side: Side,
    /// The rank after the step.
    pub rank: usize,
    /// Weighted loss that it saves.
    pub gain: f64,
}

/// The one order in which ranks grow.
#[derive(Debug, Clone)]
pub struct Planner {
    profile: Profile,
    weights: Weights,
    steps: Vec<Step>,
}

impl Planner {
    /// Orders all steps by gain. Equal gains go by layer, head, keys before values.
    ///
    /// A step that saves less than the one after it on the same side is taken for the mean of the two (the upper hull), so
    /// that a small step does not hide a large one.
    ///
    /// # Errors
    /// [`Error::Argument`] for weights of another model.
    pub fn new(profile: &Profile, weights: &Weights) -> Result<Self, Error> {
        let weights = Weights::new(profile, weights.0.clone())?;
        let mut steps = Vec::new();
        for (layer, head, side) in sides(profile) {
            let losses = profile.losses(layer, head, side);
            let weight = weights.of(layer, head, side);
            for (i, gain) in falling_gains(&losses[1..]).into_iter().enumerate() {
                steps.push(Step { layer, head, side, rank: (i + 2) * RANK_STEP, gain: gain * weight });
            }
        }
        // Stable, and gains of a side fall: a side's steps keep their order.
        steps.sort_by(|a, b| b.gain.total_cmp(&a.gain));
        Ok(Planner { profile: profile.clone(), weights, steps })
    }

    /// All steps, the most valuable first.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The plan after the first `count` steps.
    fn after(&self, count: usize, rule: Rule) -> Result<RankPlan, Error> {
        let first = HeadRanks { k: RANK_STEP, v: RANK_STEP };
        let mut ranks: Vec<Vec<HeadRanks>> =
            self.profile.layers.iter().map(|heads| vec![first; heads.len()]).collect();
        let (taken, left) = self.steps.split_at(count);
        for step in taken {
            let head = &mut ranks[step.layer][step.head];
            match step.side {
                Side::Keys => head.k = step.rank,
                Side::Values => head.v = step.rank,
            }
        }
        let reasons = sides(&self.profile).into_iter().map(|(layer, head, side)| {
            let of = |step: &&Step| (step.layer, step.head, step.side) == (layer, head, side);
            let (rank, dim) = match side {
                Side::Keys => (ranks[layer][head].k, self.profile.shapes[layer].qk_dim()),
                Side::Values => (ranks[layer][head].v, self.profile.shapes[layer].v_dim()),
            };
            let losses = self.profile.losses(layer, head, side);
            let kept = if losses[0] > 0.0 { 1.0 - losses[rank / RANK_STEP] / losses[0] } else { 1.0 };
            Reason {
                layer,
                head,
                side,
                rank,
                dim,
                kept,
                weight: self.weights.of(layer, head, side),
                last_gain: taken.iter().rfind(of).map(|step| step.gain),
                next_gain: left.iter().find(of).map(|step| step.gain),
            }
        });
        let reasons = reasons.collect();
        let layers = ranks
            .into_iter()
            .zip(&self.profile.shapes)
            .map(|(heads, shape)| LayerRanks::new(shape, heads))
            .collect::<Result<_, _>>()?;
        Ok(RankPlan { rule, layers, reasons })
    }

    /// The best plan of at most `bytes_per_token` bytes in all layers, in 16 bits.
    ///
    /// # Errors
    /// [`Error::Argument`] when even [`RANK_STEP`] everywhere is over the budget.
    pub fn within(&self, bytes_per_token: usize) -> Result<RankPlan, Error> {
        let least = self.after(0, Rule::Budget)?.bytes_per_token();
        let Some(room) = bytes_per_token.checked_sub(least) else {
            return Err(over_budget(&self.profile.shapes, bytes_per_token));
        };
        let count = (room / (RANK_STEP * ELEMENT_BYTES)).min(self.steps.len());
        self.after(count, Rule::Budget)
    }

    /// The smallest plan whose measured loss is at most `most`, found by bisection over the steps: about log₂(steps) calls.
    ///
    /// Between two targets the tighter never gets a smaller plan, even where `measure` is noisy: both bisections agree until
    /// the looser accepts a plan that the tighter refuses.
    ///
    /// # Errors
    /// [`Error::Measure`] carries what `measure` said, also when it is not a finite number; [`Error::Argument`] when even the
    /// full ranks lose more than `most`.
    pub fn accurate(
        &self,
        most: f64,
        mut measure: impl FnMut(&RankPlan) -> Result<f64, Box<dyn std::error::Error + Send + Sync>>,
    ) -> Result<RankPlan, Error> {
        // `low` steps are too few, or none were tried; `high` are enough.
        let (mut low, mut high) = (0, self.steps.len());
        let mut enough = |count: usize| -> Result<(f64, RankPlan), Error> {
            let plan = self.after(count, Rule::Accuracy)?;
            Ok((finite(measure(&plan))?, plan))
        };
        let (loss, mut best) = enough(high)?;
        if loss > most || most.is_nan() {
            return Err(Error::argument("most", format!("at least {loss}, which full ranks lose"), most));
        }
        while low < high {
            let middle = low + (high - low) / 2;
            let (loss, plan) = enough(middle)?;
            if loss <= most {
                (high, best) = (middle, plan);
            } else {
                low = middle + 1;
            }
        }
        Ok(best)
    }
}

/// What each step saves, made to fall: runs of rising gains share their mean.
fn falling_gains(losses: &[f64]) -> Vec<f64> {
    // Runs (mean gain, steps), whose means fall strictly.
    let mut runs: Vec<(f64, usize)> = Vec::new();
    for pair in losses.windows(2) {
        let mut run = ((pair[0] - pair[1]).max(0.0), 1);
        while let Some(&(mean, steps)) = runs.last().filter(|(mean, _)| *mean <= run.0) {
            let all = steps + run.1;
            run = ((mean * steps as f64 + run.0 * run.1 as f64) / all as f64, all);
            runs.pop();
        }
        runs.push(run);
    }
    runs.into_iter().flat_map(|(mean, steps)| std::iter::repeat_n(mean, steps)).collect()
}
