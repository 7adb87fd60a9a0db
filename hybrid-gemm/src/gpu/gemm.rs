//! A prepared product.

use bytemuck::Zeroable;
use cuda::kernels::hybrid_gemm as kernels;
use cuda::launch::{Device, Function};
use cuda::memory::{View, ViewMut};
use cuda::params::{
    HYBRID_GELU_TANH, HYBRID_IDENTITY, HYBRID_SILU, HYBRID_SWIGLU, HybridGemmParams, HybridGemmSchedule,
    HybridGemmTraffic,
};
use cuda::storage::Storage;
use cuda::workspace::Carver;

use super::Plan;
use super::staging::Slabs;
use crate::epilogue::Activation;
use crate::pack::{Tiling, slab_elements};
use crate::weights::{Layout, Placement};
use crate::{DType, Error, GemmConfig};

/// Where the columns of a matrix lie, as the device sees them.
#[derive(Debug, Clone, Copy)]
pub struct DeviceWeights<'a> {
    /// The columns in host memory: [`Weights::host_bytes`](crate::Weights::host_bytes), pinned. None where there are none. A view of
    /// device memory is refused: a receipt that counts bytes over the link would be wrong of it.
    pub host: Option<&'a View<'a, u8>>,
    /// The columns in HBM: [`Weights::hbm_bytes`](crate::Weights::hbm_bytes). None where there are none.
    pub hbm: Option<&'a View<'a, u8>>,
    /// Scales beside the matrix, in formats that have some: [`Weights::scales`](crate::Weights::scales), those of experts one behind
    /// the other.
    pub scales: Option<&'a View<'a, f32>>,
    /// How the columns are placed: that of one matrix, or of every expert. What a plan was not made for is refused.
    pub placements: &'a [Placement],
}

impl DeviceWeights<'_> {
    /// Refuses weights that lie otherwise than planned: their views might be long enough all the same.
    pub(super) fn check(&self, planned: &[Placement]) -> Result<(), Error> {
        if self.placements.len() != planned.len() {
            let expected = format!("{} placed as planned", planned.len());
            return Err(Error::argument("weights", expected, self.placements.len()));
        }
        match self.placements.iter().zip(planned).position(|(found, planned)| found != planned) {
            None => Ok(()),
            Some(index) => {
                let [expected, found] =
                    [planned[index], self.placements[index]].map(|placement| placement.to_string());
                let of = if planned.len() > 1 { format!("expert {index}: ") } else { String::new() };
                Err(Error::argument("weights", expected, of + &found))
            }
        }
    }
}

/// Distances between rows, in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Strides {
    /// Of X; at least k.
    pub x: usize,
    /// Of O; at least its columns.
    pub out: usize,
    /// Of the residual; at least the columns of O.
    pub residual: usize,
}

/// Arguments of [`Gemm::run`], or, without weights, of [`ResidentGemm::run`](super::ResidentGemm::run).
#[derive(Debug)]
pub struct GemmArgs<'a, X, O, W = DeviceWeights<'a>> {
    /// X `[max_tokens, k]`; rows past the schedule's tokens are not read. 16-byte aligned rows are read faster.
    pub x: &'a View<'a, X>,
    /// W.
    pub weights: W,
    /// Bias `[n]`, where the plan has one.
    pub bias: Option<&'a View<'a, f32>>,
    /// Residual `[max_tokens, out_columns]`, where the plan has one.
    pub residual: Option<&'a View<'a, O>>,
    /// Out: O `[max_tokens, out_columns]`; rows past the schedule's tokens stay as they are, unless the schedule is
    /// refused: then all rows of the launch's columns are 0.
    pub out: ViewMut<'a, O>,
    /// Distances between rows; without gaps where not given.
    pub strides: Option<Strides>,
    /// The schedules of the plan's launches, from [`Plan::schedules`].
    pub schedule: &'a View<'a, HybridGemmSchedule>,
    /// What the call moves is added to it.
    pub traffic: Option<ViewMut<'a, HybridGemmTraffic>>,
    /// Status word: what is wrong with the schedule.
    pub status: ViewMut<'a, u64>,
}

impl<'a, X, O> GemmArgs<'a, X, O, ()> {
    pub(super) fn with_weights(self, weights: DeviceWeights<'a>) -> GemmArgs<'a, X, O> {
        let GemmArgs { x, weights: (), bias, residual, out, strides, schedule, traffic, status } = self;
        GemmArgs { x, weights, bias, residual, out, strides, schedule, traffic, status }
    }
}

/// A prepared product. `X` is the storage type of activations and of unquantised weights.
#[derive(Debug, Clone)]
pub struct Gemm<F, X> {
    pub(super) plan: Plan,
    params: HybridGemmParams,
    pub(super) kernel: Kernel<F, X>,
    /// The launches of a staged plan.
    pub(super) slabs: Slabs,
}

#[derive(Debug, Clone)]
pub(super) enum Kernel<F, X> {
    Small(kernels::HybridSmallM<F, X>),
    Large(kernels::HybridLargeM<F, X>),
}

impl<F: Function, X: Storage> Kernel<F, X> {
    pub(super) fn prepare<D: Device<Function = F>>(
        device: &D,
        config: &GemmConfig,
        format: kernels::WeightFormat,
        large: bool,
    ) -> Result<Self, Error> {
        match device.sm_count() {
            Some(found) if found as usize != config.device.sm_count => {
                let expected = format!("{} SMs, as planned", config.device.sm_count);
                return Err(Error::argument("device", expected, format!("{found} SMs")));
            }
            _ => {}
        }
        if X::DTYPE != number(config.x) {
            return Err(Error::argument("x", format!("{}, as planned", config.x), X::NAME));
        }
        Ok(match large {
            true => Kernel::Large(kernels::HybridLargeM::prepare(device, format)?),
            false => Kernel::Small(kernels::HybridSmallM::prepare(device, format, config.max_tokens)?),
        })
    }

    pub(super) fn launch<O: Storage>(
        &self,
        queue: &F::Queue,
        args: kernels::HybridGemmArgs<'_, X, O>,
    ) -> Result<(), cuda::Error> {
        match self {
            Kernel::Small(kernel) => kernel.launch(queue, args),
            Kernel::Large(kernel) => kernel.launch(queue, args),
        }
    }
}

impl<F: Function, X: Storage> Gemm<F, X> {
    /// Compiles and loads. May block.
    ///
    /// # Errors
    /// [`Error::Argument`] for a device of another number of SMs than the plan's, or another `X`; [`Error::Cuda`] when the
    /// kernel cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &Plan) -> Result<Self, Error> {
        let kernel = Kernel::prepare(device, plan.config(), plan.format(), plan.is_large())?;
        Ok(Self { params: params(plan), slabs: Slabs::new(plan)?, plan: plan.clone(), kernel })
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Enqueues O = epilogue(X·Wᵀ) and returns.
    ///
    /// # Errors
    /// [`Error::Argument`] for operands that the plan has not, or has, weights that are placed otherwise, and for a staged plan, which
    /// needs [`run_staged`](Self::run_staged); [`Error::Cuda`] names an argument or workspace that does not fit.
    pub fn run<O: Storage>(
        &self,
        queue: &F::Queue,
        args: GemmArgs<'_, X, O>,
        workspace: ViewMut<'_, u8>,
    ) -> Result<(), Error> {
        if self.plan.is_staged() {
            return Err(Error::argument(
                "side",
                "a side queue (`run_staged`): the plan stages slabs",
                "none",
            ));
        }
        let params = self.params_of(&args)?;
        let carver = Carver::new("hybrid_gemm", workspace, self.plan.workspace())?;
        let args = kernels::HybridGemmArgs {
            params: &params,
            blocks: self.plan.gemm().sm_budget() as u32,
            x: args.x,
            host: args.weights.host,
            hbm: args.weights.hbm,
            scales: args.weights.scales,
            bias: args.bias,
            residual: args.residual,
            out: args.out,
            partials: carver.take(self.plan.partials())?,
            arrivals: carver.take(self.plan.arrivals())?,
            schedule: args.schedule,
            experts: None,
            traffic: args.traffic,
            status: args.status,
        };
        Ok(self.kernel.launch(queue, args)?)
    }

    /// The parameters of a call, whose operands are those of the plan.
    pub(super) fn params_of<O>(&self, args: &GemmArgs<'_, X, O>) -> Result<HybridGemmParams, Error> {
        args.weights.check(std::slice::from_ref(self.plan.placement()))?;
        let epilogue = self.plan.config().epilogue;
        for (argument, planned, given) in [
            ("bias", epilogue.bias, args.bias.is_some()),
            ("residual", epilogue.residual, args.residual.is_some()),
        ] {
            if planned != given {
                let [expected, found] = [planned, given].map(|is| if is { "given" } else { "none" });
                return Err(Error::argument(argument, format!("{expected}, as planned"), found));
            }
        }
        let mut params = self.params;
        if let Some(strides) = args.strides {
            params.x_stride = strides.x as i64;
            params.out_stride = strides.out as i64;
            params.residual_stride = strides.residual as i64;
        }
        Ok(params)
    }
}

/// The number of a storage type in kernels.
fn number(dtype: DType) -> i64 {
    match dtype {
        DType::F32 => f32::DTYPE,
        DType::F16 => half::f16::DTYPE,
        DType::BF16 => half::bf16::DTYPE,
    }
}

/// What kernels know of a plan. Every size of a plan fits 32 bits.
fn params(plan: &Plan) -> HybridGemmParams {
    let placement = plan.placement();
    HybridGemmParams {
        partial_len: plan.partials().len() as u64,
        host_columns: placement.host_columns() as u32,
        hbm_first: placement.host_columns() as u32,
        hbm_columns: placement.hbm_columns() as u32,
        host_row_major: u32::from(placement.host_layout() != Layout::Packed),
        k_splits: plan.k_splits() as u32,
        ..shape_params(plan.config(), placement.tiling())
    }
}

/// What kernels know of shapes and the epilogue.
pub(super) fn shape_params(config: &GemmConfig, tiling: &Tiling) -> HybridGemmParams {
    let columns = config.epilogue.out_columns(tiling.n()) as i64;
    HybridGemmParams {
        x_stride: tiling.k() as i64,
        out_stride: columns,
        residual_stride: columns,
        column_bytes: tiling.column_bytes() as u64,
        max_tokens: config.max_tokens as u32,
        n: tiling.n() as u32,
        k: tiling.k() as u32,
        tile_slabs: (tiling.tile_k() / slab_elements(tiling.format())) as u32,
        k_splits: 1,
        out_dtype: number(config.epilogue.out) as u32,
        activation: match config.epilogue.activation {
            Activation::Identity => HYBRID_IDENTITY,
            Activation::Silu => HYBRID_SILU,
            Activation::GeluTanh => HYBRID_GELU_TANH,
            Activation::SwiGlu => HYBRID_SWIGLU,
        },
        ..HybridGemmParams::zeroed()
    }
}
