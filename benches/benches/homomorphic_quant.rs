//! Attention on codes, for decoding and for prompts, and the append that makes them: 64 query heads over 8 KV heads of 128 channels, Π = 64, bf16.
//!
//! The backend `cpu-reference` is the plain-Rust method. `hack_dequant_decode` is the same decode with dequantization in
//! registers, over the same pages; dense bf16 decode is `attention/decode`.

use criterion::{BenchmarkId, Criterion, criterion_group};
use half::bf16;
use homomorphic_quant::gpu::{
    Append, AppendArgs, AppendConfig, AppendPlan, Counts, Decode, DecodeArgs, DecodeConfig, DecodePlan,
    DecodeStep, DecodeStepArgs, Method, Places, Pools, Prefill, PrefillConfig, PrefillInputs, PrefillOutput,
    PrefillPlan, Splits,
};
use homomorphic_quant::page::PageLayout;
use homomorphic_quant::{Bits, BlockPlace, Cache, Capacity, Config, HeadBlock, KvShape, Rounding, reference};
use longkv_attention::testing::{Inputs, shuffled_pages};
use longkv_attention::{AttentionSpec, HeadShape, HeadsView, Mask, Score};
use longkv_benches::{GpuBench, throughput};
use longkv_cuda::cudarc::driver::{CudaSlice, CudaStream};
use longkv_cuda::memory::{View, ViewMut};
use longkv_cuda::status::StatusWord;
use longkv_cuda::workspace::Workspace;
use std::sync::Arc;

const Q_HEADS: usize = 64;
const KV_HEADS: usize = 8;
const DIM: usize = 128;
const PARTITION: usize = 64;
const SINKS: usize = 4;

fn spec() -> AttentionSpec {
    AttentionSpec {
        shape: HeadShape::new(Q_HEADS, KV_HEADS, DIM, DIM).expect("a valid shape"),
        score: Score::new((DIM as f32).powf(-0.5)).expect("a finite scale"),
        mask: Mask::Causal,
    }
}

fn config(bits: Bits) -> Config {
    Config::new(bits, bits)
}

/// Pools for sequences of these lengths, with room for one more block each.
fn pools(bits: Bits, kv_lens: &[usize]) -> Pools {
    let blocks = |len: &usize| (len - SINKS) / PARTITION + 1;
    let counts = Counts {
        pages: kv_lens.iter().map(blocks).sum(),
        sink_pages: kv_lens.len(),
        open_pages: kv_lens.len(),
        max_pages: kv_lens.iter().map(blocks).max().expect("a sequence"),
    };
    Pools::new(&config(bits), 0, spec().shape, counts).expect("valid pools")
}

fn plan(method: Method, bits: Bits, kv_lens: &[usize], sm_count: u32) -> DecodePlan {
    let spec = spec();
    DecodePlan::new(DecodeConfig {
        method,
        pools: pools(bits, kv_lens),
        shape: spec.shape,
        score: spec.score,
        mask: spec.mask,
        batch: kv_lens.len(),
        q_len: 1,
        max_kv_len: kv_lens.iter().copied().max().expect("a sequence"),
        splits: Splits::Balanced,
        sm_count,
    })
    .expect("a valid plan")
}

/// A layer's cache on the device, full of random codes.
struct Layer {
    pools: Pools,
    pages: CudaSlice<u8>,
    sinks: CudaSlice<bf16>,
    open: CudaSlice<bf16>,
    block_table: CudaSlice<u32>,
    sink_page: CudaSlice<u32>,
    open_page: CudaSlice<u32>,
    kv_len: CudaSlice<u32>,
}

impl Layer {
    fn new(stream: &Arc<CudaStream>, bits: Bits, kv_lens: &[usize]) -> Self {
        let pools = pools(bits, kv_lens);
        let counts = pools.counts();
        // Random data, never zeros, which draw less power; one page's worth of it, repeated, is enough for that.
        let head = pools.geometry();
        let place = BlockPlace { layer: 0, kv_head: 0, token: 0 };
        let (k, v) = (Inputs::Normal.values(PARTITION, DIM, 5), Inputs::Normal.values(PARTITION, DIM, 6));
        let block = HeadBlock::quantize(head, Rounding::Nearest, place, &k, &v).expect("a block");
        let mut segment = vec![0; pools.segment_bytes()];
        PageLayout::Packed.write(head, &block, &mut segment).expect("a segment");
        let pages: Vec<u8> =
            segment.iter().copied().cycle().take(counts.pages * pools.page_bytes()).collect();
        let side = |page: usize| Inputs::Normal.generate::<bf16>(kv_lens.len(), page / 2, 7);
        let mut free = shuffled_pages(counts.pages, 4).into_iter();
        let mut table = vec![u32::MAX; kv_lens.len() * counts.max_pages];
        for (sequence, len) in kv_lens.iter().enumerate() {
            for entry in &mut table[sequence * counts.max_pages..][..(len - SINKS) / PARTITION + 1] {
                *entry = free.next().expect("a page for each entry");
            }
        }
        let numbers: Vec<u32> = (0..kv_lens.len() as u32).collect();
        let lens: Vec<u32> = kv_lens.iter().map(|len| *len as u32).collect();
        Layer {
            pages: stream.clone_htod(&pages).expect("copy"),
            sinks: stream.clone_htod(&side(pools.sink_page().bytes())).expect("copy"),
            open: stream.clone_htod(&side(pools.open_page().bytes())).expect("copy"),
            block_table: stream.clone_htod(&table).expect("copy"),
            sink_page: stream.clone_htod(&numbers).expect("copy"),
            open_page: stream.clone_htod(&numbers).expect("copy"),
            kv_len: stream.clone_htod(&lens).expect("copy"),
            pools,
        }
    }
}

/// The views of a layer's places, for as long as a launch needs them.
macro_rules! places {
    ($layer:expr, $stream:expr) => {
        Places {
            block_table: &View::device(&$layer.block_table, $stream),
            sink_page: &View::device(&$layer.sink_page, $stream),
            open_page: &View::device(&$layer.open_page, $stream),
        }
    };
}

fn cpu(criterion: &mut Criterion) {
    let kv_lens = [4096];
    for bits in Bits::ALL {
        let mut group = criterion.benchmark_group(format!("homomorphic-quant/decode/cpu-reference/{bits}"));
        group.sample_size(10);
        let config = config(bits);
        let shape = KvShape { kv_heads: KV_HEADS, qk_dim: DIM, v_dim: DIM };
        let capacity = Capacity::of_tokens(&config, 1, kv_lens[0]);
        let mut cache = Cache::new(&config, 0, shape, capacity).expect("a valid cache");
        let mut sequence = cache.sequence();
        let vectors = |heads: usize, tokens: usize, seed| Inputs::Normal.values(heads * tokens, DIM, seed);
        let (k, v) = (vectors(KV_HEADS, kv_lens[0], 2), vectors(KV_HEADS, kv_lens[0], 3));
        let heads = |x| HeadsView::nhd(x, kv_lens[0], KV_HEADS, DIM).expect("keys and values");
        cache.append(&mut sequence, heads(&k), heads(&v)).expect("room");
        let q = vectors(Q_HEADS, 1, 1);
        let q = HeadsView::nhd(&q, 1, Q_HEADS, DIM).expect("q");
        let (mut out, mut lse) = (vec![0.0; Q_HEADS * DIM], vec![0.0; Q_HEADS]);
        let plan = plan(Method::Codes, bits, &kv_lens, 1);
        group.throughput(throughput(plan.bytes_moved(&kv_lens), plan.flops(&kv_lens)));
        group.bench_function(BenchmarkId::from_parameter("1x4096"), |bencher| {
            bencher.iter(|| {
                reference::decode(&spec(), &cache, &[&sequence], q, None, &mut out, &mut lse)
                    .expect("valid inputs");
            });
        });
    }
}

fn decode(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    let cases = [
        ("1x4096", vec![4096]),
        ("1x32768", vec![32_768]),
        ("1x131072", vec![131_072]),
        ("16x32768", vec![32_768; 16]),
    ];
    for (method, bits) in
        [Method::Codes, Method::Dequantize].into_iter().flat_map(|m| Bits::ALL.map(|b| (m, b)))
    {
        let kernel = format!("homomorphic-quant/{}", method.kernel());
        let mut group = bench.group(criterion, &kernel, &bits.to_string());
        for (name, kv_lens) in &cases {
            let plan = plan(method, bits, kv_lens, bench.gpu.sm_count());
            let planner = DecodeStep::prepare(&bench.gpu, &plan).expect("prepare");
            let decode = Decode::<_, bf16>::prepare(&bench.gpu, &plan).expect("prepare");
            let stream = bench.stream.clone();
            let layer = Layer::new(&stream, bits, kv_lens);
            let rows = kv_lens.len() * Q_HEADS;
            let q = stream.clone_htod(&Inputs::Normal.generate::<bf16>(rows, DIM, 1)).expect("copy");
            let mut out = stream.alloc_zeros::<bf16>(rows * DIM).expect("allocate");
            let mut lse = stream.alloc_zeros::<f32>(rows).expect("allocate");
            let mut status = StatusWord::new(&stream).expect("allocate");
            let mut step_workspace =
                Workspace::zeroed(&stream, plan.step_workspace().bytes()).expect("allocate");
            let mut workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
            let step = planner
                .run(
                    &stream,
                    DecodeStepArgs {
                        kv_len: &View::device(&layer.kv_len, &stream),
                        places: places!(layer, &stream),
                        status: status.view_mut(&stream),
                    },
                    step_workspace.view_mut(&stream),
                )
                .expect("plan the step");
            let work = (plan.bytes_moved(kv_lens), plan.flops(kv_lens));
            bench.case(&mut group, name, work, |stream| {
                let args = DecodeArgs {
                    q: &View::device(&q, stream),
                    pages: &View::device(&layer.pages, stream),
                    sink_pool: &View::device(&layer.sinks, stream),
                    open_pool: &View::device(&layer.open, stream),
                    places: places!(layer, stream),
                    out: ViewMut::device(&mut out, stream),
                    lse: ViewMut::device(&mut lse, stream),
                };
                decode.run(stream, args, &step, workspace.view_mut(stream)).expect("launch");
            });
            drop(step);
            assert_eq!(status.read(&stream).expect("read the status"), None, "{name}");
        }
    }
}

/// A prompt that is seen as codes, and a chunk after a long cached context. Dense bf16 prefill is `attention/prefill`.
fn prefill(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    let cases = [("8192-causal", 8192, 8192), ("512-after-32768", 512, 32_768)];
    for bits in Bits::ALL {
        let mut group = bench.group(criterion, "homomorphic-quant/hack_prefill", &bits.to_string());
        group.group.sample_size(20);
        for (name, queries, kv_len) in cases {
            let stream = bench.stream.clone();
            let layer = Layer::new(&stream, bits, &[kv_len]);
            let spec = spec();
            let plan = PrefillPlan::new(PrefillConfig {
                mode: reference::Prefill::Codes,
                pools: layer.pools,
                shape: spec.shape,
                score: spec.score,
                mask: spec.mask,
                batch: 1,
                max_queries: queries,
                num_queries: queries,
                max_kv_len: kv_len,
            })
            .expect("a valid plan");
            let prefill = Prefill::<_, bf16>::prepare(&bench.gpu, &plan).expect("prepare");
            let rows = queries * Q_HEADS;
            let q = stream.clone_htod(&Inputs::Normal.generate::<bf16>(rows, DIM, 1)).expect("copy");
            let cu_queries = stream.clone_htod(&[0, queries as u32]).expect("copy");
            let mut out = stream.alloc_zeros::<bf16>(rows * DIM).expect("allocate");
            let mut lse = stream.alloc_zeros::<f32>(rows).expect("allocate");
            let mut status = StatusWord::new(&stream).expect("allocate");
            let sequences = [(queries, kv_len)];
            let work = (plan.bytes_moved(&sequences), plan.flops(&sequences));
            bench.case(&mut group, name, work, |stream| {
                let inputs = PrefillInputs {
                    q: &View::device(&q, stream),
                    cu_queries: &View::device(&cu_queries, stream),
                    kv_len: &View::device(&layer.kv_len, stream),
                    pages: &View::device(&layer.pages, stream),
                    sink_pool: &View::device(&layer.sinks, stream),
                    open_pool: &View::device(&layer.open, stream),
                    places: places!(layer, stream),
                    status: status.view_mut(stream),
                };
                let output = PrefillOutput {
                    out: ViewMut::device(&mut out, stream),
                    lse: ViewMut::device(&mut lse, stream),
                };
                prefill.run(stream, inputs, output).expect("launch");
            });
            assert_eq!(status.read(&stream).expect("read the status"), None, "{name}");
        }
    }
}

/// A prompt's layer at once, and a decoding step of 16 sequences of which one closes a block.
fn append(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    let cases = [("1x8192", vec![8192], 8192), ("16x1", (0..16).map(|i| 1092 + i * 3).collect(), 1)];
    for bits in Bits::ALL {
        let mut group = bench.group(criterion, "homomorphic-quant/hack_append", &bits.to_string());
        for (name, kv_lens, new) in &cases {
            let stream = bench.stream.clone();
            let mut layer = Layer::new(&stream, bits, kv_lens);
            let num_new = new * kv_lens.len();
            let max_kv_len = kv_lens.iter().copied().max().expect("a sequence");
            let plan = AppendPlan::new(AppendConfig {
                pools: layer.pools,
                batch: kv_lens.len(),
                max_new: *new,
                num_new,
                max_kv_len,
                strides: None,
            })
            .expect("a valid plan");
            let append = Append::<_, bf16>::prepare(&bench.gpu, &plan).expect("prepare");
            let vectors = |seed| Inputs::Normal.generate::<bf16>(num_new * KV_HEADS, DIM, seed);
            let k = stream.clone_htod(&vectors(1)).expect("copy");
            let v = stream.clone_htod(&vectors(2)).expect("copy");
            let start: Vec<u32> = (0..=kv_lens.len()).map(|i| (i * new) as u32).collect();
            let start = stream.clone_htod(&start).expect("copy");
            let mut status = StatusWord::new(&stream).expect("allocate");
            bench.case(&mut group, name, (plan.bytes_moved(num_new), 0), |stream| {
                let args = AppendArgs {
                    k_new: &View::device(&k, stream),
                    v_new: &View::device(&v, stream),
                    new_start: &View::device(&start, stream),
                    kv_len: &View::device(&layer.kv_len, stream),
                    places: places!(layer, stream),
                    pages: ViewMut::device(&mut layer.pages, stream),
                    sink_pool: ViewMut::device(&mut layer.sinks, stream),
                    open_pool: ViewMut::device(&mut layer.open, stream),
                    status: status.view_mut(stream),
                };
                append.run(stream, args).expect("launch");
            });
            assert_eq!(status.read(&stream).expect("read the status"), None, "{name}");
        }
    }
}

criterion_group!(benches, cpu, decode, prefill, append);
