//! What a plan promises: bits that do not depend on circumstances, exact receipts, schedules that change between replays, and
//! a word about schedules that cannot be.

use cuda::params::{self, HybridGemmSchedule};
use emulator::Order;
use emulator::rig::{EmulatorRig, Rig, gpu_or_skip};
use half::bf16;
use hybrid_gemm::gpu::Plan;
use hybrid_gemm::{
    Alpha, DType, EpilogueSpec, Error, Format, GemmConfig, GemmPlan, Path, PathChoice, Residency, RowMajor,
    Summation, Tiling, Weights, simulate::simulate,
};

use crate::common::device;
use crate::product::{Operands, Stage, check, fit, launch_each, verify, weights};

emulator::device_test!(
    bits_do_not_depend_on_circumstances,
    splits_repeat_bit_by_bit,
    partial_sums_are_not_rounded,
    fetches_are_those_of_the_simulation,
    bad_schedules_are_named,
);

fn f32_out(max_tokens: usize, sms: usize) -> GemmConfig {
    GemmConfig {
        epilogue: EpilogueSpec::plain(DType::F32),
        ..GemmConfig::new(max_tokens, DType::BF16, device(sms))
    }
}

fn operands(max_tokens: usize, [n, k]: [usize; 2], residency: Residency) -> Operands<bf16, f32> {
    let tiling = Tiling::new(n, k, Format::Float(DType::BF16)).expect("a tiling");
    Operands::new(42, max_tokens, weights::<bf16>(41, tiling, residency), EpilogueSpec::plain(DType::F32))
}

fn bits_do_not_depend_on_circumstances<R: Rig>(rig: &R) {
    let (shape, [host, hbm, half]) =
        ([200, 600], [Residency::Host, Residency::Hbm, Residency::HbmFraction(0.5)]);
    let mut rows: Option<Vec<f32>> = None;
    // Kernels of 8 and of 64 tokens, one panel and two.
    for (max_tokens, tokens, residency, sms) in
        [(8, 8, hbm, 1), (8, 3, half, 4), (8, 8, host, 3), (64, 41, half, 7), (66, 66, half, 5)]
    {
        let operands = operands(66, shape, residency);
        let case = format!("up to {max_tokens} tokens, {residency:?}, {sms} SMs, seeds 41 and 42");
        let found = check(rig, &case, f32_out(max_tokens, sms), &operands, tokens);
        let first = &found[..3 * shape[0]];
        match &rows {
            Some(rows) => assert!(rows == first, "{case}: other bits"),
            None => rows = Some(first.to_vec()),
        }
    }
}

fn splits_repeat_bit_by_bit<R: Rig>(rig: &R) {
    let operands = operands(8, [24, 2100], Residency::Hbm);
    let plan = Plan::new(
        *operands.weights.placement(),
        fit(rig, GemmConfig { summation: Summation::Fast, ..f32_out(8, 4) }),
    )
    .expect("a plan");
    assert_eq!(plan.k_splits(), 4, "{}", rig.name());
    let schedules = vec![plan.schedule(8).expect("a schedule"); (rig.stress_launches() / 4).min(1000)];
    let outcomes = launch_each(rig, &plan, &operands, &schedules, false).expect("launches");
    for outcome in &outcomes {
        assert!(outcome.out == outcomes[0].out && outcome.clean, "on {}: other bits", rig.name());
    }
    verify(rig.name().as_str(), &plan, &operands, 8, &outcomes[0]);
}

/// Weights `[8, 16384]` whose sums pass through 2¹⁴ on their way to a few units, and those sums: multiples of 2⁻⁶ all the way, so
/// that f32 holds each of them exactly, and bf16 would lose 64 at the top.
fn trap() -> (Weights, Vec<f32>) {
    let k = 16384;
    let values: Vec<bf16> = (0..8 * k)
        .map(|i| bf16::from_f32(if i % k < k / 2 { 2.0 } else { -2.0 } + f32::from(i % 97 == 3) / 64.0))
        .collect();
    let matrix = RowMajor::from_slice(&values, [8, k]).expect("a matrix");
    let weights = Weights::pack(matrix, Format::Float(DType::BF16), Residency::Host).expect("packed weights");
    let sums = values.chunks(k).map(|row| row.iter().map(|w| w.to_f64()).sum::<f64>() as f32);
    (weights, sums.collect())
}

/// Partial sums in the kernel of few tokens, in registers and between its splits.
fn partial_sums_are_not_rounded<R: Rig>(rig: &R) {
    let (weights, sums) = trap();
    let operands = Operands::<bf16, f32> {
        x: vec![bf16::ONE; weights.placement().tiling().k()],
        ..Operands::new(1, 1, weights, EpilogueSpec::plain(DType::F32))
    };
    for summation in [Summation::Bitwise, Summation::Fast] {
        let config = GemmConfig { summation, ..f32_out(1, 8) };
        let found = check(rig, "partial sums", config, &operands, 1);
        assert_eq!(found, sums, "{summation:?} on {}", rig.name());
    }
}

/// The same in `hybrid_large_m`: in registers, and, weight-stationary with two panels, in the workspace between K tiles.
fn partial_sums_of_many_tokens<R: Rig>(rig: &R) {
    let (weights, sums) = trap();
    let (tokens, k) = (257, weights.placement().tiling().k());
    // ±1 and ±2, by the token.
    let factor = |token: usize| [1.0f32, -2.0, -1.0, 2.0][token % 4];
    let operands = Operands::<bf16, f32> {
        x: (0..tokens * k).map(|i| bf16::from_f32(factor(i / k))).collect(),
        ..Operands::new(1, tokens, weights, EpilogueSpec::plain(DType::F32))
    };
    let placement = *operands.weights.placement();
    for alpha in [0.0, 1.0] {
        let config =
            GemmConfig { path: PathChoice::Direct, alpha: Alpha::Fixed(alpha), ..f32_out(tokens, 2) };
        let plan = Plan::new(placement, fit(rig, config)).expect("a plan");
        assert!(plan.is_large());
        let schedule = plan.schedule(tokens).expect("a schedule");
        let outcome = &launch_each(rig, &plan, &operands, &[schedule], false).expect("a launch")[0];
        assert_eq!(outcome.fault, None, "alpha {alpha} on {}", rig.name());
        assert_eq!(outcome.traffic.partial_bytes > 0, alpha == 0.0, "alpha {alpha} on {}", rig.name());
        for (token, row) in outcome.out.chunks(8).enumerate() {
            let expected: Vec<f32> = sums.iter().map(|sum| factor(token) * sum).collect();
            assert_eq!(row, expected, "token {token}, alpha {alpha} on {}", rig.name());
        }
    }
}

/// One order is enough for sums that one thread takes one after another.
mod many_tokens {
    use super::*;

    #[test]
    fn emulator() {
        emulator::emulator_or_skip!();
        partial_sums_of_many_tokens(&EmulatorRig::new(Order::Random(1)));
    }

    #[test]
    fn gpu() {
        if let Some(rig) = gpu_or_skip("contract::many_tokens") {
            partial_sums_of_many_tokens(&rig);
        }
    }
}

fn fetches_are_those_of_the_simulation<R: Rig>(rig: &R) {
    for (tokens, fraction) in [(1, 0.0), (8, 0.25), (5, 0.5), (8, 1.0)] {
        let operands = operands(8, [330, 520], Residency::HbmFraction(fraction));
        let placement = *operands.weights.placement();
        let config = fit(rig, f32_out(8, 5));
        let case = format!("{tokens} tokens, {fraction} in HBM, on {}", rig.name());
        let plan = Plan::new(placement, config.clone()).expect("a plan");
        let schedule = plan.schedule(tokens).expect("a schedule");
        let outcome = &launch_each(rig, &plan, &operands, &[schedule], false).expect("a launch")[0];
        let planned = GemmPlan::new(placement, config).expect("a plan");
        let simulated = simulate(&planned, Path::Direct { alpha: 1.0 }, tokens).expect("a simulation");
        assert_eq!(outcome.traffic, simulated.traffic, "{case}");
        assert_eq!(outcome.traffic.link_bytes, placement.host_bytes(), "{case}: each byte once");
    }
}

/// A schedule, what is wrong with it, and the code that says so.
type Mistake = (&'static str, fn(&mut HybridGemmSchedule), params::FaultCode);

fn bad_schedules_are_named<R: Rig>(rig: &R) {
    let operands = operands(8, [200, 80], Residency::HbmFraction(0.5));
    let plan = Plan::new(*operands.weights.placement(), fit(rig, f32_out(8, 4))).expect("a plan");
    let good = plan.schedule(6).expect("a schedule");
    let mistakes: [Mistake; 11] = [
        ("more tokens than rows", |s| s.tokens = 9, params::FAULT_BAD_LENGTH),
        ("no blocks for a role", |s| s.hbm_blocks = 0, params::FAULT_BAD_RANGE),
        ("more blocks than the grid", |s| s.hbm_blocks += 1, params::FAULT_BAD_RANGE),
        ("more host columns than there are", |s| s.os_columns += 1, params::FAULT_BAD_RANGE),
        ("more columns than there are", |s| s.hbm_columns += 1, params::FAULT_BAD_RANGE),
        ("a column less in HBM", |s| s.hbm_columns -= 1, params::FAULT_BAD_RANGE),
        ("another first column", |s| s.first_column = 1, params::FAULT_BAD_RANGE),
        ("columns past 2³²", |s| s.hbm_columns = u32::MAX, params::FAULT_BAD_RANGE),
        ("another panel", |s| s.panel = 256, params::FAULT_BAD_INDEX),
        ("other K tiles", |s| s.k_tiles += 1, params::FAULT_BAD_INDEX),
        ("a cluster", |s| s.cluster = 2, params::FAULT_BAD_INDEX),
    ];
    let schedules: Vec<_> = mistakes
        .iter()
        .map(|(_, change, _)| {
            let mut schedule = good;
            change(&mut schedule);
            schedule
        })
        .chain([good])
        .collect();
    let outcomes = launch_each(rig, &plan, &operands, &schedules, false).expect("launches");
    for ((case, _, code), outcome) in mistakes.iter().zip(&outcomes) {
        assert_eq!(outcome.fault.map(|fault| fault.code), Some(*code), "{case} on {}", rig.name());
        assert!(outcome.out.iter().all(|x| *x == 0.0), "{case} on {}: O is not zero", rig.name());
        assert_eq!(outcome.traffic.link_tiles + outcome.traffic.hbm_tiles, 0, "{case}: fetched tiles");
    }
    verify("after bad schedules", &plan, &operands, 6, &outcomes[mistakes.len()]);
}

/// One recorded launch of many tokens follows what is written to memory between replays: alpha, the number of tokens, X, and the
/// weights on both sides of the link. O keeps its bits whatever alpha is, the counters follow it.
fn everything_changes_between_replays<R: Rig>(rig: &R) {
    let most = 270;
    let tiling = Tiling::with_tile_k(140, 136, Format::Float(DType::BF16), 64).expect("a tiling");
    let sets = [0, 1].map(|seed| {
        let weights = weights::<bf16>(45 + seed, tiling, Residency::HbmFraction(0.25));
        Operands::<bf16, f32>::new(47 + seed, most, weights, EpilogueSpec::plain(DType::F32))
    });
    let placement = *sets[0].weights.placement();
    let config = GemmConfig { path: PathChoice::Direct, ..f32_out(most, 4) };
    let plan = Plan::new(placement, fit(rig, config)).expect("a plan");
    let stage = Stage::new(rig, &plan, &sets[0], 1).expect("a product");
    let replay = stage.record();
    let once = placement.host_bytes();
    let mut known = std::collections::HashMap::new();
    for index in 0..(rig.stress_launches() / 3).min(200) {
        let (set, tokens) = ((index / 3 + index / 7) % 2, [most, 3, 258][index / 2 % 3]);
        let alpha = [1.0, 0.0, 0.5][index % 3];
        let mut with_alpha = plan.clone();
        with_alpha.set_alpha(Alpha::Fixed(alpha)).expect("an alpha");
        stage.load(&sets[set]);
        stage.reset(&[with_alpha.schedule(tokens).expect("a schedule")]);
        replay();
        let outcome = stage.outcome();
        let case = format!("replay {index}: {tokens} tokens, alpha {alpha}, set {set}, on {}", rig.name());
        let found = match known.get(&(set, tokens, index % 3)) {
            None => verify(&case, &with_alpha, &sets[set], tokens, &outcome),
            Some(_) => outcome.out[..tokens * 140].to_vec(),
        };
        let first = known.entry((set, tokens, 3)).or_insert_with(|| found.clone());
        assert!(found == *first, "{case}: other bits");
        known.insert((set, tokens, index % 3), Vec::new());
        let link = outcome.traffic.link_bytes;
        let expected = match alpha {
            _ if tokens == 3 => link == once,
            0.0 => link == once,
            1.0 => link == 2 * once,
            _ => once < link && link < 2 * once,
        };
        assert!(expected, "{case}: {link} of {once}");
    }
}

/// Two products recorded on streams of their own, replayed side by side: with splits that count arrivals, and with partial sums.
fn two_recorded_products<R: Rig>(rigs: [&R; 2]) {
    let few = operands(8, [24, 2100], Residency::HbmFraction(0.0));
    let many = operands(258, [70, 136], Residency::Host);
    let fast = GemmConfig { summation: Summation::Fast, path: PathChoice::Direct, ..f32_out(8, 4) };
    let kept = GemmConfig { path: PathChoice::Only(Path::Direct { alpha: 0.0 }), ..f32_out(258, 2) };
    let plans = [(&few, fast), (&many, kept)].map(|(operands, config)| {
        Plan::new(*operands.weights.placement(), fit(rigs[0], config)).expect("a plan")
    });
    assert!(plans[0].k_splits() > 1 && plans[1].is_large());
    let products = [(0, &few, 8), (1, &many, 258)].map(|(index, operands, tokens)| {
        let (rig, plan): (_, &Plan) = (rigs[index], &plans[index]);
        let stage = Stage::new(rig, plan, operands, 1).expect("a product");
        (stage, plan.schedule(tokens).expect("a schedule"), operands, tokens)
    });
    let replays = [0, 1].map(|index: usize| products[index].0.record());
    let mut first: [Option<Vec<f32>>; 2] = [None, None];
    for round in 0..(rigs[0].stress_launches() / 10).min(100) {
        for (stage, schedule, ..) in &products {
            stage.reset(&[*schedule]);
        }
        replays.iter().for_each(|replay| replay());
        for (index, (stage, _, operands, tokens)) in products.iter().enumerate() {
            let (outcome, case) = (stage.outcome(), format!("product {index}, round {round}"));
            match &first[index] {
                None => first[index] = Some(verify(&case, &plans[index], operands, *tokens, &outcome)),
                Some(first) => assert!(outcome.out == *first && outcome.clean, "{case}: other bits"),
            }
        }
    }
}

mod two_graphs {
    use super::*;

    #[test]
    fn emulator() {
        emulator::emulator_or_skip!();
        let rigs = [Order::Forward, Order::Random(2)].map(EmulatorRig::new);
        two_recorded_products([&rigs[0], &rigs[1]]);
    }

    #[test]
    fn gpu() {
        let Some(rig) = gpu_or_skip("contract::two_graphs") else { return };
        let other = emulator::rig::GpuRig::new().expect("the GPU that was just there");
        let rigs = [rig, other].map(|rig| rig.on_own_stream().expect("a stream of its own"));
        two_recorded_products([&rigs[0], &rigs[1]]);
    }
}

/// One recorded launch follows the schedule in device memory.
fn tokens_change_between_replays<R: Rig>(rig: &R) {
    let operands = operands(8, [140, 160], Residency::HbmFraction(0.5));
    let plan = Plan::new(*operands.weights.placement(), fit(rig, f32_out(8, 3))).expect("a plan");
    let steps = [1, 8, 0, 5, 2];
    let schedules = steps.map(|tokens| plan.schedule(tokens).expect("a schedule"));
    let outcomes = launch_each(rig, &plan, &operands, &schedules, true).expect("replays");
    for (tokens, outcome) in steps.into_iter().zip(&outcomes) {
        verify(&format!("replay of {tokens} tokens on {}", rig.name()), &plan, &operands, tokens, outcome);
    }
}

mod replay {
    use super::*;

    #[test]
    fn emulator() {
        emulator::emulator_or_skip!();
        for order in Order::ALL {
            tokens_change_between_replays(&EmulatorRig::new(order));
        }
        for order in Order::few() {
            everything_changes_between_replays(&EmulatorRig::new(order));
        }
    }

    #[test]
    fn gpu() {
        if let Some(rig) = gpu_or_skip("contract::replay") {
            let rig = rig.on_own_stream().expect("a stream of its own");
            tokens_change_between_replays(&rig);
            everything_changes_between_replays(&rig);
        }
    }
}

#[test]
fn plans_without_kernels_say_so() {
    let placement = |format| {
        let tiling = Tiling::new(128, 128, format).expect("a tiling");
        hybrid_gemm::Placement::packed(tiling, Residency::Host).expect("a placement")
    };
    let bf16 = Format::Float(DType::BF16);
    let path = |path| GemmConfig { path: PathChoice::Only(path), ..f32_out(8, 4) };
    for (case, format, config, named) in [
        ("f32", Format::Float(DType::F32), GemmConfig::new(8, DType::F32, device(4)), "f16 or bf16"),
        ("two types", Format::Float(DType::F16), f32_out(8, 4), "bf16, as X"),
        ("clusters", bf16, path(Path::Multicast { cluster: 2 }), "no kernel"),
        (
            "a weight-stationary product of few tokens",
            bf16,
            path(Path::Direct { alpha: 0.0 }),
            "keeps a weight tile",
        ),
    ] {
        let error: Error = Plan::new(placement(format), config).expect_err(case);
        assert!(error.to_string().contains(named), "{case}: {error}");
    }
    let plan = Plan::new(placement(bf16), f32_out(8, 4)).expect("a plan");
    assert!(plan.schedule(9).expect_err("too many").to_string().contains("at most 8"));
}

/// Blocks count chunks in 32 bits. Plans refuse what might not fit: here just below the bound and at it.
#[test]
fn chunks_fit_32_bits() {
    // 2¹⁵ columns of 2⁸ chunks, in 2⁸ panels: 2³¹ in all.
    let tiling = Tiling::new(1 << 21, 1 << 14, Format::Float(DType::BF16)).expect("a tiling");
    let placement = hybrid_gemm::Placement::packed(tiling, Residency::Hbm).expect("a placement");
    for (tokens, possible) in [(256 << 8, false), (256 * 255, true)] {
        let config = GemmConfig { path: PathChoice::Direct, ..f32_out(tokens, 132) };
        let single = Plan::new(placement, config.clone()).map(|_| ());
        let experts = hybrid_gemm::gpu::GroupedPlan::new(vec![placement; 2], config).map(|_| ());
        for planned in [single, experts] {
            assert_eq!(planned.is_ok(), possible, "{tokens} tokens: {planned:?}");
            let Err(error) = planned else { continue };
            assert!(error.to_string().contains("chunks"), "{tokens} tokens: {error}");
        }
    }
}

/// Times of roles are those of a block that had work.
#[test]
fn role_times_are_per_busy_block() {
    let tiling = Tiling::new(640, 256, Format::Float(DType::BF16)).expect("a tiling");
    let placement = hybrid_gemm::Placement::packed(tiling, Residency::Host).expect("a placement");
    let config = GemmConfig { path: PathChoice::Direct, alpha: Alpha::Fixed(0.75), ..f32_out(300, 16) };
    let plan = Plan::new(placement, config).expect("a plan");
    let schedule = plan.schedule(300).expect("a schedule");
    // Two panels of eight columns for twelve blocks; two columns for four.
    assert_eq!((schedule.os_blocks, schedule.os_columns), (12, 8));
    assert_eq!((schedule.ws_blocks, schedule.ws_columns), (4, 2));
    let counted = params::HybridGemmTraffic { role_ns: [12_000, 6_000, 0], ..bytemuck::Zeroable::zeroed() };
    let [os, ws] = plan.role_seconds(300, &counted).expect("times");
    assert!((os - 1e-6).abs() < 1e-12 && (ws - 3e-6).abs() < 1e-12, "{os}, {ws}");
    plan.role_seconds(301, &counted).expect_err("more tokens than planned");
}

/// Which path is taken, in which kernel, and why not another: paths without a kernel keep their place.
#[test]
fn plans_explain_themselves() {
    let h200 = hybrid_gemm::DeviceProfile::h200();
    let plan = |format, tokens, config: &dyn Fn(GemmConfig) -> GemmConfig| {
        let tiling = Tiling::new(28672, 4096, format).expect("a tiling");
        let placement = hybrid_gemm::Placement::packed(tiling, Residency::Host).expect("a placement");
        Plan::new(placement, config(GemmConfig::new(tokens, DType::BF16, h200.clone())))
    };
    let (bf16, same) = (Format::Float(DType::BF16), |config| config);
    // C2C, few tokens: in place. PCIe: a copy engine is faster than reads of blocks.
    let gh200 = hybrid_gemm::DeviceProfile::gh200();
    let decode = plan(bf16, 16, &|config| GemmConfig { device: gh200.clone(), ..config }).expect("a plan");
    assert!(!decode.is_staged() && !decode.is_large());
    let copied = plan(bf16, 16, &same).expect("a plan");
    assert!(copied.is_staged() && !copied.is_large(), "{}", copied.explain(16));
    // PCIe, many tokens: each weight crosses once, and sums stay in registers.
    let prefill = plan(bf16, 16384, &same).expect("a plan");
    assert!(prefill.is_staged() && prefill.is_large(), "{}", prefill.explain(16384));
    assert_eq!(
        prefill.predict(16384).expect("a prediction").traffic.link_bytes,
        prefill.placement().host_bytes()
    );
    for (case, text, words) in [
        (
            "decode",
            decode.explain(16),
            vec!["taken    output-stationary", "dropped  multicast to 2 blocks: no kernel", "hybrid_small_m"],
        ),
        (
            "decode over PCIe",
            copied.explain(16),
            vec!["taken    staged in slabs of", "slower   output-stationary", "hybrid_small_m"],
        ),
        (
            "prefill",
            prefill.explain(16384),
            vec![
                "taken    staged in slabs of",
                "slower   output-stationary",
                "slower   weight-stationary",
                "dropped  multicast to 8 blocks: no kernel",
                "hybrid_large_m, panels of 256 tokens, 3 slots of 16.8 MB",
            ],
        ),
        (
            "int4 in groups that the large kernel does not take",
            plan(Format::Int4 { group: 32 }, 256, &|config| GemmConfig {
                path: PathChoice::Direct,
                ..config
            })
            .expect("a plan")
            .explain(256),
            vec!["256 tokens in panels of 64", "hybrid_large_m does not take tiles of int4 in groups of 32"],
        ),
        (
            "the same with zero points",
            plan(Format::Int4ZeroPoints { group: 32 }, 256, &|config| GemmConfig {
                path: PathChoice::Direct,
                ..config
            })
            .expect("a plan")
            .explain(256),
            vec!["hybrid_large_m does not take tiles of int4 with zero points in groups of 32"],
        ),
        (
            "fp8 in blocks",
            plan(Format::Fp8Blocks, 256, &|config| GemmConfig { path: PathChoice::Direct, ..config })
                .expect("a plan")
                .explain(256),
            vec!["of fp8 in blocks of 128 × 128 on", "hybrid_large_m, panels of 256 tokens"],
        ),
        (
            "a budget of one SM, half in HBM",
            {
                let tiling = Tiling::new(4096, 4096, bf16).expect("a tiling");
                let half =
                    hybrid_gemm::Placement::packed(tiling, Residency::HbmFraction(0.5)).expect("a placement");
                let config =
                    GemmConfig { sm_budget: Some(1), ..GemmConfig::new(300, DType::BF16, h200.clone()) };
                Plan::new(half, config).expect("staged").explain(300)
            },
            vec![
                "taken    staged",
                "dropped  output-stationary: needs 1 SMs for the link and 1 for the weights in HBM",
            ],
        ),
    ] {
        for word in words {
            assert!(text.contains(word), "{case}: no {word:?} in\n{text}");
        }
    }
    // Panels of 64 tokens read the weights anew each, and the prediction says so.
    let direct = |config| GemmConfig { path: PathChoice::Direct, ..config };
    let panels = plan(Format::Int4 { group: 32 }, 256, &direct).expect("a plan");
    let traffic = panels.predict(256).expect("a prediction").traffic;
    assert_eq!(traffic.link_bytes, 4 * panels.placement().host_bytes());
    let staged = plan(Format::Int4 { group: 32 }, 256, &same).expect("a plan");
    assert!(staged.is_staged(), "{}", staged.explain(256));
}

/// A receipt counts as crossing the link what a role of the link reads, so its memory must lie behind the link.
#[test]
fn host_parts_on_the_device_are_refused() {
    use cuda::memory::{Space, View};
    emulator::emulator_or_skip!();
    let rig = EmulatorRig::new(Order::Forward);
    let operands = operands(8, [200, 80], Residency::Host);
    let bytes = operands.weights.host_bytes().len();
    for path in [Path::Direct { alpha: 1.0 }, Path::Staged { slab_columns: 1 }] {
        let config = GemmConfig { path: PathChoice::Only(path), ..f32_out(8, 4) };
        let plan = Plan::new(*operands.weights.placement(), config).expect("a plan");
        let calls = [plan.schedules(8).expect("schedules")];
        // SAFETY: refused before anybody follows the address.
        let on_device = unsafe { View::<u8>::from_raw(4096, bytes, Space::Device(0)) };
        let refused = crate::product::call_each_on(&rig, &plan, &operands, &on_device, &calls, false);
        let Err(error) = refused else { panic!("{path}: taken") };
        let error = error.to_string();
        assert!(error.contains("`host`") && error.contains("pinned memory of the host"), "{path}: {error}");
    }
}
