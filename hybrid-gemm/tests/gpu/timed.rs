//! Paths timed by a GPU's clock, and alpha that follows what its calls tell. No time passes in the emulator; `tests/driver` has the same
//! calls on a stand-in driver.

use cuda::driver::{SideStream, Timer};
use emulator::rig::{GpuRig, Rig, gpu_or_skip};
use half::bf16;
use hybrid_gemm::controller::{Observation, Rule};
use hybrid_gemm::gpu::{AlphaControl, DeviceTimer, Plan, ResidentWeights};
use hybrid_gemm::tuner::{self, TIMED, Tuner};
use hybrid_gemm::{
    DType, DeviceProfile, EpilogueSpec, Error, Format, GemmConfig, GemmPlan, Path, PathChoice, Residency,
    Tiling,
};

use crate::product::{Operands, Stage, call_each, fit, verify, weights};

const TOKENS: usize = 300;

fn config(rig: &GpuRig, path: PathChoice) -> GemmConfig {
    let epilogue = EpilogueSpec::plain(DType::F32);
    // As many SMs as the GPU has, once it is known.
    let device = DeviceProfile { sm_count: 1 << 16, ..DeviceProfile::h200() };
    fit(rig, GemmConfig { epilogue, path, ..GemmConfig::new(TOKENS, DType::BF16, device) })
}

/// Keeps what it is told.
struct Noted<'t> {
    timer: DeviceTimer<'t, bf16>,
    times: Vec<(Path, f64)>,
}

impl tuner::Timer for Noted<'_> {
    fn time(&mut self, plan: &GemmPlan, path: Path, tokens: usize) -> Result<f64, Error> {
        let time = self.timer.time(plan, path, tokens)?;
        self.times.push((path, time));
        Ok(time)
    }
}

/// Every candidate takes a time that a GPU may take, the fastest is taken, and it computes the product.
#[test]
fn paths_are_timed_by_the_clock_of_the_gpu() {
    let Some(rig) = gpu_or_skip("timed::paths_are_timed_by_the_clock_of_the_gpu") else { return };
    let rig = rig.on_own_stream().expect("a stream of its own");
    let gpu = rig.device();
    let stream = gpu.context().new_stream().expect("a stream");
    let tiling = Tiling::new(4096, 1024, Format::Float(DType::BF16)).expect("a tiling");
    let host = weights::<bf16>(73, tiling, Residency::HbmFraction(0.5));
    let resident = ResidentWeights::new(gpu, &stream, &host).expect("pinned weights");
    let side = gpu.context().new_stream().expect("a side stream");
    let side = SideStream::new(gpu, side, 3).expect("marks");
    let timer = DeviceTimer::new(gpu, &stream, Some(side), &resident).expect("events");
    let mut noted = Noted { timer, times: Vec::new() };
    let (placement, config) = (*host.placement(), config(&rig, PathChoice::Fastest));
    let (mut tuner, operands) =
        (Tuner::new(), Operands::<bf16, f32>::new(74, TOKENS, host, EpilogueSpec::plain(DType::F32)));
    let plan = Plan::tuned(placement, config.clone(), &mut tuner, &mut noted).expect("a plan");

    let times = std::mem::take(&mut noted.times);
    assert!(times.len() >= 8 * 2 && times.len() <= 8 * TIMED, "{times:?}");
    // The weights' 4 MiB do not cross a link in a microsecond, and nothing here takes a second.
    assert!(times.iter().all(|(_, time)| (1e-6..1.0).contains(time)), "{times:?}");
    let median = |path: Path| {
        // Without the round that warms up.
        let mut times: Vec<f64> =
            times.iter().filter(|(timed, _)| *timed == path).map(|(_, time)| *time).skip(1).collect();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let fastest = times.iter().min_by(|a, b| median(a.0).total_cmp(&median(b.0))).expect("candidates").0;
    let taken = plan.explain(TOKENS);
    match fastest {
        Path::Staged { .. } => assert!(plan.is_staged(), "{fastest} of {times:?} in {taken}"),
        _ => assert!(taken.contains(&format!("taken    {fastest}")), "{fastest} of {times:?} in {taken}"),
    }
    Plan::tuned(placement, config, &mut tuner, &mut noted).expect("a plan");
    assert!(noted.times.is_empty(), "a known shape is not timed again");

    let calls = [plan.schedules(TOKENS).expect("schedules")];
    let outcomes = call_each(&rig, &plan, &operands, &calls, false).expect("a launch");
    verify("the fastest path, seeds 73 and 74", &plan, &operands, TOKENS, &outcomes[0]);
}

/// The roles' own clocks move alpha, in calls replayed from one recording, and whatever it is each call computes the product and moves
/// the bytes that were predicted.
#[test]
fn alpha_follows_the_clock_of_the_gpu() {
    let Some(rig) = gpu_or_skip("timed::alpha_follows_the_clock_of_the_gpu") else { return };
    let rig = rig.on_own_stream().expect("a stream of its own");
    // More columns than blocks, so that the roles' times say how they share the work.
    let tiling = Tiling::new(300 * 64, 256, Format::Float(DType::BF16)).expect("a tiling");
    let host = weights::<bf16>(75, tiling, Residency::Host);
    let plan = Plan::new(*host.placement(), config(&rig, PathChoice::Direct)).expect("a plan");
    let operands = Operands::<bf16, f32>::new(76, TOKENS, host, EpilogueSpec::plain(DType::F32));
    let mut control = AlphaControl::new(&plan, Rule::together(), TOKENS, 0.5).expect("both dataflows");
    let stage = Stage::new(&rig, &plan, &operands, 1).expect("a product");
    let (replay, timer) = (stage.record(), Timer::new(rig.device()).expect("events"));
    let (mut moves, mut apart) = (0, 0);
    for call in 0..24 {
        stage.reset(&[control.schedule().expect("a schedule")]);
        timer.start(rig.queue()).expect("an event");
        replay();
        timer.stop(rig.queue()).expect("an event");
        let time_s = timer.elapsed().expect("a time").as_secs_f64();
        let outcome = stage.outcome();
        let case = format!("call {call}, {:?}, seeds 75 and 76", control.plan().config().alpha);
        let predicted = control.plan().predict(TOKENS).expect("a prediction");
        if call % 8 == 0 {
            verify(&case, control.plan(), &operands, TOKENS, &outcome);
        }
        assert_eq!(outcome.traffic, predicted.traffic, "{case}: counted, then predicted");
        let roles = control.plan().role_seconds(TOKENS, &outcome.counted).expect("times");
        // Blocks of a role work within the call.
        assert!((1e-6..1.0).contains(&time_s), "{case}: {time_s} s");
        assert!(
            roles.iter().all(|role| *role >= 0.0 && *role <= 1.5 * time_s),
            "{case}: {roles:?} of {time_s} s"
        );
        assert!(roles[0] + roles[1] > 0.0, "{case}: no clock");
        apart += usize::from((roles[0] - roles[1]).abs() > 0.5 * roles[0].max(roles[1]));
        let call = Observation::of_call(time_s, roles, &outcome.traffic, &predicted);
        moves += usize::from(control.observe(&call).expect("a schedule").is_some());
    }
    assert!(moves > 0 || apart < 4, "alpha never moved, though the roles ended apart in {apart} calls");
}
