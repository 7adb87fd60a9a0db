//! Split-KV decode.

use attention::gpu::{
    CacheLayout, Decode, DecodeArgs, DecodeConfig, DecodePlan, DecodeStep, DecodeStepArgs, Splits,
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

emulator::device_test!(
    equals_the_oracle,
    page_order_does_not_matter,
    fixed_splits_are_batch_invariant,
    bad_sequences_are_reported_and_the_others_stay_right,
    starts_that_change_after_the_plan_read_nothing_outside,
    nan_is_never_dropped,
    many_steps_repeat_bitwise,
);

#[derive(Debug, Clone)]
struct Case {
    q_heads: usize,
    kv_heads: usize,
    qk_dim: usize,
    v_dim: usize,
    q_len: usize,
    kv_lens: Vec<usize>,
    cache: Cache,
    mask: Mask,
    soft_cap: Option<f32>,
    inputs: Inputs,
    splits: Splits,
    /// Starts of a contiguous cache that the caller puts in place between the plan and the attention.
    late_starts: Option<Vec<u32>>,
}

impl Case {
    fn new(
        heads: (usize, usize),
        dims: (usize, usize),
        q_len: usize,
        kv_lens: &[usize],
        cache: Cache,
    ) -> Self {
        Case {
            q_heads: heads.0,
            kv_heads: heads.1,
            qk_dim: dims.0,
            v_dim: dims.1,
            q_len,
            kv_lens: kv_lens.to_vec(),
            cache,
            mask: Mask::Causal,
            soft_cap: None,
            inputs: Inputs::Normal,
            splits: Splits::Balanced,
            late_starts: None,
        }
    }

    fn spec(&self) -> AttentionSpec {
        let shape =
            HeadShape::new(self.q_heads, self.kv_heads, self.qk_dim, self.v_dim).expect("a valid shape");
        let score = Score::new((self.qk_dim as f32).powf(-0.5)).expect("a finite scale");
        let score = self.soft_cap.map_or(score, |cap| score.with_soft_cap(cap).expect("a positive cap"));
        AttentionSpec { shape, score, mask: self.mask }
    }
}

/// Queries of a case, and its keys and values.
struct Tensors<E> {
    /// `[batch, q_len, q_heads, qk_dim]`.
    q: Vec<E>,
    kv: KeysValues<E>,
}

fn tensors<E: Element>(case: &Case, seed: u64) -> Tensors<E> {
    let Case { q_heads, kv_heads, qk_dim, v_dim, q_len, cache, inputs, .. } = *case;
    Tensors {
        q: inputs.generate(case.kv_lens.len() * q_len * q_heads, qk_dim, seed),
        kv: KeysValues::random(&case.kv_lens, kv_heads, (qk_dim, v_dim), cache, inputs, seed),
    }
}

fn oracle<E: Element>(case: &Case, tensors: &Tensors<E>) -> reference::Output {
    let Case { q_heads, qk_dim, q_len, .. } = *case;
    let cu_queries: Vec<u32> = (0..=case.kv_lens.len()).map(|b| (b * q_len) as u32).collect();
    let q = HeadsView::nhd(&tensors.q, case.kv_lens.len() * q_len, q_heads, qk_dim).expect("q");
    let q = RaggedView::new(q, &cu_queries).expect("ragged q");
    let kv = tensors.kv.packed();
    reference::prefill_parallel(&case.spec(), &q, &kv, reference::Probabilities::Rounded)
        .expect("a valid case")
}

/// What a step leaves behind.
#[derive(Debug, Clone)]
struct Decoded<E> {
    out: Vec<E>,
    lse: Vec<f32>,
    fault: Option<Fault>,
}

/// Runs `steps` equal steps with the given lengths and expects them to be bitwise equal.
fn decode<R: Rig, E: Storage>(
    rig: &R,
    case: &Case,
    tensors: &Tensors<E>,
    kv_len: &[u32],
    steps: usize,
) -> Decoded<E> {
    let spec = case.spec();
    let plan = DecodePlan::new(DecodeConfig {
        shape: spec.shape,
        score: spec.score,
        mask: spec.mask,
        batch: case.kv_lens.len(),
        q_len: case.q_len,
        max_kv_len: 4096,
        cache: tensors.kv.layout,
        splits: case.splits,
        // Two SMs split small cases into many parts; a GPU has the SMs that it has.
        sm_count: cuda::launch::Device::sm_count(rig.device()).unwrap_or(2),
    })
    .expect("a valid plan");
    let planner = DecodeStep::prepare(rig.device(), &plan).expect("prepare the plan");
    let kernel = Decode::<_, E>::prepare(rig.device(), &plan).expect("prepare the kernel");
    let rows = case.kv_lens.len() * case.q_len * case.q_heads;

    let (q, k, v) =
        (rig.upload(&tensors.q), rig.upload(&tensors.kv.k_cache), rig.upload(&tensors.kv.v_cache));
    let kv_len = rig.upload(kv_len);
    let contiguous = matches!(case.cache, Cache::Contiguous);
    let block_table = (!contiguous).then(|| rig.upload(&tensors.kv.block_table));
    let kv_start = contiguous.then(|| rig.upload(&tensors.kv.cu_seqlens[..case.kv_lens.len()]));
    let late_starts = case.late_starts.as_ref().map(|starts| rig.upload(starts));
    let mut status = rig.zeroed::<u64>(1);
    let mut step_workspace = rig.workspace(plan.step_workspace());
    let mut workspace = rig.workspace(plan.workspace());
    let mut first: Option<Decoded<E>> = None;
    for step in 0..steps {
        let mut out = rig.poisoned::<E>(rows * case.v_dim);
        let mut lse = rig.poisoned::<f32>(rows);
        let block_table = block_table.as_ref().map(|table| rig.view(table));
        let kv_start = kv_start.as_ref().map(|start| rig.view(start));
        let fail = |error: Error| -> ! { panic!("{case:?} on {}: {error}", rig.name()) };
        let planned = planner
            .run(
                rig.queue(),
                DecodeStepArgs {
                    kv_len: &rig.view(&kv_len),
                    block_table: block_table.as_ref(),
                    kv_start: kv_start.as_ref(),
                    status: rig.view_mut(&mut status),
                },
                rig.workspace_view(&mut step_workspace),
            )
            .unwrap_or_else(|error| fail(error));
        let kv_start = late_starts.as_ref().map(|starts| rig.view(starts)).or(kv_start);
        let args = DecodeArgs {
            q: &rig.view(&q),
            k: &rig.view(&k),
            v: &rig.view(&v),
            block_table: block_table.as_ref(),
            kv_start: kv_start.as_ref(),
            out: rig.view_mut(&mut out),
            lse: rig.view_mut(&mut lse),
        };
        kernel
            .run(rig.queue(), args, &planned, rig.workspace_view(&mut workspace))
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

fn lens(case: &Case) -> Vec<u32> {
    case.kv_lens.iter().map(|len| *len as u32).collect()
}

fn check<R: Rig, E: Storage + Element>(rig: &R, case: &Case, seed: u64) {
    let tensors = tensors::<E>(case, seed);
    let expected = oracle(case, &tensors);
    let decoded = decode(rig, case, &tensors, &lens(case), 1);
    let name = format!("{case:?} as {} with seed {seed} on {}", E::NAME, rig.name());
    Comparison::new(&decoded.out, &expected.out, Tolerance::tensor_core::<E>())
        .assert(format_args!("out of {name}"));
    Comparison::new(&decoded.lse, &expected.lse, Tolerance::LSE).assert(format_args!("lse of {name}"));
    assert_eq!(decoded.fault, None, "{name}");
}

fn equals_the_oracle<R: Rig>(rig: &R) {
    let window = |window| Mask::sliding_window(window, 0).expect("a window");
    let edges = [0, 1, 63, 64, 65];
    // Every head ratio, head size, page size, layout, mask and kind of input occurs with several values of the others.
    check::<R, f16>(rig, &Case::new((4, 4), (64, 64), 1, &edges, Cache::Nhd(16)), 1);
    check::<R, f16>(rig, &Case::new((8, 2), (64, 64), 2, &[15, 16, 130], Cache::Hnd(8)), 2);
    check::<R, bf16>(
        rig,
        &Case { soft_cap: Some(20.0), ..Case::new((16, 1), (64, 64), 1, &[1, 127, 128], Cache::Contiguous) },
        3,
    );
    check::<R, bf16>(rig, &Case::new((6, 2), (128, 128), 1, &[129, 0, 33], Cache::Nhd(64)), 4);
    check::<R, bf16>(
        rig,
        &Case { mask: window(40), ..Case::new((5, 1), (128, 128), 1, &[39, 40, 41, 300], Cache::Hnd(32)) },
        5,
    );
    check::<R, bf16>(rig, &Case::new((7, 1), (128, 128), 2, &[1, 2, 65, 200], Cache::Nhd(128)), 6);
    check::<R, bf16>(
        rig,
        &Case { mask: window(9), ..Case::new((4, 1), (128, 128), 8, &[3, 8, 70], Cache::Hnd(16)) },
        7,
    );
    check::<R, f16>(
        rig,
        &Case { inputs: Inputs::Saturated, ..Case::new((8, 1), (128, 128), 1, &[1, 190], Cache::Contiguous) },
        8,
    );
    check::<R, f16>(
        rig,
        &Case { soft_cap: Some(8.0), ..Case::new((16, 1), (128, 128), 1, &[64, 90], Cache::Nhd(16)) },
        9,
    );
    check::<R, bf16>(rig, &Case::new((2, 1), (192, 128), 1, &[100, 31], Cache::Nhd(16)), 10);
    check::<R, bf16>(
        rig,
        &Case {
            soft_cap: Some(50.0),
            inputs: Inputs::OutlierChannels,
            ..Case::new((4, 2), (256, 256), 1, &[80, 17], Cache::Hnd(16))
        },
        11,
    );
    check::<R, f16>(rig, &Case::new((3, 1), (96, 96), 2, &[75, 16, 2], Cache::Hnd(16)), 15);
    check::<R, bf16>(rig, &Case::new((9, 1), (256, 256), 1, &[70, 1], Cache::Contiguous), 12);
    // One long among short, and every tie and outlier that a softmax can meet.
    check::<R, bf16>(rig, &Case::new((4, 1), (128, 128), 1, &[1, 900, 2, 0, 5], Cache::Nhd(32)), 13);
    for inputs in [Inputs::Constant, Inputs::OutlierElements] {
        check::<R, f16>(rig, &Case { inputs, ..Case::new((2, 1), (64, 64), 1, &[200], Cache::Nhd(16)) }, 14);
    }
}

fn page_order_does_not_matter<R: Rig>(rig: &R) {
    let case = Case::new((4, 2), (64, 64), 1, &[100, 257], Cache::Nhd(16));
    let straight = tensors::<f16>(&case, 5);
    let mut reversed = tensors::<f16>(&case, 5);
    reversed.kv = reversed.kv.reverse_pages();
    let [straight, reversed] =
        [straight, reversed].map(|tensors| decode(rig, &case, &tensors, &lens(&case), 1));
    assert_eq!(straight.lse, reversed.lse, "on {}", rig.name());
    assert_eq!(straight.out, reversed.out, "on {}", rig.name());
}

fn fixed_splits_are_batch_invariant<R: Rig>(rig: &R) {
    let fixed = |kv_lens: &[usize]| Case {
        splits: Splits::Fixed { tokens: 128 },
        ..Case::new((4, 1), (128, 128), 1, kv_lens, Cache::Nhd(32))
    };
    // The first sequence alone, and before others that change every block's share.
    let together = fixed(&[400, 64, 3, 0, 300]);
    check::<R, bf16>(rig, &together, 21);
    let tensors_together = tensors::<bf16>(&together, 21);
    let decoded = decode(rig, &together, &tensors_together, &lens(&together), 1);
    let mut alone = together.clone();
    alone.kv_lens = vec![400, 0, 0, 0, 0];
    let only = decode(rig, &together, &tensors_together, &lens(&alone), 1);
    let row = 4 * 128;
    assert_eq!(decoded.out[..row], only.out[..row], "on {}", rig.name());
    assert_eq!(decoded.lse[..4], only.lse[..4], "on {}", rig.name());
}

/// What is wrong, the input, the lengths given to the kernel, and code and sequence of the report.
type BadCase<'a> = (&'a str, &'a Case, &'a Tensors<f16>, [u32; 3], (u32, u32));

fn bad_sequences_are_reported_and_the_others_stay_right<R: Rig>(rig: &R) {
    let case = Case::new((4, 2), (64, 64), 1, &[40, 50, 60], Cache::Nhd(16));
    let good = tensors::<f16>(&case, 31);
    let CacheLayout::Paged { max_pages, pages, .. } = good.kv.layout else { panic!("{case:?} is not paged") };
    let mut bad_page = tensors::<f16>(&case, 31);
    bad_page.kv.block_table[max_pages + 2] = pages as u32;
    let contiguous = Case { cache: Cache::Contiguous, ..case.clone() };
    let contiguous = Case { qk_dim: 128, v_dim: 128, ..contiguous };
    let past_the_end = tensors::<f16>(&contiguous, 31);
    let cases: [BadCase<'_>; 3] = [
        ("longer than its pages", &case, &good, [40, 16 * max_pages as u32 + 1, 60], (1, 1)),
        ("a page outside the pool", &case, &bad_page, [40, 50, 60], (2, 1)),
        ("past the end of the cache", &contiguous, &past_the_end, [40, 50, 61], (1, 2)),
    ];
    for (what, case, tensors, kv_len, (code, index)) in cases {
        let decoded = decode(rig, case, tensors, &kv_len, 1);
        let name = format!("{what} on {}", rig.name());
        assert_eq!(decoded.fault, Some(Fault { code, index }), "{name}");
        let mut expected = oracle(case, tensors);
        let (heads, row) = (case.q_heads, case.q_heads * case.v_dim);
        expected.out[index as usize * row..][..row].fill(0.0);
        expected.lse[index as usize * heads..][..heads].fill(f64::NEG_INFINITY);
        Comparison::new(&decoded.out, &expected.out, Tolerance::tensor_core::<f16>()).assert(&name);
        Comparison::new(&decoded.lse, &expected.lse, Tolerance::LSE).assert(&name);
    }
}

fn starts_that_change_after_the_plan_read_nothing_outside<R: Rig>(rig: &R) {
    let planned = Case::new((4, 2), (128, 128), 1, &[40, 50, 60], Cache::Contiguous);
    let tensors = tensors::<f16>(&planned, 33);
    // Sequence 0 stays; 1 begins past the cache and 2 ends past it. The emulator faults a read outside.
    let case = Case { late_starts: Some(vec![0, u32::MAX - 3, 149]), ..planned.clone() };
    let decoded = decode(rig, &case, &tensors, &lens(&case), 1);
    let expected = oracle(&planned, &tensors);
    let (heads, row) = (case.q_heads, case.q_heads * case.v_dim);
    let name = format!("moved starts on {}", rig.name());
    Comparison::new(&decoded.out[..row], &expected.out[..row], Tolerance::tensor_core::<f16>()).assert(&name);
    assert!(decoded.out[row..2 * row].iter().all(|x| x.to_f32() == 0.0), "{name}");
    assert_eq!(decoded.lse[heads..2 * heads], [f32::NEG_INFINITY; 4], "{name}");
    assert!(decoded.lse[2 * heads..].iter().all(|x| x.is_finite()), "{name}");
}

/// A query of NaN gives NaN, however many warps and parts share its keys, and harms no other row.
fn nan_is_never_dropped<R: Rig>(rig: &R) {
    for kv_len in [1, 40, 300] {
        let case = Case::new((4, 2), (64, 64), 1, &[kv_len, 20], Cache::Nhd(16));
        let mut tensors = tensors::<f16>(&case, 35);
        let expected = oracle(&case, &tensors);
        tensors.q[5] = f16::NAN; // of head 0
        let decoded = decode(rig, &case, &tensors, &lens(&case), 1);
        let name = format!("{kv_len} keys on {}", rig.name());
        assert!(decoded.out[..64].iter().all(|x| x.is_nan()), "{name}: {:?}", &decoded.out[..4]);
        assert!(decoded.lse[0].is_nan(), "{name}: {}", decoded.lse[0]);
        Comparison::new(&decoded.out[64..], &expected.out[64..], Tolerance::tensor_core::<f16>())
            .assert(format_args!("out of {name}"));
        Comparison::new(&decoded.lse[1..], &expected.lse[1..], Tolerance::LSE)
            .assert(format_args!("lse of {name}"));
    }
}

/// The last arriver differs from step to step; results and counters must not.
fn many_steps_repeat_bitwise<R: Rig>(rig: &R) {
    let case = Case::new((4, 1), (64, 64), 1, &[300, 7], Cache::Nhd(16));
    let tensors = tensors::<f16>(&case, 41);
    decode(rig, &case, &tensors, &lens(&case), rig.stress_launches());
}

#[test]
fn plans_refuse_what_no_kernel_can_do() {
    let shape = HeadShape::new(4, 1, 64, 64).expect("a valid shape");
    let layout = PageLayout::nhd(16, 1, 64);
    let cache =
        CacheLayout::Paged { page_size: 16, pages: 8, max_pages: 4, per_head: false, k: layout, v: layout };
    let good = DecodeConfig {
        shape,
        score: Score::new(0.125).expect("a finite scale"),
        mask: Mask::Causal,
        batch: 2,
        q_len: 1,
        max_kv_len: 64,
        cache,
        splits: Splits::Balanced,
        sm_count: 4,
    };
    DecodePlan::new(good).expect("a valid plan");
    let paged = |page_size, token_stride| CacheLayout::Paged {
        page_size,
        pages: 8,
        max_pages: 4,
        per_head: false,
        k: PageLayout { token_stride, ..layout },
        v: layout,
    };
    let pages_per_sequence = |max_pages| CacheLayout::Paged {
        page_size: 16,
        pages: 8,
        max_pages,
        per_head: true,
        k: layout,
        v: layout,
    };
    let bad = [
        ("q_len", DecodeConfig { q_len: 0, ..good }),
        ("q_len", DecodeConfig { q_len: 9, ..good }),
        ("batch", DecodeConfig { batch: 0, ..good }),
        ("sm_count", DecodeConfig { sm_count: 0, ..good }),
        ("mask", DecodeConfig { mask: Mask::Full, ..good }),
        ("mask", DecodeConfig { mask: Mask::SlidingWindow { window: 0, sinks: 0 }, ..good }),
        ("sm_count", DecodeConfig { sm_count: u32::MAX, ..good }),
        ("max_pages", DecodeConfig { cache: pages_per_sequence(usize::MAX), ..good }),
        ("page_size", DecodeConfig { cache: paged(1 << 40, 64), ..good }),
        ("max_kv_len", DecodeConfig { max_kv_len: usize::MAX, ..good }),
        ("splits", DecodeConfig { splits: Splits::Fixed { tokens: 100 }, ..good }),
        ("splits", DecodeConfig { splits: Splits::Fixed { tokens: 0 }, ..good }),
        ("page_size", DecodeConfig { cache: paged(4, 64), ..good }),
        ("page_size", DecodeConfig { cache: paged(24, 64), ..good }),
        ("k", DecodeConfig { cache: paged(16, 63), ..good }),
    ];
    for (argument, config) in bad {
        match DecodePlan::new(config) {
            Err(Error::Argument { argument: found, .. }) => assert_eq!(found, argument),
            other => panic!("{argument}: {other:?}"),
        }
    }
}
