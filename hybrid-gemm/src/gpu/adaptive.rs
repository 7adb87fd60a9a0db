//! Paths timed on the device, and alpha that follows what calls tell.

use std::sync::Arc;

use cuda::cudarc::driver::{CudaSlice, CudaStream};
use cuda::driver::{Gpu, GpuFunction, SideStream, Timer, failed};
use cuda::memory::{View, ViewMut};
use cuda::params::HybridGemmSchedule;
use cuda::status::StatusWord;
use cuda::storage::Storage;
use cuda::workspace::Workspace;

use super::{DeviceSchedule, Gemm, GemmArgs, Plan, ResidentWeights};
use crate::controller::{Controller, Observation, Rule};
use crate::cost_model::AlphaTerms;
use crate::{Alpha, DType, Element, Error, GemmConfig, GemmPlan, Path, PathChoice, tuner};

/// Times paths of a matrix by device events, on operands of its own: the timer of [`Plan::tuned`]. Allocates and waits.
#[derive(Debug)]
pub struct DeviceTimer<'a, X> {
    gpu: Gpu,
    stream: Arc<CudaStream>,
    /// Without one, staged paths are out of the question.
    side: Option<SideStream>,
    weights: &'a ResidentWeights,
    timer: Timer,
    /// Candidates take turns, so what one needs is kept for its next.
    prepared: Vec<Candidate<X>>,
}

/// Everything that a product needs.
#[derive(Debug)]
struct Candidate<X> {
    /// What it was prepared for.
    plan: GemmPlan,
    path: Path,
    tokens: usize,
    gemm: Gemm<GpuFunction, X>,
    x: CudaSlice<X>,
    /// O and the residual, as bytes.
    out: CudaSlice<u8>,
    residual: CudaSlice<u8>,
    bias: CudaSlice<f32>,
    schedule: DeviceSchedule,
    workspace: Workspace,
    status: StatusWord,
}

impl<'a, X: Storage + Element + cuda::cudarc::driver::DeviceRepr> DeviceTimer<'a, X> {
    /// Times on `stream`, staged paths with copies on `side`.
    ///
    /// # Errors
    /// [`Error::Cuda`] when the driver has no events left.
    pub fn new(
        gpu: &Gpu,
        stream: &Arc<CudaStream>,
        side: Option<SideStream>,
        weights: &'a ResidentWeights,
    ) -> Result<Self, Error> {
        let timer = Timer::new(gpu)?;
        let (gpu, stream) = (gpu.clone(), stream.clone());
        Ok(DeviceTimer { gpu, stream, side, weights, timer, prepared: Vec::new() })
    }

    fn prepare(&self, asked: &GemmPlan, path: Path, tokens: usize) -> Result<Candidate<X>, Error> {
        let config = GemmConfig { path: PathChoice::Only(path), ..asked.config().clone() };
        let plan = Plan::new(*asked.placement(), config)?;
        let (config, tiling) = (plan.config(), plan.placement().tiling());
        let rows = config.max_tokens;
        let out_bytes = rows * config.epilogue.out_columns(tiling.n()) * config.epilogue.out.size();
        // Never zeros, which draw less power.
        let x: Vec<X> = (0..rows * tiling.k()).map(|i| X::from_f32((i % 251) as f32 / 251.0 - 0.5)).collect();
        let allocated = failed("cuMemAllocAsync");
        let (stream, bytes) = (&self.stream, |len: usize| self.stream.alloc_zeros::<u8>(len.max(1)));
        let residual = if config.epilogue.residual { out_bytes } else { 0 };
        Ok(Candidate {
            plan: asked.clone(),
            path,
            tokens,
            gemm: Gemm::prepare(&self.gpu, &plan)?,
            x: stream.clone_htod(&x).map_err(failed("cuMemcpyHtoDAsync"))?,
            out: bytes(out_bytes).map_err(failed("cuMemAllocAsync"))?,
            residual: bytes(residual).map_err(failed("cuMemAllocAsync"))?,
            bias: stream.alloc_zeros(tiling.n()).map_err(allocated)?,
            schedule: DeviceSchedule::new(stream, &plan.schedules(tokens)?)?,
            workspace: Workspace::zeroed(stream, plan.workspace().bytes())?,
            status: StatusWord::new(stream)?,
        })
    }

    fn launch<O: Storage>(&mut self, index: usize) -> Result<(), Error> {
        let DeviceTimer { stream, side, weights, prepared, .. } = self;
        let Candidate { gemm, x, out, residual, bias, schedule, workspace, status, .. } =
            &mut prepared[index];
        let epilogue = gemm.plan().config().epilogue;
        weights.with(stream, |weights| {
            let (bias, residual) = (View::device(bias, stream), View::device(residual, stream).cast::<O>());
            let args = GemmArgs {
                x: &View::device(x, stream),
                weights,
                bias: epilogue.bias.then_some(&bias),
                residual: epilogue.residual.then_some(&residual),
                out: ViewMut::device(out, stream).cast(),
                strides: None,
                schedule: &schedule.view(stream),
                traffic: None,
                status: status.view_mut(stream),
            };
            match side {
                Some(side) => gemm.run_staged(stream, side, args, workspace.view_mut(stream)),
                None => gemm.run(stream, args, workspace.view_mut(stream)),
            }
        })
    }
}

impl<X: Storage + Element + cuda::cudarc::driver::DeviceRepr> tuner::Timer for DeviceTimer<'_, X> {
    /// Infinite for a staged path without a side stream. Another placement than the weights' is refused.
    fn time(&mut self, plan: &GemmPlan, path: Path, tokens: usize) -> Result<f64, Error> {
        if plan.placement() != self.weights.weights().placement() {
            return Err(Error::argument("placement", "that of the weights that are timed", "another"));
        }
        if matches!(path, Path::Staged { .. }) && self.side.is_none() {
            return Ok(f64::INFINITY);
        }
        // Candidates of another plan do not come again.
        self.prepared.retain(|known| known.plan == *plan && known.tokens == tokens);
        let known = self.prepared.iter().position(|known| known.path == path);
        let index = match known {
            Some(index) => index,
            None => {
                let candidate = self.prepare(plan, path, tokens)?;
                self.prepared.push(candidate);
                self.prepared.len() - 1
            }
        };
        let stream = self.stream.clone();
        self.timer.start(&stream)?;
        match plan.config().epilogue.out {
            DType::F32 => self.launch::<f32>(index)?,
            DType::F16 => self.launch::<half::f16>(index)?,
            DType::BF16 => self.launch::<half::bf16>(index)?,
        }
        self.timer.stop(&stream)?;
        Ok(self.timer.elapsed()?.as_secs_f64())
    }
}

/// A controller in charge of a direct plan's alpha: what it decides goes to device memory, where captured graphs find it.
#[derive(Debug, Clone)]
pub struct AlphaControl {
    plan: Plan,
    controller: Controller,
    tokens: usize,
}

impl AlphaControl {
    /// Controls calls of `tokens` tokens, from `alpha` on: the paper begins with 0, the frugal end for the link.
    ///
    /// # Errors
    /// [`Error::Argument`] for an alpha outside 0..=1; [`Error::NoPath`] for a plan without both dataflows, and for rules that look at
    /// the times of roles, [`Rule::Together`] and [`Rule::Makespan`] with a margin, where there are no more columns in host memory than
    /// blocks for them: each block has one then, whatever alpha is, and their times say nothing.
    pub fn new(plan: &Plan, rule: Rule, tokens: usize, alpha: f64) -> Result<Self, Error> {
        let gemm = plan.gemm();
        let pure = |alpha| {
            let launches = gemm.launches_of(Path::Direct { alpha }, tokens).map_err(Error::NoPath)?;
            Ok::<_, Error>(gemm.model().predict(&launches))
        };
        if plan.is_staged() {
            return Err(Error::NoPath("a staged plan has no alpha".into()));
        }
        // Both roles need a block, else no schedule follows what the controller says.
        let both = gemm.launches_of(Path::Direct { alpha: 0.5 }, tokens).map_err(Error::NoPath)?;
        let schedule = both[0].schedule;
        let (columns, blocks) =
            (schedule.os_columns + schedule.ws_columns, schedule.os_blocks + schedule.ws_blocks);
        let by_roles = match rule {
            Rule::Together { .. } => true,
            Rule::Makespan { margin } => margin > 0.0,
            Rule::Utilisation { .. } => false,
        };
        if by_roles && columns <= blocks {
            let why = format!(
                "roles have no times to compare: {columns} columns in host memory for {blocks} blocks"
            );
            return Err(Error::NoPath(why));
        }
        let terms = AlphaTerms::between(&pure(1.0)?, &pure(0.0)?);
        let device = &plan.config().device;
        let controller =
            Controller::new(rule, terms, device.link_reads_per_s, device.hbm_bytes_per_s, alpha)?;
        let mut plan = plan.clone();
        plan.set_alpha(Alpha::Fixed(alpha))?;
        Ok(AlphaControl { plan, controller, tokens })
    }

    /// The plan, with the alpha of the next call.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The controller, to give it a budget of the link.
    pub fn controller_mut(&mut self) -> &mut Controller {
        &mut self.controller
    }

    /// The schedule of the next call.
    ///
    /// # Errors
    /// As [`Plan::schedule`].
    pub fn schedule(&self) -> Result<HybridGemmSchedule, Error> {
        self.plan.schedule(self.tokens)
    }

    /// Takes in what a call told ([`Observation::of_call`]); gives the schedule to write to device memory where alpha has moved.
    ///
    /// # Errors
    /// As [`Plan::schedule`].
    pub fn observe(&mut self, call: &Observation) -> Result<Option<HybridGemmSchedule>, Error> {
        let before = self.controller.alpha();
        self.controller.observe(call);
        let alpha = self.controller.alpha();
        if alpha == before {
            return Ok(None);
        }
        self.plan.set_alpha(Alpha::Fixed(alpha))?;
        self.schedule().map(Some)
    }
}
