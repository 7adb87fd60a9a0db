//! Compression plans for a model: calibrate on a text, choose ranks, measure on other parts of it.

use attention::HeadShape;
use kv_compress::projection::{HeadBasis, Projection, project};
use kv_compress::rank_plan::{Planner, Profile, RankPlan, Weights, layer_threshold};
use kv_compress::{CompressionPlan, calibrate::Calibration};
use ndarray::Axis;

use crate::eval::negative_log_likelihood;
use crate::kv::{Dense, Fdc, FdcStorage, Geometry, KvCache, Probe, Recorder};
use crate::{Error, Model};

/// Windows to calibrate on, spread over the text.
const CALIBRATION_WINDOWS: usize = 24;
/// Windows to measure on, none of them calibrated on.
const MEASURED_WINDOWS: usize = 4;

/// What ranks are chosen for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// This part of the dense bytes, above 0 and at most 1.
    Ratio(f64),
    /// The fewest bytes that keep this part of the accuracy, above 0 and below 1: dense nats per token over those of the
    /// compressed model.
    KeepAccuracy(f64),
}

impl Target {
    /// Checks the number.
    ///
    /// # Errors
    /// [`Error::Argument`] when it is out of range or NaN.
    pub fn check(self) -> Result<(), Error> {
        let (argument, value, expected, fits) = match self {
            Target::Ratio(ratio) => {
                ("ratio", ratio, "a number above 0 and at most 1", ratio > 0.0 && ratio <= 1.0)
            }
            Target::KeepAccuracy(part) => {
                ("keep-accuracy", part, "a number above 0 and below 1", part > 0.0 && part < 1.0)
            }
        };
        if fits { Ok(()) } else { Err(Error::argument(argument, expected, value)) }
    }
}

/// How bytes are spread over heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allocation {
    /// Where the model suffers most from their lack: by what bases lose of their layer's output, the keys and the values of each
    /// layer weighed by measuring the model.
    Adaptive,
    /// By what bases lose of their layer's output alone.
    Profile,
    /// Per layer, one energy threshold for all (EigenAttention).
    LayerThreshold,
    /// The same ranks everywhere.
    Uniform,
}

/// A model's calibration, and the text that plans are measured on.
pub struct Compressor<'m> {
    model: &'m Model,
    geometry: Geometry,
    calibration: Calibration,
    /// Windows to measure on.
    measured: Vec<Vec<u32>>,
    dense_nll: f64,
}

impl<'m> Compressor<'m> {
    /// Runs the model over a text in windows of `context` tokens. Three of four windows calibrate, spread over the text; of the
    /// rest a few are kept to measure on. `progress` hears of windows done and windows in all.
    ///
    /// # Errors
    /// A text of fewer than four windows, a context over the model's maximum, tokens out of range, activations that are not
    /// finite.
    pub fn new(
        model: &'m Model,
        text: &[u32],
        context: usize,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Self, Error> {
        let geometry = Geometry::new(model.config(), context)?;
        let windows: Vec<&[u32]> =
            if context == 0 { Vec::new() } else { text.chunks_exact(context).collect() };
        if windows.len() < 4 {
            let expected = format!("at least {} tokens, four windows of {context}", 4 * context.max(1));
            return Err(Error::argument("text", expected, text.len()));
        }
        let (measured, calibrated): (Vec<_>, Vec<_>) =
            windows.into_iter().enumerate().partition(|(i, _)| i % 4 == 3);
        let (measured, calibrated) =
            (spread(measured, MEASURED_WINDOWS), spread(calibrated, CALIBRATION_WINDOWS));
        let all = calibrated.len() + measured.len();
        let mut recorder = Recorder::new(geometry.clone())?;
        for (done, window) in calibrated.iter().enumerate() {
            recorder.clear();
            model.forward(window, 0, &mut recorder)?;
            progress(done + 1, all);
        }
        let mut compressor = Compressor {
            model,
            calibration: recorder.finish(),
            measured: measured.iter().map(|window| window.to_vec()).collect(),
            dense_nll: 0.0,
            geometry,
        };
        let mut dense = Dense::<half::f16>::new(compressor.geometry.clone())?;
        compressor.dense_nll = nll(model, &compressor.measured, &mut dense)?;
        progress(all, all);
        Ok(compressor)
    }

    /// Nats per token of the dense cache in f16 on the measured windows.
    pub fn dense_nll(&self) -> f64 {
        self.dense_nll
    }

    /// Nats per token of a plan on the measured windows.
    ///
    /// # Errors
    /// A plan of another model.
    pub fn plan_nll(&self, plan: &CompressionPlan) -> Result<f64, Error> {
        let mut cache = Fdc::new(&self.geometry, plan.clone(), &FdcStorage::Half)?;
        nll(self.model, &self.measured, &mut cache)
    }

    /// The plan for a target.
    ///
    /// # Errors
    /// A target out of range or out of reach.
    pub fn plan(
        &self,
        projection: Projection,
        allocation: Allocation,
        target: Target,
    ) -> Result<CompressionPlan, Error> {
        target.check()?;
        let shapes: Vec<HeadShape> = self.geometry.layers.iter().map(|spec| spec.shape).collect();
        let layers = self.calibration.layers().iter().enumerate();
        let bases = layers
            .map(|(l, layer)| project(l, layer, projection))
            .collect::<Result<Vec<_>, kv_compress::Error>>()?;
        let measure = |ranks: &RankPlan| -> Result<f64, Box<dyn std::error::Error + Send + Sync>> {
            Ok(self.plan_nll(&self.cut(projection, &bases, ranks)?)?)
        };
        let elements = |shape: &HeadShape| shape.kv_heads() * (shape.qk_dim() + shape.v_dim());
        let dense: usize = shapes.iter().map(|shape| 2 * elements(shape)).sum();
        let ranks = match (allocation, target) {
            (Allocation::Uniform, Target::Ratio(ratio)) => RankPlan::uniform(&shapes, bytes(dense, ratio))?,
            (Allocation::LayerThreshold, Target::Ratio(ratio)) => {
                let scales: Vec<f32> = self.geometry.layers.iter().map(|spec| spec.score.scale()).collect();
                layer_threshold(&Profile::new(&self.calibration, &bases, &scales)?, bytes(dense, ratio))?
            }
            (Allocation::Uniform | Allocation::LayerThreshold, Target::KeepAccuracy(_)) => {
                let found = format!("{allocation:?}");
                return Err(Error::argument(
                    "allocation",
                    "Adaptive or Profile for an accuracy target",
                    found,
                ));
            }
            (Allocation::Adaptive | Allocation::Profile, target) => {
                let profile = self.output_profile(&bases)?;
                let smallest =
                    shapes.iter().map(|shape| shape.qk_dim().min(shape.v_dim())).min().unwrap_or(0);
                let probe = (smallest / 64 * 16).max(16);
                let weights = match allocation {
                    Allocation::Adaptive if probe < smallest => {
                        Weights::measured_by_layer(&profile, probe, measure)?
                    }
                    _ => Weights::equal(&profile),
                };
                let planner = Planner::new(&profile, &weights)?;
                match target {
                    Target::Ratio(ratio) => planner.within(bytes(dense, ratio))?,
                    Target::KeepAccuracy(part) => planner.accurate(self.dense_nll / part, measure)?,
                }
            }
        };
        Ok(self.cut(projection, &bases, &ranks)?)
    }

    /// What every rank of bases `[layers][kv_heads]` loses of its layer's output, on the measured windows. Gram matrices alone
    /// would weigh the scores of all pairs of tokens alike, those that the softmax makes nothing of too.
    fn output_profile(&self, bases: &[Vec<HeadBasis>]) -> Result<Profile, Error> {
        let mut probe = Probe::new(self.geometry.clone(), bases)?;
        for window in &self.measured {
            probe.clear();
            self.model.forward(window, 0, &mut probe)?;
        }
        probe.finish()
    }

    fn cut(
        &self,
        projection: Projection,
        bases: &[Vec<HeadBasis>],
        ranks: &RankPlan,
    ) -> Result<CompressionPlan, kv_compress::Error> {
        CompressionPlan::new(&self.calibration, projection, bases, ranks)
    }
}

/// Nats per token of windows through a cache. Every query of a window reads the keys and values that the cache holds, its own
/// included, so one pass over a window measures what decoding it token by token would.
fn nll(model: &Model, windows: &[Vec<u32>], cache: &mut dyn KvCache) -> Result<f64, Error> {
    let (mut sum, mut scored) = (0.0, 0);
    for window in windows {
        cache.clear();
        let hidden = model.forward(window, 0, cache)?;
        let logits = model.logits(hidden.view())?;
        Model::check_logits(logits.view(), 0)?;
        for (logits, &next) in logits.axis_iter(Axis(0)).zip(&window[1..]) {
            sum += negative_log_likelihood(logits, next)?;
            scored += 1;
        }
    }
    Ok(sum / f64::from(scored))
}

fn bytes(dense: usize, ratio: f64) -> usize {
    (dense as f64 * ratio).floor() as usize
}

/// At most `count` of the windows, evenly spread.
fn spread(windows: Vec<(usize, &[u32])>, count: usize) -> Vec<&[u32]> {
    let kept = count.min(windows.len());
    (0..kept).map(|i| windows[i * windows.len() / kept].1).collect()
}
