//! Appending to a paged cache with RoPE, in bf16: 32 query heads over 8 KV heads of 128 channels, pages of 64 tokens.

use criterion::{BenchmarkId, Criterion, criterion_group};
use half::bf16;
use longkv_attention::gpu::{Append, AppendArgs, AppendConfig, AppendPlan, AppendTables, CacheLayout};
use longkv_attention::rope::{Rope, RopeConfig};
use longkv_attention::testing::Inputs;
use longkv_attention::{DType, HeadShape, PageLayout};
use longkv_benches::{GpuBench, throughput};
use longkv_cuda::memory::{View, ViewMut};
use longkv_cuda::status::StatusWord;

const Q_HEADS: usize = 32;
const KV_HEADS: usize = 8;
const DIM: usize = 128;
const PAGE: usize = 64;
const POSITIONS: usize = 8192;

/// A decode step of 64 sequences, and a chunk of prefill.
const TOKENS: [usize; 2] = [64, 8192];

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
    let rope = Rope::new(RopeConfig::new(DIM, 10_000.0), POSITIONS).expect("a valid rotation");
    for tokens in TOKENS {
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
        let append = Append::<_, bf16>::prepare(&bench.gpu, &plan).expect("prepare");
        let stream = bench.stream.clone();
        let upload = |heads: usize, seed| {
            stream.clone_htod(&Inputs::Normal.generate::<bf16>(tokens * heads, DIM, seed)).expect("copy")
        };
        let (mut q, k_new, v_new) = (upload(Q_HEADS, 1), upload(KV_HEADS, 2), upload(KV_HEADS, 3));
        let (cos, sin) =
            (stream.clone_htod(rope.cos()).expect("copy"), stream.clone_htod(rope.sin()).expect("copy"));
        // A step writes one token to each of many pages, a chunk fills pages one after the other.
        let stride = POSITIONS / tokens;
        let slots: Vec<i64> = (0..tokens).map(|token| (token * stride) as i64).collect();
        let slots = stream.clone_htod(&slots).expect("copy");
        let positions: Vec<u32> = (0..tokens as u32).collect();
        let positions = stream.clone_htod(&positions).expect("copy");
        let cache_len = pages * PAGE * KV_HEADS * DIM;
        let mut k = stream.alloc_zeros::<bf16>(cache_len).expect("allocate");
        let mut v = stream.alloc_zeros::<bf16>(cache_len).expect("allocate");
        let mut status = StatusWord::new(&stream).expect("allocate");
        let work = (plan.bytes_moved(DType::BF16), 0);
        bench.case(&mut group, &tokens.to_string(), work, |stream| {
            let tables = AppendTables {
                cos: &View::device(&cos, stream),
                sin: &View::device(&sin, stream),
                position: &View::device(&positions, stream),
            };
            let args = AppendArgs {
                q_new: Some(ViewMut::device(&mut q, stream)),
                k_new: &View::device(&k_new, stream),
                v_new: &View::device(&v_new, stream),
                tables: Some(tables),
                slot: &View::device(&slots, stream),
                k: ViewMut::device(&mut k, stream),
                v: ViewMut::device(&mut v, stream),
                status: status.view_mut(stream),
            };
            append.run(stream, args).expect("launch");
        });
        assert_eq!(status.read(&stream).expect("read the status"), None, "{tokens} tokens");
    }
}

criterion_group!(benches, cpu, gpu);
