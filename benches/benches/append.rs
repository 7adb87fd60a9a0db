//! Appending to a paged cache with RoPE, in bf16: 32 query heads over 8 KV heads of 128 channels, pages of 64 tokens.

use criterion::{BenchmarkId, Criterion, criterion_group};
use half::bf16;
use longkv_attention::gpu::{Append, AppendArgs, AppendConfig, AppendPlan, AppendTables, CacheLayout};
use longkv_attention::rope::{Rope, RopeConfig};
use longkv_attention::testing::Inputs;
use longkv_attention::{DType, HeadShape, PageLayout};
use longkv_benches::data::{Vectors, poisoned};
use longkv_benches::{Case, GpuBench, Work, check, throughput};
use longkv_cuda::memory::{View, ViewMut};
use longkv_cuda::status::StatusWord;

const Q_HEADS: usize = 32;
const KV_HEADS: usize = 8;
const DIM: usize = 128;
const PAGE: usize = 64;
const POSITIONS: usize = 8192;

/// A decode step of one sequence and of 64, and a chunk of prefill.
const TOKENS: [usize; 3] = [1, 64, 8192];

fn cpu(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention/append/cpu-reference/f32");
    let rope = Rope::new(RopeConfig::new(DIM, 10_000.0), POSITIONS).expect("a valid rotation");
    let mut q = Inputs::Normal.values(64 * Q_HEADS, DIM, 1);
    let positions: Vec<u32> = (0..64).collect();
    group.throughput(throughput((2 * q.len() * size_of::<f32>()) as u64, 3 * q.len() as u64));
    group.bench_function(BenchmarkId::from_parameter("rope-64"), |bencher| {
        bencher.iter(|| rope.apply(&mut q, Q_HEADS, &positions).expect("valid positions"));
    });
}

fn gpu(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    let mut group = bench.group(criterion, "attention/append", "bf16");
    for tokens in TOKENS {
        bench.case(&mut group, &tokens.to_string(), |case| append(case, tokens));
    }
}

fn append(case: &mut Case<'_, '_>, tokens: usize) {
    let (gpu, stream) = (&case.bench.gpu, case.bench.stream.clone());
    let rope = Rope::new(RopeConfig::new(DIM, 10_000.0), POSITIONS).expect("a valid rotation");
    let layout = PageLayout::hnd(PAGE, KV_HEADS, DIM);
    let pages = POSITIONS / PAGE;
    let cache = CacheLayout::Paged {
        page_size: PAGE,
        pages,
        max_pages: pages,
        per_head: false,
        k: layout,
        v: layout,
    };
    let shape = HeadShape::new(Q_HEADS, KV_HEADS, DIM, DIM).expect("a valid shape");
    let config = AppendConfig::packed(shape, tokens, Some((rope.config(), POSITIONS)), true, cache);
    let plan = AppendPlan::new(config).expect("a valid plan");
    let append = Append::<_, bf16>::prepare(gpu, &plan).expect("prepare");
    let (q, k, v) =
        (Vectors::<bf16>::new(DIM, 1), Vectors::<bf16>::new(DIM, 2), Vectors::<bf16>::new(DIM, 3));
    let q = q.upload(&stream, tokens * Q_HEADS);
    let (k_new, v_new) = (k.upload(&stream, tokens * KV_HEADS), v.upload(&stream, tokens * KV_HEADS));
    let (cos, sin) =
        (stream.clone_htod(rope.cos()).expect("copy"), stream.clone_htod(rope.sin()).expect("copy"));
    // A step writes one token to each of many pages, a chunk fills pages one after the other.
    let stride = POSITIONS / tokens;
    let slots: Vec<i64> = (0..tokens).map(|token| (token * stride) as i64).collect();
    let slots = stream.clone_htod(&slots).expect("copy");
    let positions: Vec<u32> = (0..tokens as u32).collect();
    let positions = stream.clone_htod(&positions).expect("copy");
    let cache_len = pages * PAGE * KV_HEADS * DIM;
    let cache = [poisoned::<bf16>(&stream, cache_len), poisoned::<bf16>(&stream, cache_len)];
    let status = StatusWord::new(&stream).expect("allocate");
    let (.., status) = case.time(
        Work::new(plan.bytes_moved(DType::BF16), 0),
        (q, cache, status),
        |(q, [k_cache, v_cache], status), stream| {
            let tables = AppendTables {
                cos: &View::device(&cos, stream),
                sin: &View::device(&sin, stream),
                position: &View::device(&positions, stream),
            };
            let args = AppendArgs {
                q_new: Some(ViewMut::device(q, stream)),
                k_new: &View::device(&k_new, stream),
                v_new: &View::device(&v_new, stream),
                tables: Some(tables),
                slot: &View::device(&slots, stream),
                k: ViewMut::device(k_cache, stream),
                v: ViewMut::device(v_cache, stream),
                status: status.view_mut(stream),
            };
            append.run(stream, args).expect("launch");
        },
        |(_, [k_cache, v_cache], status), stream| {
            check::no_fault(stream, status);
            for (token, head) in [(0, 0), (tokens - 1, KV_HEADS - 1)] {
                let slot = token * stride;
                let at = ((slot / PAGE * KV_HEADS + head) * PAGE + slot % PAGE) * DIM;
                let vector = token * KV_HEADS + head;
                let mut rotated: Vec<f32> = k.get(vector).iter().map(|x| x.to_f32()).collect();
                rope.apply(&mut rotated, 1, &[token as u32]).expect("a position of the table");
                let rotated: Vec<f64> = rotated.into_iter().map(f64::from).collect();
                check::products("a key", &check::download(stream, k_cache, at, DIM), &rotated);
                assert!(check::download(stream, v_cache, at, DIM) == v.get(vector), "value of token {token}");
            }
        },
    );
    check::no_fault(&stream, &status);
}

criterion_group!(benches, cpu, gpu);
