//! The merge of partial states.

use attention::gpu::{Merge, MergeArgs, MergeConfig, MergePlan};
use attention::testing::{Comparison, Rng, Tolerance};
use attention::{Element, Error, FaultCode, reference};
use cuda::status::Fault;
use cuda::storage::Storage;
use cuda::workspace::{ALIGNMENT, HostWorkspace};
use emulator::rig::Rig;
use half::{bf16, f16};
use longkv_attention as attention;

emulator::device_test!(
    merges_equal_the_oracle,
    bad_rows_are_reported_and_the_others_stay_right,
    a_split_of_the_keys_merges_to_the_whole,
    nan_is_never_hidden,
    many_launches_repeat_bitwise,
);

/// How the LSEs of a case are spread.
#[derive(Debug, Clone, Copy)]
enum Spread {
    /// Around 0.
    Mild,
    /// Thousands apart: one state of a row decides.
    Saturated,
    /// Every third state is empty, and the partial output of an empty state is NaN.
    SomeEmpty,
    /// No state has seen a key.
    AllEmpty,
}

#[derive(Debug, Clone, Copy)]
struct Case {
    rows: usize,
    max_splits: usize,
    v_dim: usize,
    spread: Spread,
    /// Whether rows have counts of their own, 0 and the maximum among them.
    ragged: bool,
    /// 4 makes long rows split over blocks already in small cases.
    sm_count: u32,
}

/// Random states of one case; rows past their count hold NaN everywhere.
struct States {
    partial_out: Vec<f32>,
    partial_lse: Vec<f32>,
    num_splits: Option<Vec<u32>>,
}

fn states(case: Case, seed: u64) -> States {
    let Case { rows, max_splits, v_dim, .. } = case;
    let mut random = Rng::new(seed);
    let num_splits = case.ragged.then(|| {
        (0..rows)
            .map(|row| match row % 4 {
                0 => max_splits as u32,
                1 => 0,
                2 => 1.min(max_splits as u32),
                _ => random.below(max_splits + 1) as u32,
            })
            .collect::<Vec<_>>()
    });
    let mut partial_out = vec![f32::NAN; rows * max_splits * v_dim];
    let mut partial_lse = vec![f32::NAN; rows * max_splits];
    for row in 0..rows {
        let count = num_splits.as_ref().map_or(max_splits, |n| n[row] as usize);
        for split in 0..count {
            let state = row * max_splits + split;
            let lse = match case.spread {
                Spread::Mild => random.normal() as f32,
                Spread::Saturated => (random.normal() * 2000.0) as f32,
                Spread::SomeEmpty if state % 3 == 0 => f32::NEG_INFINITY,
                Spread::SomeEmpty => random.normal() as f32 * 10.0,
                Spread::AllEmpty => f32::NEG_INFINITY,
            };
            partial_lse[state] = lse;
            if lse != f32::NEG_INFINITY {
                partial_out[state * v_dim..][..v_dim].fill_with(|| random.normal() as f32);
            }
        }
    }
    States { partial_out, partial_lse, num_splits }
}

/// What a run leaves behind.
struct Merged<O> {
    out: Vec<O>,
    lse: Vec<f32>,
    fault: Option<Fault>,
}

fn merge<R: Rig, O: Storage>(rig: &R, case: Case, states: &States, launches: usize) -> Merged<O> {
    let Case { rows, max_splits, v_dim, sm_count, .. } = case;
    // A GPU has the SMs that it has.
    let sm_count = cuda::launch::Device::sm_count(rig.device()).unwrap_or(sm_count);
    let plan = MergePlan::new(MergeConfig { rows, max_splits, v_dim, sm_count }).expect("a valid plan");
    let kernel = Merge::<_, O>::prepare(rig.device(), &plan).expect("prepare");
    let (partial_out, partial_lse) = (rig.upload(&states.partial_out), rig.upload(&states.partial_lse));
    let num_splits = states.num_splits.as_ref().map(|n| rig.upload(n));
    let mut workspace = rig.workspace(plan.workspace());
    let mut status = rig.zeroed::<u64>(1);
    let mut merged: Option<Merged<O>> = None;
    for launch in emulator::rig::within_time(launches) {
        let mut out = rig.poisoned::<O>(rows * v_dim);
        let mut lse = rig.poisoned::<f32>(rows);
        let num_splits = num_splits.as_ref().map(|n| rig.view(n));
        let args = MergeArgs {
            partial_out: &rig.view(&partial_out),
            partial_lse: &rig.view(&partial_lse),
            num_splits: num_splits.as_ref(),
            out: rig.view_mut(&mut out),
            lse: rig.view_mut(&mut lse),
            status: rig.view_mut(&mut status),
        };
        kernel
            .run(rig.queue(), args, rig.workspace_view(&mut workspace))
            .unwrap_or_else(|error| panic!("{case:?} on {}: {error}", rig.name()));
        let (out, lse) = (rig.download(&out), rig.download(&lse));
        if let Some(first) = &merged {
            let same = bytemuck::cast_slice::<O, u8>(&first.out) == bytemuck::cast_slice::<O, u8>(&out)
                && first.lse.iter().map(|x| x.to_bits()).eq(lse.iter().map(|x| x.to_bits()));
            assert!(same, "{case:?} on {}: launch {launch} differs from launch 0", rig.name());
        } else {
            merged = Some(Merged { out, lse, fault: None });
        }
    }
    let mut merged = merged.expect("at least one launch");
    assert!(rig.counters_are_zero(&mut workspace, plan.workspace()), "{case:?} on {}: counters", rig.name());
    merged.fault = Fault::decode(rig.download(&status)[0]);
    merged
}

fn check<R: Rig, O: Storage + Element>(rig: &R, case: Case, seed: u64) {
    let states = states(case, seed);
    let oracle = reference::merge_states(
        &states.partial_out,
        &states.partial_lse,
        states.num_splits.as_deref(),
        case.rows,
        case.max_splits,
        case.v_dim,
    )
    .expect("a valid case");
    let merged = merge::<R, O>(rig, case, &states, 1);
    let name = format!("{case:?} as {} with seed {seed} on {}", O::NAME, rig.name());
    let tolerance = Tolerance { absolute: 1e-5, ..Tolerance::rounded_once::<O>() };
    Comparison::new(&merged.out, &oracle.out, tolerance).assert(format_args!("out of {name}"));
    Comparison::new(&merged.lse, &oracle.lse, Tolerance::LSE).assert(format_args!("lse of {name}"));
    assert_eq!(merged.fault, None, "{name}");
}

fn merges_equal_the_oracle<R: Rig>(rig: &R) {
    let case =
        |rows, max_splits, spread, ragged| Case { rows, max_splits, v_dim: 0, spread, ragged, sm_count: 4 };
    let cases = [
        case(1, 1, Spread::Mild, false),
        case(9, 2, Spread::SomeEmpty, true),
        case(33, 5, Spread::Saturated, false),
        case(3, 32, Spread::Mild, true),
        case(2, 33, Spread::SomeEmpty, false),
        case(5, 67, Spread::Saturated, true),
        case(1, 300, Spread::Mild, false),
        case(4, 128, Spread::AllEmpty, false),
    ];
    for (seed, case) in (1..).zip(cases) {
        check::<R, f32>(rig, Case { v_dim: 64, ..case }, seed);
        check::<R, bf16>(rig, Case { v_dim: 96, ..case }, seed);
        check::<R, f32>(rig, Case { v_dim: 128, ..case }, seed);
        check::<R, f16>(rig, Case { v_dim: 128, ..case }, seed);
        check::<R, bf16>(rig, Case { v_dim: 256, ..case }, seed);
    }
}

fn bad_rows_are_reported_and_the_others_stay_right<R: Rig>(rig: &R) {
    for max_splits in [4, 70] {
        let case = Case { rows: 6, max_splits, v_dim: 128, spread: Spread::Mild, ragged: true, sm_count: 4 };
        let mut states = states(case, 7);
        states.num_splits.as_mut().expect("a ragged case")[3] = max_splits as u32 + 1;
        let oracle = reference::merge_states(
            &states.partial_out,
            &states.partial_lse,
            states.num_splits.as_deref(),
            case.rows,
            case.max_splits,
            case.v_dim,
        )
        .expect("a valid case");
        let merged = merge::<R, f32>(rig, case, &states, 1);
        let name = format!("{case:?} on {}", rig.name());
        let [fault] = oracle.faults[..] else { panic!("{name}: {:?}", oracle.faults) };
        assert_eq!((fault.code, fault.index), (FaultCode::BadSplits, 3), "{name}");
        let found = merged.fault.unwrap_or_else(|| panic!("{name}: nothing reported"));
        assert_eq!((found.code, found.index), (fault.code as u32, 3), "{name}");
        let tolerance = Tolerance { absolute: 1e-5, ..Tolerance::rounded_once::<f32>() };
        Comparison::new(&merged.out, &oracle.out, tolerance).assert(&name);
        Comparison::new(&merged.lse, &oracle.lse, Tolerance::LSE).assert(&name);
    }
}

/// Softmax over all keys equals the merge of softmaxes over any split of them.
fn a_split_of_the_keys_merges_to_the_whole<R: Rig>(rig: &R) {
    let (rows, keys, v_dim) = (3, 150, 64);
    let mut random = Rng::new(11);
    let scores: Vec<f64> = (0..rows * keys).map(|_| random.normal() * 4.0).collect();
    let values: Vec<f64> = (0..rows * keys * v_dim).map(|_| random.normal()).collect();
    // The softmax state over some keys of a row, in f64.
    let state = |row: usize, range: std::ops::Range<usize>| {
        let m = range.clone().map(|k| scores[row * keys + k]).fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = range.clone().map(|k| (scores[row * keys + k] - m).exp()).collect();
        let l: f64 = weights.iter().sum();
        let mut out = vec![0.0; v_dim];
        for (k, weight) in range.zip(&weights) {
            for (o, v) in out.iter_mut().zip(&values[(row * keys + k) * v_dim..][..v_dim]) {
                *o += weight / l * v;
            }
        }
        (out, if weights.is_empty() { f64::NEG_INFINITY } else { m + l.ln() })
    };
    for max_splits in [1, 3, 40] {
        let case = Case { rows, max_splits, v_dim, spread: Spread::Mild, ragged: false, sm_count: 4 };
        let mut split = States { partial_out: Vec::new(), partial_lse: Vec::new(), num_splits: None };
        let (mut whole_out, mut whole_lse) = (Vec::new(), Vec::new());
        for row in 0..rows {
            // Cut points in increasing order, equal ones among them: their splits are empty.
            let mut cuts: Vec<usize> = (1..max_splits).map(|_| random.below(keys + 1)).collect();
            cuts.extend([0, keys]);
            cuts.sort_unstable();
            for cut in cuts.windows(2) {
                let (out, lse) = state(row, cut[0]..cut[1]);
                split.partial_out.extend(out.iter().map(|x| *x as f32));
                split.partial_lse.push(lse as f32);
            }
            let (out, lse) = state(row, 0..keys);
            whole_out.extend(out);
            whole_lse.push(lse);
        }
        let merged = merge::<R, f32>(rig, case, &split, 1);
        let name = format!("{max_splits} splits on {}", rig.name());
        Comparison::new(&merged.out, &whole_out, Tolerance::new(1e-5, 1e-5)).assert(&name);
        Comparison::new(&merged.lse, &whole_lse, Tolerance::LSE).assert(&name);
    }
}

fn nan_is_never_hidden<R: Rig>(rig: &R) {
    for max_splits in [3, 80] {
        let case = Case { rows: 3, max_splits, v_dim: 64, spread: Spread::Mild, ragged: false, sm_count: 4 };
        let mut states = states(case, 3);
        states.partial_lse[max_splits + 1] = f32::NAN;
        let merged = merge::<R, f32>(rig, case, &states, 1);
        let nan: Vec<bool> = merged.lse.iter().map(|x| x.is_nan()).collect();
        assert_eq!(nan, [false, true, false], "{case:?} on {}: lse {:?}", rig.name(), merged.lse);
        for (row, out) in merged.out.chunks(64).enumerate() {
            assert_eq!(out.iter().all(|x| x.is_nan()), row == 1, "{case:?} on {}: row {row}", rig.name());
            assert_eq!(out.iter().any(|x| x.is_nan()), row == 1, "{case:?} on {}: row {row}", rig.name());
        }
    }
}

/// The last arriver differs from launch to launch; results and counters must not.
fn many_launches_repeat_bitwise<R: Rig>(rig: &R) {
    let case =
        Case { rows: 3, max_splits: 100, v_dim: 64, spread: Spread::SomeEmpty, ragged: true, sm_count: 4 };
    let states = states(case, 5);
    merge::<R, f32>(rig, case, &states, rig.stress_launches());
}

#[test]
fn plans_refuse_what_no_kernel_can_do() {
    let good = MergeConfig { rows: 4, max_splits: 64, v_dim: 128, sm_count: 4 };
    assert!(MergePlan::new(good).is_ok());
    let bad = [
        ("max_splits", MergeConfig { max_splits: 0, ..good }),
        ("v_dim", MergeConfig { v_dim: 0, ..good }),
        ("sm_count", MergeConfig { sm_count: 0, ..good }),
        ("rows", MergeConfig { rows: usize::MAX, ..good }),
    ];
    for (argument, config) in bad {
        match MergePlan::new(config) {
            Err(Error::Argument { argument: found, .. }) => assert_eq!(found, argument),
            other => panic!("{argument}: {other:?}"),
        }
    }
}

#[test]
fn bad_arguments_are_named() {
    emulator::emulator_or_skip!();
    let rig = emulator::rig::EmulatorRig::new(emulator::Order::Forward);
    let plan = MergePlan::new(MergeConfig { rows: 4, max_splits: 64, v_dim: 128, sm_count: 4 })
        .expect("a valid plan");
    let kernel = Merge::<_, f32>::prepare(rig.device(), &plan).expect("prepare");
    let run = |len: [usize; 4], workspace_bytes: usize| {
        let (partial_out, partial_lse) = (rig.zeroed::<f32>(len[0]), rig.zeroed::<f32>(len[1]));
        let (mut out, mut lse, mut status) =
            (rig.zeroed::<f32>(len[2]), rig.zeroed::<f32>(len[3]), rig.zeroed::<u64>(1));
        let mut workspace = HostWorkspace::zeroed(workspace_bytes);
        let args = MergeArgs {
            partial_out: &rig.view(&partial_out),
            partial_lse: &rig.view(&partial_lse),
            num_splits: None,
            out: rig.view_mut(&mut out),
            lse: rig.view_mut(&mut lse),
            status: rig.view_mut(&mut status),
        };
        kernel.run(rig.queue(), args, workspace.view_mut())
    };
    let (good, bytes) = ([4 * 64 * 128, 4 * 64, 4 * 128, 4], plan.workspace().bytes());
    run(good, bytes).expect("valid arguments");
    for (i, argument) in ["partial_out", "partial_lse", "out", "lse"].into_iter().enumerate() {
        let mut short = good;
        short[i] -= 1;
        let error = run(short, bytes).expect_err(argument).to_string();
        assert!(error.contains(&format!("`{argument}`")), "{error}");
    }
    let error = run(good, bytes - ALIGNMENT).expect_err("a short workspace").to_string();
    assert!(error.contains("`workspace`"), "{error}");
}
