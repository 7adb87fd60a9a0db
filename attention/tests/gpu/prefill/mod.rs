//! Flash prefill.

use attention::gpu::{
    CacheLayout, MAX_SOFT_CAP, Prefill, PrefillConfig, PrefillInputs, PrefillKernel, PrefillOutput,
    PrefillPlan, PrefillState, PrefillTiles, PrefillTilesArgs,
};
use attention::testing::{Comparison, Inputs, Tolerance};
use attention::{
    AttentionSpec, Element, Error, HeadShape, HeadsView, Mask, PageLayout, RaggedView, Score, reference,
};
use cuda::status::Fault;
use cuda::storage::Storage;
use emulator::rig::Rig;
use half::{bf16, f16};
use longkv_attention as attention;

use crate::cache::{Cache, KeysValues};

mod product;
mod refusals;
mod steps;
mod warpgroups;

pub(crate) use warpgroups::has_wgmma;

emulator::device_test!(
    equals_the_oracle,
    bad_sequences_are_reported_and_the_others_stay_right,
    a_bad_page_of_one_head_harms_that_head_alone,
    keys_that_no_query_sees_hold_anything,
    every_query_is_written_once_whatever_cu_queries_say,
    page_order_does_not_matter,
    more_sequences_than_threads,
);

#[derive(Debug, Clone)]
struct Case {
    q_heads: usize,
    kv_heads: usize,
    dims: (usize, usize),
    /// (queries, keys) of each sequence.
    sequences: Vec<(usize, usize)>,
    cache: Cache,
    mask: Mask,
    soft_cap: Option<f32>,
    inputs: Inputs,
    kernel: PrefillKernel,
}

impl Case {
    fn new(
        (q_heads, kv_heads): (usize, usize),
        dims: (usize, usize),
        sequences: &[(usize, usize)],
        cache: Cache,
        mask: Mask,
    ) -> Self {
        let sequences = sequences.to_vec();
        let (inputs, kernel) = (Inputs::Normal, PrefillKernel::MmaSync);
        Case { q_heads, kv_heads, dims, sequences, cache, mask, soft_cap: None, inputs, kernel }
    }

    fn spec(&self) -> AttentionSpec {
        let shape =
            HeadShape::new(self.q_heads, self.kv_heads, self.dims.0, self.dims.1).expect("a valid shape");
        let score = Score::new((self.dims.0 as f32).powf(-0.5)).expect("a finite scale");
        let score = self.soft_cap.map_or(score, |cap| score.with_soft_cap(cap).expect("a positive cap"));
        AttentionSpec { shape, score, mask: self.mask }
    }

    fn queries(&self) -> usize {
        self.sequences.iter().map(|(queries, _)| queries).sum()
    }

    fn kv_lens(&self) -> Vec<usize> {
        self.sequences.iter().map(|(_, keys)| *keys).collect()
    }

    fn cu_queries(&self) -> Vec<u32> {
        let mut cu_queries = vec![0];
        cu_queries.extend(self.sequences.iter().scan(0, |sum, (queries, _)| {
            *sum += *queries as u32;
            Some(*sum)
        }));
        cu_queries
    }
}

struct Tensors<E> {
    /// `[queries, q_heads, qk_dim]`.
    q: Vec<E>,
    kv: KeysValues<E>,
}

fn tensors<E: Element>(case: &Case, seed: u64) -> Tensors<E> {
    Tensors {
        q: case.inputs.generate(case.queries() * case.q_heads, case.dims.0, seed),
        kv: KeysValues::random(&case.kv_lens(), case.kv_heads, case.dims, case.cache, case.inputs, seed),
    }
}

fn oracle<E: Element>(case: &Case, tensors: &Tensors<E>) -> reference::Output {
    let cu_queries = case.cu_queries();
    let q = HeadsView::nhd(&tensors.q, case.queries(), case.q_heads, case.dims.0).expect("q");
    let q = RaggedView::new(q, &cu_queries).expect("ragged q");
    let kv = tensors.kv.packed();
    reference::prefill_parallel(&case.spec(), &q, &kv, reference::Probabilities::Rounded)
        .expect("a valid case")
}

fn plan(case: &Case, cache: CacheLayout, carry: bool) -> PrefillPlan {
    PrefillPlan::new(PrefillConfig {
        spec: case.spec(),
        batch: case.sequences.len(),
        num_queries: case.queries(),
        max_kv_len: 4096,
        cache,
        carry,
        kernel: case.kernel,
    })
    .expect("a valid plan")
}

/// What a prefill leaves behind.
struct Prefilled<E> {
    out: Vec<E>,
    lse: Vec<f32>,
    fault: Option<Fault>,
}

fn prefill<R: Rig, E: Storage>(
    rig: &R,
    case: &Case,
    tensors: &Tensors<E>,
    cu_queries: &[u32],
    kv_len: &[u32],
) -> Prefilled<E> {
    let plan = plan(case, tensors.kv.layout, false);
    let kernel = Prefill::<_, E>::prepare(rig.device(), &plan).expect("prepare");
    let rows = case.queries() * case.q_heads;
    let (q, k, v) =
        (rig.upload(&tensors.q), rig.upload(&tensors.kv.k_cache), rig.upload(&tensors.kv.v_cache));
    let (cu_queries, kv_len) = (rig.upload(cu_queries), rig.upload(kv_len));
    let contiguous = matches!(tensors.kv.layout, CacheLayout::Contiguous { .. });
    let block_table = (!contiguous).then(|| rig.upload(&tensors.kv.block_table));
    let kv_start = contiguous.then(|| rig.upload(&tensors.kv.kv_start));
    let (block_table, kv_start) =
        (block_table.as_ref().map(|x| rig.view(x)), kv_start.as_ref().map(|x| rig.view(x)));
    let mut status = rig.zeroed::<u64>(1);
    let mut out = rig.poisoned::<E>(rows * case.dims.1);
    let mut lse = rig.poisoned::<f32>(rows);
    let mut workspace = rig.workspace(plan.workspace());
    let args = PrefillTilesArgs {
        cu_queries: &rig.view(&cu_queries),
        kv_len: &rig.view(&kv_len),
        block_table: block_table.as_ref(),
        kv_start: kv_start.as_ref(),
        status: rig.view_mut(&mut status),
    };
    let fail = |error: Error| -> ! { panic!("{case:?} on {}: {error}", rig.name()) };
    let mut tiles = PrefillTiles::prepare(rig.device(), &plan)
        .and_then(|planner| planner.run(rig.queue(), args, rig.workspace_view(&mut workspace)))
        .unwrap_or_else(|error| fail(error));
    let inputs = PrefillInputs {
        q: &rig.view(&q),
        k: &rig.view(&k),
        v: &rig.view(&v),
        block_table: block_table.as_ref(),
    };
    let output = PrefillOutput { out: rig.view_mut(&mut out), lse: rig.view_mut(&mut lse) };
    kernel.run(rig.queue(), inputs, output, &mut tiles).unwrap_or_else(|error| fail(error));
    drop(tiles);
    assert!(rig.counters_are_zero(&mut workspace, plan.workspace()), "{case:?}: counters");
    let (out, lse) = (rig.download(&out), rig.download(&lse));
    Prefilled { out, lse, fault: Fault::decode(rig.download(&status)[0]) }
}

fn lens(case: &Case) -> Vec<u32> {
    case.sequences.iter().map(|(_, keys)| *keys as u32).collect()
}

fn check<R: Rig, E: Storage + Element>(rig: &R, case: &Case, seed: u64) {
    let tensors = tensors::<E>(case, seed);
    let expected = oracle(case, &tensors);
    let prefilled = prefill(rig, case, &tensors, &case.cu_queries(), &lens(case));
    let name = format!("{case:?} as {} with seed {seed} on {}", E::NAME, rig.name());
    Comparison::attention(&prefilled.out, &expected.out, case.dims.1).assert(format_args!("out of {name}"));
    Comparison::new(&prefilled.lse, &expected.lse, Tolerance::LSE).assert(format_args!("lse of {name}"));
    assert_eq!(prefilled.fault, None, "{name}");
}

fn equals_the_oracle<R: Rig>(rig: &R) {
    let window = |window, sinks| Mask::sliding_window(window, sinks).expect("a window");
    // Every mask, head size, head ratio and layout; chunks after a cached prefix, more queries than keys, empty sequences.
    let edges = [(0, 5), (1, 1), (3, 0), (64, 64), (65, 129)];
    check::<R, f16>(rig, &Case::new((2, 2), (64, 64), &edges, Cache::Contiguous, Mask::Causal), 1);
    check::<R, f16>(rig, &Case::new((3, 1), (64, 64), &[(50, 70)], Cache::Contiguous, Mask::Full), 2);
    check::<R, bf16>(
        rig,
        &Case::new((8, 2), (128, 128), &[(70, 70), (5, 200), (0, 0)], Cache::Nhd(16), Mask::Causal),
        3,
    );
    check::<R, bf16>(rig, &Case::new((5, 1), (128, 128), &[(30, 230)], Cache::Hnd(8), window(40, 0)), 4);
    check::<R, bf16>(rig, &Case::new((8, 1), (128, 128), &[(20, 300)], Cache::Nhd(64), window(33, 70)), 5);
    check::<R, bf16>(
        rig,
        &Case::new((16, 1), (128, 128), &[(30, 90), (10, 4)], Cache::Hnd(128), Mask::Prefix { prefix: 40 }),
        6,
    );
    check::<R, bf16>(
        rig,
        &Case {
            inputs: Inputs::Saturated,
            ..Case::new((7, 1), (128, 128), &[(20, 80)], Cache::Contiguous, Mask::Causal)
        },
        7,
    );
    check::<R, f16>(rig, &Case::new((3, 1), (96, 96), &[(50, 90)], Cache::Hnd(16), Mask::Causal), 10);
    check::<R, bf16>(rig, &Case::new((4, 4), (192, 128), &[(66, 80)], Cache::Nhd(16), Mask::Causal), 8);
    // A model's cap and the largest.
    for (soft_cap, seed) in [(30.0, 9), (MAX_SOFT_CAP, 11)] {
        check::<R, bf16>(
            rig,
            &Case {
                soft_cap: Some(soft_cap),
                inputs: Inputs::OutlierChannels,
                ..Case::new((2, 1), (256, 256), &[(40, 100)], Cache::Hnd(32), window(50, 4))
            },
            seed,
        );
    }
}

/// What is wrong, the input, the lengths given to the kernel, and code and sequence of the report.
type BadCase<'a> = (&'a str, &'a Tensors<bf16>, [u32; 3], (u32, u32));

fn bad_sequences_are_reported_and_the_others_stay_right<R: Rig>(rig: &R) {
    let case = Case::new((4, 2), (128, 128), &[(20, 40), (10, 50), (5, 60)], Cache::Nhd(16), Mask::Causal);
    let good = tensors::<bf16>(&case, 31);
    let CacheLayout::Paged { max_pages, pages, .. } = good.kv.layout else { panic!("not paged") };
    let mut bad_page = tensors::<bf16>(&case, 31);
    bad_page.kv.block_table[max_pages + 2] = pages as u32;
    let cases: [BadCase<'_>; 3] = [
        ("longer than its pages", &good, [40, 16 * max_pages as u32 + 1, 60], (1, 1)),
        ("longer than the plan allows", &good, [40, 50, u32::MAX], (1, 2)),
        ("a page outside the pool", &bad_page, [40, 50, 60], (2, 1)),
    ];
    for (what, tensors, kv_len, (code, index)) in cases {
        let prefilled = prefill(rig, &case, tensors, &case.cu_queries(), &kv_len);
        let name = format!("{what} on {}", rig.name());
        assert_eq!(prefilled.fault, Some(Fault { code, index }), "{name}");
        let mut expected = oracle(&case, tensors);
        let cu_queries = case.cu_queries();
        let bad = cu_queries[index as usize] as usize..cu_queries[index as usize + 1] as usize;
        let (heads, row) = (case.q_heads, case.q_heads * case.dims.1);
        expected.out[bad.start * row..bad.end * row].fill(0.0);
        expected.lse[bad.start * heads..bad.end * heads].fill(f64::NEG_INFINITY);
        Comparison::attention(&prefilled.out, &expected.out, case.dims.1).assert(&name);
        Comparison::new(&prefilled.lse, &expected.lse, Tolerance::LSE).assert(&name);
    }
}

fn a_bad_page_of_one_head_harms_that_head_alone<R: Rig>(rig: &R) {
    let case = Case::new((4, 2), (128, 128), &[(6, 40), (9, 150)], Cache::PerHead(16), Mask::Causal);
    let mut tensors = tensors::<bf16>(&case, 32);
    let CacheLayout::Paged { max_pages, pages, .. } = tensors.kv.layout else { panic!("not paged") };
    // Table row of head 1 and sequence 1.
    tensors.kv.block_table[3 * max_pages + 4] = pages as u32;
    let prefilled = prefill(rig, &case, &tensors, &case.cu_queries(), &lens(&case));
    assert_eq!(prefilled.fault, Some(Fault { code: 2, index: 1 }), "on {}", rig.name());
    let mut expected = oracle(&case, &tensors);
    for row in (6 * 4..15 * 4).filter(|row| row % 4 >= 2) {
        expected.out[row * 128..][..128].fill(0.0);
        expected.lse[row] = f64::NEG_INFINITY;
    }
    Comparison::attention(&prefilled.out, &expected.out, case.dims.1).assert(rig.name());
    Comparison::new(&prefilled.lse, &expected.lse, Tolerance::LSE).assert(rig.name());
}

/// Before every window, past the length and in unused pages there may be NaN and infinity, and no page at all.
fn keys_that_no_query_sees_hold_anything<R: Rig>(rig: &R) {
    let window = |window, sinks| Mask::sliding_window(window, sinks).expect("a window");
    let sequences = [(3, 150), (40, 41), (20, 200)];
    let cases = [
        Case::new((4, 2), (128, 128), &sequences, Cache::Nhd(16), window(37, 0)),
        Case::new((2, 2), (128, 128), &sequences, Cache::PerHead(8), window(20, 9)),
        Case::new((2, 1), (96, 96), &sequences, Cache::Hnd(32), window(70, 40)),
        Case::new((3, 1), (64, 64), &sequences, Cache::Gaps, window(33, 70)),
    ];
    for (seed, case) in cases.iter().enumerate() {
        if case.dims.0 == 128 {
            forgetful::<R, bf16>(rig, case, seed as u64 + 51);
        } else {
            forgetful::<R, f16>(rig, case, seed as u64 + 51);
        }
    }
}

fn forgetful<R: Rig, E: Storage + Element>(rig: &R, case: &Case, seed: u64) {
    let mut tensors = tensors::<E>(case, seed);
    let expected = oracle(case, &tensors);
    let hidden = tensors.kv.forget_hidden(case.mask, |sequence| case.sequences[sequence].0);
    assert!(hidden > 0, "{case:?} hides nothing");
    let prefilled = prefill(rig, case, &tensors, &case.cu_queries(), &lens(case));
    let name = format!("{case:?} as {} with seed {seed} on {}", E::NAME, rig.name());
    Comparison::attention(&prefilled.out, &expected.out, case.dims.1).assert(&name);
    Comparison::new(&prefilled.lse, &expected.lse, Tolerance::LSE).assert(&name);
    assert_eq!(prefilled.fault, None, "{name}");
}

fn page_order_does_not_matter<R: Rig>(rig: &R) {
    let case = Case::new((2, 1), (128, 128), &[(20, 100), (70, 90)], Cache::Nhd(16), Mask::Causal);
    let straight = tensors::<bf16>(&case, 5);
    let mut reversed = tensors::<bf16>(&case, 5);
    reversed.kv = reversed.kv.reverse_pages();
    let [straight, reversed] =
        [straight, reversed].map(|tensors| prefill(rig, &case, &tensors, &case.cu_queries(), &lens(&case)));
    assert_eq!(straight.lse, reversed.lse, "on {}", rig.name());
    assert_eq!(straight.out, reversed.out, "on {}", rig.name());
}

/// More sequences than the plan has threads, of few and many tiles each.
fn more_sequences_than_threads<R: Rig>(rig: &R) {
    let sequences: Vec<(usize, usize)> = (0..300)
        .map(|i| match i {
            17 => (130, 130),
            200 => (70, 260),
            _ => (usize::from(i % 16 == 0), i % 5),
        })
        .collect();
    check::<R, f16>(rig, &Case::new((2, 1), (64, 64), &sequences, Cache::Contiguous, Mask::Causal), 41);
}

/// Sequences whose queries make no sense are refused, wherever they are, and queries of no sequence see nothing.
fn every_query_is_written_once_whatever_cu_queries_say<R: Rig>(rig: &R) {
    let case = Case::new((2, 2), (64, 64), &[(2, 4); 10], Cache::Contiguous, Mask::Causal);
    let tensors = tensors::<f16>(&case, 33);
    let expected = oracle(&case, &tensors);
    let straight = case.cu_queries();
    let changed = |changes: &[(usize, u32)]| {
        let mut cu_queries = straight.clone();
        changes.iter().for_each(|(index, value)| cu_queries[*index] = *value);
        cu_queries
    };
    // cu_queries, the sequences that are refused or lost, the sequences that may be reported.
    let cases = [
        ("the last sequence ends past the queries", changed(&[(10, 21)]), 9..10, Some(9..10)),
        ("queries behind the last sequence", changed(&[(9, 16), (10, 16)]), 8..10, None),
        ("queries before the first sequence", changed(&[(0, 2), (1, 2)]), 0..1, None),
        // Sequence 7 descends, and 8 begins among the queries of an earlier one, which keep their only writer.
        ("a sequence descends", changed(&[(8, 13)]), 7..9, Some(7..9)),
        ("no sequence at all", vec![20; 11], 0..10, None),
        ("far out of range", changed(&[(5, u32::MAX)]), 4..6, Some(4..6)),
    ];
    for (what, cu_queries, lost, reported) in cases {
        let prefilled = prefill(rig, &case, &tensors, &cu_queries, &lens(&case));
        let name = format!("{what} on {}", rig.name());
        match (prefilled.fault, reported) {
            (None, None) => {}
            (Some(Fault { code, index }), Some(reported)) => {
                assert_eq!(code, attention::FaultCode::BadRange as u32, "{name}");
                assert!(reported.contains(&index), "{name}: {index}");
            }
            (fault, _) => panic!("{name}: {fault:?}"),
        }
        // Two queries and two heads a sequence.
        let rows = lost.start * 4..lost.end * 4;
        let mut expected = expected.clone();
        expected.out[rows.start * 64..rows.end * 64].fill(0.0);
        expected.lse[rows].fill(f64::NEG_INFINITY);
        Comparison::attention(&prefilled.out, &expected.out, case.dims.1).assert(&name);
        Comparison::new(&prefilled.lse, &expected.lse, Tolerance::LSE).assert(&name);
    }
}
