//! Prefill in steps that carry a state, as in a ring.

use super::*;

emulator::device_test!(
    steps_over_chunks_of_keys_equal_one_prefill,
    rows_without_keys_keep_their_state,
    nan_survives_the_steps_that_follow,
);

/// One step: its sequences' queries, which are those of every step, with keys of its own.
pub(super) struct Step<E> {
    pub(super) case: Case,
    pub(super) tensors: Tensors<E>,
}

/// Steps of equal queries with these (keys of each sequence, mask).
fn steps<E: Element>(case: &Case, chunks: &[(&[usize], Mask)], seed: u64) -> Vec<Step<E>> {
    let q = tensors::<E>(case, seed).q;
    let step = |(index, (keys, mask)): (usize, &(&[usize], Mask))| {
        let sequences = case.sequences.iter().zip(*keys).map(|((queries, _), keys)| (*queries, *keys));
        let case = Case { sequences: sequences.collect(), mask: *mask, ..case.clone() };
        let tensors = Tensors { q: q.clone(), ..tensors(&case, seed + 100 * (index as u64 + 1)) };
        Step { case, tensors }
    };
    chunks.iter().enumerate().map(step).collect()
}

/// The states (m, l, O) that steps leave, as they lie in memory: `[queries, q_heads, v_dim]` and `[queries, q_heads, 2]`.
#[derive(Debug, PartialEq)]
pub(super) struct States {
    o: Vec<f32>,
    pub(super) ml: Vec<f32>,
}

impl States {
    fn output(&self) -> (Vec<f64>, Vec<f64>) {
        let (rows, dim) = (self.ml.len() / 2, self.o.len() / (self.ml.len() / 2));
        let l = |row: usize| f64::from(self.ml[2 * row + 1]);
        let out = |i: usize| if l(i / dim) == 0.0 { 0.0 } else { f64::from(self.o[i]) / l(i / dim) };
        let lse = |row: usize| f64::from(self.ml[2 * row]) + l(row).ln();
        ((0..self.o.len()).map(out).collect(), (0..rows).map(lse).collect())
    }
}

pub(super) fn run_steps<R: Rig, E: Storage + Element>(rig: &R, steps: &[Step<E>]) -> States {
    let rows = steps[0].case.queries() * steps[0].case.q_heads;
    // NaN: the first step starts anew over whatever is there.
    let (mut o, mut ml) = (rig.poisoned::<f32>(rows * steps[0].case.dims.1), rig.poisoned::<f32>(rows * 2));
    let mut status = rig.zeroed::<u64>(1);
    for (index, Step { case, tensors }) in steps.iter().enumerate() {
        let plan = plan(case, tensors.kv.layout, true);
        let kernel = Prefill::<_, E>::prepare(rig.device(), &plan).expect("prepare");
        let planner = PrefillTiles::prepare(rig.device(), &plan).expect("prepare the plan");
        let mut workspace = rig.workspace(plan.workspace());
        let (q, k, v) =
            (rig.upload(&tensors.q), rig.upload(&tensors.kv.k_cache), rig.upload(&tensors.kv.v_cache));
        let (cu_queries, kv_len) = (rig.upload(&case.cu_queries()), rig.upload(&lens(case)));
        let contiguous = matches!(tensors.kv.layout, CacheLayout::Contiguous { .. });
        let kv_start = contiguous.then(|| rig.upload(&tensors.kv.kv_start));
        let table = (!contiguous).then(|| rig.upload(&tensors.kv.block_table));
        let (kv_start, table) = (kv_start.as_ref().map(|x| rig.view(x)), table.as_ref().map(|x| rig.view(x)));
        let args = PrefillTilesArgs {
            cu_queries: &rig.view(&cu_queries),
            kv_len: &rig.view(&kv_len),
            block_table: table.as_ref(),
            kv_start: kv_start.as_ref(),
            status: rig.view_mut(&mut status),
        };
        let mut tiles =
            planner.run(rig.queue(), args, rig.workspace_view(&mut workspace)).expect("plan the tiles");
        let inputs = PrefillInputs {
            q: &rig.view(&q),
            k: &rig.view(&k),
            v: &rig.view(&v),
            block_table: table.as_ref(),
        };
        let state = PrefillState { o: rig.view_mut(&mut o), ml: rig.view_mut(&mut ml), resume: index > 0 };
        kernel
            .run_step(rig.queue(), inputs, state, &mut tiles)
            .unwrap_or_else(|error| panic!("{case:?}, step {index} on {}: {error}", rig.name()));
    }
    assert_eq!(Fault::decode(rig.download(&status)[0]), None, "{:?} on {}", steps[0].case, rig.name());
    States { o: rig.download(&o), ml: rig.download(&ml) }
}

/// The oracle of several steps: that of each, merged by LSE.
fn oracle_of_steps<E: Element>(steps: &[Step<E>]) -> (Vec<f64>, Vec<f64>) {
    let parts: Vec<reference::Output> = steps.iter().map(|step| oracle(&step.case, &step.tensors)).collect();
    let dim = steps[0].case.dims.1;
    let lse: Vec<f64> = (0..parts[0].lse.len())
        .map(|row| parts.iter().map(|part| part.lse[row]).fold(f64::NEG_INFINITY, log_add))
        .collect();
    let weight = |part: &reference::Output, row: usize| {
        if part.lse[row] == f64::NEG_INFINITY { 0.0 } else { (part.lse[row] - lse[row]).exp() }
    };
    let out = |i: usize| parts.iter().map(|part| weight(part, i / dim) * part.out[i]).sum();
    ((0..parts[0].out.len()).map(out).collect(), lse)
}

fn log_add(a: f64, b: f64) -> f64 {
    let (low, high) = (a.min(b), a.max(b));
    if high == f64::NEG_INFINITY { high } else { high + (low - high).exp().ln_1p() }
}

/// A ring step sees a chunk of the keys; the state that steps carry is that of all of them. The last chunk lies on the
/// diagonal, where some queries of a tile see keys and others none.
fn steps_over_chunks_of_keys_equal_one_prefill<R: Rig>(rig: &R) {
    let wide = Case::new((4, 2), (128, 128), &[(70, 0)], Cache::Contiguous, Mask::Full);
    let full = |keys: &'static [usize]| (keys, Mask::Full);
    let causal = |keys: &'static [usize]| (keys, Mask::Causal);
    carried::<R, bf16>(rig, &wide, &[full(&[64]), full(&[0]), full(&[37]), full(&[69])], 11);
    let ragged =
        Case::new((2, 1), (128, 128), &[(70, 0), (5, 0), (0, 0), (90, 0)], Cache::Contiguous, Mask::Full);
    let ring = [full(&[100, 0, 3, 64]), full(&[1, 7, 0, 65]), causal(&[70, 3, 5, 20])];
    carried::<R, bf16>(rig, &ragged, &ring, 12);
    let paged = Case::new((2, 2), (64, 64), &[(33, 0), (40, 0)], Cache::Nhd(16), Mask::Full);
    carried::<R, bf16>(rig, &paged, &[causal(&[10, 40]), full(&[32, 1]), full(&[64, 0])], 13);
}

pub(super) fn carried<R: Rig, E: Storage + Element>(
    rig: &R,
    case: &Case,
    chunks: &[(&[usize], Mask)],
    seed: u64,
) {
    let steps = steps::<E>(case, chunks, seed);
    let (expected_out, expected_lse) = oracle_of_steps(&steps);
    let (out, lse) = run_steps(rig, &steps).output();
    let name = format!("{case:?} in steps {chunks:?} with seed {seed} on {}", rig.name());
    Comparison::attention_f64(&out, &expected_out, case.dims.1, Tolerance::tensor_core::<E>())
        .assert(format_args!("out of {name}"));
    Comparison::of_f64(&lse, &expected_lse, Tolerance::LSE).assert(format_args!("lse of {name}"));
}

/// A query of NaN has no maximum; the next step must not take its state for an empty one.
fn nan_survives_the_steps_that_follow<R: Rig>(rig: &R) {
    let case = Case::new((2, 2), (64, 64), &[(5, 0)], Cache::Nhd(16), Mask::Full);
    let mut steps = steps::<bf16>(&case, &[(&[32], Mask::Full), (&[64], Mask::Full)], 13);
    // Of query 0, head 0. The second step sees an ordinary query, so that only the state can bring the NaN.
    steps[0].tensors.q[3] = bf16::NAN;
    let (out, lse) = run_steps(rig, &steps).output();
    assert!(out[..64].iter().all(|x| x.is_nan()) && lse[0].is_nan(), "on {}: {:?}", rig.name(), &out[..4]);
    assert!(out[64..].iter().chain(&lse[1..]).all(|x| x.is_finite()), "on {}", rig.name());
}

/// A step that shows a row no key leaves its state bit for bit: on the diagonal some rows of a tile, and every row where the
/// chunk is empty.
fn rows_without_keys_keep_their_state<R: Rig>(rig: &R) {
    let case = Case::new((2, 2), (64, 64), &[(40, 0), (9, 0)], Cache::Nhd(16), Mask::Full);
    let mut steps = steps::<bf16>(&case, &[(&[50, 20], Mask::Full), (&[10, 0], Mask::Causal)], 14);
    let both = run_steps(rig, &steps);
    steps.truncate(1);
    let first = run_steps(rig, &steps);
    let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
    for row in 0..49 * 2 {
        let same = [(&both.o, &first.o, 64), (&both.ml, &first.ml, 2)].iter().all(|(both, first, width)| {
            bits(&both[row * width..][..*width]) == bits(&first[row * width..][..*width])
        });
        let sees = (30..40).contains(&(row / 2));
        assert_eq!(same, !sees, "query {}, head {} on {}", row / 2, row % 2, rig.name());
    }
}
