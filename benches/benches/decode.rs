//! Split-KV decode attention in bf16: 32 query heads over 8 KV heads of 128 channels, pages of 64 tokens.

use criterion::{BenchmarkId, Criterion, criterion_group};
use half::bf16;
use longkv_attention::gpu::{
    CacheLayout, Decode, DecodeArgs, DecodeConfig, DecodePlan, DecodeStep, DecodeStepArgs, Splits,
};
use longkv_attention::testing::{Inputs, shuffled_pages};
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
const PAGE: usize = 64;

/// (name, keys of each sequence): latency, bandwidth, and one long sequence among short ones beside its uniform equal.
fn cases() -> Vec<(&'static str, Vec<usize>)> {
    let mut ragged = vec![4096; 63];
    ragged.push(131_072);
    let uniform = ragged.iter().sum::<usize>() / 64;
    vec![
        ("1x4096", vec![4096]),
        ("1x32768", vec![32_768]),
        ("1x131072", vec![131_072]),
        ("8x131072", vec![131_072; 8]),
        ("16x4096", vec![4096; 16]),
        ("64x4096", vec![4096; 64]),
        ("63x4096+131072", ragged),
        ("64xuniform", vec![uniform; 64]),
    ]
}

fn spec() -> AttentionSpec {
    AttentionSpec {
        shape: HeadShape::new(Q_HEADS, KV_HEADS, DIM, DIM).expect("a valid shape"),
        score: Score::new((DIM as f32).powf(-0.5)).expect("a finite scale"),
        mask: Mask::Causal,
    }
}

fn plan(kv_lens: &[usize], sm_count: u32) -> DecodePlan {
    let spec = spec();
    let layout = PageLayout::hnd(PAGE, KV_HEADS, DIM);
    let max_kv_len = kv_lens.iter().copied().max().expect("a sequence");
    DecodePlan::new(DecodeConfig {
        shape: spec.shape,
        score: spec.score,
        mask: spec.mask,
        batch: kv_lens.len(),
        q_len: 1,
        max_kv_len,
        cache: CacheLayout::Paged {
            page_size: PAGE,
            pages: kv_lens.iter().map(|len| len.div_ceil(PAGE)).sum(),
            max_pages: max_kv_len.div_ceil(PAGE),
            per_head: false,
            k: layout,
            v: layout,
        },
        splits: Splits::Balanced,
        sm_count,
    })
    .expect("a valid plan")
}

fn cpu(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention/decode/cpu-reference/bf16");
    group.sample_size(10);
    let kv_lens = [4096];
    let plan = plan(&kv_lens, 1);
    let q: Vec<bf16> = Inputs::Normal.generate(Q_HEADS, DIM, 1);
    let k: Vec<bf16> = Inputs::Normal.generate(kv_lens[0] * KV_HEADS, DIM, 2);
    let v: Vec<bf16> = Inputs::Normal.generate(kv_lens[0] * KV_HEADS, DIM, 3);
    let q = RaggedView::one_each(HeadsView::nhd(&q, 1, Q_HEADS, DIM).expect("q")).expect("q");
    let heads = |x| HeadsView::nhd(x, kv_lens[0], KV_HEADS, DIM).expect("keys and values");
    let kv = RaggedKv::single(heads(&k), heads(&v)).expect("keys and values");
    group.throughput(throughput(plan.bytes_moved(&kv_lens, DType::BF16), plan.flops(&kv_lens)));
    group.bench_function(BenchmarkId::from_parameter("1x4096"), |bencher| {
        bencher.iter(|| {
            reference::prefill_parallel(&spec(), &q, &kv, reference::Probabilities::Rounded)
                .expect("valid inputs")
        });
    });
}

fn gpu(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    let mut group = bench.group(criterion, "attention/decode", "bf16");
    for (name, kv_lens) in cases() {
        let plan = plan(&kv_lens, bench.gpu.sm_count());
        let planner = DecodeStep::prepare(&bench.gpu, &plan).expect("prepare");
        let decode = Decode::<_, bf16>::prepare(&bench.gpu, &plan).expect("prepare");
        let stream = bench.stream.clone();
        let batch = kv_lens.len();
        let pages: usize = kv_lens.iter().map(|len| len.div_ceil(PAGE)).sum();
        let max_pages = kv_lens.iter().map(|len| len.div_ceil(PAGE)).max().expect("a sequence");
        let mut free = shuffled_pages(pages, 4).into_iter();
        let mut table = vec![u32::MAX; batch * max_pages];
        for (sequence, len) in kv_lens.iter().enumerate() {
            for entry in &mut table[sequence * max_pages..][..len.div_ceil(PAGE)] {
                *entry = free.next().expect("a page for each entry");
            }
        }
        // Random data, never zeros, which draw less power; one page's worth of it, repeated, is enough for that.
        let page: Vec<bf16> = Inputs::Normal.generate(PAGE * KV_HEADS, DIM, 5);
        let store: Vec<bf16> = page.iter().copied().cycle().take(pages * page.len()).collect();
        let (k, v) = (stream.clone_htod(&store).expect("copy"), stream.clone_htod(&store).expect("copy"));
        let q = stream.clone_htod(&Inputs::Normal.generate::<bf16>(batch * Q_HEADS, DIM, 1)).expect("copy");
        let lens: Vec<u32> = kv_lens.iter().map(|len| *len as u32).collect();
        let lens = stream.clone_htod(&lens).expect("copy");
        let table = stream.clone_htod(&table).expect("copy");
        let mut out = stream.alloc_zeros::<bf16>(batch * Q_HEADS * DIM).expect("allocate");
        let mut lse = stream.alloc_zeros::<f32>(batch * Q_HEADS).expect("allocate");
        let mut status = StatusWord::new(&stream).expect("allocate");
        let mut step_workspace = Workspace::zeroed(&stream, plan.step_workspace().bytes()).expect("allocate");
        let mut workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
        let block_table = View::device(&table, &stream);
        let step = DecodeStepArgs {
            kv_len: &View::device(&lens, &stream),
            block_table: Some(&block_table),
            kv_start: None,
            status: status.view_mut(&stream),
        };
        let step = planner.run(&stream, step, step_workspace.view_mut(&stream)).expect("plan the step");
        let work = (plan.bytes_moved(&kv_lens, DType::BF16), plan.flops(&kv_lens));
        bench.case(&mut group, name, work, |stream| {
            let args = DecodeArgs {
                q: &View::device(&q, stream),
                k: &View::device(&k, stream),
                v: &View::device(&v, stream),
                block_table: Some(&block_table),
                kv_start: None,
                out: ViewMut::device(&mut out, stream),
                lse: ViewMut::device(&mut lse, stream),
            };
            decode.run(stream, args, &step, workspace.view_mut(stream)).expect("launch");
        });
        drop(step);
        assert_eq!(status.read(&stream).expect("read the status"), None, "{name}");
    }
}

criterion_group!(benches, cpu, gpu);
