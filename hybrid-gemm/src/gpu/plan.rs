//! Grid, schedules and workspace of products on a GPU.

use cuda::kernels::hybrid_gemm::{MOST_CHUNKS, WeightFormat, large_m_supports};
use cuda::params::{HYBRID_LARGE_PANEL, HYBRID_SMALL_PANEL, HybridGemmSchedule, HybridGemmTraffic};
use cuda::workspace::{ALIGNMENT, Layout, Region};

use crate::pack::{TILE_ROWS, Tiling, slab_elements};
use crate::path::RING_SLABS;
use crate::plan::{Backend, LARGE_PANEL, SMALL_PANEL, check_alpha};
use crate::schedule::TileSchedule;
use crate::tuner::{Timer, Tuner};
use crate::weights::Placement;
use crate::{
    Alpha, DType, Error, Format, GemmConfig, GemmPlan, Launch, Path, PathChoice, Prediction, Summation,
    Traffic,
};

const _: () =
    assert!(SMALL_PANEL == HYBRID_SMALL_PANEL as usize && LARGE_PANEL == HYBRID_LARGE_PANEL as usize);

/// K parts that are looked at where sums may be grouped.
const SPLITS: [usize; 4] = [1, 2, 4, 8];
/// K tiles below which a part is too short to fill the ring.
const MIN_SPLIT_TILES: usize = 2;

/// A plan of products on a GPU: everything that follows from shape and configuration. Needs no device.
///
/// The path is that of the largest call, so that one captured graph serves every call: either direct, where calls and alpha
/// may change from replay to replay, or staged ([`is_staged`](Self::is_staged)), where the slabs are the same in each.
///
/// With [`Summation::Bitwise`] an output depends on its rows of X and W alone: not on the path, on alpha, on where the weights
/// lie, on the number of tokens or of SMs. With [`Summation::Fast`] a direct product of few tokens deals the K tiles of a column
/// to several blocks, as the number of SMs suggests; the same plan still gives the same bits at every run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// All paths, for whoever wants to know why; its budget of SMs is the caller's.
    considered: GemmPlan,
    /// What schedules come from: the path that is taken, and a budget of as many blocks as the grid is wide.
    gemm: GemmPlan,
    format: WeightFormat,
    k_splits: usize,
    layout: Layout,
    partials: Region<f32>,
    arrivals: Region<u32>,
    /// Slots of slabs, `slot_bytes` apart.
    ring: Region<u8>,
    slot_bytes: usize,
}

impl Plan {
    /// Plans products with weights placed like `placement`. [`PathChoice::Fastest`] is by the cost model, for the largest call.
    ///
    /// # Errors
    /// [`Error::Argument`] for types that no kernel has, and as [`GemmPlan::new`]; [`Error::NoPath`] for a path that has no
    /// kernel here.
    pub fn new(placement: Placement, config: GemmConfig) -> Result<Self, Error> {
        let (considered, format) = consider(placement, config)?;
        let path = considered.choose(considered.config().max_tokens)?.0;
        Plan::on_path(considered, format, path)
    }

    /// The same with the path that the tuner remembers, or finds by timing the cost model's first candidates.
    ///
    /// # Errors
    /// As [`new`](Self::new), and what the timer returns.
    pub fn tuned(
        placement: Placement,
        config: GemmConfig,
        tuner: &mut Tuner,
        timer: &mut impl Timer,
    ) -> Result<Self, Error> {
        let (considered, format) = consider(placement, config)?;
        let path = tuner.choose(&considered, considered.config().max_tokens, timer)?;
        Plan::on_path(considered, format, path)
    }

    fn on_path(considered: GemmPlan, format: WeightFormat, path: Path) -> Result<Self, Error> {
        let (config, placement) = (considered.config().clone(), *considered.placement());
        let (tiling, tokens, budget) = (placement.tiling(), config.max_tokens, considered.sm_budget());
        let large = considered.panel() == LARGE_PANEL;
        check_chunks(format, tiling, tokens.div_ceil(considered.panel()))?;
        let staged = matches!(path, Path::Staged { .. });
        let k_splits = match config.summation {
            Summation::Fast if tokens <= SMALL_PANEL && !staged => k_splits(&placement, tokens, budget),
            _ => 1,
        };
        let (choice, alpha) = match path {
            Path::Direct { .. } if !large => (PathChoice::Direct, Alpha::Fixed(1.0)),
            // Alpha has one place, so that it can be set later.
            Path::Direct { alpha } if matches!(config.path, PathChoice::Only(_)) => {
                (PathChoice::Direct, Alpha::Fixed(alpha))
            }
            Path::Direct { alpha } if config.alpha == Alpha::Auto => {
                // An alpha that was timed stays; the model's own follows the size of each call.
                let model = considered.choose(tokens)?.0;
                (PathChoice::Direct, if model == path { Alpha::Auto } else { Alpha::Fixed(alpha) })
            }
            Path::Direct { .. } => (PathChoice::Direct, config.alpha),
            other => (PathChoice::Only(other), config.alpha),
        };
        let backend = if large { Backend::LargePanels } else { Backend::SmallPanels };
        let config = GemmConfig { path: choice, alpha, ..config };
        let gemm = GemmPlan::with_panel(placement, config, considered.panel(), budget / k_splits, backend)?;

        let columns = tiling.column_tiles();
        let (mut layout, too_large) = (Layout::new(), usize::MAX);
        let sums = match k_splits {
            1 if large && !staged => Some(gemm.workspace_len(tokens)),
            1 => Some(0),
            _ => k_splits.checked_mul(columns).and_then(|sums| sums.checked_mul(tokens * TILE_ROWS)),
        };
        let partials = layout.scratch(sums.unwrap_or(too_large))?;
        let slab = match path {
            Path::Staged { slab_columns } => {
                placement.column_bytes(0..slab_columns.min(placement.host_columns()))
            }
            _ => 0,
        };
        let slot_bytes = (slab as usize).next_multiple_of(ALIGNMENT);
        let ring = layout.scratch(RING_SLABS * slot_bytes)?;
        let arrivals = layout.counters(if k_splits > 1 { columns } else { 0 })?;
        Ok(Plan { considered, gemm, format, k_splits, layout, partials, arrivals, ring, slot_bytes })
    }

    /// Where the weights lie.
    pub fn placement(&self) -> &Placement {
        self.gemm.placement()
    }

    /// What the plan was made for, with the path that is taken.
    pub fn config(&self) -> &GemmConfig {
        self.gemm.config()
    }

    /// All the paths that were open, for a tuner's [`Timer`] or a closer look.
    pub fn considered(&self) -> &GemmPlan {
        &self.considered
    }

    /// Whether `hybrid_large_m` serves it, in panels of 256 tokens; else `hybrid_small_m` does, in panels of 64.
    pub fn is_large(&self) -> bool {
        self.gemm.panel() == LARGE_PANEL
    }

    /// Whether slabs are staged, so that it needs a side queue: [`Gemm::run_staged`](super::Gemm::run_staged).
    pub fn is_staged(&self) -> bool {
        self.slot_bytes > 0
    }

    /// Slots of the ring of slabs, as many as the side queue has marks for; 0 where nothing is staged.
    pub fn slots(&self) -> usize {
        if self.is_staged() { RING_SLABS } else { 0 }
    }

    /// Sets alpha for the schedules that follow; everything that is prepared stays.
    ///
    /// # Errors
    /// [`Error::Argument`] for an alpha outside 0..=1; [`Error::NoPath`] for a staged plan, and for a weight-stationary share where
    /// kernels of this plan have one dataflow only.
    pub fn set_alpha(&mut self, alpha: Alpha) -> Result<(), Error> {
        check_alpha(alpha)?;
        if self.is_staged() {
            return Err(Error::NoPath("a staged plan has no alpha".into()));
        }
        if !self.is_large() {
            return match alpha {
                Alpha::Auto | Alpha::Fixed(1.0) => Ok(()),
                Alpha::Fixed(_) => Err(Error::NoPath(format!(
                    "no kernel of panels of {SMALL_PANEL} tokens keeps a weight tile"
                ))),
            };
        }
        self.gemm.set_alpha(alpha)
    }

    /// Parts that the K tiles of a column are dealt to.
    pub fn k_splits(&self) -> usize {
        self.k_splits
    }

    /// Layout of the workspace of [`Gemm::run`](super::Gemm::run), zeroed before the first. Calls of this plan share it one after
    /// another; another plan's counters lie elsewhere in theirs, so each plan has its own.
    pub fn workspace(&self) -> &Layout {
        &self.layout
    }

    /// The schedules of a call of `tokens` tokens, one per launch, to be written to device memory before it: one for a direct
    /// product; for a staged one that of the columns in HBM, if there are any, and then one per slab.
    ///
    /// # Errors
    /// [`Error::Argument`] for more tokens than planned.
    pub fn schedules(&self, tokens: usize) -> Result<Vec<HybridGemmSchedule>, Error> {
        Ok(self.launches(tokens)?.iter().map(|launch| to_device(&launch.schedule)).collect())
    }

    /// The one schedule of a direct product: the first of [`schedules`](Self::schedules).
    ///
    /// # Errors
    /// As there.
    pub fn schedule(&self, tokens: usize) -> Result<HybridGemmSchedule, Error> {
        Ok(to_device(&self.launches(tokens)?[0].schedule))
    }

    /// The launches of a call: as many for every number of tokens.
    pub(super) fn launches(&self, tokens: usize) -> Result<Vec<Launch>, Error> {
        let most = self.config().max_tokens;
        if tokens > most {
            return Err(Error::argument("tokens", format!("at most {most}"), tokens));
        }
        self.gemm.launches(tokens)
    }

    /// What a call is expected to move and take; its traffic is what the kernel counts.
    ///
    /// # Errors
    /// As [`GemmPlan::predict`].
    pub fn predict(&self, tokens: usize) -> Result<Prediction, Error> {
        let mut prediction = self.gemm.predict(tokens)?;
        if self.k_splits > 1 {
            // Written by each part, and read by the last.
            let sums = self.k_splits * self.placement().tiling().column_tiles() * tokens * TILE_ROWS;
            let bytes = 2 * (sums * size_of::<f32>()) as u64;
            prediction.traffic.partial_bytes += bytes;
            prediction.hbm_bytes += bytes;
        }
        Ok(prediction)
    }

    /// Which path is taken, what became of the others, and why, as [`GemmPlan::explain`].
    pub fn explain(&self, tokens: usize) -> String {
        let taken = self.gemm.choose(tokens).ok().map(|(path, _)| path);
        let mut text = self.considered.explain_as(tokens, taken);
        let kernel = if self.is_large() { "hybrid_large_m" } else { "hybrid_small_m" };
        text += &format!("  kernel   {kernel}, panels of {} tokens", self.gemm.panel());
        if self.config().max_tokens > self.gemm.panel() && !self.is_large() {
            text +=
                &format!(": hybrid_large_m does not take tiles of {}", self.placement().tiling().format());
        }
        if self.is_staged() {
            text += &format!(
                ", {} slots of {} for slabs",
                RING_SLABS,
                crate::traffic::Bytes(self.slot_bytes as u64)
            );
        }
        text + "\n"
    }

    /// The receipt: what the kernel has counted.
    pub fn traffic(&self, counted: &HybridGemmTraffic) -> Traffic {
        traffic(counted)
    }

    /// Seconds that a block of the output-stationary and of the weight-stationary role worked in a call of `tokens` tokens, from the
    /// counters of that call alone; 0 for a role without blocks, and in the emulator, where no time passes.
    ///
    /// # Errors
    /// As [`schedules`](Self::schedules).
    pub fn role_seconds(&self, tokens: usize, counted: &HybridGemmTraffic) -> Result<[f64; 2], Error> {
        let launches = self.launches(tokens)?;
        let schedule = &launches[0].schedule;
        let items = schedule.items();
        let busy = [schedule.os_blocks.min(items[0]), schedule.ws_blocks.min(items[1])];
        Ok(std::array::from_fn(|role| {
            let blocks = (busy[role] * self.k_splits).max(1);
            counted.role_ns[role] as f64 * 1e-9 / blocks as f64
        }))
    }

    pub(super) fn gemm(&self) -> &GemmPlan {
        &self.gemm
    }

    pub(super) fn format(&self) -> WeightFormat {
        self.format
    }

    pub(super) fn partials(&self) -> Region<f32> {
        self.partials
    }

    pub(super) fn arrivals(&self) -> Region<u32> {
        self.arrivals
    }

    pub(super) fn ring(&self) -> Region<u8> {
        self.ring
    }

    pub(super) fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }
}

/// All paths that kernels have for a matrix and a configuration, and the weights' format.
fn consider(placement: Placement, config: GemmConfig) -> Result<(GemmPlan, WeightFormat), Error> {
    // The arguments' own checks first.
    let any = GemmConfig { path: PathChoice::Fastest, ..config.clone() };
    let budget = GemmPlan::new(placement, any)?.sm_budget();
    let format = weight_format(placement.tiling(), config.x)?;
    let large = config.max_tokens > SMALL_PANEL && is_large(placement.tiling(), format);
    let (panel, backend) =
        if large { (LARGE_PANEL, Backend::LargePanels) } else { (SMALL_PANEL, Backend::SmallPanels) };
    // Panels of 64 tokens are output-stationary whatever alpha says.
    let alpha =
        if large || matches!(config.path, PathChoice::Only(_)) { config.alpha } else { Alpha::Fixed(1.0) };
    let config = GemmConfig { alpha, ..config };
    Ok((GemmPlan::with_panel(placement, config, panel, budget, backend)?, format))
}

/// How kernels name the format of weights for activations `x`.
pub(super) fn weight_format(tiling: &Tiling, x: DType) -> Result<WeightFormat, Error> {
    match (tiling.format(), x) {
        (_, DType::F32) => Err(Error::argument("x", "f16 or bf16", x)),
        (Format::Float(weights), x) if weights != x => {
            Err(Error::argument("weights", format!("{x}, as X"), weights))
        }
        (Format::Float(_), _) => Ok(WeightFormat::Float),
        (Format::Int8, _) => Ok(WeightFormat::Int8),
        (Format::Int4 { group }, _) => Ok(WeightFormat::Int4 { group }),
        (Format::Int4ZeroPoints { group }, _) => Ok(WeightFormat::Int4ZeroPoints { group }),
        (Format::Fp8Rows, _) => Ok(WeightFormat::Fp8Rows),
        (Format::Fp8Blocks, _) => Ok(WeightFormat::Fp8Blocks),
    }
}

/// Refuses products whose chunks of activations a block might not be able to count.
pub(super) fn check_chunks(format: WeightFormat, tiling: &Tiling, panels: usize) -> Result<(), Error> {
    match format.chunks([tiling.n(), tiling.k()], panels) {
        chunks if chunks > MOST_CHUNKS => {
            let expected = format!("at most {MOST_CHUNKS} chunks of 64 × 64 weights times panels of tokens");
            Err(Error::argument("max_tokens", expected, chunks))
        }
        _ => Ok(()),
    }
}

/// Whether the kernel of large panels takes tiles like these.
pub(super) fn is_large(tiling: &Tiling, format: WeightFormat) -> bool {
    large_m_supports(format, tiling.tile_k() / slab_elements(tiling.format()))
}

/// A receipt from the device.
pub(super) fn traffic(counted: &HybridGemmTraffic) -> Traffic {
    Traffic {
        link_tiles: counted.link_tiles,
        link_bytes: counted.link_bytes,
        hbm_tiles: counted.hbm_tiles,
        hbm_weight_bytes: counted.hbm_weight_bytes,
        staged_bytes: counted.staged_bytes,
        activation_bytes: counted.activation_bytes,
        partial_bytes: counted.partial_bytes,
        output_bytes: counted.output_bytes,
        flops: counted.flops,
    }
}

/// The schedule as the kernel reads it. Every size of a plan fits 32 bits.
pub(super) fn to_device(schedule: &TileSchedule) -> HybridGemmSchedule {
    HybridGemmSchedule {
        tokens: schedule.tokens as u32,
        panel: schedule.panel as u32,
        k_tiles: schedule.k_tiles as u32,
        first_column: schedule.first_column as u32,
        os_columns: schedule.os_columns as u32,
        ws_columns: schedule.ws_columns as u32,
        hbm_columns: schedule.hbm_columns as u32,
        os_blocks: schedule.os_blocks as u32,
        ws_blocks: schedule.ws_blocks as u32,
        hbm_blocks: schedule.hbm_blocks as u32,
        cluster: schedule.cluster as u32,
        rotation: schedule.rotation.map(|rotation| rotation as u32),
        padding: [0; 2],
    }
}

/// Parts of K that keep a budget of SMs evenly busy on the larger side, against the partial sums that they cost.
fn k_splits(placement: &Placement, tokens: usize, budget: usize) -> usize {
    let tiling = placement.tiling();
    let sides = [placement.host_columns(), placement.hbm_columns()];
    let roles = sides.iter().filter(|columns| **columns > 0).count();
    let columns = sides[0].max(sides[1]);
    let cost = |splits: usize| {
        // Bytes of the busiest block, and its share of the sums.
        let waves = columns.div_ceil(budget / splits);
        let sums = if splits > 1 { 2 * splits * columns * tokens * TILE_ROWS * size_of::<f32>() } else { 0 };
        (waves * tiling.column_bytes()) as f64 / splits as f64 + sums as f64 / budget as f64
    };
    let fits = |splits: &usize| {
        *splits == 1 || (splits * MIN_SPLIT_TILES <= tiling.k_tiles() && splits * roles <= budget)
    };
    let possible = SPLITS.into_iter().filter(fits);
    possible.min_by(|a, b| cost(*a).total_cmp(&cost(*b))).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Residency, Tiling};

    #[test]
    fn splits_fill_the_last_wave() {
        for (case, n, k, tokens, budget, expected) in [
            ("64 columns on 132 SMs", 4096, 4096, 8, 132, 2),
            ("448 columns, 3.4 waves", 28672, 4096, 8, 132, 2),
            ("one K tile", 4096, 256, 8, 132, 1),
            ("as many columns as SMs", 132 * 64, 4096, 64, 132, 1),
            ("one SM", 4096, 4096, 8, 1, 1),
        ] {
            let tiling = Tiling::new(n, k, Format::Float(DType::BF16)).unwrap();
            let placement = Placement::packed(tiling, Residency::Hbm).unwrap();
            assert_eq!(k_splits(&placement, tokens, budget), expected, "{case}");
        }
    }
}
