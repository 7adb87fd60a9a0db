//! The plan of a product: which path, in which launches, with how much workspace, and why not another.

use std::fmt::Write;

use crate::cost_model::{CostModel, Operands, Prediction};
use crate::path::{Launch, Path, PathShape};
use crate::traffic::Bytes;
use crate::weights::Placement;
use crate::{DType, DeviceProfile, EpilogueSpec, Error};

/// Tokens of a panel up to which a product is a decoding step: one panel, weights on the wide side of the tensor cores.
pub const SMALL_PANEL: usize = 64;
/// Tokens of a panel of larger products.
pub const LARGE_PANEL: usize = 256;
/// Bytes of a staged slab, about: long against the start of a kernel even on C2C.
const SLAB_BYTES: u64 = 16 << 20;
/// HBM for the ring of slabs.
const RING_BYTES: u64 = 64 << 20;

/// Who may change a result in its last bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Summation {
    /// Nobody: an output depends on its row of X and its row of W alone, not on where the weights lie, the path, alpha, the
    /// number of tokens or of threads. Weight-stationary sums continue from the workspace instead of being added to it.
    #[default]
    Bitwise,
    /// Sums may be grouped as is fastest.
    Fast,
}

/// How alpha, the output-stationary share of the link's blocks, is set.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Alpha {
    /// By the cost model.
    #[default]
    Auto,
    /// 0 to 1.
    Fixed(f64),
}

/// Which path is taken.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum PathChoice {
    /// The one that the cost model finds fastest.
    #[default]
    Fastest,
    /// Blocks that read host memory in place, with the plan's alpha.
    Direct,
    /// This one. A direct path is output-stationary for calls of one panel of a plan of several.
    Only(Path),
}

/// What a plan is made for.
#[derive(Debug, Clone, PartialEq)]
pub struct GemmConfig {
    /// Most tokens of a call.
    pub max_tokens: usize,
    /// Type of X.
    pub x: DType,
    /// What follows the sums, and the type of O.
    pub epilogue: EpilogueSpec,
    /// Who may change the last bits.
    pub summation: Summation,
    /// Share of the output-stationary dataflow.
    pub alpha: Alpha,
    /// Which path.
    pub path: PathChoice,
    /// The device, or what is assumed of it.
    pub device: DeviceProfile,
    /// SMs that launches may use; all, where it is not given.
    pub sm_budget: Option<usize>,
}

impl GemmConfig {
    /// The bare product on a device: X and O of one type, everything else by the cost model.
    pub fn new(max_tokens: usize, dtype: DType, device: DeviceProfile) -> Self {
        GemmConfig {
            max_tokens,
            x: dtype,
            epilogue: EpilogueSpec::plain(dtype),
            summation: Summation::default(),
            alpha: Alpha::default(),
            path: PathChoice::default(),
            device,
            sm_budget: None,
        }
    }
}

/// A plan: everything that follows from shape and configuration, without weights or a device.
#[derive(Debug, Clone, PartialEq)]
pub struct GemmPlan {
    placement: Placement,
    config: GemmConfig,
    panel: usize,
    sm_budget: usize,
    backend: Backend,
}

/// Who computes, and so which paths there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backend {
    /// The CPU walks every path.
    Cpu,
    /// Kernels with panels of [`SMALL_PANEL`] tokens.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    SmallPanels,
    /// Kernels with panels of [`LARGE_PANEL`] tokens.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    LargePanels,
}

impl Backend {
    /// Why it does not have a path.
    fn refuses(self, path: Path) -> Option<String> {
        match (self, path) {
            (Backend::Cpu, _) => None,
            (_, Path::Multicast { .. }) => {
                Some("no kernel of thread-block clusters (sm_90a) is written yet".to_string())
            }
            (Backend::SmallPanels, Path::Direct { alpha }) if alpha < 1.0 => {
                Some(format!("no kernel of panels of {SMALL_PANEL} tokens keeps a weight tile"))
            }
            _ => None,
        }
    }
}

/// Refuses an alpha that is no share.
pub(crate) fn check_alpha(alpha: Alpha) -> Result<(), Error> {
    match alpha {
        Alpha::Fixed(alpha) if !(0.0..=1.0).contains(&alpha) => {
            Err(Error::argument("alpha", "0 to 1", alpha))
        }
        _ => Ok(()),
    }
}

/// The same of a path.
pub(crate) fn check_path(path: PathChoice) -> Result<(), Error> {
    match path {
        PathChoice::Only(Path::Direct { alpha }) => check_alpha(Alpha::Fixed(alpha)),
        _ => Ok(()),
    }
}

/// A path that was looked at for a number of tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// The path.
    pub path: Path,
    /// What it would move and take, or why it cannot be taken.
    pub outcome: Result<Prediction, String>,
}

impl GemmPlan {
    /// Plans products with weights placed like `placement`. Needs no device.
    ///
    /// # Errors
    /// [`Error::Argument`] names what does not fit; [`Error::NoPath`] when the budget of SMs is too small for every path.
    pub fn new(placement: Placement, config: GemmConfig) -> Result<Self, Error> {
        config.device.check()?;
        config.epilogue.check(placement.tiling().n())?;
        check_alpha(config.alpha)?;
        check_path(config.path)?;
        let sm_budget = config.sm_budget.unwrap_or(config.device.sm_count);
        if sm_budget == 0 || sm_budget > config.device.sm_count {
            let expected = format!("1 to {}, the SMs of {}", config.device.sm_count, config.device.name);
            return Err(Error::argument("sm_budget", expected, sm_budget));
        }
        if config.max_tokens == 0 || u32::try_from(config.max_tokens).is_err() {
            return Err(Error::argument("max_tokens", format!("1 to {}", u32::MAX), config.max_tokens));
        }
        let panel = if config.max_tokens <= SMALL_PANEL { SMALL_PANEL } else { LARGE_PANEL };
        GemmPlan::with_panel(placement, config, panel, sm_budget, Backend::Cpu)
    }

    /// The same with panels of the caller's choice; the arguments are checked.
    pub(crate) fn with_panel(
        placement: Placement,
        config: GemmConfig,
        panel: usize,
        sm_budget: usize,
        backend: Backend,
    ) -> Result<Self, Error> {
        let plan = GemmPlan { placement, config, panel, sm_budget, backend };
        // A plan that could not serve its largest call is no plan.
        plan.choose(plan.config.max_tokens)?;
        Ok(plan)
    }

    /// The plan of one expert, whose launches are the group's.
    pub(crate) fn unchecked(
        placement: Placement,
        config: GemmConfig,
        panel: usize,
        sm_budget: usize,
    ) -> Self {
        GemmPlan { placement, config, panel, sm_budget, backend: Backend::Cpu }
    }

    /// Where the weights lie.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// What the plan was made for.
    pub fn config(&self) -> &GemmConfig {
        &self.config
    }

    /// SMs that launches may use.
    pub fn sm_budget(&self) -> usize {
        self.sm_budget
    }

    /// Tokens of a panel.
    pub fn panel(&self) -> usize {
        self.panel
    }

    /// Sets alpha for the calls that follow, as a controller does: blocks change their dataflow, nothing is planned anew. It takes
    /// the place of the alpha of [`PathChoice::Only`] a direct path; other paths have none, and stay as they are.
    ///
    /// # Errors
    /// [`Error::Argument`] for an alpha outside 0..=1.
    pub fn set_alpha(&mut self, alpha: Alpha) -> Result<(), Error> {
        check_alpha(alpha)?;
        let path = match self.config.path {
            PathChoice::Only(Path::Direct { .. }) => PathChoice::Direct,
            path => path,
        };
        let config = GemmConfig { alpha, path, ..self.config.clone() };
        *self = GemmPlan::with_panel(self.placement, config, self.panel, self.sm_budget, self.backend)?;
        Ok(())
    }

    /// The path of a call and what it is expected to move and take.
    ///
    /// # Errors
    /// [`Error::NoPath`] with the reason of each path.
    pub fn choose(&self, tokens: usize) -> Result<(Path, Prediction), Error> {
        let candidates = self.candidates(tokens);
        let possible = candidates.iter().filter_map(|candidate| {
            candidate.outcome.as_ref().ok().map(|prediction| (candidate.path, *prediction))
        });
        // The first of equals: the list starts with the simplest.
        possible.min_by(|a, b| a.1.time_s.total_cmp(&b.1.time_s)).ok_or_else(|| {
            let reason = |candidate: &Candidate| match &candidate.outcome {
                Err(reason) => format!("{}: {reason}", candidate.path),
                Ok(_) => String::new(),
            };
            Error::NoPath(candidates.iter().map(reason).collect::<Vec<_>>().join("; "))
        })
    }

    /// The launches of a call.
    ///
    /// # Errors
    /// As [`choose`](Self::choose).
    pub fn launches(&self, tokens: usize) -> Result<Vec<Launch>, Error> {
        let (path, _) = self.choose(tokens)?;
        self.launches_of(path, tokens).map_err(Error::NoPath)
    }

    /// What a call is expected to move and take.
    ///
    /// # Errors
    /// As [`choose`](Self::choose).
    pub fn predict(&self, tokens: usize) -> Result<Prediction, Error> {
        self.choose(tokens).map(|(_, prediction)| prediction)
    }

    /// Partial sums that a call needs, in f32: `[host columns, tokens, 64]`, whatever alpha becomes; 0 where no path keeps any.
    pub fn workspace_len(&self, tokens: usize) -> usize {
        if tokens <= self.panel {
            return 0;
        }
        self.placement.host_columns() * tokens * crate::pack::TILE_ROWS
    }

    /// Every path for a number of tokens, the simplest first.
    pub fn candidates(&self, tokens: usize) -> Vec<Candidate> {
        let paths = match self.config.path {
            // With one panel all dataflows are one, so a plan of many tokens serves few as well.
            PathChoice::Only(Path::Direct { .. })
                if tokens <= self.panel && self.config.max_tokens > self.panel =>
            {
                vec![Path::Direct { alpha: 1.0 }]
            }
            PathChoice::Only(path) => vec![path],
            PathChoice::Direct => self.direct(tokens),
            PathChoice::Fastest => {
                let mut paths = self.direct(tokens);
                paths.extend([2, 4, 8].map(|cluster| Path::Multicast { cluster }));
                paths.push(Path::Staged { slab_columns: self.slab_columns() });
                paths
            }
        };
        let model = self.model();
        let outcome = |path| self.launches_of(path, tokens).map(|launches| model.predict(&launches));
        paths.into_iter().map(|path| Candidate { path, outcome: outcome(path) }).collect()
    }

    /// The direct paths. A fixed alpha is for calls of several panels; with one, all dataflows are output-stationary.
    fn direct(&self, tokens: usize) -> Vec<Path> {
        let output_stationary = Path::Direct { alpha: 1.0 };
        if tokens <= self.panel || self.placement.host_columns() == 0 {
            return vec![output_stationary];
        }
        match self.config.alpha {
            Alpha::Fixed(alpha) => vec![Path::Direct { alpha }],
            Alpha::Auto => {
                let mut paths = vec![output_stationary, Path::Direct { alpha: 0.0 }];
                let predict =
                    |path| self.launches_of(path, tokens).map(|launches| self.model().predict(&launches));
                if let (Ok(os), Ok(ws)) = (predict(paths[0]), predict(paths[1])) {
                    let balanced = self.model().balanced_alpha(&os, &ws);
                    if balanced > 0.0 && balanced < 1.0 {
                        paths.push(Path::Direct { alpha: balanced });
                    }
                }
                paths
            }
        }
    }

    fn slab_columns(&self) -> usize {
        let column = self.placement.column_bytes(0..1).max(1);
        ((SLAB_BYTES / column) as usize).clamp(1, self.placement.host_columns().max(1))
    }

    /// The cost model of this plan.
    pub fn model(&self) -> CostModel<'_> {
        CostModel { placement: &self.placement, operands: self.operands(), device: &self.config.device }
    }

    /// Types and epilogue.
    pub fn operands(&self) -> Operands {
        Operands { x: self.config.x, epilogue: self.config.epilogue }
    }

    /// The launches of a path, or why it cannot be taken.
    pub fn launches_of(&self, path: Path, tokens: usize) -> Result<Vec<Launch>, String> {
        match self.backend.refuses(path) {
            Some(reason) => Err(reason),
            None => self.shape().launches(path, tokens),
        }
    }

    fn shape(&self) -> PathShape<'_> {
        PathShape {
            placement: &self.placement,
            operands: self.operands(),
            device: &self.config.device,
            panel: self.panel,
            sm_budget: self.sm_budget,
            ring_bytes: RING_BYTES,
        }
    }

    /// Which path a call of `tokens` takes, and what became of the others. The sizes in host memory and HBM leave out scales that lie
    /// beside the matrix; traffic has those of blocks.
    pub fn explain(&self, tokens: usize) -> String {
        self.explain_as(tokens, self.choose(tokens).ok().map(|(path, _)| path))
    }

    /// The same with the path that is taken.
    pub(crate) fn explain_as(&self, tokens: usize, taken: Option<Path>) -> String {
        let tiling = self.placement.tiling();
        let mut text = format!(
            "{tokens} tokens in panels of {} × [{}, {}] of {} on {}: {} in host memory, {} in HBM\n",
            self.panel,
            tiling.n(),
            tiling.k(),
            tiling.format(),
            self.config.device.name,
            Bytes(self.placement.host_bytes()),
            Bytes(self.placement.hbm_bytes()),
        );
        let mut candidates = self.candidates(tokens);
        if let Some(path) = taken.filter(|path| candidates.iter().all(|candidate| candidate.path != *path)) {
            let launches = self.launches_of(path, tokens);
            let outcome = launches.map(|launches| self.model().predict(&launches));
            candidates.insert(0, Candidate { path, outcome });
        }
        for Candidate { path, outcome } in candidates {
            let _ = match outcome {
                Ok(prediction) => {
                    let mark = if taken == Some(path) { "taken" } else { "slower" };
                    writeln!(
                        text,
                        "  {mark:<8} {path}: {:.1} µs, bound by {} (link {:.1}, HBM {:.1}, math {:.1} µs)",
                        1e6 * prediction.time_s,
                        prediction.bound,
                        1e6 * prediction.link_s,
                        1e6 * prediction.hbm_s,
                        1e6 * prediction.math_s,
                    )
                }
                Err(reason) => writeln!(text, "  {:<8} {path}: {reason}", "dropped"),
            };
        }
        if let Some(Ok(launches)) = taken.map(|path| self.launches_of(path, tokens)) {
            let _ = writeln!(text, "  moves    {}", self.model().predict(&launches).traffic);
        }
        text
    }
}
