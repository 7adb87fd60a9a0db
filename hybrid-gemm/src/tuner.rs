//! Candidates of the cost model, timed on the device; the fastest is remembered per device and shape.

use std::collections::HashMap;

use crate::weights::Layout;
use crate::{DType, EpilogueSpec, Error, Format, GemmPlan, Path, PathChoice, Summation};

/// Candidates that are timed: the model ranks them well enough that the best is among its first.
pub const TIMED: usize = 3;
/// Rounds of timing. Candidates take turns within a round, so that clocks and neighbours meet all of them.
const ROUNDS: usize = 7;

/// Something that can run a path once and tell how long it took.
pub trait Timer {
    /// Seconds that one product of `tokens` tokens takes on this path.
    ///
    /// # Errors
    /// Whatever keeps the product from running.
    fn time(&mut self, plan: &GemmPlan, path: Path, tokens: usize) -> Result<f64, Error>;
}

/// What a tuned choice is remembered by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TuningKey {
    /// Name of the device.
    pub device: String,
    /// Bits of the link's rates for reads of blocks and for copies, which decide between paths.
    pub link: [u64; 2],
    /// Format of the weights.
    pub format: Format,
    /// `[n, k]`
    pub shape: [usize; 2],
    /// Column tiles in host memory.
    pub host_columns: usize,
    /// How they lie in memory.
    pub host_layout: Layout,
    /// Type of X.
    pub x: DType,
    /// What follows the sums.
    pub epilogue: EpilogueSpec,
    /// Who may change the last bits.
    pub summation: Summation,
    /// Which paths are open, as text: choices of a path hold numbers that have no hash.
    pub paths: String,
    /// SMs that launches may use.
    pub sm_budget: usize,
    /// Tokens of a panel.
    pub panel: usize,
    /// Tokens, rounded up to a bucket.
    pub tokens: usize,
}

impl TuningKey {
    /// The key of a call. Tokens count by buckets: 1, 8, 16, then by powers of two.
    pub fn new(plan: &GemmPlan, tokens: usize) -> Self {
        let (config, tiling) = (plan.config(), plan.placement().tiling());
        TuningKey {
            device: config.device.name.clone(),
            link: [config.device.link_reads_per_s, config.device.link_copies_per_s].map(f64::to_bits),
            format: tiling.format(),
            shape: [tiling.n(), tiling.k()],
            host_columns: plan.placement().host_columns(),
            host_layout: plan.placement().host_layout(),
            x: config.x,
            epilogue: config.epilogue,
            summation: config.summation,
            paths: format!("{:?}, {:?}", config.path, config.alpha),
            panel: plan.panel(),
            sm_budget: config.sm_budget.unwrap_or(config.device.sm_count),
            tokens: if tokens <= 1 { 1 } else { tokens.next_power_of_two().max(8) },
        }
    }
}

/// Remembers the fastest path per key.
#[derive(Debug, Clone, Default)]
pub struct Tuner {
    choices: HashMap<TuningKey, Path>,
}

impl Tuner {
    /// Knows nothing yet.
    pub fn new() -> Self {
        Tuner::default()
    }

    /// The paths that the cost model puts first, at most `count`; hybrids in sixteenths of alpha.
    pub fn rank(plan: &GemmPlan, tokens: usize, count: usize) -> Vec<(Path, f64)> {
        let mut paths: Vec<Path> =
            plan.candidates(tokens).into_iter().map(|candidate| candidate.path).collect();
        if plan.config().path == PathChoice::Fastest {
            paths.extend((1..16).map(|alpha| Path::Direct { alpha: f64::from(alpha) / 16.0 }));
        }
        let model = plan.model();
        let predict = |path| {
            let launches = plan.launches_of(path, tokens).ok()?;
            Some((path, model.predict(&launches).time_s))
        };
        let mut ranked: Vec<_> = paths.into_iter().filter_map(predict).collect();
        ranked.sort_by(|a, b| a.1.total_cmp(&b.1));
        ranked.truncate(count);
        ranked
    }

    /// The path for a call: as remembered, or the fastest of the first few by the median of several rounds. The first round warms
    /// up and does not count.
    ///
    /// # Errors
    /// [`Error::NoPath`] when there is no candidate; what the timer returns.
    pub fn choose(&mut self, plan: &GemmPlan, tokens: usize, timer: &mut impl Timer) -> Result<Path, Error> {
        let key = TuningKey::new(plan, tokens);
        // Tokens of one bucket may differ in what is open to them.
        if let Some(path) = self.choices.get(&key)
            && plan.launches_of(*path, tokens).is_ok()
        {
            return Ok(*path);
        }
        let candidates = Self::rank(plan, key.tokens.min(plan.config().max_tokens), TIMED);
        let mut times: Vec<Vec<f64>> = vec![Vec::new(); candidates.len()];
        for round in 0..=ROUNDS {
            for ((path, _), times) in candidates.iter().zip(&mut times) {
                let time = timer.time(plan, *path, tokens)?;
                if round > 0 {
                    times.push(time);
                }
            }
        }
        let median = |mut times: Vec<f64>| {
            times.sort_by(f64::total_cmp);
            times.get(times.len() / 2).copied().unwrap_or(f64::INFINITY)
        };
        let timed = candidates.iter().zip(times).map(|((path, _), times)| (*path, median(times)));
        let fastest = timed.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(path, _)| path);
        match fastest {
            Some(path) => {
                self.choices.insert(key, path);
                Ok(path)
            }
            // The plan names the reasons.
            None => plan.choose(tokens).map(|(path, _)| path),
        }
    }
}
