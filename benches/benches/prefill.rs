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
use longkv_benches::{GpuBench, throughput};
use longkv_cuda::memory::{View, ViewMut};
use longkv_cuda::status::StatusWord;
use longkv_cuda::workspace::Workspace;

const Q_HEADS: usize = 32;
const KV_HEADS: usize = 8;
const DIM: usize = 128;

/// (name, queries, keys, mask, whether the state is carried, as in a ring step).
const CASES: [(&str, usize, usize, Mask, bool); 6] = [
    ("4096-causal", 4096, 4096, Mask::Causal, false),
    ("16384-full", 16_384, 16_384, Mask::Full, false),
    ("16384-causal", 16_384, 16_384, Mask::Causal, false),
    ("16384-full-step", 16_384, 16_384, Mask::Full, true),
    ("2048-after-30720", 2048, 32_768, Mask::Causal, false),
    ("64-after-32704", 64, 32_768, Mask::Causal, false),
];

fn plan(queries: usize, keys: usize, mask: Mask, carry: bool, kernel: PrefillKernel) -> PrefillPlan {
    let layout = PageLayout::nhd(1, KV_HEADS, DIM);
    PrefillPlan::new(PrefillConfig {
        spec: AttentionSpec {
            shape: HeadShape::new(Q_HEADS, KV_HEADS, DIM, DIM).expect("a valid shape"),
            score: Score::new((DIM as f32).powf(-0.5)).expect("a finite scale"),
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
        score: Score::new((DIM as f32).powf(-0.5)).expect("a finite scale"),
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
    group.group.sample_size(20);
    // All kernels, where the device has the others.
    let arch = longkv_cuda::launch::Device::arch(&bench.gpu);
    let wgmma = longkv_cuda::table::ArchClass::Hopper.runs_on(arch);
    let kernels = [
        ("", PrefillKernel::MmaSync),
        ("-wgmma", PrefillKernel::Wgmma),
        ("-wgmma-copies", PrefillKernel::WgmmaCopies),
    ];
    let kernels = &kernels[..if wgmma { 3 } else { 1 }];
    for (case, (suffix, kernel)) in
        CASES.iter().flat_map(|case| kernels.iter().map(move |kernel| (case, *kernel)))
    {
        let &(name, queries, keys, mask, carry) = case;
        // Of the steps only the kernel by maps is shipped.
        if carry && kernel == PrefillKernel::WgmmaCopies {
            continue;
        }
        let name = &format!("{name}{suffix}");
        let plan = plan(queries, keys, mask, carry, kernel);
        let prefill = Prefill::<_, bf16>::prepare(&bench.gpu, &plan).expect("prepare");
        let planner = PrefillTiles::prepare(&bench.gpu, &plan).expect("prepare the plan");
        let stream = bench.stream.clone();
        let upload = |vectors, seed| {
            stream.clone_htod(&Inputs::Normal.generate::<bf16>(vectors, DIM, seed)).expect("copy")
        };
        let (q, k, v) =
            (upload(queries * Q_HEADS, 1), upload(keys * KV_HEADS, 2), upload(keys * KV_HEADS, 3));
        let cu_queries = stream.clone_htod(&[0, queries as u32]).expect("copy");
        let kv_len = stream.clone_htod(&[keys as u32]).expect("copy");
        let kv_start = stream.clone_htod(&[0u32]).expect("copy");
        let rows = queries * Q_HEADS;
        let mut out = stream.alloc_zeros::<bf16>(if carry { 1 } else { rows * DIM }).expect("allocate");
        let mut lse = stream.alloc_zeros::<f32>(if carry { 1 } else { rows }).expect("allocate");
        let mut o = stream.alloc_zeros::<f32>(if carry { rows * DIM } else { 1 }).expect("allocate");
        let mut ml = stream.alloc_zeros::<f32>(if carry { rows * 2 } else { 1 }).expect("allocate");
        let mut status = StatusWord::new(&stream).expect("allocate");
        let mut workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
        let sequences = [(queries, keys)];
        let work = (plan.bytes_moved(&sequences, DType::BF16), plan.flops(&sequences));
        // The plan is part of what is timed, though many layers would share it.
        bench.case(&mut group, name, work, |stream| {
            let args = PrefillTilesArgs {
                cu_queries: &View::device(&cu_queries, stream),
                kv_len: &View::device(&kv_len, stream),
                block_table: None,
                kv_start: Some(&View::device(&kv_start, stream)),
                status: status.view_mut(stream),
            };
            let mut tiles = planner.run(stream, args, workspace.view_mut(stream)).expect("plan");
            let inputs = PrefillInputs {
                q: &View::device(&q, stream),
                k: &View::device(&k, stream),
                v: &View::device(&v, stream),
                block_table: None,
            };
            if carry {
                let state = PrefillState {
                    o: ViewMut::device(&mut o, stream),
                    ml: ViewMut::device(&mut ml, stream),
                    resume: true,
                };
                prefill.run_step(stream, inputs, state, &mut tiles).expect("launch");
            } else {
                let output = PrefillOutput {
                    out: ViewMut::device(&mut out, stream),
                    lse: ViewMut::device(&mut lse, stream),
                };
                prefill.run(stream, inputs, output, &mut tiles).expect("launch");
            }
        });
        assert_eq!(status.read(&stream).expect("read the status"), None, "{name}");
    }
}

criterion_group!(benches, cpu, gpu);
