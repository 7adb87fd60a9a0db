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
use longkv_benches::data::{Vectors, poisoned};
use longkv_benches::{Case, GpuBench, Work, check, throughput};
use longkv_cuda::memory::{View, ViewMut};
use longkv_cuda::status::StatusWord;
use longkv_cuda::workspace::Workspace;

/// Query heads; 64 where a name says so, as many as `homomorphic-quant` is measured with.
const Q_HEADS: usize = 32;
const KV_HEADS: usize = 8;
const DIM: usize = 128;
const PAGE: usize = 64;

/// (name, query heads, keys of each sequence): latency, bandwidth, and one long sequence among short ones beside its uniform equal.
fn cases() -> Vec<(&'static str, usize, Vec<usize>)> {
    let mut ragged = vec![4096; 63];
    ragged.push(131_072);
    let uniform = ragged.iter().sum::<usize>() / 64;
    vec![
        ("1x4096", Q_HEADS, vec![4096]),
        ("1x32768", Q_HEADS, vec![32_768]),
        ("1x131072", Q_HEADS, vec![131_072]),
        ("8x131072", Q_HEADS, vec![131_072; 8]),
        ("16x4096", Q_HEADS, vec![4096; 16]),
        ("64x4096", Q_HEADS, vec![4096; 64]),
        ("63x4096+131072", Q_HEADS, ragged),
        ("64xuniform", Q_HEADS, vec![uniform; 64]),
        ("1x131072-64-heads", 64, vec![131_072]),
        ("16x32768-64-heads", 64, vec![32_768; 16]),
    ]
}

fn spec(q_heads: usize) -> AttentionSpec {
    AttentionSpec {
        shape: HeadShape::new(q_heads, KV_HEADS, DIM, DIM).expect("a valid shape"),
        score: Score::new((DIM as f32).powf(-0.5)).expect("a finite scale"),
        mask: Mask::Causal,
    }
}

fn plan(q_heads: usize, kv_lens: &[usize], sm_count: u32) -> DecodePlan {
    let spec = spec(q_heads);
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
    let plan = plan(Q_HEADS, &kv_lens, 1);
    let q: Vec<bf16> = Inputs::Normal.generate(Q_HEADS, DIM, 1);
    let k: Vec<bf16> = Inputs::Normal.generate(kv_lens[0] * KV_HEADS, DIM, 2);
    let v: Vec<bf16> = Inputs::Normal.generate(kv_lens[0] * KV_HEADS, DIM, 3);
    let q = RaggedView::one_each(HeadsView::nhd(&q, 1, Q_HEADS, DIM).expect("q")).expect("q");
    let heads = |x| HeadsView::nhd(x, kv_lens[0], KV_HEADS, DIM).expect("keys and values");
    let kv = RaggedKv::single(heads(&k), heads(&v)).expect("keys and values");
    group.throughput(throughput(plan.bytes_moved(&kv_lens, DType::BF16), plan.flops(&kv_lens)));
    group.bench_function(BenchmarkId::from_parameter("1x4096"), |bencher| {
        bencher.iter(|| {
            reference::prefill_parallel(&spec(Q_HEADS), &q, &kv, reference::Probabilities::Rounded)
                .expect("valid inputs")
        });
    });
}

fn gpu(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    let mut group = bench.group(criterion, "attention/decode", "bf16");
    let (q, k, v) = (Vectors::new(DIM, 1), Vectors::new(DIM, 5), Vectors::new(DIM, 6));
    for (name, q_heads, kv_lens) in cases() {
        bench.case(&mut group, name, |case| decode(case, q_heads, &kv_lens, [&q, &k, &v]));
    }
}

fn decode(case: &mut Case<'_, '_>, q_heads: usize, kv_lens: &[usize], [q, k, v]: [&Vectors<bf16>; 3]) {
    let (gpu, stream) = (&case.bench.gpu, case.bench.stream.clone());
    let plan = plan(q_heads, kv_lens, gpu.sm_count());
    let planner = DecodeStep::prepare(gpu, &plan).expect("prepare");
    let decode = Decode::<_, bf16>::prepare(gpu, &plan).expect("prepare");
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
    let vectors = pages * KV_HEADS * PAGE;
    let (k_device, v_device) = (k.upload(&stream, vectors), v.upload(&stream, vectors));
    let q_device = q.upload(&stream, batch * q_heads);
    let lens: Vec<u32> = kv_lens.iter().map(|len| *len as u32).collect();
    let lens = stream.clone_htod(&lens).expect("copy");
    let table_device = stream.clone_htod(&table).expect("copy");
    let out = poisoned::<bf16>(&stream, batch * q_heads * DIM);
    let lse = poisoned::<f32>(&stream, batch * q_heads);
    let mut status = StatusWord::new(&stream).expect("allocate");
    let mut step_workspace = Workspace::zeroed(&stream, plan.step_workspace().bytes()).expect("allocate");
    let mut workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
    let block_table = View::device(&table_device, &stream);
    let step = DecodeStepArgs {
        kv_len: &View::device(&lens, &stream),
        block_table: Some(&block_table),
        kv_start: None,
        status: status.view_mut(&stream),
    };
    let step = planner.run(&stream, step, step_workspace.view_mut(&stream)).expect("plan the step");
    let work = Work::new(plan.bytes_moved(kv_lens, DType::BF16), plan.flops(kv_lens))
        .note("decode and merge, without the plan of the step");
    case.time(
        work,
        (out, lse),
        |(out, lse), stream| {
            let args = DecodeArgs {
                q: &View::device(&q_device, stream),
                k: &View::device(&k_device, stream),
                v: &View::device(&v_device, stream),
                block_table: Some(&block_table),
                kv_start: None,
                out: ViewMut::device(out, stream),
                lse: ViewMut::device(lse, stream),
            };
            decode.run(stream, args, &step, workspace.view_mut(stream)).expect("launch");
        },
        |(out, lse), stream| {
            // Of the first and the longest sequence, a head of the first group and one of the last.
            let longest = (0..batch).max_by_key(|sequence| kv_lens[*sequence]).expect("a sequence");
            let samples = [(0, 1), (longest, q_heads - 1)];
            let expected = samples.map(|(sequence, head)| {
                let row = sequence * q_heads + head;
                let at = |token: usize| {
                    let page = table[sequence * max_pages + token / PAGE] as usize;
                    (page * KV_HEADS + head * KV_HEADS / q_heads) * PAGE + token % PAGE
                };
                let (k, v) = (|token| k.get(at(token)), |token| v.get(at(token)));
                (row, check::attention(spec(q_heads).score, q.get(row), kv_lens[sequence], k, v))
            });
            check::rows(stream, out, lse, &expected);
        },
    );
    drop(step);
    check::no_fault(&stream, &status);
}

criterion_group!(benches, cpu, gpu);
