//! Products of many tokens: `hybrid_large_m`, both dataflows.

use cuda::params::HybridGemmSchedule;
use emulator::rig::Rig;
use half::{bf16, f16};
use hybrid_gemm::epilogue::Activation;
use hybrid_gemm::gpu::Plan;
use hybrid_gemm::{
    Alpha, DType, Element, EpilogueSpec, Format, GemmConfig, GemmPlan, Path, PathChoice, Residency, Tiling,
    simulate::simulate,
};

use crate::common::device;
use crate::product::{Operands, Stage, check, fit, launch_each, verify, weights};

emulator::device_test!(shapes_and_formats, weight_stationary_repeats_bit_by_bit, epilogues);
emulator::device_test!(emulator::Order::few(); every_alpha_gives_the_same_bits);

fn config(max_tokens: usize, x: DType, out: DType) -> GemmConfig {
    let (epilogue, path) = (EpilogueSpec::plain(out), PathChoice::Direct);
    GemmConfig { epilogue, path, ..GemmConfig::new(max_tokens, x, device(5)) }
}

fn shape<R: Rig, X: cuda::storage::Storage + Element>(
    rig: &R,
    format: Format,
    (max_tokens, tokens): (usize, usize),
    (n, k): (usize, usize),
    residency: Residency,
    alpha: f64,
) {
    let tiling = Tiling::new(n, k, format).expect("a tiling");
    let operands = Operands::<X, f32>::new(
        2,
        max_tokens,
        weights::<X>(1, tiling, residency),
        EpilogueSpec::plain(DType::F32),
    );
    let config =
        GemmConfig { alpha: Alpha::Fixed(alpha), ..config(max_tokens, <X as Element>::DTYPE, DType::F32) };
    let plan = Plan::new(*operands.weights.placement(), fit(rig, config.clone())).expect("a plan");
    assert!(plan.is_large(), "[{n}, {k}] of {format}");
    let case = format!("[{n}, {k}] of {format}, {residency:?}, alpha {alpha}, seeds 1 and 2");
    check(rig, &case, config, &operands, tokens);
}

fn shapes_and_formats<R: Rig>(rig: &R) {
    let [host, half] = [Residency::Host, Residency::HbmFraction(0.5)];
    let float = [DType::F16, DType::BF16].map(Format::Float);
    shape::<R, bf16>(rig, float[1], (65, 65), (72, 80), half, 1.0);
    shape::<R, bf16>(rig, float[1], (257, 257), (70, 330), host, 0.0);
    shape::<R, bf16>(rig, float[1], (300, 7), (130, 200), half, 0.5);
    shape::<R, f16>(rig, float[0], (260, 260), (129, 77), half, 0.0);
    shape::<R, bf16>(rig, Format::Int8, (258, 258), (72, 600), half, 0.0);
    shape::<R, bf16>(rig, Format::Int8, (130, 128), (64, 136), host, 1.0);
    shape::<R, bf16>(rig, Format::Int4 { group: 128 }, (258, 258), (72, 1288), half, 0.0);
    shape::<R, bf16>(rig, Format::Int4 { group: 128 }, (130, 70), (66, 520), half, 1.0);
    shape::<R, f16>(rig, Format::Int4 { group: 64 }, (260, 257), (70, 1100), host, 0.5);
    shape::<R, bf16>(rig, Format::Int4ZeroPoints { group: 128 }, (258, 258), (72, 1288), half, 0.0);
    shape::<R, f16>(rig, Format::Int4ZeroPoints { group: 64 }, (130, 70), (70, 520), half, 0.5);
    shape::<R, bf16>(rig, Format::Fp8Blocks, (258, 258), (136, 600), half, 0.0);
    shape::<R, bf16>(rig, Format::Fp8Blocks, (130, 66), (200, 136), host, 1.0);
}

/// Output-stationary, weight-stationary and both, on the same plan: the schedule alone differs, as when a controller moves alpha
/// under a captured graph. Fetches are those of the simulation.
fn every_alpha_gives_the_same_bits<R: Rig>(rig: &R) {
    let tokens = 513;
    // Tiles of two slabs, two of them and a half, so that sums pass through memory more than once.
    let tiling = Tiling::with_tile_k(196, 260, Format::Float(DType::BF16), 128).expect("a tiling");
    let operands = Operands::<bf16, bf16>::new(
        4,
        tokens,
        weights::<bf16>(3, tiling, Residency::HbmFraction(0.2)),
        EpilogueSpec::plain(DType::BF16),
    );
    let placement = *operands.weights.placement();
    let alphas = [1.0, 0.0, 0.5];
    let mut plan = Plan::new(placement, fit(rig, config(tokens, DType::BF16, DType::BF16))).expect("a plan");
    let mut schedules = Vec::new();
    for alpha in alphas {
        plan.set_alpha(Alpha::Fixed(alpha)).expect("an alpha");
        schedules.push(plan.schedule(tokens).expect("a schedule"));
    }
    let outcomes = launch_each(rig, &plan, &operands, &schedules, false).expect("launches");
    for (alpha, outcome) in alphas.into_iter().zip(&outcomes) {
        let case = format!("alpha {alpha}, {tokens} tokens, on {}", rig.name());
        plan.set_alpha(Alpha::Fixed(alpha)).expect("an alpha");
        let found = verify(&case, &plan, &operands, tokens, outcome);
        assert!(found == outcomes[0].out, "{case}: other bits");
        let planned = GemmPlan::new(placement, plan.config().clone()).expect("a plan");
        let simulated = simulate(&planned, Path::Direct { alpha }, tokens).expect("a simulation");
        assert_eq!(outcome.traffic, simulated.traffic, "{case}");
    }
    let [os, ws] = [&outcomes[0], &outcomes[1]].map(|outcome| outcome.traffic.link_bytes);
    assert_eq!((os, ws), (3 * placement.host_bytes(), placement.host_bytes()), "three panels, or one read");
}

/// Weight-stationary calls on poisoned memory, O and workspace anew each time: sums that are read before they are stored, or stored
/// over later ones, are other bits or NaN. Two panels, whose sums pass through the workspace between four K tiles, and one, whose sums
/// stay in registers.
fn weight_stationary_repeats_bit_by_bit<R: Rig>(rig: &R) {
    let (tokens, few) = (258, 40);
    let tiling = Tiling::with_tile_k(70, 200, Format::Float(DType::BF16), 64).expect("a tiling");
    assert_eq!(tiling.k_tiles(), 4);
    let weights = weights::<bf16>(6, tiling, Residency::Host);
    let operands = Operands::<bf16, f32>::new(7, tokens, weights, EpilogueSpec::plain(DType::F32));
    let config = GemmConfig { alpha: Alpha::Fixed(0.0), ..config(tokens, DType::BF16, DType::F32) };
    let plan = Plan::new(*operands.weights.placement(), fit(rig, config)).expect("a plan");
    let two = plan.schedule(tokens).expect("a schedule");
    assert_eq!((two.ws_columns, two.os_columns), (2, 0));
    let schedules = [two, HybridGemmSchedule { tokens: few as u32, ..two }];
    let stage = Stage::new(rig, &plan, &operands, 1).expect("a product");
    let mut first: [Option<Vec<f32>>; 2] = [None, None];
    for repeat in 0..2 * (rig.stress_launches() / 8).min(1000) {
        let (which, case) = (repeat % 2, format!("repeat {repeat} on {}", rig.name()));
        stage.reset(&[schedules[which]]);
        stage.poison_workspace();
        stage.enqueue().expect("a launch");
        let outcome = stage.outcome();
        match &first[which] {
            None => {
                verify(&case, &plan, &operands, [tokens, few][which], &outcome);
                first[which] = Some(outcome.out);
            }
            Some(first) => {
                let same = outcome.out.iter().zip(first).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same && outcome.fault.is_none(), "{case}: other bits");
            }
        }
    }
}

fn epilogues<R: Rig>(rig: &R) {
    let all = EpilogueSpec { bias: true, residual: true, ..EpilogueSpec::plain(DType::F16) };
    for (case, spec) in
        [("bias and residual", all), ("SwiGLU", EpilogueSpec { activation: Activation::SwiGlu, ..all })]
    {
        let tiling = Tiling::new(80, 72, Format::Float(DType::F16)).expect("a tiling");
        let weights = weights::<f16>(11, tiling, Residency::HbmFraction(0.5));
        let operands = Operands::<f16, f16>::new(12, 140, weights, spec);
        let config = GemmConfig { epilogue: spec, ..config(140, DType::F16, DType::F16) };
        check(rig, case, config, &operands, 140);
    }
}
