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

mod caches;
mod numbers;
mod product;
mod refusals;
mod replay;

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

fn plan<R: Rig>(rig: &R, case: &Case, cache: CacheLayout) -> DecodePlan {
    let spec = case.spec();
    DecodePlan::new(DecodeConfig {
        shape: spec.shape,
        score: spec.score,
        mask: spec.mask,
        batch: case.kv_lens.len(),
        q_len: case.q_len,
        max_kv_len: 4096,
        cache,
        splits: case.splits,
        // Two SMs split small cases into many parts; a GPU has the SMs that it has.
        sm_count: cuda::launch::Device::sm_count(rig.device()).unwrap_or(2),
    })
    .expect("a valid plan")
}

/// Runs `steps` equal steps with the given lengths and expects them to be bitwise equal.
fn decode<R: Rig, E: Storage>(
    rig: &R,
    case: &Case,
    tensors: &Tensors<E>,
    kv_len: &[u32],
    steps: usize,
) -> Decoded<E> {
    decode_keys(rig, case, tensors, &rig.upload(&tensors.kv.k_cache), kv_len, steps)
}

/// [`decode`] with keys that are on the device already.
fn decode_keys<R: Rig, E: Storage>(
    rig: &R,
    case: &Case,
    tensors: &Tensors<E>,
    k: &R::Buffer<E>,
    kv_len: &[u32],
    steps: usize,
) -> Decoded<E> {
    let plan = plan(rig, case, tensors.kv.layout);
    let planner = DecodeStep::prepare(rig.device(), &plan).expect("prepare the plan");
    let kernel = Decode::<_, E>::prepare(rig.device(), &plan).expect("prepare the kernel");
    let rows = case.kv_lens.len() * case.q_len * case.q_heads;

    let (q, v) = (rig.upload(&tensors.q), rig.upload(&tensors.kv.v_cache));
    let kv_len = rig.upload(kv_len);
    let contiguous = matches!(tensors.kv.layout, CacheLayout::Contiguous { .. });
    let block_table = (!contiguous).then(|| rig.upload(&tensors.kv.block_table));
    let kv_start = contiguous.then(|| rig.upload(&tensors.kv.kv_start));
    let late_starts = case.late_starts.as_ref().map(|starts| rig.upload(starts));
    let mut status = rig.zeroed::<u64>(1);
    let mut step_workspace = rig.workspace(plan.step_workspace());
    let mut workspace = rig.workspace(plan.workspace());
    let mut first: Option<Decoded<E>> = None;
    for step in emulator::rig::within_time(steps) {
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
            k: &rig.view(k),
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
    Comparison::attention(&decoded.out, &expected.out, case.v_dim).assert(format_args!("out of {name}"));
    Comparison::new(&decoded.lse, &expected.lse, Tolerance::LSE).assert(format_args!("lse of {name}"));
    assert_eq!(decoded.fault, None, "{name}");
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
    // What only the kernel's table and launch know.
    let odd = HeadShape::new(4, 1, 80, 64).expect("a valid shape");
    let k = PageLayout::nhd(16, 1, 80);
    let wide = CacheLayout::Paged { page_size: 16, pages: 8, max_pages: 4, per_head: false, k, v: layout };
    let bad = [
        ("QK_DIM", DecodeConfig { shape: odd, cache: wide, ..good }),
        ("max_kv_len", DecodeConfig { batch: 1 << 17, max_kv_len: 1 << 20, ..good }),
    ];
    for (argument, config) in bad {
        match DecodePlan::new(config) {
            Err(Error::Cuda(error)) => assert!(error.to_string().contains(argument), "{argument}: {error}"),
            other => panic!("{argument}: {other:?}"),
        }
    }
}
