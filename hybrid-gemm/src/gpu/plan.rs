//! Grid, schedules and workspace of products on a GPU.

use cuda::kernels::hybrid_gemm::{WeightFormat, large_m_supports};
use cuda::params::{HYBRID_LARGE_PANEL, HYBRID_SMALL_PANEL, HybridGemmSchedule, HybridGemmTraffic};
use cuda::workspace::{Layout, Region};

use crate::pack::{TILE_ROWS, slab_elements};
use crate::schedule::TileSchedule;
use crate::weights::Placement;
use crate::{
    Alpha, DType, Error, Format, GemmConfig, GemmPlan, Path, PathChoice, Prediction, Summation, Traffic,
};

/// K parts that are looked at where sums may be grouped.
const SPLITS: [usize; 4] = [1, 2, 4, 8];
/// K tiles below which a part is too short to fill the ring.
const MIN_SPLIT_TILES: usize = 2;

/// A plan of products on a GPU: everything that follows from shape and configuration. Needs no device.
///
/// With [`Summation::Bitwise`] an output depends on its rows of X and W alone: not on alpha, on where the weights lie, on the
/// number of tokens or of SMs. With [`Summation::Fast`] a product of few tokens deals the K tiles of a column to several
/// blocks, as the number of SMs suggests; the same plan still gives the same bits at every run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What schedules come from: panels of the kernel, and a budget of as many blocks as the grid is wide.
    gemm: GemmPlan,
    format: WeightFormat,
    /// Whether the kernel of large panels serves it.
    large: bool,
    k_splits: usize,
    layout: Layout,
    partials: Region<f32>,
    arrivals: Region<u32>,
}

impl Plan {
    /// Plans products with weights placed like `placement`.
    ///
    /// # Errors
    /// [`Error::Argument`] for types that no kernel has, and as [`GemmPlan::new`]; [`Error::NoPath`] for a path that has no
    /// kernel here.
    pub fn new(placement: Placement, config: GemmConfig) -> Result<Self, Error> {
        let path = match config.path {
            PathChoice::Fastest | PathChoice::Direct => PathChoice::Direct,
            PathChoice::Only(Path::Direct { alpha }) => PathChoice::Only(Path::Direct { alpha }),
            PathChoice::Only(path) => return Err(Error::NoPath(format!("{path} has no kernel"))),
        };
        // The arguments' own checks first.
        let budget = GemmPlan::new(placement, GemmConfig { path, ..config.clone() })?.sm_budget();
        let tiling = placement.tiling();
        let format = match (tiling.format(), config.x) {
            (_, DType::F32) => return Err(Error::argument("x", "f16 or bf16", config.x)),
            (Format::Float(weights), x) if weights != x => {
                return Err(Error::argument("weights", format!("{x}, as X"), weights));
            }
            (Format::Float(_), _) => WeightFormat::Float,
            (Format::Int8, _) => WeightFormat::Int8,
            (Format::Int4 { group }, _) => WeightFormat::Int4 { group },
        };
        let k_splits = match config.summation {
            Summation::Fast if config.max_tokens <= HYBRID_SMALL_PANEL as usize => {
                k_splits(&placement, config.max_tokens, budget)
            }
            _ => 1,
        };
        // Weight-stationary columns need the kernel of large panels; panels of 64 tokens are output-stationary.
        let slabs = tiling.tile_k() / slab_elements(tiling.format());
        let large = config.max_tokens > HYBRID_SMALL_PANEL as usize && large_m_supports(format, slabs);
        let (panel, config) = match (large, path) {
            (true, _) => (HYBRID_LARGE_PANEL, GemmConfig { path, ..config }),
            (false, PathChoice::Only(Path::Direct { alpha })) if alpha < 1.0 => {
                return Err(Error::NoPath(format!(
                    "{} has no kernel for {format:?}",
                    Path::Direct { alpha }
                )));
            }
            (false, _) => (HYBRID_SMALL_PANEL, GemmConfig { path, alpha: Alpha::Fixed(1.0), ..config }),
        };
        let gemm = GemmPlan::with_panel(placement, config, panel as usize, budget / k_splits)?;

        let (tokens, columns) = (gemm.config().max_tokens, tiling.column_tiles());
        let (mut layout, too_large) = (Layout::new(), usize::MAX);
        let sums = match k_splits {
            1 if large => Some(gemm.workspace_len(tokens)),
            1 => Some(0),
            _ => k_splits.checked_mul(columns).and_then(|sums| sums.checked_mul(tokens * TILE_ROWS)),
        };
        let partials = layout.scratch(sums.unwrap_or(too_large))?;
        let arrivals = layout.counters(if k_splits > 1 { columns } else { 0 })?;
        Ok(Plan { gemm, format, large, k_splits, layout, partials, arrivals })
    }

    /// Where the weights lie.
    pub fn placement(&self) -> &Placement {
        self.gemm.placement()
    }

    /// What the plan was made for, with the paths that have kernels.
    pub fn config(&self) -> &GemmConfig {
        self.gemm.config()
    }

    /// Whether `hybrid_large_m` serves it, in panels of 256 tokens; else `hybrid_small_m` does, in panels of 64.
    pub fn is_large(&self) -> bool {
        self.large
    }

    /// Sets alpha for the schedules that follow; everything that is prepared stays.
    ///
    /// # Errors
    /// [`Error::Argument`] for an alpha outside 0..=1.
    pub fn set_alpha(&mut self, alpha: Alpha) -> Result<(), Error> {
        *self = Plan::new(*self.placement(), GemmConfig { alpha, ..self.config().clone() })?;
        Ok(())
    }

    /// Parts that the K tiles of a column are dealt to.
    pub fn k_splits(&self) -> usize {
        self.k_splits
    }

    /// Layout of the workspace of [`Gemm::run`](super::Gemm::run), zeroed before the first; products on one stream share it.
    pub fn workspace(&self) -> &Layout {
        &self.layout
    }

    /// The schedule of a call of `tokens` tokens, to be written to device memory before it.
    ///
    /// # Errors
    /// [`Error::Argument`] for more tokens than planned.
    pub fn schedule(&self, tokens: usize) -> Result<HybridGemmSchedule, Error> {
        let most = self.config().max_tokens;
        if tokens > most {
            return Err(Error::argument("tokens", format!("at most {most}"), tokens));
        }
        let launches = self.gemm.launches(tokens)?;
        Ok(to_device(&launches[0].schedule))
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

    /// The receipt: what the kernel has counted.
    pub fn traffic(&self, counted: &HybridGemmTraffic) -> Traffic {
        Traffic {
            link_tiles: counted.link_tiles,
            link_bytes: counted.link_bytes,
            hbm_tiles: counted.hbm_tiles,
            hbm_weight_bytes: counted.hbm_weight_bytes,
            staged_bytes: 0,
            activation_bytes: counted.activation_bytes,
            partial_bytes: counted.partial_bytes,
            output_bytes: counted.output_bytes,
            flops: counted.flops,
        }
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
}

/// The schedule as the kernel reads it. Every size of a plan fits 32 bits.
fn to_device(schedule: &TileSchedule) -> HybridGemmSchedule {
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
