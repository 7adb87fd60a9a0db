//! Alpha in device memory: a controller writes it, recorded launches follow.

use emulator::Order;
use emulator::rig::{EmulatorRig, Rig, gpu_or_skip};
use half::bf16;
use hybrid_gemm::controller::{Observation, Rule};
use hybrid_gemm::gpu::{AlphaControl, Plan};
use hybrid_gemm::simulate::simulate;
use hybrid_gemm::{
    Alpha, DType, DeviceProfile, EpilogueSpec, Error, Format, GemmConfig, MigSlice, Path, PathChoice,
    Placement, Residency, Tiling,
};

use crate::common::device;
use crate::product::{Operands, fit, launch_each, verify, weights};

fn config(max_tokens: usize, device: DeviceProfile) -> GemmConfig {
    let epilogue = EpilogueSpec::plain(DType::F32);
    GemmConfig { epilogue, path: PathChoice::Direct, ..GemmConfig::new(max_tokens, DType::BF16, device) }
}

/// Calls of which the controller is told that the link, or HBM, has become slower: alpha moves, and the same recorded launch
/// fetches what the new alpha fetches, with the same bits.
fn recorded_launches_follow_the_controller<R: Rig>(rig: &R) {
    let tokens = 300;
    let tiling = Tiling::with_tile_k(330, 264, Format::Float(DType::BF16), 128).expect("a tiling");
    let weights = weights::<bf16>(71, tiling, Residency::Host);
    let operands = Operands::<bf16, f32>::new(72, tokens, weights, EpilogueSpec::plain(DType::F32));
    let plan = Plan::new(*operands.weights.placement(), fit(rig, config(tokens, device(4)))).expect("a plan");
    // Told the times of link and HBM themselves.
    let mut control =
        AlphaControl::new(&plan, Rule::Makespan { margin: 0.0 }, tokens, 0.0).expect("both dataflows");
    let mut states = vec![control.clone()];
    // The rates that calls see: HBM becomes slow, then the link.
    for (link, hbm) in [(300e9, 2e9), (1e9, 3e12)] {
        for _ in 0..60 {
            let predicted = control.plan().predict(tokens).expect("a prediction");
            let (link_bytes, hbm_bytes) = (predicted.traffic.link_bytes as f64, predicted.hbm_bytes as f64);
            let (link_busy_s, hbm_busy_s) = (link_bytes / link, hbm_bytes / hbm);
            let time_s = link_busy_s.max(hbm_busy_s);
            let call =
                Observation { time_s, link_bytes, hbm_bytes, link_busy_s, hbm_busy_s, role_s: [0.0; 2] };
            control.observe(&call).expect("a schedule");
        }
        states.push(control.clone());
    }
    let schedules: Vec<_> = states.iter().map(|state| state.schedule().expect("a schedule")).collect();
    let outcomes = launch_each(rig, &plan, &operands, &schedules, true).expect("replays");
    let mut link = Vec::new();
    for (state, outcome) in states.iter().zip(&outcomes) {
        let case = format!("{:?} on {}", state.plan().config().alpha, rig.name());
        let found = verify(&case, state.plan(), &operands, tokens, outcome);
        assert!(found == outcomes[0].out, "{case}: other bits");
        link.push(outcome.traffic.link_bytes);
    }
    let once = operands.weights.placement().host_bytes();
    assert_eq!((link[0], link[2]), (once, once), "frugal with the link at the start, and when it is slow");
    assert!(link[1] > once, "more of the link where HBM is slow: {link:?}");
}

mod replay {
    use super::*;

    #[test]
    fn emulator() {
        emulator::emulator_or_skip!();
        for order in Order::few() {
            recorded_launches_follow_the_controller(&EmulatorRig::new(order));
        }
    }

    #[test]
    fn gpu() {
        if let Some(rig) = gpu_or_skip("adaptive::replay") {
            recorded_launches_follow_the_controller(&rig.on_own_stream().expect("a stream of its own"));
        }
    }
}

fn large_plan(device: DeviceProfile) -> Result<Plan, Error> {
    let tiling = Tiling::new(15360, 1024, Format::Float(DType::BF16))?;
    Plan::new(Placement::packed(tiling, Residency::Host)?, config(1024, device))
}

/// In the loop with the simulation, told what a device tells of a call, rules come within 15 % of the best of all alphas in 100
/// calls, and again after a step of the link's rate down and up: the paper's where the step is announced, those that look at the times
/// of the roles where nobody says a word.
#[test]
fn the_controller_follows_a_step() {
    let nominal = DeviceProfile::gh200().slice(MigSlice::ThreeG);
    for (rule, announced) in
        [(Rule::utilisation(), true), (Rule::together(), false), (Rule::makespan(), false)]
    {
        let planned = large_plan(nominal.clone()).expect("a plan");
        let mut control = AlphaControl::new(&planned, rule, 1024, 0.0).expect("both dataflows");
        let alpha = |control: &AlphaControl| match control.plan().config().alpha {
            Alpha::Fixed(alpha) => alpha,
            other => panic!("{other:?}"),
        };
        for share in [1.0, 0.4, 1.0] {
            let plan = large_plan(nominal.with_link_share(share)).expect("a plan");
            if announced {
                control = AlphaControl::new(&plan, rule, 1024, alpha(&control)).expect("both dataflows");
            }
            let time =
                |alpha| simulate(plan.considered(), Path::Direct { alpha }, 1024).expect("a simulation");
            for _ in 0..100 {
                let call = time(alpha(&control));
                let predicted = control.plan().predict(1024).expect("a prediction");
                let roles = [call.role_s[0], call.role_s[1]];
                let call = Observation::of_call(call.time_s, roles, &call.traffic, &predicted);
                let Some(schedule) = control.observe(&call).expect("a schedule") else { continue };
                let link = f64::from(schedule.os_blocks + schedule.ws_blocks);
                let share = f64::from(schedule.os_blocks) / link;
                assert!(
                    (share - alpha(&control)).abs() <= 1.0 / link,
                    "{} of {link} blocks",
                    schedule.os_blocks
                );
            }
            let (alpha, found) = (alpha(&control), time(alpha(&control)).time_s);
            let best = (0..=16).map(|i| time(f64::from(i) / 16.0).time_s).fold(f64::INFINITY, f64::min);
            assert!(
                found <= 1.15 * best,
                "{rule:?}, link at {share}: alpha {alpha} takes {found}, the best {best}"
            );
        }
    }
}

/// A path that was asked for is where alpha starts, not where it stays: of one matrix, and of experts.
#[test]
fn one_direct_path_follows_too() {
    let tiling = Tiling::new(640, 256, Format::Float(DType::BF16)).expect("a tiling");
    let placement = Placement::packed(tiling, Residency::Host).expect("a placement");
    let only = GemmConfig { path: PathChoice::Only(Path::Direct { alpha: 0.25 }), ..config(300, device(8)) };
    let plan = Plan::new(placement, only.clone()).expect("a plan");
    assert_eq!(plan.schedule(300).expect("a schedule").os_blocks, 2);
    assert_eq!(plan.schedule(7).expect("few tokens").os_blocks, 8, "one panel is output-stationary");
    assert_eq!(plan.schedule(0).expect("no tokens").tokens, 0);
    let mut control = AlphaControl::new(&plan, Rule::together(), 300, 0.5).expect("both dataflows");
    assert_eq!(control.schedule().expect("a schedule").os_blocks, 4);
    let predicted = plan.predict(300).expect("a prediction");
    // The link is slow: its readers take twice as long.
    let slow = Observation::of_call(1e-3, [2e-3, 1e-3], &predicted.traffic, &predicted);
    let moved: Vec<u32> = (0..12)
        .filter_map(|_| control.observe(&slow).expect("a schedule"))
        .map(|schedule| schedule.os_blocks)
        .collect();
    assert!(!moved.is_empty() && *moved.last().expect("one") < 4, "{moved:?}");
    let mut experts = hybrid_gemm::gpu::GroupedPlan::new(vec![placement; 2], only).expect("a plan");
    assert_eq!(experts.schedule().os_blocks, 2);
    experts.set_alpha(Alpha::Fixed(0.75)).expect("an alpha");
    assert_eq!(experts.schedule().os_blocks, 6);
}

#[test]
fn plans_without_an_alpha_have_no_controller() {
    let placement = |n| {
        let tiling = Tiling::new(n, 256, Format::Float(DType::BF16)).expect("a tiling");
        Placement::packed(tiling, Residency::Host).expect("a placement")
    };
    let few = Plan::new(placement(640), config(8, device(4))).expect("a plan");
    assert!(AlphaControl::new(&few, Rule::makespan(), 8, 0.0).is_err(), "one panel has one dataflow");
    let staged =
        GemmConfig { path: PathChoice::Only(Path::Staged { slab_columns: 1 }), ..config(300, device(4)) };
    let staged = Plan::new(placement(640), staged).expect("a plan");
    assert!(AlphaControl::new(&staged, Rule::makespan(), 300, 0.0).is_err());
    let direct = Plan::new(placement(640), config(300, device(4))).expect("a plan");
    assert!(AlphaControl::new(&direct, Rule::makespan(), 300, 1.5).is_err());
    // Ten columns for sixteen blocks: each has one at most.
    let wide = Plan::new(placement(640), config(300, device(16))).expect("a plan");
    for rule in [Rule::together(), Rule::makespan()] {
        let error = AlphaControl::new(&wide, rule, 300, 0.5).expect_err("no signal").to_string();
        assert!(error.contains("10 columns in host memory for 16 blocks"), "{rule:?}: {error}");
    }
    AlphaControl::new(&wide, Rule::Makespan { margin: 0.0 }, 300, 0.5).expect("rates are another signal");
    let one = GemmConfig { sm_budget: Some(1), ..config(300, device(4)) };
    let one = Plan::new(placement(640), one).expect("a plan");
    assert!(AlphaControl::new(&one, Rule::makespan(), 300, 0.0).is_err(), "one block for two roles");
}
