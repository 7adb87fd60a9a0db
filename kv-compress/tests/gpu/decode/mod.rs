//! Balanced decode over heads of different ranks.

mod product;
mod replay;

use attention::testing::{Comparison, Inputs, Tolerance};
use attention::{AttentionSpec, Element, FaultCode, HeadShape, HeadsView, Mask, RaggedView, Score};
use cuda::status::Fault;
use cuda::storage::Storage;
use emulator::rig::Rig;
use half::{bf16, f16};
use kv_compress::Error;
use kv_compress::gpu::{Decode, DecodeArgs, DecodeConfig, DecodePlan, DecodeStep, DecodeStepArgs, Splits};
use kv_compress::reference::{self, Attend};

use crate::cache::{Pages, ranks};

emulator::device_test!(
    equals_the_padded_dense_oracle,
    page_order_does_not_matter,
    fixed_splits_are_batch_invariant,
    every_split_gives_the_same,
    bad_sequences_are_reported_and_the_others_stay_right,
    hidden_keys_may_hold_anything,
    nan_is_never_dropped,
    one_step_serves_layers_of_different_ranks,
    many_steps_repeat_bitwise,
);

/// Ranks that share nothing: the widest, the narrowest, a short key with a long value.
const MIXED: [(usize, usize); 4] = [(128, 128), (16, 16), (48, 112), (96, 32)];

#[derive(Debug, Clone)]
struct Case {
    group: usize,
    head_dim: usize,
    ranks: Vec<(usize, usize)>,
    q_len: usize,
    kv_lens: Vec<usize>,
    page_size: usize,
    mask: Mask,
    soft_cap: Option<f32>,
    inputs: Inputs,
    splits: Splits,
}

impl Case {
    fn new(group: usize, head_dim: usize, ranks: &[(usize, usize)], q_len: usize, kv_lens: &[usize]) -> Self {
        Case {
            group,
            head_dim,
            ranks: ranks.to_vec(),
            q_len,
            kv_lens: kv_lens.to_vec(),
            page_size: 64,
            mask: Mask::Causal,
            soft_cap: None,
            inputs: Inputs::Normal,
            splits: Splits::Balanced,
        }
    }

    fn shape(&self) -> HeadShape {
        let kv_heads = self.ranks.len();
        HeadShape::new(self.group * kv_heads, kv_heads, self.head_dim, self.head_dim).expect("a valid shape")
    }

    fn score(&self) -> Score {
        // That of the full dimension, whatever the ranks.
        let score = Score::new((self.head_dim as f32).powf(-0.5)).expect("a finite scale");
        self.soft_cap.map_or(score, |cap| score.with_soft_cap(cap).expect("a positive cap"))
    }
}

/// Projected queries of a case, and its cache.
struct Tensors<E> {
    /// `[batch · q_len, Σ group · r_k]`.
    q: Vec<E>,
    kv: Pages<E>,
}

fn tensors<E: Element>(case: &Case, seed: u64) -> Tensors<E> {
    let ranks = ranks(&case.shape(), &case.ranks);
    let width = case.group * case.ranks.iter().map(|(k, _)| k).sum::<usize>();
    Tensors {
        q: case.inputs.generate(case.kv_lens.len() * case.q_len, width, seed),
        kv: Pages::random(&ranks, case.head_dim, case.page_size, &case.kv_lens, case.inputs, seed),
    }
}

/// What a step leaves behind.
#[derive(Debug, Clone)]
struct Decoded<E> {
    /// `[batch · q_len, Σ group · r_v]`.
    out: Vec<E>,
    lse: Vec<f32>,
    fault: Option<Fault>,
}

struct Expected {
    out: Vec<f64>,
    lse: Vec<f64>,
}

fn cu_queries(case: &Case) -> Vec<u32> {
    (0..=case.kv_lens.len()).map(|b| (b * case.q_len) as u32).collect()
}

/// Dense attention over keys, values and queries that are zero past their ranks.
fn padded_dense<E: Element>(case: &Case, tensors: &Tensors<E>) -> Expected {
    let Case { group, head_dim, .. } = *case;
    let rows = case.kv_lens.len() * case.q_len;
    let (q_heads, kv_heads) = (group * case.ranks.len(), case.ranks.len());
    let mut padded = vec![E::from_f32(0.0); rows * q_heads * head_dim];
    let mut from = tensors.q.as_slice();
    for (i, vector) in padded.chunks_mut(head_dim).enumerate() {
        let rank = case.ranks[i / group % kv_heads].0;
        vector[..rank].copy_from_slice(&from[..rank]);
        from = &from[rank..];
    }
    let cu_queries = cu_queries(case);
    let q = HeadsView::nhd(&padded, rows, q_heads, head_dim).expect("q");
    let q = RaggedView::new(q, &cu_queries).expect("ragged q");
    let spec = AttentionSpec { shape: case.shape(), score: case.score(), mask: case.mask };
    let rounded = attention::reference::Probabilities::Rounded;
    let output = attention::reference::prefill_parallel(&spec, &q, &tensors.kv.padded(), rounded)
        .expect("a valid case");
    let out = output.out.chunks(head_dim).enumerate();
    let out = out.flat_map(|(i, row)| row[..case.ranks[i / group % kv_heads].1].iter().copied());
    Expected { out: out.collect(), lse: output.lse }
}

/// The oracle in the reduced basis.
fn reduced<E: Element>(case: &Case, tensors: &Tensors<E>) -> Expected {
    let attend = Attend { group: case.group, score: case.score(), mask: case.mask };
    let rounded = attention::reference::Probabilities::Rounded;
    let output = reference::attend(&attend, &tensors.q, &cu_queries(case), &tensors.kv.view(), rounded)
        .expect("a valid case");
    Expected { out: output.out, lse: output.lse }
}

fn plan<R: Rig, E: Element>(rig: &R, case: &Case, kv: &Pages<E>) -> DecodePlan {
    DecodePlan::new(DecodeConfig {
        shape: case.shape(),
        layout: kv.layout.clone(),
        pages: kv.count(),
        max_pages: kv.max_pages,
        score: case.score(),
        mask: case.mask,
        batch: case.kv_lens.len(),
        q_len: case.q_len,
        max_kv_len: 4096,
        splits: case.splits,
        // Two SMs split small cases into many parts; a GPU has the SMs that it has.
        sm_count: cuda::launch::Device::sm_count(rig.device()).unwrap_or(2),
    })
    .expect("a valid plan")
}

/// Runs one step for each set of lengths with the same workspace, as a replayed graph does.
fn decode<R: Rig, E: Storage + Element>(
    rig: &R,
    case: &Case,
    tensors: &Tensors<E>,
    steps: &[&[u32]],
) -> Vec<Decoded<E>> {
    let fail = |error: Error| -> ! { panic!("{case:?} on {}: {error}", rig.name()) };
    let plan = plan(rig, case, &tensors.kv);
    let planner = DecodeStep::prepare(rig.device(), &plan).unwrap_or_else(|error| fail(error));
    let kernel = Decode::<_, E>::prepare(rig.device(), &plan).unwrap_or_else(|error| fail(error));
    let rows = case.kv_lens.len() * case.q_len * case.group;
    let width = case.ranks.iter().map(|(_, v)| v).sum::<usize>();

    let (q, pages) = (rig.upload(&tensors.q), rig.upload(&tensors.kv.pages));
    let block_table = rig.upload(&tensors.kv.block_table);
    let mut step_workspace = rig.workspace(plan.step_workspace());
    let mut workspace = rig.workspace(plan.workspace());
    let mut decoded = Vec::new();
    for kv_len in emulator::rig::within_time(steps.len()).map(|step| steps[step]) {
        let kv_len = rig.upload(kv_len);
        let mut status = rig.zeroed::<u64>(1);
        let mut out = rig.poisoned::<E>(rows * width);
        let mut lse = rig.poisoned::<f32>(rows * case.ranks.len());
        let args = DecodeStepArgs {
            kv_len: &rig.view(&kv_len),
            block_table: &rig.view(&block_table),
            status: rig.view_mut(&mut status),
        };
        let planned = planner
            .run(rig.queue(), args, rig.workspace_view(&mut step_workspace))
            .unwrap_or_else(|error| fail(error));
        let args = DecodeArgs {
            q: &rig.view(&q),
            pages: &rig.view(&pages),
            block_table: &rig.view(&block_table),
            out: rig.view_mut(&mut out),
            lse: rig.view_mut(&mut lse),
        };
        kernel
            .run(rig.queue(), args, &planned, rig.workspace_view(&mut workspace))
            .unwrap_or_else(|error| fail(error));
        decoded.push(Decoded {
            out: rig.download(&out),
            lse: rig.download(&lse),
            fault: Fault::decode(rig.download(&status)[0]),
        });
    }
    assert!(rig.counters_are_zero(&mut step_workspace, plan.step_workspace()), "{case:?}: step counters");
    assert!(rig.counters_are_zero(&mut workspace, plan.workspace()), "{case:?}: counters");
    decoded
}

fn assert_close<E: Element>(decoded: &Decoded<E>, expected: &Expected, name: &str) {
    Comparison::new(&decoded.out, &expected.out, Tolerance::tensor_core::<E>())
        .assert(format_args!("out of {name}"));
    Comparison::new(&decoded.lse, &expected.lse, Tolerance::LSE).assert(format_args!("lse of {name}"));
}

fn check<R: Rig, E: Storage + Element>(rig: &R, case: &Case, seed: u64) {
    let tensors = tensors::<E>(case, seed);
    let decoded = &decode(rig, case, &tensors, &[&tensors.kv.lengths])[0];
    let name = format!("{case:?} as {} with seed {seed} on {}", E::NAME, rig.name());
    assert_close(decoded, &padded_dense(case, &tensors), &format!("the padded dense oracle, {name}"));
    assert_close(decoded, &reduced(case, &tensors), &format!("the oracle in the reduced basis, {name}"));
    assert_eq!(decoded.fault, None, "{name}");
}

fn equals_the_padded_dense_oracle<R: Rig>(rig: &R) {
    let window = |window| Mask::sliding_window(window, 0).expect("a window");
    let edges = [0, 1, 15, 16, 17, 63, 64, 65];
    // Every head ratio, head size, page size, mask and kind of input occurs with several mixtures of ranks.
    check::<R, bf16>(rig, &Case::new(4, 128, &[(16, 16), (48, 48), (128, 128)], 1, &edges), 1);
    check::<R, f16>(rig, &Case::new(1, 64, &[(64, 16), (16, 64), (32, 48)], 1, &[0, 127, 128, 129]), 2);
    check::<R, bf16>(
        rig,
        &Case { page_size: 16, ..Case::new(5, 96, &[(96, 96), (80, 16), (16, 64)], 2, &[1, 2, 31, 150]) },
        3,
    );
    let mut one_wide = vec![(16, 16); 8];
    one_wide[3] = (128, 128);
    check::<R, bf16>(rig, &Case::new(3, 128, &one_wide, 1, &[200, 3]), 4);
    check::<R, bf16>(
        rig,
        &Case { mask: window(40), page_size: 32, ..Case::new(7, 128, &MIXED, 1, &[39, 40, 41, 300]) },
        5,
    );
    check::<R, bf16>(
        rig,
        &Case { page_size: 128, ..Case::new(8, 128, &[(112, 80), (64, 96)], 1, &[257]) },
        6,
    );
    check::<R, bf16>(
        rig,
        &Case { mask: window(9), page_size: 16, ..Case::new(4, 128, &[(32, 16), (16, 48)], 8, &[3, 8, 70]) },
        7,
    );
    check::<R, bf16>(
        rig,
        &Case { inputs: Inputs::Saturated, ..Case::new(16, 128, &[(128, 16), (16, 128)], 1, &[1, 190]) },
        8,
    );
    check::<R, f16>(rig, &Case { soft_cap: Some(8.0), ..Case::new(2, 128, &MIXED, 1, &[64, 90]) }, 9);
    check::<R, f16>(
        rig,
        &Case { inputs: Inputs::OutlierChannels, ..Case::new(4, 64, &[(16, 32), (48, 16)], 1, &[80, 17]) },
        10,
    );
    // One long among short, and every tie and outlier that a softmax can meet.
    check::<R, bf16>(rig, &Case::new(4, 128, &[(16, 16), (128, 48)], 1, &[1, 1500, 2, 0, 5]), 11);
    for inputs in [Inputs::Constant, Inputs::OutlierElements] {
        check::<R, f16>(rig, &Case { inputs, ..Case::new(2, 64, &[(16, 16), (64, 64)], 1, &[200]) }, 12);
    }
}

fn page_order_does_not_matter<R: Rig>(rig: &R) {
    let case = Case { page_size: 16, ..Case::new(2, 128, &MIXED, 1, &[100, 257]) };
    let straight = tensors::<bf16>(&case, 5);
    let mut reversed = tensors::<bf16>(&case, 5);
    reversed.kv = reversed.kv.reverse_pages();
    let [straight, reversed] =
        [straight, reversed].map(|tensors| decode(rig, &case, &tensors, &[&tensors.kv.lengths]).remove(0));
    assert_eq!(straight.lse, reversed.lse, "on {}", rig.name());
    assert_eq!(straight.out, reversed.out, "on {}", rig.name());
}

fn fixed_splits_are_batch_invariant<R: Rig>(rig: &R) {
    let mixed = [(16, 16), (48, 112), (128, 128)];
    let case = Case {
        splits: Splits::Fixed { bytes: 16 << 10 },
        ..Case::new(4, 128, &mixed, 1, &[400, 64, 3, 0, 300])
    };
    check::<R, bf16>(rig, &case, 21);
    // The first sequence alone, and before others that change every block's share.
    let tensors = tensors::<bf16>(&case, 21);
    let decoded = decode(rig, &case, &tensors, &[&tensors.kv.lengths, &[400, 0, 0, 0, 0]]);
    let row = 4 * (16 + 112 + 128);
    assert_eq!(decoded[0].out[..row], decoded[1].out[..row], "on {}", rig.name());
    assert_eq!(decoded[0].lse[..12], decoded[1].lse[..12], "on {}", rig.name());
}

fn every_split_gives_the_same<R: Rig>(rig: &R) {
    let fixed = |bytes| Splits::Fixed { bytes };
    for splits in [fixed(1024), fixed(5000), fixed(1 << 20), Splits::OneBlockPerHead] {
        let case = Case::new(3, 96, &[(96, 80), (16, 16), (32, 96)], 3, &[150, 0, 40]);
        check::<R, bf16>(rig, &Case { splits, ..case }, 25);
    }
}

fn bad_sequences_are_reported_and_the_others_stay_right<R: Rig>(rig: &R) {
    let case = Case { page_size: 16, ..Case::new(2, 64, &[(16, 64), (48, 32)], 1, &[40, 50, 60]) };
    let good = tensors::<f16>(&case, 31);
    let mut bad_page = tensors::<f16>(&case, 31);
    bad_page.kv.block_table[bad_page.kv.max_pages + 2] = bad_page.kv.count() as u32;
    let past_the_table = good.kv.max_pages as u32 * 16 + 1;
    let cases = [
        ("a length past the plan", &good, [40, 5000, 60], FaultCode::BadLength, 1),
        ("a length past the block table", &good, [past_the_table, 50, 60], FaultCode::BadLength, 0),
        ("a page past the pool", &bad_page, [40, 50, 60], FaultCode::BadPage, 1),
    ];
    for (what, tensors, kv_len, code, index) in cases {
        let decoded = decode(rig, &case, tensors, &[&kv_len]).remove(0);
        let name = format!("{what} on {}", rig.name());
        assert_eq!(decoded.fault, Some(Fault { code: code as u32, index: index as u32 }), "{name}");
        let mut expected = padded_dense(&case, &good);
        expected.out[index * 2 * 96..][..2 * 96].fill(0.0);
        expected.lse[index * 4..][..4].fill(f64::NEG_INFINITY);
        assert_close(&decoded, &expected, &name);
    }
}

fn hidden_keys_may_hold_anything<R: Rig>(rig: &R) {
    let mask = Mask::sliding_window(20, 0).expect("a window");
    let case = Case { mask, page_size: 16, ..Case::new(2, 64, &[(16, 48), (64, 32)], 2, &[9, 21, 60, 150]) };
    let mut tensors = tensors::<f16>(&case, 33);
    let expected = padded_dense(&case, &tensors);
    // The first of two queries sees the 20 keys up to the last but one.
    tensors.kv.hide(&case.kv_lens.iter().map(|len| len.saturating_sub(21)).collect::<Vec<_>>());
    let decoded = decode(rig, &case, &tensors, &[&tensors.kv.lengths]).remove(0);
    assert_close(&decoded, &expected, &format!("{case:?} on {}", rig.name()));
    assert_eq!(decoded.fault, None, "{case:?} on {}", rig.name());
}

/// A query of NaN gives NaN, however many warps and parts share its keys, and harms no other row.
fn nan_is_never_dropped<R: Rig>(rig: &R) {
    for kv_len in [1, 40, 300] {
        let case = Case::new(2, 64, &[(16, 32), (64, 48)], 1, &[kv_len, 20]);
        let mut tensors = tensors::<f16>(&case, 35);
        let expected = padded_dense(&case, &tensors);
        tensors.q[5] = f16::NAN; // of head 0
        let decoded = decode(rig, &case, &tensors, &[&tensors.kv.lengths]).remove(0);
        let name = format!("{kv_len} keys on {}", rig.name());
        assert!(decoded.out[..32].iter().all(|x| x.is_nan()), "{name}: {:?}", &decoded.out[..4]);
        assert!(decoded.lse[0].is_nan(), "{name}: {}", decoded.lse[0]);
        Comparison::new(&decoded.out[32..], &expected.out[32..], Tolerance::tensor_core::<f16>())
            .assert(format_args!("out of {name}"));
        Comparison::new(&decoded.lse[1..], &expected.lse[1..], Tolerance::LSE)
            .assert(format_args!("lse of {name}"));
    }
}

fn one_step_serves_layers_of_different_ranks<R: Rig>(rig: &R) {
    let layers = [[(16, 128), (112, 48)], [(64, 64), (32, 16)]];
    let cases = layers.map(|ranks| Case::new(4, 128, &ranks, 1, &[70, 0, 500]));
    let tensors = [0, 1].map(|layer| tensors::<bf16>(&cases[layer], 61));
    let plans = [0, 1].map(|layer| plan(rig, &cases[layer], &tensors[layer].kv));
    let planner = DecodeStep::prepare(rig.device(), &plans[0]).expect("prepare");
    let mut step_workspace = rig.workspace(plans[0].step_workspace());
    let mut status = rig.zeroed::<u64>(1);
    // The same tokens in the same pages: only the ranks differ.
    assert_eq!(tensors[0].kv.block_table, tensors[1].kv.block_table);
    let (kv_len, block_table) = (rig.upload(&tensors[0].kv.lengths), rig.upload(&tensors[0].kv.block_table));
    let args = DecodeStepArgs {
        kv_len: &rig.view(&kv_len),
        block_table: &rig.view(&block_table),
        status: rig.view_mut(&mut status),
    };
    let step = planner.run(rig.queue(), args, rig.workspace_view(&mut step_workspace)).expect("plan");
    for ((case, tensors), plan) in cases.iter().zip(&tensors).zip(&plans) {
        let kernel = Decode::<_, bf16>::prepare(rig.device(), plan).expect("prepare");
        let (q, pages) = (rig.upload(&tensors.q), rig.upload(&tensors.kv.pages));
        let mut workspace = rig.workspace(plan.workspace());
        let expected = padded_dense(case, tensors);
        let mut out = rig.poisoned::<bf16>(expected.out.len());
        let mut lse = rig.poisoned::<f32>(expected.lse.len());
        let args = DecodeArgs {
            q: &rig.view(&q),
            pages: &rig.view(&pages),
            block_table: &rig.view(&block_table),
            out: rig.view_mut(&mut out),
            lse: rig.view_mut(&mut lse),
        };
        kernel.run(rig.queue(), args, &step, rig.workspace_view(&mut workspace)).expect("run");
        let decoded = Decoded { out: rig.download(&out), lse: rig.download(&lse), fault: None };
        assert_close(&decoded, &expected, &format!("{case:?} on {}", rig.name()));
    }
    // A layer of another batch is refused.
    let other = Case::new(4, 128, &layers[0], 1, &[70, 0]);
    let other_kv = crate::decode::tensors::<bf16>(&other, 61).kv;
    let kernel =
        Decode::<_, bf16>::prepare(rig.device(), &self::plan(rig, &other, &other_kv)).expect("prepare");
    let mut workspace = rig.workspace(plans[0].workspace());
    let (mut out, mut lse) = (rig.poisoned::<bf16>(1), rig.poisoned::<f32>(1));
    let (q, pages) = (rig.zeroed::<bf16>(1), rig.zeroed::<bf16>(1));
    let args = DecodeArgs {
        q: &rig.view(&q),
        pages: &rig.view(&pages),
        block_table: &rig.view(&block_table),
        out: rig.view_mut(&mut out),
        lse: rig.view_mut(&mut lse),
    };
    let refused = kernel.run(rig.queue(), args, &step, rig.workspace_view(&mut workspace));
    assert!(matches!(refused, Err(Error::Argument { argument: "step", .. })), "{refused:?}");
}

/// The last arriver differs from step to step, lengths change and come back; results and counters must not.
fn many_steps_repeat_bitwise<R: Rig>(rig: &R) {
    let case = Case::new(4, 64, &[(16, 16), (64, 48)], 1, &[300, 7]);
    let tensors = tensors::<f16>(&case, 41);
    let (long, short): (&[u32], &[u32]) = (&[300, 7], &[20, 0]);
    let mut steps = vec![long, short];
    steps.extend(std::iter::repeat_n(long, rig.stress_launches()));
    let decoded = decode(rig, &case, &tensors, &steps);
    assert_close(&decoded[0], &padded_dense(&case, &tensors), &format!("{case:?} on {}", rig.name()));
    for (step, later) in decoded.iter().enumerate().skip(2) {
        assert_eq!(decoded[0].out, later.out, "{case:?} on {}: step {step}", rig.name());
        assert_eq!(decoded[0].lse, later.lse, "{case:?} on {}: step {step}", rig.name());
    }
    assert_eq!(decoded[1].lse[8..], [f32::NEG_INFINITY; 8], "the empty sequence on {}", rig.name());
}

#[test]
fn plans_refuse_what_no_kernel_can_do() {
    let case = Case::new(2, 64, &[(16, 32), (64, 48)], 1, &[20, 70]);
    let kv = tensors::<f16>(&case, 1).kv;
    let good = DecodeConfig {
        shape: case.shape(),
        layout: kv.layout.clone(),
        pages: kv.count(),
        max_pages: kv.max_pages,
        score: case.score(),
        mask: Mask::Causal,
        batch: 2,
        q_len: 1,
        max_kv_len: 128,
        splits: Splits::Balanced,
        sm_count: 4,
    };
    DecodePlan::new(good.clone()).expect("a valid plan");
    let shape = |q_heads, kv_heads, qk_dim, v_dim| {
        HeadShape::new(q_heads, kv_heads, qk_dim, v_dim).expect("a valid shape")
    };
    let bad = [
        ("shape", DecodeConfig { shape: shape(4, 2, 128, 64), ..good.clone() }),
        ("ranks", DecodeConfig { shape: shape(4, 4, 64, 64), ..good.clone() }),
        ("shape", DecodeConfig { shape: shape(4, 2, 48, 48), ..good.clone() }),
        ("shape", DecodeConfig { shape: shape(4, 2, 256, 256), ..good.clone() }),
        ("r_k", DecodeConfig { shape: shape(4, 2, 32, 32), ..good.clone() }),
        ("q_len", DecodeConfig { q_len: 0, ..good.clone() }),
        ("q_len", DecodeConfig { q_len: 9, ..good.clone() }),
        ("batch", DecodeConfig { batch: 0, ..good.clone() }),
        ("pages", DecodeConfig { pages: 0, ..good.clone() }),
        ("pages", DecodeConfig { pages: usize::MAX, ..good.clone() }),
        ("max_pages", DecodeConfig { max_pages: 0, ..good.clone() }),
        ("max_kv_len", DecodeConfig { max_kv_len: usize::MAX, ..good.clone() }),
        ("sm_count", DecodeConfig { sm_count: 0, ..good.clone() }),
        ("sm_count", DecodeConfig { sm_count: u32::MAX, ..good.clone() }),
        ("mask", DecodeConfig { mask: Mask::Full, ..good.clone() }),
        ("mask", DecodeConfig { mask: Mask::SlidingWindow { window: 0, sinks: 0 }, ..good.clone() }),
        ("mask", DecodeConfig { mask: Mask::SlidingWindow { window: 8, sinks: 2 }, ..good.clone() }),
        ("splits", DecodeConfig { splits: Splits::Fixed { bytes: 1000 }, ..good.clone() }),
    ];
    for (argument, config) in bad {
        match DecodePlan::new(config) {
            Err(Error::Argument { argument: found, .. }) => assert_eq!(found, argument),
            other => panic!("{argument}: {other:?}"),
        }
    }
}
