//! One product on a rig, held against the oracle and its receipt against the prediction.

use std::cell::RefCell;

use bytemuck::Zeroable;
use cuda::memory::View;
use cuda::params::{HybridGemmSchedule, HybridGemmTraffic};
use cuda::status::Fault;
use cuda::storage::Storage;
use emulator::rig::Rig;
use hybrid_gemm::gpu::{DeviceWeights, Gemm, GemmArgs, Plan, Strides};
use hybrid_gemm::{
    DeviceProfile, Element, EpilogueSpec, Error, GemmConfig, MatrixView, Placement, RowMajor, Tiling,
    Traffic, Weights, reference,
};

use crate::common::{compare, random};

/// Operands of a product, on the host.
pub(crate) struct Operands<X, O> {
    pub(crate) x: Vec<X>,
    pub(crate) weights: Weights,
    pub(crate) bias: Option<Vec<f32>>,
    pub(crate) residual: Option<Vec<O>>,
    pub(crate) strides: Option<Strides>,
}

impl<X: Element, O: Element> Operands<X, O> {
    /// Random operands without gaps between rows: X `[tokens, k]`, W as given.
    pub(crate) fn new(seed: u64, tokens: usize, weights: Weights, epilogue: EpilogueSpec) -> Self {
        let tiling = *weights.placement().tiling();
        let columns = epilogue.out_columns(tiling.n());
        Operands {
            x: random(seed, tokens * tiling.k()),
            bias: epilogue.bias.then(|| random(seed + 1, tiling.n())),
            residual: epilogue.residual.then(|| random(seed + 2, tokens * columns)),
            strides: None,
            weights,
        }
    }

    fn strides(&self, columns: usize) -> Strides {
        let k = self.weights.placement().tiling().k();
        self.strides.unwrap_or(Strides { x: k, out: columns, residual: columns })
    }
}

/// A configuration for the device of a rig: its number of SMs, of which as many are used as the configuration has.
pub(crate) fn fit<R: Rig>(rig: &R, config: GemmConfig) -> GemmConfig {
    use cuda::launch::Device;
    let Some(sm_count) = rig.device().sm_count() else { return config };
    let used = config.sm_budget.unwrap_or(config.device.sm_count);
    let device = DeviceProfile { sm_count: sm_count as usize, ..config.device };
    GemmConfig { sm_budget: Some(used.min(device.sm_count)), device, ..config }
}

/// Packs random weights.
pub(crate) fn weights<E: Element>(seed: u64, tiling: Tiling, residency: hybrid_gemm::Residency) -> Weights {
    let shape = [tiling.n(), tiling.k()];
    let values: Vec<E> = random(seed, shape[0] * shape[1]);
    let matrix = RowMajor::from_slice(&values, shape).expect("a matrix");
    Weights::pack_tiled(matrix, tiling, residency).expect("packed weights")
}

/// What a launch left behind.
pub(crate) struct Outcome<O> {
    /// O, gaps between its rows included.
    pub(crate) out: Vec<O>,
    /// The kernel's counters, and the receipt that they are.
    pub(crate) counted: HybridGemmTraffic,
    pub(crate) traffic: Traffic,
    pub(crate) fault: Option<Fault>,
    /// Whether counters of the workspace are zero again.
    pub(crate) clean: bool,
}

/// Columns in host memory: the stage's own, or somebody else's.
enum Host<'a, B> {
    Own(RefCell<B>),
    Elsewhere(&'a View<'a, u8>),
}

/// A prepared product with all its memory on a rig.
pub(crate) struct Stage<'a, R: Rig, X: Storage, O: Storage> {
    rig: &'a R,
    plan: &'a Plan,
    gemm: Gemm<R::Function, X>,
    placement: Placement,
    strides: Option<Strides>,
    host: Host<'a, R::Buffer<u8>>,
    hbm: RefCell<R::Buffer<u8>>,
    scales: R::Buffer<f32>,
    x: RefCell<R::Buffer<X>>,
    bias: Option<R::Buffer<f32>>,
    residual: Option<R::Buffer<O>>,
    schedule: RefCell<R::Buffer<HybridGemmSchedule>>,
    side: RefCell<Option<R::Side>>,
    out: RefCell<R::Buffer<O>>,
    poison: Vec<O>,
    traffic: RefCell<R::Buffer<HybridGemmTraffic>>,
    status: RefCell<R::Buffer<u64>>,
    workspace: RefCell<R::Workspace>,
}

impl<'a, R: Rig, X: Storage + Element, O: Storage + Element> Stage<'a, R, X, O> {
    /// A product of `launches` launches, with the operands' contents.
    pub(crate) fn new(
        rig: &'a R,
        plan: &'a Plan,
        operands: &Operands<X, O>,
        launches: usize,
    ) -> Result<Self, Error> {
        let host = Host::Own(RefCell::new(rig.pin(operands.weights.host_bytes())));
        Stage::with_host(rig, plan, operands, launches, host)
    }

    fn with_host(
        rig: &'a R,
        plan: &'a Plan,
        operands: &Operands<X, O>,
        launches: usize,
        host: Host<'a, R::Buffer<u8>>,
    ) -> Result<Self, Error> {
        let (config, weights) = (plan.config(), &operands.weights);
        let columns = config.epilogue.out_columns(weights.placement().tiling().n());
        let out = rig.poisoned::<O>(config.max_tokens * operands.strides(columns).out);
        Ok(Stage {
            rig,
            plan,
            gemm: Gemm::prepare(rig.device(), plan)?,
            placement: *weights.placement(),
            strides: operands.strides,
            host,
            hbm: RefCell::new(rig.upload(weights.hbm_bytes())),
            scales: rig.upload(weights.scales()),
            x: RefCell::new(rig.upload(&operands.x)),
            bias: operands.bias.as_ref().map(|bias| rig.upload(bias)),
            residual: operands.residual.as_ref().map(|residual| rig.upload(residual)),
            schedule: RefCell::new(rig.zeroed(launches)),
            side: RefCell::new(plan.is_staged().then(|| rig.side(plan.slots()))),
            poison: rig.download(&out),
            out: RefCell::new(out),
            traffic: RefCell::new(rig.zeroed(1)),
            status: RefCell::new(rig.zeroed(1)),
            workspace: RefCell::new(rig.workspace(plan.workspace())),
        })
    }

    /// Enqueues the product.
    pub(crate) fn enqueue(&self) -> Result<(), Error> {
        let rig = self.rig;
        let (x, hbm, scales) = (self.x.borrow(), self.hbm.borrow(), rig.view(&self.scales));
        let (bias, residual) =
            (self.bias.as_ref().map(|b| rig.view(b)), self.residual.as_ref().map(|r| rig.view(r)));
        let (mut out, mut traffic) = (self.out.borrow_mut(), self.traffic.borrow_mut());
        let (mut status, mut workspace) = (self.status.borrow_mut(), self.workspace.borrow_mut());
        let (schedule, hbm) = (self.schedule.borrow(), rig.view(&hbm));
        let (buffer, view);
        let host = match &self.host {
            Host::Elsewhere(host) => *host,
            Host::Own(own) => {
                buffer = own.borrow();
                view = rig.view(&buffer);
                &view
            }
        };
        let tiling = self.placement.tiling();
        let scaled = tiling.format().scales(tiling.n(), tiling.k()) > 0;
        let args = GemmArgs {
            x: &rig.view(&x),
            weights: DeviceWeights {
                host: (self.placement.host_bytes() > 0).then_some(host),
                hbm: (self.placement.hbm_bytes() > 0).then_some(&hbm),
                scales: scaled.then_some(&scales),
                placements: std::slice::from_ref(&self.placement),
            },
            bias: bias.as_ref(),
            residual: residual.as_ref(),
            out: rig.view_mut(&mut out),
            strides: self.strides,
            schedule: &rig.view(&schedule),
            traffic: Some(rig.view_mut(&mut traffic)),
            status: rig.view_mut(&mut status),
        };
        let workspace = rig.workspace_view(&mut workspace);
        match self.side.borrow_mut().as_mut() {
            Some(side) => self.gemm.run_staged(rig.queue(), side, args, workspace),
            None => self.gemm.run(rig.queue(), args, workspace),
        }
    }

    /// Records the product: what it gives enqueues it again.
    pub(crate) fn record(&self) -> Box<dyn Fn() + '_> {
        self.rig.record(Box::new(|| self.enqueue().expect("a launch to record")))
    }

    /// Other contents of X and W, placed alike, for the calls that follow.
    pub(crate) fn load(&self, operands: &Operands<X, O>) {
        assert_eq!(*operands.weights.placement(), self.placement);
        self.rig.write(&mut self.x.borrow_mut(), 0, &operands.x);
        if self.placement.hbm_bytes() > 0 {
            self.rig.write(&mut self.hbm.borrow_mut(), 0, operands.weights.hbm_bytes());
        }
        match &self.host {
            Host::Own(_) if self.placement.host_bytes() == 0 => {}
            Host::Own(host) => self.rig.write(&mut host.borrow_mut(), 0, operands.weights.host_bytes()),
            Host::Elsewhere(_) => panic!("somebody else's memory"),
        }
    }

    /// Schedules of the next call; O is poisoned, receipt and status are empty.
    pub(crate) fn reset(&self, schedules: &[HybridGemmSchedule]) {
        let rig = self.rig;
        rig.write(&mut self.schedule.borrow_mut(), 0, schedules);
        rig.write(&mut self.out.borrow_mut(), 0, &self.poison);
        rig.write(&mut self.traffic.borrow_mut(), 0, &[HybridGemmTraffic::zeroed()]);
        rig.write(&mut self.status.borrow_mut(), 0, &[0]);
    }

    /// A poisoned workspace elsewhere, for calls that were not recorded.
    pub(crate) fn poison_workspace(&self) {
        *self.workspace.borrow_mut() = self.rig.workspace(self.plan.workspace());
    }

    /// Waits for the call, and gives what it left behind.
    pub(crate) fn outcome(&self) -> Outcome<O> {
        let rig = self.rig;
        let counted = rig.download(&self.traffic.borrow())[0];
        Outcome {
            out: rig.download(&self.out.borrow()),
            counted,
            traffic: self.plan.traffic(&counted),
            fault: Fault::decode(rig.download(&self.status.borrow())[0]),
            clean: rig.counters_are_zero(&mut self.workspace.borrow_mut(), self.plan.workspace()),
        }
    }

    fn call_each(&self, calls: &[Vec<HybridGemmSchedule>], recorded: bool) -> Result<Vec<Outcome<O>>, Error> {
        let replay = recorded.then(|| self.record());
        let mut outcomes = Vec::new();
        for schedules in calls {
            self.reset(schedules);
            match &replay {
                Some(replay) => replay(),
                None => self.enqueue()?,
            }
            outcomes.push(self.outcome());
        }
        Ok(outcomes)
    }
}

/// Runs one product with each of some schedules: as the rig records it, or launch by launch.
pub(crate) fn launch_each<R: Rig, X: Storage + Element, O: Storage + Element>(
    rig: &R,
    plan: &Plan,
    operands: &Operands<X, O>,
    schedules: &[HybridGemmSchedule],
    recorded: bool,
) -> Result<Vec<Outcome<O>>, Error> {
    let calls: Vec<_> = schedules.iter().map(|schedule| vec![*schedule]).collect();
    call_each(rig, plan, operands, &calls, recorded)
}

/// The same for plans of several launches, which have a schedule each.
pub(crate) fn call_each<R: Rig, X: Storage + Element, O: Storage + Element>(
    rig: &R,
    plan: &Plan,
    operands: &Operands<X, O>,
    calls: &[Vec<HybridGemmSchedule>],
    recorded: bool,
) -> Result<Vec<Outcome<O>>, Error> {
    Stage::new(rig, plan, operands, calls.first().map_or(1, Vec::len))?.call_each(calls, recorded)
}

/// The same with the columns in host memory elsewhere.
pub(crate) fn call_each_on<R: Rig, X: Storage + Element, O: Storage + Element>(
    rig: &R,
    plan: &Plan,
    operands: &Operands<X, O>,
    host: &View<'_, u8>,
    calls: &[Vec<HybridGemmSchedule>],
    recorded: bool,
) -> Result<Vec<Outcome<O>>, Error> {
    let launches = calls.first().map_or(1, Vec::len);
    Stage::with_host(rig, plan, operands, launches, Host::Elsewhere(host))?.call_each(calls, recorded)
}

/// Runs a product of `tokens` of the plan's tokens and verifies it.
pub(crate) fn check<R: Rig, X: Storage + Element, O: Storage + Element>(
    rig: &R,
    case: &str,
    config: GemmConfig,
    operands: &Operands<X, O>,
    tokens: usize,
) -> Vec<O> {
    let case = &format!("{case}, {tokens} tokens, on {}", rig.name());
    let config = fit(rig, config);
    let plan = Plan::new(*operands.weights.placement(), config).unwrap_or_else(|e| panic!("{case}: {e}"));
    let schedules = plan.schedules(tokens).unwrap_or_else(|e| panic!("{case}: {e}"));
    let outcomes = call_each(rig, &plan, operands, &[schedules], false);
    let outcome = &outcomes.unwrap_or_else(|e| panic!("{case}: {e}"))[0];
    verify(case, &plan, operands, tokens, outcome)
}

/// Holds what a launch left behind against the oracle, its receipt against the prediction, what it must not touch against
/// poison. Gives O without gaps.
pub(crate) fn verify<X: Element, O: Element>(
    case: &str,
    plan: &Plan,
    operands: &Operands<X, O>,
    tokens: usize,
    outcome: &Outcome<O>,
) -> Vec<O> {
    let epilogue = plan.config().epilogue;
    assert_eq!(outcome.fault, None, "{case}");
    assert!(outcome.clean, "{case}: counters are left");

    let tiling = *operands.weights.placement().tiling();
    let (k, columns) = (tiling.k(), epilogue.out_columns(tiling.n()));
    let strides = operands.strides(columns);
    let x = MatrixView::strided(&operands.x, tokens, k, strides.x).expect("x");
    let residual = operands.residual.as_ref().map(|residual| {
        MatrixView::strided(residual, tokens, columns, strides.residual).expect("a residual")
    });
    let bias = operands.bias.as_deref();
    let exact = reference::gemm(x, &operands.weights, &epilogue, bias, residual).expect("the oracle");
    let mut found = Vec::new();
    for (token, row) in outcome.out.chunks(strides.out).enumerate() {
        let (written, beyond) = row.split_at(if token < tokens { columns } else { 0 });
        found.extend_from_slice(written);
        let untouched = beyond.iter().all(|value| bytemuck::bytes_of(value).iter().all(|byte| *byte == 0xff));
        assert!(untouched, "{case}: wrote beside row {token}");
    }
    let w = operands.weights.dequantize();
    let terms: Vec<f32> = (0..tokens).flat_map(|token| x.row(token).iter().map(|x| x.to_f32())).collect();
    compare(case, &found, &exact, norm(&terms, k) * norm(&w, k) * gain(&epilogue, &exact));
    let predicted = plan.predict(tokens).expect("a prediction").traffic;
    assert_eq!(outcome.traffic, predicted, "{case}: counted, then predicted");
    found
}

/// Largest norm of a row.
fn norm(values: &[f32], k: usize) -> f64 {
    let square = |row: &[f32]| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    values.chunks(k).map(square).fold(0.0, f64::max)
}

/// How much an activation can magnify an error of a sum: that of a gate by what it gates.
fn gain(epilogue: &EpilogueSpec, exact: &[f64]) -> f64 {
    match epilogue.activation {
        hybrid_gemm::epilogue::Activation::SwiGlu => {
            2.0 + exact.iter().fold(0.0f64, |most, x| most.max(x.abs().sqrt()))
        }
        _ => 1.2,
    }
}
