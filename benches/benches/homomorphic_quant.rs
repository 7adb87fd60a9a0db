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
use longkv_benches::data::{Vectors, poisoned, repeated};
use longkv_benches::{Case, GpuBench, Work, check, throughput};
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
    /// What every head of every page holds.
    block: HeadBlock,
    /// What is in the pools of sinks and of open blocks.
    side: [Vec<bf16>; 2],
    table: Vec<u32>,
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
        let side = |page: usize, seed| Inputs::Normal.generate::<bf16>(kv_lens.len(), page / 2, seed);
        let side = [side(pools.sink_page().bytes(), 7), side(pools.open_page().bytes(), 8)];
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
            pages: repeated(stream, &segment, counts.pages * pools.page_bytes()),
            sinks: stream.clone_htod(&side[0]).expect("copy"),
            open: stream.clone_htod(&side[1]).expect("copy"),
            block_table: stream.clone_htod(&table).expect("copy"),
            sink_page: stream.clone_htod(&numbers).expect("copy"),
            open_page: stream.clone_htod(&numbers).expect("copy"),
            kv_len: stream.clone_htod(&lens).expect("copy"),
            pools,
            block,
            side,
            table,
        }
    }

    /// Attention of one query head over the first `seen` tokens of a sequence of `kv_len`, over the vectors that the codes stand for.
    fn row(&self, q: &[bf16], sequence: usize, kv_head: usize, kv_len: usize, seen: usize) -> check::Row {
        let plain = |values: Vec<f64>| values.into_iter().map(|x| x as f32).collect::<Vec<f32>>();
        let geometry = self.pools.geometry();
        let block = [plain(self.block.keys(geometry)), plain(self.block.values(geometry))];
        let closed = self.pools.split(kv_len).0;
        let [sinks, open] =
            &self.side.each_ref().map(|side| side.iter().map(|x| x.to_f32()).collect::<Vec<_>>());
        // A side page holds, of each head, its keys, then its values.
        let at = |token: usize, part: usize| {
            let (store, tokens, token) = match token.checked_sub(SINKS) {
                None => (sinks, SINKS, token),
                Some(token) if token / PARTITION < closed => {
                    return &block[part][token % PARTITION * DIM..][..DIM];
                }
                Some(token) => (open, PARTITION, token % PARTITION),
            };
            &store[((sequence * KV_HEADS + kv_head) * 2 * tokens + part * tokens + token) * DIM..][..DIM]
        };
        check::attention(spec().score, q, seen, |token| at(token, 0), |token| at(token, 1))
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
            bench.case(&mut group, name, |case| decode_case(case, method, bits, kv_lens));
        }
    }
}

fn decode_case(case: &mut Case<'_, '_>, method: Method, bits: Bits, kv_lens: &[usize]) {
    let (gpu, stream) = (&case.bench.gpu, case.bench.stream.clone());
    let plan = plan(method, bits, kv_lens, gpu.sm_count());
    let planner = DecodeStep::prepare(gpu, &plan).expect("prepare");
    let decode = Decode::<_, bf16>::prepare(gpu, &plan).expect("prepare");
    let layer = Layer::new(&stream, bits, kv_lens);
    let rows = kv_lens.len() * Q_HEADS;
    let q = Inputs::Normal.generate::<bf16>(rows, DIM, 1);
    let q_device = stream.clone_htod(&q).expect("copy");
    let (out, lse) = (poisoned::<bf16>(&stream, rows * DIM), poisoned::<f32>(&stream, rows));
    let mut status = StatusWord::new(&stream).expect("allocate");
    let mut step_workspace = Workspace::zeroed(&stream, plan.step_workspace().bytes()).expect("allocate");
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
    let work = Work::new(plan.bytes_moved(kv_lens), plan.flops(kv_lens))
        .note("decode and merge, without the plan of the step");
    case.time(
        work,
        (out, lse),
        |(out, lse), stream| {
            let args = DecodeArgs {
                q: &View::device(&q_device, stream),
                pages: &View::device(&layer.pages, stream),
                sink_pool: &View::device(&layer.sinks, stream),
                open_pool: &View::device(&layer.open, stream),
                places: places!(layer, stream),
                out: ViewMut::device(out, stream),
                lse: ViewMut::device(lse, stream),
            };
            decode.run(stream, args, &step, workspace.view_mut(stream)).expect("launch");
        },
        |(out, lse), stream| {
            let expected = [(0, 3), (kv_lens.len() - 1, Q_HEADS - 1)].map(|(sequence, head)| {
                let (row, len) = (sequence * Q_HEADS + head, kv_lens[sequence]);
                let q = &q[row * DIM..][..DIM];
                (row, layer.row(q, sequence, head * KV_HEADS / Q_HEADS, len, len))
            });
            check::quantized_rows(stream, out, lse, &expected);
        },
    );
    drop(step);
    check::no_fault(&stream, &status);
}

/// A prompt that is seen as codes, and a chunk after a long cached context. Dense bf16 prefill is `attention/prefill`.
fn prefill(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    let cases = [("8192-causal", 8192, 8192), ("512-after-32768", 512, 32_768)];
    for bits in Bits::ALL {
        let mut group = bench.group(criterion, "homomorphic-quant/hack_prefill", &bits.to_string());
        for (name, queries, kv_len) in cases {
            bench.case(&mut group, name, |case| prefill_case(case, bits, queries, kv_len));
        }
    }
}

fn prefill_case(case: &mut Case<'_, '_>, bits: Bits, queries: usize, kv_len: usize) {
    let (gpu, stream) = (&case.bench.gpu, case.bench.stream.clone());
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
    let prefill = Prefill::<_, bf16>::prepare(gpu, &plan).expect("prepare");
    let rows = queries * Q_HEADS;
    let q = Vectors::<bf16>::new(DIM, 1);
    let q_device = q.upload(&stream, rows);
    let cu_queries = stream.clone_htod(&[0, queries as u32]).expect("copy");
    let (out, lse) = (poisoned::<bf16>(&stream, rows * DIM), poisoned::<f32>(&stream, rows));
    let status = StatusWord::new(&stream).expect("allocate");
    let sequences = [(queries, kv_len)];
    let work = Work::new(plan.bytes_moved(&sequences), plan.flops(&sequences));
    let (.., status) = case.time(
        work,
        (out, lse, status),
        |(out, lse, status), stream| {
            let inputs = PrefillInputs {
                q: &View::device(&q_device, stream),
                cu_queries: &View::device(&cu_queries, stream),
                kv_len: &View::device(&layer.kv_len, stream),
                pages: &View::device(&layer.pages, stream),
                sink_pool: &View::device(&layer.sinks, stream),
                open_pool: &View::device(&layer.open, stream),
                places: places!(layer, stream),
                status: status.view_mut(stream),
            };
            let output =
                PrefillOutput { out: ViewMut::device(out, stream), lse: ViewMut::device(lse, stream) };
            prefill.run(stream, inputs, output).expect("launch");
        },
        |(out, lse, status), stream| {
            check::no_fault(stream, status);
            let samples = [(0, 0), (queries / 2 + 1, 13), (queries - 1, Q_HEADS - 1)];
            let expected = samples.map(|(query, head)| {
                let (row, seen) = (query * Q_HEADS + head, kv_len - queries + query + 1);
                (row, layer.row(q.get(row), 0, head * KV_HEADS / Q_HEADS, kv_len, seen))
            });
            check::quantized_rows(stream, out, lse, &expected);
        },
    );
    check::no_fault(&stream, &status);
}

/// A prompt's layer at once, and decoding steps: of one sequence, of which the token closes a block, and of 16, of which one does.
fn append(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    let cases = [
        ("1x8192", vec![8192], 8192),
        ("1x1", vec![1092], 1),
        ("16x1", (0..16).map(|i| 1092 + i * 3).collect(), 1),
    ];
    for bits in Bits::ALL {
        let mut group = bench.group(criterion, "homomorphic-quant/hack_append", &bits.to_string());
        for (name, kv_lens, new) in &cases {
            bench.case(&mut group, name, |case| append_case(case, bits, kv_lens, *new));
        }
    }
}

fn append_case(case: &mut Case<'_, '_>, bits: Bits, kv_lens: &[usize], new: usize) {
    let (gpu, stream) = (&case.bench.gpu, case.bench.stream.clone());
    let layer = Layer::new(&stream, bits, kv_lens);
    let num_new = new * kv_lens.len();
    let plan = AppendPlan::new(AppendConfig {
        pools: layer.pools,
        batch: kv_lens.len(),
        max_new: new,
        num_new,
        max_kv_len: kv_lens.iter().copied().max().expect("a sequence"),
        strides: None,
    })
    .expect("a valid plan");
    let append = Append::<_, bf16>::prepare(gpu, &plan).expect("prepare");
    let (k, v) = (Vectors::<bf16>::new(DIM, 1), Vectors::<bf16>::new(DIM, 2));
    let (k_device, v_device) = (k.upload(&stream, num_new * KV_HEADS), v.upload(&stream, num_new * KV_HEADS));
    let start: Vec<u32> = (0..=kv_lens.len()).map(|i| (i * new) as u32).collect();
    let start = stream.clone_htod(&start).expect("copy");
    let status = StatusWord::new(&stream).expect("allocate");
    let work = Work::new(plan.bytes_moved(num_new), 0);
    let (.., status) = case.time(
        work,
        (layer, status),
        |(layer, status), stream| {
            let args = AppendArgs {
                k_new: &View::device(&k_device, stream),
                v_new: &View::device(&v_device, stream),
                new_start: &View::device(&start, stream),
                kv_len: &View::device(&layer.kv_len, stream),
                places: places!(layer, stream),
                pages: ViewMut::device(&mut layer.pages, stream),
                sink_pool: ViewMut::device(&mut layer.sinks, stream),
                open_pool: ViewMut::device(&mut layer.open, stream),
                status: status.view_mut(stream),
            };
            append.run(stream, args).expect("launch");
        },
        |(layer, status), stream| {
            check::no_fault(stream, status);
            // The last block that the first sequence closes, of two heads, to the bit: its tokens are new ones, and before them those
            // of the open block.
            let (pools, closed) = (layer.pools, layer.pools.split(kv_lens[0]).0);
            let (first, seen) = (SINKS + (closed - 1) * PARTITION, kv_lens[0] - new);
            for kv_head in [0, KV_HEADS - 1] {
                let vectors = |part: usize, new: &Vectors<bf16>| -> Vec<f32> {
                    let open =
                        |slot| &layer.side[1][((kv_head * 2 + part) * PARTITION + slot) * DIM..][..DIM];
                    let at = |slot: usize| match (first + slot).checked_sub(seen) {
                        Some(token) => new.get(token * KV_HEADS + kv_head),
                        None => open(slot),
                    };
                    (0..PARTITION).flat_map(at).map(|x| x.to_f32()).collect()
                };
                let place = BlockPlace { layer: 0, kv_head: kv_head as u32, token: first as u32 };
                let (k, v) = (vectors(0, &k), vectors(1, &v));
                let geometry = pools.geometry();
                let block = HeadBlock::quantize(geometry, Rounding::Nearest, place, &k, &v).expect("a block");
                let at =
                    layer.table[closed - 1] as usize * pools.page_bytes() + kv_head * pools.segment_bytes();
                let found = check::download(stream, &layer.pages, at, pools.segment_bytes());
                let found = PageLayout::Packed.read(geometry, &found).expect("a segment");
                assert!(found == block, "block {} of head {kv_head} is another", closed - 1);
            }
        },
    );
    check::no_fault(&stream, &status);
}

criterion_group!(benches, cpu, decode, prefill, append);
