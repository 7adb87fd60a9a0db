//! Products of experts (MoE): rows of X sorted by expert, one matrix per expert, only the active ones fetched.
//!
//! Experts are one list of items per role: a block that has finished with one expert's columns goes on with the next expert's where the
//! deal of items ended ([`TileSchedule::rotation`]). The roles of the blocks are those of the launch, whatever rows come
//! ([`GroupSchedule`]); rows per expert are data, on a device too, so that a captured graph follows them.

use crate::cpu::{Gemm, GemmArgs};
use crate::path::{self, LinkLoad};
use crate::plan::{LARGE_PANEL, SMALL_PANEL, check_alpha, check_path};
use crate::schedule::TileSchedule;
use crate::traffic::Receipt;
use crate::weights::Placement;
use crate::{
    Alpha, CostModel, Element, Error, GemmConfig, GemmPlan, Launch, MatrixView, MatrixViewMut, Operands,
    Path, PathChoice, Prediction, Traffic, Weights,
};

/// What all experts of a launch share: panels, K tiles and the blocks of the three roles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupSchedule {
    /// Tokens of a panel.
    pub panel: usize,
    /// K tiles of a column.
    pub k_tiles: usize,
    /// Blocks of the output-stationary role.
    pub os_blocks: usize,
    /// Blocks of the weight-stationary role.
    pub ws_blocks: usize,
    /// Blocks of the HBM role.
    pub hbm_blocks: usize,
}

impl GroupSchedule {
    /// The schedule of an expert with `tokens` rows, whose items go to the blocks from `rotation` on.
    pub fn expert(&self, placement: &Placement, tokens: usize, rotation: [usize; 3]) -> TileSchedule {
        let host = placement.host_columns();
        let link = self.os_blocks + self.ws_blocks;
        let os_columns = path::output_stationary_columns(host, self.os_blocks, link);
        TileSchedule {
            tokens,
            panel: self.panel,
            k_tiles: self.k_tiles,
            first_column: 0,
            os_columns,
            ws_columns: host - os_columns,
            hbm_columns: placement.hbm_columns(),
            os_blocks: self.os_blocks,
            ws_blocks: self.ws_blocks,
            hbm_blocks: self.hbm_blocks,
            cluster: 1,
            rotation,
        }
    }
}

/// A plan of grouped products: experts of one shape, whose weights may lie in different places.
///
/// Paths are direct: the slabs of a copy engine would have to be known before the rows are.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupedPlan {
    experts: Vec<Placement>,
    config: GemmConfig,
    sm_budget: usize,
    schedule: GroupSchedule,
}

impl GroupedPlan {
    /// Plans calls of up to `config.max_tokens` rows in all. Needs no device.
    ///
    /// # Errors
    /// [`Error::Argument`] for no experts, experts of different shapes, an epilogue with operands, and as [`GemmPlan::new`];
    /// [`Error::NoPath`] for a path that is not direct, or a budget of SMs that is too small for the link and HBM.
    pub fn new(experts: Vec<Placement>, config: GemmConfig) -> Result<Self, Error> {
        let panel = if config.max_tokens <= SMALL_PANEL { SMALL_PANEL } else { LARGE_PANEL };
        GroupedPlan::with_panel(experts, config, panel)
    }

    /// The same with panels of the caller's choice.
    pub(crate) fn with_panel(
        experts: Vec<Placement>,
        config: GemmConfig,
        panel: usize,
    ) -> Result<Self, Error> {
        let Some(first) = experts.first() else { return Err(Error::argument("experts", "at least 1", 0)) };
        if config.epilogue.bias || config.epilogue.residual {
            return Err(Error::argument("epilogue", "no bias and no residual", "one of them"));
        }
        if let Some(index) = experts.iter().position(|expert| expert.tiling() != first.tiling()) {
            return Err(Error::argument(
                "experts",
                "one shape and format",
                format!("expert {index} with another"),
            ));
        }
        // The configuration's own checks.
        let any = GemmConfig { path: PathChoice::Fastest, ..config.clone() };
        let sm_budget = GemmPlan::new(*first, any)?.sm_budget();
        let k_tiles = first.tiling().k_tiles();
        let schedule = GroupSchedule { panel, k_tiles, os_blocks: 0, ws_blocks: 0, hbm_blocks: 0 };
        check_path(config.path)?;
        // Alpha has one place, so that it can be set later.
        let config = match config.path {
            PathChoice::Only(Path::Direct { alpha }) => {
                GemmConfig { path: PathChoice::Direct, alpha: Alpha::Fixed(alpha), ..config }
            }
            _ => config,
        };
        let mut plan = GroupedPlan { experts, config, sm_budget, schedule };
        plan.set_alpha(plan.config.alpha)?;
        Ok(plan)
    }

    /// Where the weights of each expert lie.
    pub fn experts(&self) -> &[Placement] {
        &self.experts
    }

    /// What the plan was made for.
    pub fn config(&self) -> &GemmConfig {
        &self.config
    }

    /// SMs that launches may use.
    pub fn sm_budget(&self) -> usize {
        self.sm_budget
    }

    /// What all experts of a launch share.
    pub fn schedule(&self) -> &GroupSchedule {
        &self.schedule
    }

    /// Sets alpha for the calls that follow. [`Alpha::Auto`] is the model's best for rows that are spread evenly.
    ///
    /// # Errors
    /// [`Error::Argument`] for an alpha outside 0..=1; [`Error::NoPath`] for a budget of SMs that is too small for it.
    pub fn set_alpha(&mut self, alpha: Alpha) -> Result<(), Error> {
        check_alpha(alpha)?;
        let several_panels = self.config.max_tokens > self.schedule.panel;
        let fixed = match (self.config.path, alpha) {
            (PathChoice::Only(path), _) => {
                return Err(Error::NoPath(format!("{path}: grouped products read weights where they lie")));
            }
            (_, Alpha::Fixed(alpha)) => Some(alpha),
            // With one panel all dataflows are one.
            (_, Alpha::Auto) if !several_panels || self.host_columns() == 0 => Some(1.0),
            (_, Alpha::Auto) => None,
        };
        self.config.alpha = alpha;
        if let Some(alpha) = fixed {
            self.schedule = self.blocks(alpha).map_err(Error::NoPath)?;
            return Ok(());
        }
        let even = self.even_rows();
        let mut best: Option<(f64, GroupSchedule)> = None;
        let mut refused = String::new();
        // The first is taken where others are no faster: weight-stationary, whose bytes over the link stay the same where rows
        // crowd at an expert and fill several panels.
        for sixteenths in [0, 16].into_iter().chain(1..16) {
            match self.blocks(f64::from(sixteenths) / 16.0) {
                Ok(schedule) => {
                    self.schedule = schedule;
                    let time = self.predict(&even)?.time_s;
                    if best.is_none_or(|(least, _)| time < least) {
                        best = Some((time, schedule));
                    }
                }
                Err(reason) => refused = reason,
            }
        }
        self.schedule = best.ok_or(Error::NoPath(refused))?.1;
        Ok(())
    }

    /// Host columns of all experts.
    fn host_columns(&self) -> usize {
        self.experts.iter().map(Placement::host_columns).sum()
    }

    /// Rows of the largest call, spread evenly.
    fn even_rows(&self) -> Vec<usize> {
        let (experts, rows) = (self.experts.len(), self.config.max_tokens);
        (0..experts).map(|expert| rows / experts + usize::from(expert < rows % experts)).collect()
    }

    /// Roles of blocks: link and HBM by what all experts have there, the link's by alpha.
    fn blocks(&self, alpha: f64) -> Result<GroupSchedule, String> {
        let (host, rows) = (self.host_columns(), self.even_rows());
        let needed = usize::from(host > 0) + usize::from(host > 0 && alpha > 0.0 && alpha < 1.0);
        let operands = self.operands();
        let flops = self.experts.iter().zip(&rows);
        let load = LinkLoad {
            columns: [host, self.experts.iter().map(Placement::hbm_columns).sum()],
            tile_bytes: self.experts[0].tile_bytes(0, 0),
            host_bytes: self.experts.iter().map(Placement::host_bytes).sum(),
            flops: flops.map(|(expert, rows)| operands.flops(expert, 0..expert.host_columns(), *rows)).sum(),
        };
        let link = if host > 0 { load.blocks(&self.config.device, self.sm_budget, needed)? } else { 0 };
        let os_blocks = if host > 0 { path::output_stationary_blocks(alpha, link) } else { 0 };
        Ok(GroupSchedule {
            os_blocks,
            ws_blocks: link - os_blocks,
            hbm_blocks: self.sm_budget - link,
            ..self.schedule
        })
    }

    fn operands(&self) -> Operands {
        Operands { x: self.config.x, epilogue: self.config.epilogue }
    }

    fn model<'a>(&'a self, expert: &'a Placement) -> CostModel<'a> {
        CostModel { placement: expert, operands: self.operands(), device: &self.config.device }
    }

    /// Partial sums of a call, in f32, whatever alpha becomes: those of an expert that is all in host memory and has all rows.
    pub fn workspace_len(&self) -> usize {
        if self.config.max_tokens <= self.schedule.panel {
            return 0;
        }
        let host = self.experts.iter().map(Placement::host_columns).max().unwrap_or(0);
        host * self.config.max_tokens * crate::pack::TILE_ROWS
    }

    /// What each expert does for its number of rows; nothing for one without.
    ///
    /// # Errors
    /// [`Error::Argument`] for another number of experts, or more rows than planned.
    pub fn launches(&self, rows: &[usize]) -> Result<Vec<Option<Launch>>, Error> {
        if rows.len() != self.experts.len() {
            return Err(Error::argument("rows", format!("{} experts", self.experts.len()), rows.len()));
        }
        let (sum, most) = (rows.iter().sum::<usize>(), self.config.max_tokens);
        if sum > most {
            return Err(Error::argument("rows", format!("at most {most} in all"), sum));
        }
        let mut dealt = [0; 3];
        let launch = |(expert, &rows): (&Placement, &usize)| {
            if rows == 0 {
                return None;
            }
            let schedule = self.schedule.expert(expert, rows, dealt);
            dealt.iter_mut().zip(schedule.items()).for_each(|(dealt, items)| *dealt += items);
            Some(Launch { schedule, staged: 0..0 })
        };
        Ok(self.experts.iter().zip(rows).map(launch).collect())
    }

    /// What a call is expected to move and take: experts share link, HBM and SMs, and one launch serves them all.
    ///
    /// # Errors
    /// As [`launches`](Self::launches).
    pub fn predict(&self, rows: &[usize]) -> Result<Prediction, Error> {
        let launches = self.launches(rows)?;
        let mut sum = self.model(&self.experts[0]).predict(&[]);
        for (expert, launch) in self.experts.iter().zip(&launches) {
            let own = self.model(expert).predict(launch.as_slice());
            sum.traffic += own.traffic;
            sum.hbm_bytes += own.hbm_bytes;
            sum.link_s += own.link_s;
            sum.hbm_s += own.hbm_s;
            sum.math_s += own.math_s;
        }
        let (slowest, bound) = crate::cost_model::slowest(sum.link_s, sum.hbm_s, sum.math_s);
        Ok(Prediction { time_s: slowest + self.config.device.launch_s, bound, ..sum })
    }
}

/// The products of experts on the CPU, and their weights, which it keeps alive.
#[derive(Debug, Clone)]
pub struct GroupedGemm {
    plan: GroupedPlan,
    experts: Vec<Gemm>,
}

/// Operands of [`GroupedGemm::run`].
#[derive(Debug)]
pub struct GroupedArgs<'a, X, O> {
    /// X `[rows, k]`, the rows of an expert together.
    pub x: MatrixView<'a, X>,
    /// First row of each expert, and the end: `[experts + 1]`, rising from 0. Rows behind the end are padding and stay untouched.
    pub offsets: &'a [u32],
    /// O `[rows, out_columns]`.
    pub out: MatrixViewMut<'a, O>,
}

impl GroupedGemm {
    /// Puts a plan and the experts' weights together.
    ///
    /// # Errors
    /// [`Error::Argument`] for weights that lie elsewhere than planned.
    pub fn prepare(plan: &GroupedPlan, experts: Vec<Weights>) -> Result<Self, Error> {
        let planned = plan.experts.len();
        if experts.len() != planned {
            return Err(Error::argument("experts", format!("{planned}, as planned"), experts.len()));
        }
        let prepare = |(index, weights): (usize, Weights)| {
            let placement = plan.experts[index];
            if *weights.placement() != placement {
                let found = format!("expert {index} with another");
                return Err(Error::argument("experts", "the placements of the plan", found));
            }
            let config = GemmConfig { path: PathChoice::Direct, ..plan.config.clone() };
            Gemm::prepare(
                &GemmPlan::unchecked(placement, config, plan.schedule.panel, plan.sm_budget),
                weights,
            )
        };
        let experts = experts.into_iter().enumerate().map(prepare).collect::<Result<_, _>>()?;
        Ok(GroupedGemm { plan: plan.clone(), experts })
    }

    /// The plan.
    pub fn plan(&self) -> &GroupedPlan {
        &self.plan
    }

    /// O = epilogue(X·Wᵀ) with each row's expert. `workspace` has [`GroupedPlan::workspace_len`] elements or more.
    ///
    /// # Errors
    /// [`Error::Argument`] for offsets that do not rise from 0 to at most the rows of X, and whatever a single product refuses.
    pub fn run<X: Element, O: Element>(
        &self,
        mut args: GroupedArgs<'_, X, O>,
        workspace: &mut [f32],
    ) -> Result<Receipt, Error> {
        let rows = self.rows(args.offsets, args.x.shape()[0])?;
        if args.out.shape()[0] != args.x.shape()[0] {
            return Err(Error::argument("out", format!("{} rows", args.x.shape()[0]), args.out.shape()[0]));
        }
        let predicted = self.plan.predict(&rows)?;
        let launches = self.plan.launches(&rows)?;
        let mut parts = Vec::new();
        // Everything is checked before anything is written.
        for (index, expert) in self.experts.iter().enumerate() {
            let range = args.offsets[index] as usize..args.offsets[index + 1] as usize;
            let own = GemmArgs {
                x: args.x.slice(range.clone()),
                bias: None,
                residual: None,
                out: args.out.slice_mut(range.clone()),
            };
            expert.check(&own, workspace.len())?;
            parts.push(range);
        }
        let mut counted = Traffic::default();
        for ((expert, range), launch) in self.experts.iter().zip(parts).zip(&launches) {
            let mut own = GemmArgs {
                x: args.x.slice(range.clone()),
                bias: None,
                residual: None,
                out: args.out.slice_mut(range),
            };
            counted += expert.run_launches(launch.as_slice(), &mut own, workspace);
        }
        Ok(Receipt { counted, predicted })
    }

    /// Rows of each expert.
    fn rows(&self, offsets: &[u32], rows: usize) -> Result<Vec<usize>, Error> {
        if offsets.len() != self.experts.len() + 1 {
            return Err(Error::argument(
                "offsets",
                format!("{} values", self.experts.len() + 1),
                offsets.len(),
            ));
        }
        if offsets[0] != 0 {
            return Err(Error::argument("offsets", "0 first", offsets[0]));
        }
        if let Some(pair) = offsets.windows(2).find(|pair| pair[0] > pair[1]) {
            return Err(Error::argument(
                "offsets",
                "rising values",
                format!("{} before {}", pair[0], pair[1]),
            ));
        }
        let end = offsets[self.experts.len()] as usize;
        if end > rows {
            return Err(Error::argument("offsets", format!("an end of at most {rows}, the rows of X"), end));
        }
        Ok(offsets.windows(2).map(|pair| (pair[1] - pair[0]) as usize).collect())
    }
}
