//! Products of experts (MoE) on a GPU, in one launch: rows per expert are read on the device.

use cuda::kernels::hybrid_gemm::{HybridGemmArgs, HybridGemmExperts, WeightFormat};
use cuda::launch::{Device, Function};
use cuda::memory::{View, ViewMut};
use cuda::params::{HybridGemmExpert, HybridGemmParams, HybridGemmSchedule, HybridGemmTraffic};
use cuda::storage::Storage;
use cuda::workspace::{Carver, Layout, Region};

use super::gemm::{Kernel, shape_params};
use super::plan::{check_chunks, is_large, traffic, weight_format};
use super::{DeviceWeights, Strides};
use crate::plan::{LARGE_PANEL, SMALL_PANEL};
use crate::weights::{Layout as WeightLayout, Placement};
use crate::{Alpha, Error, GemmConfig, Path, PathChoice, Prediction, Traffic, grouped};

/// A plan of grouped products on a GPU. Needs no device.
///
/// The host parts of all experts lie one behind the other, and so do their parts in HBM ([`table`](Self::table)).
#[derive(Debug, Clone)]
pub struct GroupedPlan {
    group: grouped::GroupedPlan,
    format: WeightFormat,
    layout: Layout,
    partials: Region<f32>,
    arrivals: Region<u32>,
}

impl GroupedPlan {
    /// Plans calls of up to `config.max_tokens` rows in all.
    ///
    /// # Errors
    /// As [`grouped::GroupedPlan::new`]; [`Error::Argument`] for types that no kernel has, or experts that are not packed;
    /// [`Error::NoPath`] for a weight-stationary share without a kernel.
    pub fn new(experts: Vec<Placement>, config: GemmConfig) -> Result<Self, Error> {
        let Some(first) = experts.first() else { return Err(Error::argument("experts", "at least 1", 0)) };
        let tiling = *first.tiling();
        let format = weight_format(&tiling, config.x)?;
        if let Some(index) = experts.iter().position(|expert| expert.host_layout() != WeightLayout::Packed) {
            return Err(Error::argument("experts", "packed weights", format!("expert {index} row by row")));
        }
        let large = config.max_tokens > SMALL_PANEL && is_large(&tiling, format);
        let (panel, config) = match (large, config.path) {
            (true, _) => (LARGE_PANEL, config),
            (false, PathChoice::Only(Path::Direct { alpha })) if alpha < 1.0 => {
                return Err(Error::NoPath(format!(
                    "{}: no kernel of panels of {SMALL_PANEL} tokens keeps a weight tile",
                    Path::Direct { alpha }
                )));
            }
            (false, _) => (SMALL_PANEL, GemmConfig { alpha: Alpha::Fixed(1.0), ..config }),
        };
        check_chunks(format, &tiling, config.max_tokens.div_ceil(panel))?;
        let group = grouped::GroupedPlan::with_panel(experts, config, panel)?;
        let mut layout = Layout::new();
        let partials = layout.scratch(if large { group.workspace_len() } else { 0 })?;
        let arrivals = layout.counters(0)?;
        Ok(GroupedPlan { group, format, layout, partials, arrivals })
    }

    /// Experts, configuration, predictions.
    pub fn group(&self) -> &grouped::GroupedPlan {
        &self.group
    }

    /// Whether `hybrid_large_m` serves it, in panels of 256 tokens; else `hybrid_small_m` does, in panels of 64.
    pub fn is_large(&self) -> bool {
        self.group.schedule().panel == LARGE_PANEL
    }

    /// Sets alpha for the schedules that follow; everything that is prepared stays.
    ///
    /// # Errors
    /// As [`grouped::GroupedPlan::set_alpha`]; [`Error::NoPath`] where kernels of this plan have one dataflow only.
    pub fn set_alpha(&mut self, alpha: Alpha) -> Result<(), Error> {
        if !self.is_large() && alpha != Alpha::Fixed(1.0) && alpha != Alpha::Auto {
            return Err(Error::NoPath(format!(
                "no kernel of panels of {SMALL_PANEL} tokens keeps a weight tile"
            )));
        }
        self.group.set_alpha(alpha)
    }

    /// Layout of the workspace of [`GroupedGemm::run`], zeroed before the first.
    pub fn workspace(&self) -> &Layout {
        &self.layout
    }

    /// Where each expert's columns lie, in host memory and in HBM: its parts follow those of the expert before.
    pub fn table(&self) -> Vec<HybridGemmExpert> {
        let mut ends = [0, 0];
        let entry = |expert: &Placement| {
            let [host_offset, hbm_offset] = ends;
            ends[0] += expert.host_bytes();
            ends[1] += expert.hbm_bytes();
            HybridGemmExpert {
                host_offset,
                hbm_offset,
                host_columns: expert.host_columns() as u32,
                padding: 0,
            }
        };
        self.group.experts().iter().map(entry).collect()
    }

    /// The schedule, to be written to device memory: the roles of blocks. Rows are not in it.
    pub fn schedule(&self) -> HybridGemmSchedule {
        let schedule = self.group.schedule();
        HybridGemmSchedule {
            tokens: self.group.config().max_tokens as u32,
            panel: schedule.panel as u32,
            k_tiles: schedule.k_tiles as u32,
            first_column: 0,
            os_columns: 0,
            ws_columns: 0,
            hbm_columns: 0,
            os_blocks: schedule.os_blocks as u32,
            ws_blocks: schedule.ws_blocks as u32,
            hbm_blocks: schedule.hbm_blocks as u32,
            cluster: 1,
            rotation: [0; 3],
            padding: [0; 2],
        }
    }

    /// What a call with these rows per expert is expected to move and take; its traffic is what the kernel counts.
    ///
    /// # Errors
    /// As [`grouped::GroupedPlan::predict`].
    pub fn predict(&self, rows: &[usize]) -> Result<Prediction, Error> {
        self.group.predict(rows)
    }

    /// The receipt: what the kernel has counted.
    pub fn traffic(&self, counted: &HybridGemmTraffic) -> Traffic {
        traffic(counted)
    }
}

/// Arguments of [`GroupedGemm::run`].
#[derive(Debug)]
pub struct GroupedArgs<'a, X, O> {
    /// X `[max_tokens, k]`, the rows of an expert together; rows past the last offset are not read.
    pub x: &'a View<'a, X>,
    /// The columns of all experts by [`GroupedPlan::table`]; scales of each expert one behind the other.
    pub weights: DeviceWeights<'a>,
    /// [`GroupedPlan::table`], `[experts]`.
    pub table: &'a View<'a, HybridGemmExpert>,
    /// First row of each expert and the end, `[experts + 1]`: rising from 0 to at most `max_tokens`.
    pub offsets: &'a View<'a, u32>,
    /// Out: O `[max_tokens, out_columns]`; rows past the last offset stay as they are.
    pub out: ViewMut<'a, O>,
    /// Distances between rows of X and O; without gaps where not given.
    pub strides: Option<Strides>,
    /// The schedule, from [`GroupedPlan::schedule`].
    pub schedule: &'a View<'a, HybridGemmSchedule>,
    /// What the call moves is added to it.
    pub traffic: Option<ViewMut<'a, HybridGemmTraffic>>,
    /// Status word: what is wrong with the schedule, or with an expert's rows or place, and which expert.
    pub status: ViewMut<'a, u64>,
}

/// A prepared grouped product. `X` is the storage type of activations and of unquantised weights.
#[derive(Debug, Clone)]
pub struct GroupedGemm<F, X> {
    plan: GroupedPlan,
    params: HybridGemmParams,
    kernel: Kernel<F, X>,
}

impl<F: Function, X: Storage> GroupedGemm<F, X> {
    /// Compiles and loads. May block.
    ///
    /// # Errors
    /// As [`Gemm::prepare`](super::Gemm::prepare).
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &GroupedPlan) -> Result<Self, Error> {
        let (group, experts) = (&plan.group, plan.group.experts());
        let kernel = Kernel::prepare(device, group.config(), plan.format, plan.is_large())?;
        let params = HybridGemmParams {
            partial_len: plan.partials.len() as u64,
            host_bytes: experts.iter().map(Placement::host_bytes).sum(),
            hbm_bytes: experts.iter().map(Placement::hbm_bytes).sum(),
            host_columns: experts.iter().map(Placement::host_columns).max().unwrap_or(0) as u32,
            experts: experts.len() as u32,
            ..shape_params(group.config(), experts[0].tiling())
        };
        Ok(GroupedGemm { plan: plan.clone(), params, kernel })
    }

    /// The plan.
    pub fn plan(&self) -> &GroupedPlan {
        &self.plan
    }

    /// Enqueues O = epilogue(X·Wᵀ) with each row's expert, and returns.
    ///
    /// # Errors
    /// [`Error::Argument`] for experts that are placed otherwise than planned; [`Error::Cuda`] names an argument or workspace that
    /// does not fit.
    pub fn run<O: Storage>(
        &self,
        queue: &F::Queue,
        args: GroupedArgs<'_, X, O>,
        workspace: ViewMut<'_, u8>,
    ) -> Result<(), Error> {
        args.weights.check(self.plan.group.experts())?;
        let mut params = self.params;
        if let Some(strides) = args.strides {
            params.x_stride = strides.x as i64;
            params.out_stride = strides.out as i64;
        }
        let carver = Carver::new("hybrid_gemm", workspace, &self.plan.layout)?;
        let args = HybridGemmArgs {
            params: &params,
            blocks: self.plan.group.sm_budget() as u32,
            x: args.x,
            host: args.weights.host,
            hbm: args.weights.hbm,
            scales: args.weights.scales,
            bias: None,
            residual: None,
            out: args.out,
            partials: carver.take(self.plan.partials)?,
            arrivals: carver.take(self.plan.arrivals)?,
            schedule: args.schedule,
            experts: Some(HybridGemmExperts { table: args.table, offsets: args.offsets }),
            traffic: args.traffic,
            status: args.status,
        };
        Ok(self.kernel.launch(queue, args)?)
    }
}
