//! Flash prefill in bf16: 32 query heads over 8 KV heads of 128 channels, one contiguous sequence.

use criterion::{BenchmarkId, Criterion, criterion_group};
use half::bf16;
use longkv_attention::gpu::{
    CacheLayout, Prefill, PrefillConfig, PrefillInputs, PrefillKernel, PrefillOutput, PrefillPlan,
    PrefillState, PrefillTiles, PrefillTilesArgs,
};
use longkv_attention::testing::Inputs;
use longkv_attention::{
    AttentionSpec, DType, HeadShape, HeadsView, Mask, PageLayout, RaggedKv, RaggedView, Score, reference,
};
use longkv_benches::data::{Vectors, poisoned, repeated};
use longkv_benches::{Case, GpuBench, Work, check, exhaustive, throughput};
use longkv_cuda::launch::Device as _;
use longkv_cuda::memory::{View, ViewMut};
use longkv_cuda::status::StatusWord;
use longkv_cuda::table::ArchClass;
use longkv_cuda::workspace::Workspace;

const Q_HEADS: usize = 32;
const KV_HEADS: usize = 8;
const DIM: usize = 128;

/// (name, queries, keys, mask, whether the state is carried, as in a ring step).
const CASES: [Shape; 9] = [
    ("4096-causal", 4096, 4096, Mask::Causal, false),
    ("8192-full", 8192, 8192, Mask::Full, false),
    ("8192-causal", 8192, 8192, Mask::Causal, false),
    ("16384-full", 16_384, 16_384, Mask::Full, false),
    ("16384-causal", 16_384, 16_384, Mask::Causal, false),
    ("16384-full-step", 16_384, 16_384, Mask::Full, true),
    ("16384-causal-step", 16_384, 16_384, Mask::Causal, true),
    ("2048-after-30720", 2048, 32_768, Mask::Causal, false),
    ("64-after-32704", 64, 32_768, Mask::Causal, false),
];

type Shape = (&'static str, usize, usize, Mask, bool);

/// (Suffix of the name, kernel): the plain name is of what a caller gets. On sm_90a that is wgmma, and the portable kernel stands
/// beside it; the loads that pages and soft caps need there are for `EXHAUSTIVE=1`.
fn kernels(hopper: bool) -> &'static [(&'static str, PrefillKernel)] {
    let all = &[
        ("", PrefillKernel::Auto),
        ("-mma-sync", PrefillKernel::MmaSync),
        ("-wgmma-copies", PrefillKernel::WgmmaCopies),
    ];
    match (hopper, exhaustive()) {
        (false, _) => &all[..1],
        (true, false) => &all[..2],
        (true, true) => all,
    }
}

fn score() -> Score {
    Score::new((DIM as f32).powf(-0.5)).expect("a finite scale")
}

fn plan(queries: usize, keys: usize, mask: Mask, carry: bool, kernel: PrefillKernel) -> PrefillPlan {
    let layout = PageLayout::nhd(1, KV_HEADS, DIM);
    PrefillPlan::new(PrefillConfig {
        spec: AttentionSpec {
            shape: HeadShape::new(Q_HEADS, KV_HEADS, DIM, DIM).expect("a valid shape"),
            score: score(),
            mask,
        },
        batch: 1,
        num_queries: queries,
        max_kv_len: keys,
        cache: CacheLayout::Contiguous { tokens: keys, k: layout, v: layout },
        carry,
        kernel,
    })
    .expect("a valid plan")
}

fn cpu(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention/prefill/cpu-reference/bf16");
    group.sample_size(10);
    let tokens = 256;
    let plan = plan(tokens, tokens, Mask::Causal, false, PrefillKernel::MmaSync);
    let vectors = |heads, seed| Inputs::Normal.generate::<bf16>(tokens * heads, DIM, seed);
    let (q, k, v) = (vectors(Q_HEADS, 1), vectors(KV_HEADS, 2), vectors(KV_HEADS, 3));
    let q = RaggedView::single(HeadsView::nhd(&q, tokens, Q_HEADS, DIM).expect("q")).expect("q");
    let heads = |x| HeadsView::nhd(x, tokens, KV_HEADS, DIM).expect("keys and values");
    let kv = RaggedKv::single(heads(&k), heads(&v)).expect("keys and values");
    let spec = AttentionSpec {
        shape: HeadShape::new(Q_HEADS, KV_HEADS, DIM, DIM).expect("a valid shape"),
        score: score(),
        mask: Mask::Causal,
    };
    let sequences = [(tokens, tokens)];
    group.throughput(throughput(plan.bytes_moved(&sequences, DType::BF16), plan.flops(&sequences)));
    group.bench_function(BenchmarkId::from_parameter("256-causal"), |bencher| {
        let rounded = reference::Probabilities::Rounded;
        bencher.iter(|| reference::prefill_parallel(&spec, &q, &kv, rounded).expect("valid inputs"));
    });
}

fn gpu(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    let mut group = bench.group(criterion, "attention/prefill", "bf16");
    let hopper = ArchClass::Hopper.runs_on(bench.gpu.arch());
    let inputs = [Vectors::new(DIM, 1), Vectors::new(DIM, 2), Vectors::new(DIM, 3)];
    for shape in &CASES {
        for &(suffix, kernel) in kernels(hopper) {
            // Of the steps only the kernel by maps is shipped.
            if !(shape.4 && kernel == PrefillKernel::WgmmaCopies) {
                let name = format!("{}{suffix}", shape.0);
                bench.case(&mut group, &name, |case| prefill(case, shape, kernel, &inputs));
            }
        }
    }
}

fn prefill(case: &mut Case<'_, '_>, shape: &Shape, kernel: PrefillKernel, [q, k, v]: &[Vectors<bf16>; 3]) {
    let &(_, queries, keys, mask, carry) = shape;
    let (gpu, stream) = (&case.bench.gpu, case.bench.stream.clone());
    let plan = plan(queries, keys, mask, carry, kernel);
    let prefill = Prefill::<_, bf16>::prepare(gpu, &plan).expect("prepare");
    let planner = PrefillTiles::prepare(gpu, &plan).expect("prepare the plan");
    let q_device = q.upload(&stream, queries * Q_HEADS);
    let (k_device, v_device) = (k.upload(&stream, keys * KV_HEADS), v.upload(&stream, keys * KV_HEADS));
    let cu_queries = stream.clone_htod(&[0, queries as u32]).expect("copy");
    let kv_len = stream.clone_htod(&[keys as u32]).expect("copy");
    let kv_start = stream.clone_htod(&[0u32]).expect("copy");
    let rows = queries * Q_HEADS;
    let out = poisoned::<bf16>(&stream, if carry { 1 } else { rows * DIM });
    let lse = poisoned::<f32>(&stream, if carry { 1 } else { rows });
    // A state that has seen no key: every launch adds the same keys to it once more.
    let o = stream.alloc_zeros::<f32>(if carry { rows * DIM } else { 1 }).expect("allocate");
    let ml = repeated(&stream, &[f32::NEG_INFINITY, 0.0], if carry { rows * 2 } else { 2 });
    let status = StatusWord::new(&stream).expect("allocate");
    let mut workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
    let sequences = [(queries, keys)];
    let mut bytes = plan.bytes_moved(&sequences, DType::BF16);
    if carry {
        // States are read and written in place of results.
        bytes += (rows * (2 * 4 * (DIM + 2))) as u64 - (rows * (DIM * 2 + 4)) as u64;
    }
    let work = Work::new(bytes, plan.flops(&sequences))
        .note(format!("{:?}, with the plan, which many layers would share", prefill.kernel()));
    let (.., status) = case.time(
        work,
        (out, lse, o, ml, status),
        |(out, lse, o, ml, status), stream| {
            let args = PrefillTilesArgs {
                cu_queries: &View::device(&cu_queries, stream),
                kv_len: &View::device(&kv_len, stream),
                block_table: None,
                kv_start: Some(&View::device(&kv_start, stream)),
                status: status.view_mut(stream),
            };
            let mut tiles = planner.run(stream, args, workspace.view_mut(stream)).expect("plan");
            let inputs = PrefillInputs {
                q: &View::device(&q_device, stream),
                k: &View::device(&k_device, stream),
                v: &View::device(&v_device, stream),
                block_table: None,
            };
            if carry {
                let state = PrefillState {
                    o: ViewMut::device(o, stream),
                    ml: ViewMut::device(ml, stream),
                    resume: true,
                };
                prefill.run_step(stream, inputs, state, &mut tiles).expect("launch");
            } else {
                let output =
                    PrefillOutput { out: ViewMut::device(out, stream), lse: ViewMut::device(lse, stream) };
                prefill.run(stream, inputs, output, &mut tiles).expect("launch");
            }
        },
        |(out, lse, o, ml, status), stream| {
            check::no_fault(stream, status);
            let samples = [(0, 0), (queries / 2 + 1, 13), (queries - 1, Q_HEADS - 1)];
            let expected = samples.map(|(query, head)| {
                let seen = if mask == Mask::Full { keys } else { keys - queries + query + 1 };
                let at = |token: usize| token * KV_HEADS + head * KV_HEADS / Q_HEADS;
                let (k, v) = (|token| k.get(at(token)), |token| v.get(at(token)));
                let row = query * Q_HEADS + head;
                (row, check::attention(score(), q.get(row), seen, k, v))
            });
            if carry {
                check::states(stream, o, ml, &expected);
            } else {
                check::rows(stream, out, lse, &expected);
            }
        },
    );
    check::no_fault(&stream, &status);
}

criterion_group!(benches, cpu, gpu);
