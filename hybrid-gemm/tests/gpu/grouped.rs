//! Products of experts in one launch.

use std::cell::RefCell;

use bytemuck::Zeroable;
use cuda::params::{self, HybridGemmExpert, HybridGemmSchedule, HybridGemmTraffic};
use cuda::status::Fault;
use cuda::storage::Storage;
use emulator::Order;
use emulator::rig::{EmulatorRig, Rig, gpu_or_skip};
use half::{bf16, f16};
use hybrid_gemm::epilogue::Activation;
use hybrid_gemm::gpu::{DeviceWeights, GroupedArgs, GroupedGemm, GroupedPlan};
use hybrid_gemm::{
    Alpha, DType, Element, EpilogueSpec, Error, Format, GemmConfig, MatrixView, Path, PathChoice, Placement,
    Residency, Tiling, Traffic, Weights, grouped, reference,
};

use crate::common::{compare, device, random};
use crate::product::{fit, weights};

emulator::device_test!(formats_of_experts, bad_experts_are_named);
emulator::device_test!(emulator::Order::few(); experts_are_a_loop_of_products, partial_sums_of_experts);

/// Experts whose weights lie in host memory, in HBM and in both, one after another.
fn experts<X: Element>(count: usize, tiling: Tiling) -> Vec<Weights> {
    let residencies = [Residency::Host, Residency::HbmFraction(0.4), Residency::Hbm];
    (0..count).map(|index| weights::<X>(80 + index as u64, tiling, residencies[index % 3])).collect()
}

fn offsets(rows: &[usize]) -> Vec<u32> {
    let ends = rows.iter().scan(0, |end, rows| {
        *end += *rows as u32;
        Some(*end)
    });
    std::iter::once(0).chain(ends).collect()
}

/// What a launch left behind.
struct Outcome<O> {
    out: Vec<O>,
    traffic: Traffic,
    fault: Option<Fault>,
}

/// What a call finds in device memory.
struct Call<'a> {
    offsets: Vec<u32>,
    table: Vec<HybridGemmExpert>,
    schedule: HybridGemmSchedule,
    /// Other contents of the weights, placed alike.
    experts: Option<&'a [Weights]>,
}

impl Call<'_> {
    fn new(plan: &GroupedPlan, rows: &[usize]) -> Self {
        Call { offsets: offsets(rows), table: plan.table(), schedule: plan.schedule(), experts: None }
    }
}

/// Parts of all experts, one behind the other.
fn parts(experts: &[Weights], bytes: fn(&Weights) -> &[u8]) -> Vec<u8> {
    experts.iter().flat_map(bytes).copied().collect()
}

/// One recorded launch, or launch after launch, with other values in device memory each.
fn run<R: Rig, X: Storage + Element, O: Storage + Element>(
    rig: &R,
    plan: &GroupedPlan,
    experts: &[Weights],
    x: &[X],
    calls: &[Call<'_>],
    recorded: bool,
) -> Result<Vec<Outcome<O>>, Error> {
    let gemm = GroupedGemm::<_, X>::prepare(rig.device(), plan)?;
    let config = plan.group().config();
    let tiling = experts[0].placement().tiling();
    let columns = config.epilogue.out_columns(tiling.n());
    let host = RefCell::new(rig.pin(&parts(experts, Weights::host_bytes)));
    let hbm = RefCell::new(rig.upload(&parts(experts, Weights::hbm_bytes)));
    let scales: Vec<f32> = experts.iter().flat_map(Weights::scales).copied().collect();
    let (has_scales, scales) = (!scales.is_empty(), rig.upload(&scales));
    let x = rig.upload(x);
    let schedule = RefCell::new(rig.zeroed::<HybridGemmSchedule>(1));
    let table = RefCell::new(rig.zeroed::<HybridGemmExpert>(experts.len()));
    let offsets = RefCell::new(rig.zeroed::<u32>(experts.len() + 1));
    let out = RefCell::new(rig.poisoned::<O>(config.max_tokens * columns));
    let poison = rig.download(&out.borrow());
    let traffic = RefCell::new(rig.zeroed::<HybridGemmTraffic>(1));
    let status = RefCell::new(rig.zeroed::<u64>(1));
    let workspace = RefCell::new(rig.workspace(plan.workspace()));
    let placements: Vec<Placement> = experts.iter().map(|expert| *expert.placement()).collect();
    let enqueue = || {
        let (host, hbm, schedule) = (host.borrow(), hbm.borrow(), schedule.borrow());
        let (host, hbm, scales) = (rig.view(&host), rig.view(&hbm), rig.view(&scales));
        let (mut out, mut traffic) = (out.borrow_mut(), traffic.borrow_mut());
        let (mut status, mut workspace) = (status.borrow_mut(), workspace.borrow_mut());
        let (table, offsets) = (table.borrow(), offsets.borrow());
        let args = GroupedArgs {
            x: &rig.view(&x),
            weights: DeviceWeights {
                host: Some(&host),
                hbm: Some(&hbm),
                scales: has_scales.then_some(&scales),
                placements: &placements,
            },
            table: &rig.view(&table),
            offsets: &rig.view(&offsets),
            out: rig.view_mut(&mut out),
            strides: None,
            schedule: &rig.view(&schedule),
            traffic: Some(rig.view_mut(&mut traffic)),
            status: rig.view_mut(&mut status),
        };
        gemm.run(rig.queue(), args, rig.workspace_view(&mut workspace))
    };
    let replay = recorded.then(|| rig.record(Box::new(|| enqueue().expect("a launch to record"))));
    let mut outcomes = Vec::new();
    for call in calls {
        rig.write(&mut offsets.borrow_mut(), 0, &call.offsets);
        rig.write(&mut table.borrow_mut(), 0, &call.table);
        rig.write(&mut schedule.borrow_mut(), 0, &[call.schedule]);
        if let Some(experts) = call.experts {
            rig.write(&mut host.borrow_mut(), 0, &parts(experts, Weights::host_bytes));
            rig.write(&mut hbm.borrow_mut(), 0, &parts(experts, Weights::hbm_bytes));
        }
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
        });
    }
    Ok(outcomes)
}

/// Holds a launch against the oracle, expert by expert, and its receipt against the prediction: the bytes of active experts.
fn verify<X: Element, O: Element>(
    case: &str,
    plan: &GroupedPlan,
    experts: &[Weights],
    x: &[X],
    rows: &[usize],
    outcome: &Outcome<O>,
) {
    assert_eq!(outcome.fault, None, "{case}");
    let epilogue = plan.group().config().epilogue;
    let tiling = experts[0].placement().tiling();
    let (k, columns) = (tiling.k(), epilogue.out_columns(tiling.n()));
    let mut first = 0;
    let mut active = 0;
    for (index, (expert, &rows)) in experts.iter().zip(rows).enumerate() {
        let view = MatrixView::new(&x[first * k..(first + rows) * k], rows, k).expect("x");
        let exact = reference::gemm::<X, O>(view, expert, &epilogue, None, None).expect("the oracle");
        // Norms of rows of such values are below 12 per √k; a gate multiplies two sums.
        let gain = exact.iter().fold(1.0f64, |most, value| most.max(value.abs().sqrt()));
        let scale =
            144.0 * k as f64 * if epilogue.activation == Activation::SwiGlu { 2.0 + gain } else { 1.0 };
        let found = &outcome.out[first * columns..(first + rows) * columns];
        compare(&format!("{case}, expert {index}"), found, &exact, scale);
        first += rows;
        active += if rows > 0 { expert.placement().host_bytes() } else { 0 };
    }
    let beyond = &outcome.out[first * columns..];
    assert!(
        beyond.iter().all(|value| bytemuck::bytes_of(value).iter().all(|byte| *byte == 0xff)),
        "{case}: beyond"
    );
    let predicted = plan.predict(rows).expect("a prediction").traffic;
    assert_eq!(outcome.traffic, predicted, "{case}: counted, then predicted");
    let one_panel = rows.iter().all(|rows| *rows <= plan.group().schedule().panel);
    if one_panel {
        assert_eq!(outcome.traffic.link_bytes, active, "{case}: active experts, each byte once");
    }
}

fn plan<R: Rig>(
    rig: &R,
    experts: &[Weights],
    (max_tokens, x): (usize, DType),
    alpha: Alpha,
    epilogue: EpilogueSpec,
) -> GroupedPlan {
    let placements: Vec<Placement> = experts.iter().map(|expert| *expert.placement()).collect();
    let config = fit(rig, GemmConfig { alpha, epilogue, ..GemmConfig::new(max_tokens, x, device(6)) });
    GroupedPlan::new(placements, config).expect("a plan")
}

fn experts_are_a_loop_of_products<R: Rig>(rig: &R) {
    let tiling = Tiling::new(144, 200, Format::Float(DType::BF16)).expect("a tiling");
    let experts = experts::<bf16>(5, tiling);
    let plain = EpilogueSpec::plain(DType::F32);
    for (max_tokens, alpha, cases) in [
        (
            8,
            Alpha::Auto,
            vec![
                ("nobody", [0, 0, 0, 0, 0]),
                ("the first has all", [8, 0, 0, 0, 0]),
                ("the last has all", [0, 0, 0, 0, 8]),
                ("every other", [0, 3, 0, 4, 0]),
                ("some each", [1, 2, 1, 1, 3]),
            ],
        ),
        (
            300,
            Alpha::Fixed(0.0),
            vec![("all full", [60, 60, 60, 60, 60]), ("one with two panels", [0, 30, 0, 270, 0])],
        ),
        (300, Alpha::Fixed(0.5), vec![("a Zipf of routes", [257, 10, 0, 20, 5])]),
        (600, Alpha::Fixed(1.0), vec![("two with two panels", [280, 300, 7, 0, 0])]),
    ] {
        let plan = plan(rig, &experts, (max_tokens, DType::BF16), alpha, plain);
        let x: Vec<bf16> = random(90, max_tokens * tiling.k());
        let calls: Vec<_> = cases.iter().map(|(_, rows)| Call::new(&plan, rows)).collect();
        let outcomes = run::<R, bf16, f32>(rig, &plan, &experts, &x, &calls, false).expect("launches");
        for ((case, rows), outcome) in cases.iter().zip(&outcomes) {
            let case = format!("{case} of {max_tokens}, {alpha:?}, on {}, seeds 80 to 90", rig.name());
            verify(&case, &plan, &experts, &x, rows, outcome);
        }
    }
}

/// Two experts of several panels and several K tiles: their partial sums pass through the workspace one after the other.
fn partial_sums_of_experts<R: Rig>(rig: &R) {
    let tiling = Tiling::with_tile_k(72, 264, Format::Float(DType::BF16), 128).expect("a tiling");
    assert_eq!(tiling.k_tiles(), 3);
    let experts: Vec<_> = (0..3).map(|index| weights::<bf16>(84 + index, tiling, Residency::Host)).collect();
    let (tokens, rows) = (540, [259, 3, 278]);
    let x: Vec<bf16> = random(94, tokens * tiling.k());
    for alpha in [0.0, 0.5] {
        let plain = EpilogueSpec::plain(DType::F32);
        let plan = plan(rig, &experts, (tokens, DType::BF16), Alpha::Fixed(alpha), plain);
        let calls = [Call::new(&plan, &rows)];
        let outcome = &run::<R, bf16, f32>(rig, &plan, &experts, &x, &calls, false).expect("a launch")[0];
        let case = format!("alpha {alpha}, on {}, seeds 84 to 94", rig.name());
        verify(&case, &plan, &experts, &x, &rows, outcome);
        assert!(outcome.traffic.partial_bytes > 0, "{case}: no partial sums");
    }
}

fn format<R: Rig, X: Storage + Element>(rig: &R, format: Format, [n, k]: [usize; 2], epilogue: EpilogueSpec) {
    let tiling = Tiling::new(n, k, format).expect("a tiling");
    let experts = experts::<X>(3, tiling);
    let rows = [6, 0, 7];
    let plan = plan(rig, &experts, (16, <X as Element>::DTYPE), Alpha::Auto, epilogue);
    let x: Vec<X> = random(91, 16 * k);
    let calls = [Call::new(&plan, &rows)];
    let outcomes = run::<R, X, f16>(rig, &plan, &experts, &x, &calls, false).expect("a launch");
    let case = format!("[{n}, {k}] of {format} on {}, seeds 80 to 91", rig.name());
    verify(&case, &plan, &experts, &x, &rows, &outcomes[0]);
}

/// Scales of each expert's rows and blocks, int4 groups with and without zero points, and the gate of a feed-forward layer.
fn formats_of_experts<R: Rig>(rig: &R) {
    let plain = EpilogueSpec::plain(DType::F16);
    let gated = EpilogueSpec { activation: Activation::SwiGlu, ..plain };
    format::<R, bf16>(rig, Format::Int8, [130, 200], plain);
    format::<R, bf16>(rig, Format::Int4 { group: 128 }, [72, 520], plain);
    format::<R, bf16>(rig, Format::Int4ZeroPoints { group: 128 }, [72, 520], plain);
    format::<R, bf16>(rig, Format::Fp8Blocks, [136, 200], plain);
    format::<R, f16>(rig, Format::Float(DType::F16), [144, 72], gated);
}

/// What is wrong with an expert is named with its index; O is zero, nothing is fetched.
fn bad_experts_are_named<R: Rig>(rig: &R) {
    let tiling = Tiling::new(144, 80, Format::Float(DType::BF16)).expect("a tiling");
    let experts = experts::<bf16>(3, tiling);
    let plan = plan(rig, &experts, (8, DType::BF16), Alpha::Auto, EpilogueSpec::plain(DType::F32));
    let x: Vec<bf16> = random(92, 8 * tiling.k());
    type Mistake = (&'static str, fn(&mut Call<'_>), params::FaultCode, u32);
    let mistakes: [Mistake; 6] = [
        ("falling offsets", |call| call.offsets[1] = 5, params::FAULT_BAD_RANGE, 1),
        ("offsets past the rows", |call| call.offsets[3] = 9, params::FAULT_BAD_RANGE, 2),
        ("offsets not from 0", |call| call.offsets[0] = 1, params::FAULT_BAD_RANGE, 0),
        ("weights past the end", |call| call.table[1].host_offset += 1 << 40, params::FAULT_BAD_INDEX, 1),
        ("weights between vectors", |call| call.table[2].hbm_offset += 8, params::FAULT_BAD_INDEX, 2),
        ("more columns than there are", |call| call.table[0].host_columns = 9, params::FAULT_BAD_INDEX, 0),
    ];
    let rows = [3, 0, 2];
    let good = || Call::new(&plan, &rows);
    let calls: Vec<Call<'_>> = mistakes
        .iter()
        .map(|(_, change, _, _)| {
            let mut call = good();
            change(&mut call);
            call
        })
        .chain([good()])
        .collect();
    let outcomes = run::<R, bf16, f32>(rig, &plan, &experts, &x, &calls, false).expect("launches");
    for ((case, _, code, index), outcome) in mistakes.iter().zip(&outcomes) {
        let fault = outcome.fault.map(|fault| (fault.code, fault.index));
        assert_eq!(fault, Some((*code, *index)), "{case} on {}", rig.name());
        assert!(outcome.out.iter().all(|x| *x == 0.0), "{case} on {}: O is not zero", rig.name());
        assert_eq!(outcome.traffic, Traffic::default(), "{case}: something was moved");
    }
    verify("after bad experts", &plan, &experts, &x, &rows, &outcomes[mistakes.len()]);
}

/// One recorded launch of either kernel follows routes, alpha and weights that change in memory between replays.
fn everything_changes_between_replays<R: Rig>(rig: &R) {
    let tiling = Tiling::new(144, 136, Format::Float(DType::BF16)).expect("a tiling");
    let residencies = [Residency::Host, Residency::HbmFraction(0.4), Residency::Hbm, Residency::Host];
    let sets = [80, 90].map(|seed| -> Vec<Weights> {
        (seed..).zip(residencies).map(|(seed, residency)| weights::<bf16>(seed, tiling, residency)).collect()
    });
    let plain = EpilogueSpec::plain(DType::F32);
    for (most, alphas, routes) in [
        (8, vec![Alpha::Fixed(1.0)], [[2, 2, 2, 2], [0, 0, 8, 0], [0, 0, 0, 0], [1, 0, 0, 5]]),
        (
            70,
            [0.0, 0.5, 1.0].map(Alpha::Fixed).to_vec(),
            [[3, 0, 2, 65], [0, 70, 0, 0], [0, 0, 0, 0], [17, 1, 30, 9]],
        ),
    ] {
        let mut plan = plan(rig, &sets[0], (most, DType::BF16), Alpha::Auto, plain);
        assert_eq!(plan.is_large(), most == 70);
        let x: Vec<bf16> = random(93, most * tiling.k());
        let replays = (rig.stress_launches() / 5).min(200);
        let mut used = Vec::new();
        let calls: Vec<Call<'_>> = (0..replays)
            .map(|index| {
                let (alpha, set) = (alphas[index % alphas.len()], (index / 2 + index / 7) % 2);
                plan.set_alpha(alpha).expect("an alpha");
                used.push((plan.clone(), set, routes[index % 4]));
                Call { experts: Some(&sets[set]), ..Call::new(&plan, &routes[index % 4]) }
            })
            .collect();
        let outcomes = run::<R, bf16, f32>(rig, &plan, &sets[0], &x, &calls, true).expect("replays");
        for (index, ((plan, set, rows), outcome)) in used.iter().zip(&outcomes).enumerate() {
            let case = format!("replay {index} of {rows:?}, set {set}, on {}", rig.name());
            verify(&case, plan, &sets[*set], &x, rows, outcome);
        }
    }
}

/// Experts of one total size whose places are others than the plan's: every view would be long enough.
#[test]
fn experts_of_another_plan_are_refused() {
    emulator::emulator_or_skip!();
    let rig = EmulatorRig::new(Order::Forward);
    let tiling = Tiling::new(144, 80, Format::Float(DType::BF16)).expect("a tiling");
    let experts = experts::<bf16>(3, tiling);
    let plan = plan(&rig, &experts, (8, DType::BF16), Alpha::Auto, EpilogueSpec::plain(DType::F32));
    let x: Vec<bf16> = random(95, 8 * tiling.k());
    let swapped = [experts[1].clone(), experts[0].clone(), experts[2].clone()];
    for (case, experts, named) in [
        ("two swapped", &swapped[..], "found expert 0: "),
        ("one too few", &experts[..2], "expected 3 placed as planned, found 2"),
    ] {
        let count = experts.len();
        let table = plan.table()[..count].to_vec();
        let call = Call { table, ..Call::new(&plan, &[3, 0, 2][..count]) };
        let refused = run::<_, bf16, f32>(&rig, &plan, experts, &x, &[call], false);
        let Err(error) = refused else { panic!("{case}: taken") };
        let error = error.to_string();
        assert!(error.contains("`weights`") && error.contains(named), "{case}: {error}");
    }
}

mod replay {
    use super::*;

    #[test]
    fn emulator() {
        emulator::emulator_or_skip!();
        for order in Order::ALL {
            everything_changes_between_replays(&EmulatorRig::new(order));
        }
    }

    #[test]
    fn gpu() {
        if let Some(rig) = gpu_or_skip("grouped::replay") {
            everything_changes_between_replays(&rig.on_own_stream().expect("a stream of its own"));
        }
    }
}

#[test]
fn plans_of_groups_say_what_does_not_fit() {
    let tiling = Tiling::new(128, 128, Format::Float(DType::BF16)).expect("a tiling");
    let packed = |residency| Placement::packed(tiling, residency).expect("a placement");
    let other = Tiling::new(128, 192, Format::Float(DType::BF16)).expect("a tiling");
    let config = |max_tokens| GemmConfig::new(max_tokens, DType::BF16, device(4));
    let host = packed(Residency::Host);
    let half = packed(Residency::HbmFraction(0.5));
    for (case, experts, config, named) in [
        ("no experts", vec![], config(8), "experts"),
        ("two shapes", vec![host, Placement::packed(other, Residency::Host).unwrap()], config(8), "expert 1"),
        (
            "slabs",
            vec![host],
            GemmConfig { path: PathChoice::Only(Path::Staged { slab_columns: 1 }), ..config(8) },
            "where they lie",
        ),
        (
            "weight-stationary products of few tokens",
            vec![host],
            GemmConfig { path: PathChoice::Only(Path::Direct { alpha: 0.0 }), ..config(8) },
            "keeps a weight tile",
        ),
        (
            "one SM for both memories",
            vec![half, host],
            GemmConfig { sm_budget: Some(1), ..config(8) },
            "budget is 1",
        ),
        ("f32", vec![host], GemmConfig::new(8, DType::F32, device(4)), "f16 or bf16"),
    ] {
        let error = GroupedPlan::new(experts, config).expect_err(case).to_string();
        assert!(error.contains(named), "{case}: {error}");
    }
    // An alpha of the model's lies between the ends where link and HBM balance; the blocks are the schedule's.
    let mut plan = GroupedPlan::new(vec![host; 4], config(2000)).expect("a plan");
    for (alpha, os_blocks) in [(0.0, 0), (1.0, 4), (0.5, 2)] {
        plan.set_alpha(Alpha::Fixed(alpha)).expect("an alpha");
        assert_eq!((plan.schedule().os_blocks, plan.schedule().ws_blocks), (os_blocks, 4 - os_blocks));
    }
    assert!(plan.predict(&[2001, 0, 0, 0]).expect_err("too many").to_string().contains("at most 2000"));
    assert!(grouped::GroupedPlan::new(vec![host], config(8)).is_ok());
}
