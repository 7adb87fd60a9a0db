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
    DeviceProfile, Element, EpilogueSpec, Error, GemmConfig, MatrixView, RowMajor, Tiling, Traffic, Weights,
    reference,
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
    pub(crate) traffic: Traffic,
    pub(crate) fault: Option<Fault>,
    /// Whether counters of the workspace are zero again.
    pub(crate) clean: bool,
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
    let host = rig.pin(operands.weights.host_bytes());
    call_each_on(rig, plan, operands, &rig.view(&host), calls, recorded)
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
    let gemm = Gemm::<_, X>::prepare(rig.device(), plan)?;
    let (config, weights) = (plan.config(), &operands.weights);
    let columns = config.epilogue.out_columns(weights.placement().tiling().n());
    let strides = operands.strides(columns);

    let x = rig.upload(&operands.x);
    let hbm = rig.upload(weights.hbm_bytes());
    let scales = rig.upload(weights.channel_scales());
    let bias = operands.bias.as_ref().map(|bias| rig.upload(bias));
    let residual = operands.residual.as_ref().map(|residual| rig.upload(residual));
    let schedule = RefCell::new(rig.zeroed::<HybridGemmSchedule>(calls.first().map_or(1, Vec::len)));
    let side = RefCell::new(plan.is_staged().then(|| rig.side(plan.slots())));
    let out = RefCell::new(rig.poisoned::<O>(config.max_tokens * strides.out));
    let poison = rig.download(&out.borrow());
    let traffic = RefCell::new(rig.zeroed::<HybridGemmTraffic>(1));
    let status = RefCell::new(rig.zeroed::<u64>(1));
    let workspace = RefCell::new(rig.workspace(plan.workspace()));
    let enqueue = || {
        let (hbm_view, scales_view) = (rig.view(&hbm), rig.view(&scales));
        let (bias, residual) = (bias.as_ref().map(|b| rig.view(b)), residual.as_ref().map(|r| rig.view(r)));
        let (mut out, mut traffic) = (out.borrow_mut(), traffic.borrow_mut());
        let (mut status, mut workspace) = (status.borrow_mut(), workspace.borrow_mut());
        let schedule = schedule.borrow();
        let args = GemmArgs {
            x: &rig.view(&x),
            weights: DeviceWeights {
                host: (!weights.host_bytes().is_empty()).then_some(host),
                hbm: (!weights.hbm_bytes().is_empty()).then_some(&hbm_view),
                scales: (!weights.channel_scales().is_empty()).then_some(&scales_view),
                placements: std::slice::from_ref(operands.weights.placement()),
            },
            bias: bias.as_ref(),
            residual: residual.as_ref(),
            out: rig.view_mut(&mut out),
            strides: operands.strides,
            schedule: &rig.view(&schedule),
            traffic: Some(rig.view_mut(&mut traffic)),
            status: rig.view_mut(&mut status),
        };
        match side.borrow_mut().as_mut() {
            Some(side) => gemm.run_staged(rig.queue(), side, args, rig.workspace_view(&mut workspace)),
            None => gemm.run(rig.queue(), args, rig.workspace_view(&mut workspace)),
        }
    };
    let replay = recorded.then(|| rig.record(Box::new(|| enqueue().expect("a launch to record"))));
    let mut outcomes = Vec::new();
    for wanted in calls {
        rig.write(&mut schedule.borrow_mut(), 0, wanted);
        rig.write(&mut out.borrow_mut(), 0, &poison);
        rig.write(&mut traffic.borrow_mut(), 0, &[HybridGemmTraffic::zeroed()]);
        rig.write(&mut status.borrow_mut(), 0, &[0]);
        match &replay {
            Some(replay) => replay(),
            None => enqueue()?,
        }
        outcomes.push(Outcome {
            out: rig.download(&out.borrow()),
            traffic: plan.traffic(&rig.download(&traffic.borrow())[0]),
            fault: Fault::decode(rig.download(&status.borrow())[0]),
            clean: rig.counters_are_zero(&mut workspace.borrow_mut(), plan.workspace()),
        });
    }
    Ok(outcomes)
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
