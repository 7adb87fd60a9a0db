//! Attention on codes, against the reference on the same codes.

mod product;

use attention::gpu::Splits;
use attention::testing::{Comparison, Inputs, Tolerance};
use attention::{AttentionSpec, Element, HeadsView, Mask, Score};
use cuda::status::Fault;
use cuda::storage::Storage;
use emulator::rig::Rig;
use half::{bf16, f16};
use homomorphic_quant::gpu::{
    Decode, DecodeArgs, DecodeConfig, DecodePlan, DecodeStep, DecodeStepArgs, Method,
};
use homomorphic_quant::{Error, reference};

use crate::close::assert_close;
use crate::sequences::{
    Cached, DeviceTable, Shape, Side, Spoilt, Table, Tokens, refuse_dims, saturate_queries,
};

emulator::device_test!(
    equals_the_reference,
    dequantizing_equals_the_oracle,
    saturated_codes_do_not_overflow,
    fixed_splits_are_batch_invariant,
    bad_sequences_are_reported_and_the_others_stay_right,
    places_that_change_after_the_plan_read_nothing_outside,
    nan_is_never_dropped,
    what_is_not_finite_in_the_cache_reaches_what_sees_it_alone,
    many_steps_repeat_bitwise,
);

#[derive(Debug, Clone)]
struct Case {
    method: Method,
    shape: Shape,
    q_len: usize,
    kv_lens: Vec<usize>,
    mask: Mask,
    soft_cap: Option<f32>,
    kinds: (Inputs, Inputs),
    splits: Splits,
}

impl Case {
    fn new(shape: Shape, q_len: usize, kv_lens: &[usize]) -> Self {
        Case {
            method: Method::Codes,
            shape,
            q_len,
            kv_lens: kv_lens.to_vec(),
            mask: Mask::Causal,
            soft_cap: None,
            kinds: (Inputs::OutlierChannels, Inputs::Normal),
            splits: Splits::Balanced,
        }
    }

    fn spec(&self) -> AttentionSpec {
        let score = Score::new((self.shape.dims.0 as f32).powf(-0.5)).expect("a finite scale");
        let score = self.soft_cap.map_or(score, |cap| score.with_soft_cap(cap).expect("a positive cap"));
        AttentionSpec { shape: self.shape.heads(), score, mask: self.mask }
    }

    fn rows(&self) -> usize {
        self.q_len * self.shape.q_heads
    }
}

/// Queries `[batch, q_len, q_heads, qk_dim]` and cached sequences of a case.
struct Inputs16<E> {
    q: Vec<E>,
    cached: Cached,
}

fn inputs<E: Element>(case: &Case, seed: u64) -> Inputs16<E> {
    let tokens: Vec<Tokens<E>> = (case.kv_lens.iter().zip(seed * 100..))
        .map(|(&len, seed)| Tokens::new(&case.shape, len, case.kinds, seed))
        .collect();
    Inputs16 {
        q: Inputs::Normal.generate(case.kv_lens.len() * case.rows(), case.shape.dims.0, seed + 7),
        cached: Cached::new(&case.shape, &tokens),
    }
}

/// What the reference computes on the same codes: outputs and LSEs.
fn expected<E: Element>(case: &Case, inputs: &Inputs16<E>) -> (Vec<f64>, Vec<f64>) {
    let (rows, (qk_dim, v_dim)) = (case.rows(), case.shape.dims);
    let q: Vec<f32> = inputs.q.iter().map(|x| x.to_f64() as f32).collect();
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for (sequence, q) in inputs.cached.sequences.iter().zip(q.chunks_exact(rows * qk_dim)) {
        let q = HeadsView::nhd(q, case.q_len, case.shape.q_heads, qk_dim).expect("queries");
        let (mut o, mut l) = (vec![f32::NAN; rows * v_dim], vec![f32::NAN; rows]);
        reference::attend(&case.spec(), &inputs.cached.cache, sequence, q, None, &mut o, &mut l)
            .expect("a valid case");
        out.extend(o.into_iter().map(f64::from));
        lse.extend(l.into_iter().map(f64::from));
    }
    (out, lse)
}

/// What a step leaves behind.
#[derive(Debug, Clone)]
struct Decoded<E> {
    out: Vec<E>,
    lse: Vec<f32>,
    fault: Option<Fault>,
}

fn plan<R: Rig>(rig: &R, case: &Case, cached: &Cached) -> DecodePlan {
    let spec = case.spec();
    DecodePlan::new(DecodeConfig {
        method: case.method,
        pools: cached.pools(&case.shape),
        shape: spec.shape,
        score: spec.score,
        mask: spec.mask,
        batch: case.kv_lens.len(),
        q_len: case.q_len,
        max_kv_len: 4096,
        splits: case.splits,
        // Two SMs split small cases into many parts; a GPU has the SMs that it has.
        sm_count: cuda::launch::Device::sm_count(rig.device()).unwrap_or(2),
    })
    .expect("a valid plan")
}

/// Runs `steps` equal steps with the given lengths and expects them to be bitwise equal. Planned with `table`, attended with
/// `late`.
fn decode_with<R: Rig, E: Storage + Element>(
    rig: &R,
    case: &Case,
    inputs: &Inputs16<E>,
    kv_len: &[u32],
    (table, late): (&Table, &Table),
    steps: usize,
) -> Decoded<E> {
    let plan = plan(rig, case, &inputs.cached);
    let planner = DecodeStep::prepare(rig.device(), &plan).expect("prepare the plan");
    let kernel = Decode::<_, E>::prepare(rig.device(), &plan).expect("prepare the kernel");
    let rows = case.kv_lens.len() * case.rows();

    let (pages, sinks, open) = inputs.cached.upload::<R, E>(rig);
    let (q, kv_len) = (rig.upload(&inputs.q), rig.upload(kv_len));
    let (table, late) = (DeviceTable::new(rig, table), DeviceTable::new(rig, late));
    let mut status = rig.zeroed::<u64>(1);
    let mut step_workspace = rig.workspace(plan.step_workspace());
    let mut workspace = rig.workspace(plan.workspace());
    let mut first: Option<Decoded<E>> = None;
    for step in emulator::rig::within_time(steps) {
        let mut out = rig.poisoned::<E>(rows * case.shape.dims.1);
        let mut lse = rig.poisoned::<f32>(rows);
        let fail = |error: Error| -> ! { panic!("{case:?} on {}: {error}", rig.name()) };
        let planned = table
            .with(rig, |places| {
                let args =
                    DecodeStepArgs { kv_len: &rig.view(&kv_len), places, status: rig.view_mut(&mut status) };
                planner.run(rig.queue(), args, rig.workspace_view(&mut step_workspace))
            })
            .unwrap_or_else(|error| fail(error));
        late.with(rig, |places| {
            let args = DecodeArgs {
                q: &rig.view(&q),
                pages: &rig.view(&pages),
                sink_pool: &rig.view(&sinks),
                open_pool: &rig.view(&open),
                places,
                out: rig.view_mut(&mut out),
                lse: rig.view_mut(&mut lse),
            };
            kernel.run(rig.queue(), args, &planned, rig.workspace_view(&mut workspace))
        })
        .unwrap_or_else(|error| fail(error));
        let decoded = Decoded { out: rig.download(&out), lse: rig.download(&lse), fault: None };
        match &first {
            None => first = Some(decoded),
            Some(first) => {
                let bits = |d: &Decoded<E>| (bytemuck::cast_slice::<E, u8>(&d.out).to_vec(), d.lse.clone());
                assert_eq!(bits(first), bits(&decoded), "{case:?} on {}: step {step}", rig.name());
            }
        }
    }
    assert!(rig.counters_are_zero(&mut step_workspace, plan.step_workspace()), "{case:?}: step counters");
    assert!(rig.counters_are_zero(&mut workspace, plan.workspace()), "{case:?}: counters");
    let fault = Fault::decode(rig.download(&status)[0]);
    Decoded { fault, ..first.expect("at least one step") }
}

fn decode<R: Rig, E: Storage + Element>(
    rig: &R,
    case: &Case,
    inputs: &Inputs16<E>,
    kv_len: &[u32],
) -> Decoded<E> {
    let table = &inputs.cached.table;
    decode_with(rig, case, inputs, kv_len, (table, table), 1)
}

fn lens(case: &Case) -> Vec<u32> {
    case.kv_lens.iter().map(|len| *len as u32).collect()
}

fn check<R: Rig, E: Storage + Element>(rig: &R, case: &Case, seed: u64) {
    let inputs = inputs::<E>(case, seed);
    let expected = expected(case, &inputs);
    let decoded = decode(rig, case, &inputs, &lens(case));
    let name = format!("{case:?} as {} with seed {seed} on {}", E::NAME, rig.name());
    assert_eq!(decoded.fault, None, "{name}");
    assert_close((&decoded.out, &decoded.lse), (&expected.0, &expected.1), case.shape.dims.1, &name);
}

fn equals_the_reference<R: Rig>(rig: &R) {
    let window = |window, sinks| Mask::sliding_window(window, sinks).expect("a window");
    let shape = |heads, dim, bits, partition| Shape::new(heads, dim, bits, partition);
    // Every width, partition, head size and ratio occurs with several values of the others.
    let two = |heads| shape(heads, 128, (2, 2), 64);
    check::<R, bf16>(rig, &Case::new(two((8, 1)), 1, &[0, 1, 4, 67, 68, 69]), 1);
    check::<R, bf16>(rig, &Case::new(two((6, 2)), 1, &[700, 0, 3, 260]), 2);
    check::<R, f16>(rig, &Case::new(two((16, 1)), 1, &[200, 70]), 3);
    check::<R, f16>(rig, &Case::new(two((3, 1)), 5, &[70, 2, 200]), 4);
    let four = |heads| shape(heads, 128, (4, 4), 64);
    check::<R, bf16>(rig, &Case::new(four((4, 2)), 1, &[140, 69]), 5);
    check::<R, bf16>(rig, &Case { mask: window(100, 0), ..Case::new(four((5, 1)), 1, &[40, 331, 99]) }, 6);
    // Prefill on codes: a chunk of queries, of which the first see only a part of what is cached.
    check::<R, bf16>(rig, &Case::new(four((4, 1)), 21, &[21, 150]), 7);
    check::<R, bf16>(rig, &Case { mask: window(70, 4), ..Case::new(four((2, 1)), 40, &[200, 33]) }, 8);
    let eight = |heads| shape(heads, 128, (8, 8), 64);
    check::<R, bf16>(rig, &Case::new(eight((7, 1)), 1, &[333, 64]), 9);
    check::<R, f16>(rig, &Case::new(shape((4, 2), 64, (2, 4), 32), 1, &[35, 36, 37, 150]), 10);
    let capped = Case { soft_cap: Some(20.0), ..Case::new(shape((4, 1), 96, (4, 2), 64), 1, &[69, 200]) };
    check::<R, f16>(rig, &capped, 11);
    check::<R, bf16>(rig, &Case::new(shape((2, 1), 256, (8, 2), 128), 1, &[300, 67]), 12);
    check::<R, f16>(rig, &Case::new(shape((3, 1), 256, (8, 8), 32), 1, &[110, 36]), 18);
    check::<R, f16>(rig, &Case::new(shape((8, 2), 128, (2, 2), 128), 1, &[131, 132, 133, 400]), 16);
    // Keys longer than values.
    let unequal = |heads| Shape { dims: (256, 128), ..shape(heads, 256, (2, 2), 32) };
    check::<R, f16>(rig, &Case::new(unequal((2, 1)), 1, &[100]), 13);
    check::<R, f16>(rig, &Case::new(unequal((6, 2)), 2, &[37, 150]), 17);
    let no_sinks = Shape { sinks: 0, ..shape((2, 1), 64, (2, 4), 32) };
    check::<R, f16>(rig, &Case::new(no_sinks, 2, &[32, 33, 1]), 14);
    for kinds in [
        (Inputs::Constant, Inputs::Constant),
        (Inputs::Saturated, Inputs::OutlierElements),
        (Inputs::OutlierElements, Inputs::OutlierChannels),
    ] {
        check::<R, f16>(rig, &Case { kinds, ..Case::new(shape((4, 1), 64, (2, 4), 32), 1, &[170]) }, 15);
    }
}

/// The kernel that dequantizes, against attention in f64 over what the codes stand for: keys, values and P are rounded to the
/// storage type on the way.
fn dequantizing_equals_the_oracle<R: Rig>(rig: &R) {
    fn check<R: Rig, E: Storage + Element>(rig: &R, case: Case, seed: u64) {
        let epsilon = <E as Element>::DTYPE.epsilon();
        let case = Case { method: Method::Dequantize, kinds: (Inputs::Normal, Inputs::Normal), ..case };
        let inputs = inputs::<E>(&case, seed);
        let decoded = decode(rig, &case, &inputs, &lens(&case));
        let name = format!("{case:?} as {} with seed {seed} on {}", E::NAME, rig.name());
        assert_eq!(decoded.fault, None, "{name}");
        let (rows, (qk_dim, v_dim)) = (case.rows(), case.shape.dims);
        let q: Vec<f32> = inputs.q.iter().map(|x| x.to_f64() as f32).collect();
        for (s, sequence) in inputs.cached.sequences.iter().enumerate() {
            let q = HeadsView::nhd(
                &q[s * rows * qk_dim..][..rows * qk_dim],
                case.q_len,
                case.shape.q_heads,
                qk_dim,
            );
            let cache = &inputs.cached.cache;
            let oracle =
                reference::oracle(&case.spec(), cache, sequence, q.expect("queries")).expect("a valid case");
            let tolerance = Tolerance::new(4.0 * epsilon, 4.0 * epsilon);
            Comparison::new(&decoded.out[s * rows * v_dim..][..rows * v_dim], &oracle.out, tolerance)
                .assert(format_args!("out of {name}"));
            let tolerance = Tolerance::new(2.0 * epsilon, 1e-5);
            Comparison::new(&decoded.lse[s * rows..][..rows], &oracle.lse, tolerance)
                .assert(format_args!("lse of {name}"));
        }
    }
    for bits in [2, 4, 8] {
        check::<R, bf16>(rig, Case::new(Shape::new((8, 1), 128, (bits, bits), 64), 1, &[200, 0, 68]), 51);
    }
    check::<R, bf16>(rig, Case::new(Shape::new((4, 2), 128, (4, 4), 64), 1, &[67, 69, 150]), 52);
    // Other constants of the storage type, keys whose bytes hold both halves of a k-step, and other widths for values.
    check::<R, f16>(rig, Case::new(Shape::new((6, 2), 64, (2, 4), 32), 1, &[150, 3, 36, 69]), 53);
}

/// Keys, values and queries whose codes are all at one end, so that integer sums are as large as they get.
fn saturated_codes_do_not_overflow<R: Rig>(rig: &R) {
    for (bits, dim, partition) in
        [((2, 2), 128, 64), ((8, 8), 128, 64), ((4, 4), 128, 64), ((8, 2), 256, 128)]
    {
        saturated::<R, bf16>(rig, Shape::new((2, 1), dim, bits, partition));
    }
    saturated::<R, f16>(rig, Shape::new((2, 1), 128, (2, 2), 128));
    saturated::<R, f16>(rig, Shape::new((2, 1), 256, (8, 8), 32));
}

fn saturated<R: Rig, E: Storage + Element>(rig: &R, shape: Shape) {
    let case = Case::new(Shape { sinks: 0, ..shape }, 1, &[shape.partition]);
    let mut saturated = inputs::<E>(&case, 17);
    saturated.cached = Cached::new(&case.shape, &[Tokens::<E>::saturated(&case.shape)]);
    saturate_queries(&case.shape, &mut saturated.q);
    let expected = expected(&case, &saturated);
    let decoded = decode(rig, &case, &saturated, &lens(&case));
    let name = format!("{case:?} as {} on {}", E::NAME, rig.name());
    assert_close((&decoded.out, &decoded.lse), (&expected.0, &expected.1), shape.dims.1, &name);
    saturated.cached.assert_saturated(&case.shape, &saturated.q, &name);
}

fn fixed_splits_are_batch_invariant<R: Rig>(rig: &R) {
    let together = Case {
        splits: Splits::Fixed { tokens: 64 },
        ..Case::new(Shape::new((4, 1), 64, (2, 4), 32), 1, &[400, 64, 3, 0, 300])
    };
    check::<R, f16>(rig, &together, 21);
    // The first sequence alone, and before others that change every block's share.
    let inputs = inputs::<f16>(&together, 21);
    let decoded = decode(rig, &together, &inputs, &lens(&together));
    let only = decode(rig, &together, &inputs, &[400, 0, 0, 0, 0]);
    let row = 4 * 64;
    assert_eq!(decoded.out[..row], only.out[..row], "on {}", rig.name());
    assert_eq!(decoded.lse[..4], only.lse[..4], "on {}", rig.name());
    // Other splits are other roundings of the same sums.
    for splits in [Splits::Balanced, Splits::Fixed { tokens: 32 }, Splits::Fixed { tokens: 320 }] {
        check::<R, f16>(rig, &Case { splits, ..together.clone() }, 21);
    }
}

fn bad_sequences_are_reported_and_the_others_stay_right<R: Rig>(rig: &R) {
    let case = Case::new(Shape::new((4, 2), 64, (2, 4), 32), 1, &[40, 70, 60]);
    let inputs = inputs::<f16>(&case, 31);
    let good = &inputs.cached.table;
    type Change = fn(&mut Table, &mut Vec<u32>);
    let cases: [(&str, Change, u32); 4] = [
        ("longer than its pages", |table, lens| lens[1] = 32 * table.max_pages as u32 + 36, 1),
        ("a page outside the pool", |table, _| table.block_table[table.max_pages + 1] = 1000, 2),
        ("sinks outside the pool", |table, _| table.sink_page[1] = 3, 4),
        ("an open block outside the pool", |table, _| table.open_page[1] = u32::MAX, 4),
    ];
    for (what, change, code) in cases {
        let (mut table, mut kv_len) = (good.clone(), lens(&case));
        change(&mut table, &mut kv_len);
        let decoded = decode_with(rig, &case, &inputs, &kv_len, (&table, &table), 1);
        let name = format!("{what} on {}", rig.name());
        assert_eq!(decoded.fault, Some(Fault { code, index: 1 }), "{name}");
        let (mut out, mut lse) = expected(&case, &inputs);
        out[4 * 64..8 * 64].fill(0.0);
        lse[4..8].fill(f64::NEG_INFINITY);
        assert_close((&decoded.out, &decoded.lse), (&out, &lse), 64, &name);
    }
}

fn places_that_change_after_the_plan_read_nothing_outside<R: Rig>(rig: &R) {
    let case = Case::new(Shape::new((4, 2), 64, (2, 4), 32), 1, &[40, 70, 60]);
    let inputs = inputs::<f16>(&case, 33);
    let good = &inputs.cached.table;
    let mut late = good.clone();
    late.block_table[good.max_pages..2 * good.max_pages].fill(u32::MAX - 1);
    late.sink_page[1] = u32::MAX;
    late.open_page[1] = 1 << 30;
    // The emulator faults a read outside.
    let decoded = decode_with(rig, &case, &inputs, &lens(&case), (good, &late), 1);
    let (out, _) = expected(&case, &inputs);
    for sequence in [0, 2] {
        let row = sequence * 4 * 64..(sequence + 1) * 4 * 64;
        Comparison::new(&decoded.out[row.clone()], &out[row], Tolerance::new(2e-3, 4e-3))
            .assert(format_args!("sequence {sequence} on {}", rig.name()));
    }
}

/// A query of NaN gives NaN, and harms no other row.
fn nan_is_never_dropped<R: Rig>(rig: &R) {
    let case = Case::new(Shape::new((4, 2), 64, (2, 4), 32), 1, &[70, 20]);
    let good = inputs::<f16>(&case, 35);
    let (out, lse) = expected(&case, &good);
    let mut query = inputs::<f16>(&case, 35);
    query.q[5] = f16::NAN; // of head 0
    let decoded = decode(rig, &case, &query, &lens(&case));
    let name = format!("a query of NaN on {}", rig.name());
    assert!(decoded.out[..64].iter().all(|x| x.is_nan()), "{name}: {:?}", &decoded.out[..4]);
    assert!(decoded.lse[0].is_nan(), "{name}: {}", decoded.lse[0]);
    Comparison::new(&decoded.out[64..], &out[64..], Tolerance::new(2e-3, 4e-3)).assert(&name);
    Comparison::new(&decoded.lse[1..], &lse[1..], Tolerance::new(1e-3, 1e-5)).assert(&name);
}

/// A key that is not finite makes the rows that see it NaN; a value its own channel, in a closed block those that share its scale.
/// All others keep their bits: those of other KV heads, other sequences, other channels, and queries whose window does not reach.
fn what_is_not_finite_in_the_cache_reaches_what_sees_it_alone<R: Rig>(rig: &R) {
    let case = Case::new(Shape::new((4, 2), 64, (2, 4), 32), 1, &[107, 40]);
    let window = Mask::sliding_window(50, 0).expect("a window");
    let (sink, closed, open) = (2, 4 + 9, 104);
    let channel = 40;
    // (token, side, what is there, the channels of the output that are hit)
    let all = 0..64;
    let cases = [
        (sink, Side::K, f32::NAN, all.clone()),
        (open, Side::K, f32::NAN, all.clone()),
        (closed, Side::K, f32::INFINITY, all),
        (sink, Side::V, f32::INFINITY, 40..41),
        (open, Side::V, f32::NAN, 40..41),
        (closed, Side::V, f32::NEG_INFINITY, 32..64),
    ];
    for mask in [Mask::Causal, window] {
        let case = Case { mask, ..case.clone() };
        let mut inputs = inputs::<f16>(&case, 37);
        let good = decode(rig, &case, &inputs, &lens(&case));
        for (token, side, value, channels) in cases.clone() {
            let name = format!("{value} in {side:?} of token {token}, {case:?} on {}", rig.name());
            let (sequence, kv_head) = (0, 1);
            inputs.cached.spoilt = Some(Spoilt { sequence, kv_head, token, side, channel, value });
            let bad = decode(rig, &case, &inputs, &lens(&case));
            assert_eq!(bad.fault, None, "{name}");
            let seen = mask == Mask::Causal || token >= 107 - 50;
            for row in 0..2 * 4 {
                let hit = seen && (row == 2 || row == 3);
                let lse_hit = hit && side == Side::K;
                assert_eq!(bad.lse[row].is_nan(), lse_hit, "{name}: lse of row {row}");
                assert!(lse_hit || bad.lse[row] == good.lse[row], "{name}: lse of row {row}");
                // 16-bit tokens come in sixteens, which the sinks share with the open block: a value may spoil its channel there.
                let loaded = (row == 2 || row == 3) && side == Side::V && token == sink;
                for c in 0..64 {
                    let [bad, good] = [&bad, &good].map(|decoded| decoded.out[row * 64 + c]);
                    if hit && channels.contains(&c) {
                        assert!(!bad.is_finite(), "{name}: {bad} in row {row}, channel {c}");
                    } else if !(loaded && channels.contains(&c)) {
                        assert_eq!(bad, good, "{name}: row {row}, channel {c}");
                    }
                }
            }
        }
    }
}

/// The last arriver differs from step to step; results and counters must not.
fn many_steps_repeat_bitwise<R: Rig>(rig: &R) {
    let case = Case::new(Shape::new((4, 1), 64, (2, 4), 32), 1, &[600, 7]);
    let inputs = inputs::<f16>(&case, 41);
    let table = &inputs.cached.table;
    decode_with(rig, &case, &inputs, &lens(&case), (table, table), rig.stress_launches());
}

#[test]
fn plans_refuse_what_no_kernel_can_do() {
    let case = Case::new(Shape::new((4, 2), 64, (2, 4), 32), 1, &[70]);
    let cached = inputs::<f16>(&case, 1).cached;
    let spec = case.spec();
    let good = DecodeConfig {
        method: Method::Codes,
        pools: cached.pools(&case.shape),
        shape: spec.shape,
        score: spec.score,
        mask: Mask::Causal,
        batch: 1,
        q_len: 1,
        max_kv_len: 100,
        splits: Splits::Balanced,
        sm_count: 4,
    };
    DecodePlan::new(good).expect("a valid plan");
    for (named, config) in [
        ("batch", DecodeConfig { batch: 0, ..good }),
        ("q_len", DecodeConfig { q_len: 0, ..good }),
        ("q_len", DecodeConfig { q_len: 1 << 31, ..good }),
        ("sm_count", DecodeConfig { sm_count: 0, ..good }),
        ("sm_count", DecodeConfig { sm_count: u32::MAX, ..good }),
        ("shape", DecodeConfig { shape: Shape::new((4, 1), 64, (2, 4), 32).heads(), ..good }),
        ("mask", DecodeConfig { mask: Mask::Full, ..good }),
        ("mask", DecodeConfig { mask: Mask::SlidingWindow { window: 0, sinks: 0 }, ..good }),
        ("mask", DecodeConfig { mask: Mask::SlidingWindow { window: 9, sinks: 5 }, ..good }),
        ("splits", DecodeConfig { splits: Splits::Fixed { tokens: 48 }, ..good }),
        ("splits", DecodeConfig { splits: Splits::Fixed { tokens: 0 }, ..good }),
        ("max_kv_len", DecodeConfig { max_kv_len: usize::MAX, ..good }),
        // Units of work, summed over the sequences.
        ("max_kv_len", DecodeConfig { batch: 1 << 20, max_kv_len: 1 << 17, ..good }),
    ] {
        match DecodePlan::new(config) {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, named),
            other => panic!("{named}: {other:?}"),
        }
    }
    for method in [Method::Codes, Method::Dequantize] {
        refuse_dims(&case.shape, |shape, pools| {
            DecodePlan::new(DecodeConfig { method, pools, shape: shape.heads(), ..good }).map(drop)
        });
    }
}
