//! Balanced decode in the reduced basis, and what it is measured against: equal bytes at uniform ranks, one block per head,
//! the dense kernel on uncompressed keys and values, and rebuilding these before the dense kernel.
//!
//! `reconstruct` rebuilds keys and values in memory, as EigenAttention's released code does with keys at every step (`k_proj_up`, then
//! RoPE): the published way where attention runs in the full dimension. It is no bound for a kernel that rebuilds keys tile by tile on
//! chip, as Palu's does (its values stay low-rank): that one reads as few bytes as ours and pays r·d multiply-adds per key and KV
//! head on the tensor cores instead.

use criterion::{BenchmarkId, Criterion};
use half::bf16;
use kv_compress::cache::PagedView;
use kv_compress::gpu::{
    Decode, DecodeArgs, DecodeConfig, DecodePlan, DecodeStep, DecodeStepArgs, Reconstruct, ReconstructArgs,
    ReconstructPlan, Splits,
};
use kv_compress::reference::{self, Attend};
use longkv_attention::gpu as dense;
use longkv_attention::reference::Probabilities;
use longkv_attention::testing::{Inputs, shuffled_pages};
use longkv_attention::{BlockTable, DType, Mask, PageLayout, Score};
use longkv_benches::{GpuBench, GpuGroup, throughput};
use longkv_cuda::cudarc::driver::CudaSlice;
use longkv_cuda::memory::{View, ViewMut};
use longkv_cuda::status::StatusWord;
use longkv_cuda::workspace::Workspace;

use super::{DIM, EVEN, KV_HEADS, MIXED, ONE_WIDE, PAGE, Q_HEADS, Ranks, UNIFORM, layout, shape};

const GROUP: usize = Q_HEADS / KV_HEADS;

/// (name, keys of each sequence): latency, bandwidth, and one long sequence among short ones.
fn lengths() -> [(&'static str, Vec<usize>); 4] {
    let mut ragged = vec![4096; 63];
    ragged.push(131_072);
    [
        ("1x4096", vec![4096]),
        ("1x131072", vec![131_072]),
        ("16x32768", vec![32_768; 16]),
        ("63x4096+131072", ragged),
    ]
}

/// (name, ranks, splits).
const LAYERS: [(&str, Ranks, Splits); 5] = [
    ("mixed", MIXED, Splits::Balanced),
    ("uniform", UNIFORM, Splits::Balanced),
    ("mixed-one-block-per-head", MIXED, Splits::OneBlockPerHead),
    ("one-wide", ONE_WIDE, Splits::Balanced),
    ("even", EVEN, Splits::Balanced),
];

/// That of the full dimension.
fn score() -> Score {
    Score::new((DIM as f32).powf(-0.5)).expect("a finite scale")
}

fn max_pages(kv_lens: &[usize]) -> usize {
    kv_lens.iter().map(|len| len.div_ceil(PAGE)).max().expect("a sequence")
}

fn pages(kv_lens: &[usize]) -> usize {
    kv_lens.iter().map(|len| len.div_ceil(PAGE)).sum()
}

/// Page ids `[batch, max_pages]`, scattered.
fn block_table(kv_lens: &[usize]) -> Vec<u32> {
    let mut free = shuffled_pages(pages(kv_lens), 4).into_iter();
    let mut table = vec![u32::MAX; kv_lens.len() * max_pages(kv_lens)];
    for (entries, len) in table.chunks_mut(max_pages(kv_lens)).zip(kv_lens) {
        entries[..len.div_ceil(PAGE)].fill_with(|| free.next().expect("a page for each entry"));
    }
    table
}

fn plan(ranks: &Ranks, splits: Splits, kv_lens: &[usize], sm_count: u32) -> DecodePlan {
    DecodePlan::new(DecodeConfig {
        shape: shape(),
        layout: layout(ranks),
        pages: pages(kv_lens),
        max_pages: max_pages(kv_lens),
        score: score(),
        mask: Mask::Causal,
        batch: kv_lens.len(),
        q_len: 1,
        max_kv_len: kv_lens.iter().copied().max().expect("a sequence"),
        splits,
        sm_count,
    })
    .expect("a valid plan")
}

/// Random data, never zeros, which draw less power; `piece` elements of it, repeated, are enough for that.
fn random(elements: usize, piece: usize, seed: u64) -> Vec<bf16> {
    let piece: Vec<bf16> = Inputs::Normal.generate(piece, 1, seed);
    piece.iter().copied().cycle().take(elements).collect()
}

pub(super) fn cpu(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("kv-compress/decode/cpu-reference/bf16");
    group.sample_size(10);
    let kv_lens = [4096];
    let layout = layout(&MIXED);
    let plan = plan(&MIXED, Splits::Balanced, &kv_lens, 1);
    let k_sum: usize = MIXED.iter().map(|ranks| ranks.0).sum();
    let q: Vec<bf16> = Inputs::Normal.generate(1, GROUP * k_sum, 1);
    let store = random(pages(&kv_lens) * layout.page_elements(), layout.page_elements(), 2);
    let table = block_table(&kv_lens);
    let attend = Attend { group: GROUP, score: score(), mask: Mask::Causal };
    group.throughput(throughput(plan.bytes_moved(&kv_lens, DType::BF16), plan.flops(&kv_lens)));
    group.bench_function(BenchmarkId::from_parameter("mixed/1x4096"), |bencher| {
        let view = PagedView {
            layout: &layout,
            pages: &store,
            block_table: BlockTable::shared(&table, 1, max_pages(&kv_lens)).expect("a block table"),
            lengths: &[4096],
        };
        bencher.iter(|| {
            reference::attend(&attend, &q, &[0, 1], &view, Probabilities::Rounded).expect("valid inputs")
        });
    });
}

pub(super) fn gpu(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    let mut group = bench.group(criterion, "kv-compress/decode", "bf16");
    for (lengths, kv_lens) in lengths() {
        for (layer, ranks, splits) in LAYERS {
            low_rank(&mut bench, &mut group, &format!("{layer}/{lengths}"), &ranks, splits, &kv_lens);
        }
        over_dense(&mut bench, &mut group, &format!("dense/{lengths}"), None, &kv_lens);
        over_dense(&mut bench, &mut group, &format!("reconstruct/{lengths}"), Some(&UNIFORM), &kv_lens);
    }
}

fn low_rank(
    bench: &mut GpuBench,
    group: &mut GpuGroup<'_>,
    name: &str,
    ranks: &Ranks,
    splits: Splits,
    kv_lens: &[usize],
) {
    let plan = plan(ranks, splits, kv_lens, bench.gpu.sm_count());
    let planner = DecodeStep::prepare(&bench.gpu, &plan).expect("prepare");
    let decode = Decode::<_, bf16>::prepare(&bench.gpu, &plan).expect("prepare");
    let stream = bench.stream.clone();
    let (k_sum, v_sum) = ranks.iter().fold((0, 0), |(k, v), ranks| (k + ranks.0, v + ranks.1));
    let page = layout(ranks).page_elements();
    let store = stream.clone_htod(&random(pages(kv_lens) * page, page, 5)).expect("copy");
    let q = stream.clone_htod(&random(kv_lens.len() * GROUP * k_sum, GROUP * k_sum, 1)).expect("copy");
    let lens: Vec<u32> = kv_lens.iter().map(|len| *len as u32).collect();
    let lens = stream.clone_htod(&lens).expect("copy");
    let table = stream.clone_htod(&block_table(kv_lens)).expect("copy");
    let mut out = stream.alloc_zeros::<bf16>(kv_lens.len() * GROUP * v_sum).expect("allocate");
    let mut lse = stream.alloc_zeros::<f32>(kv_lens.len() * Q_HEADS).expect("allocate");
    let mut status = StatusWord::new(&stream).expect("allocate");
    let mut step_workspace = Workspace::zeroed(&stream, plan.step_workspace().bytes()).expect("allocate");
    let mut workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
    let block_table = View::device(&table, &stream);
    let step = DecodeStepArgs {
        kv_len: &View::device(&lens, &stream),
        block_table: &block_table,
        status: status.view_mut(&stream),
    };
    let step = planner.run(&stream, step, step_workspace.view_mut(&stream)).expect("plan the step");
    let work = (plan.bytes_moved(kv_lens, DType::BF16), plan.flops(kv_lens));
    bench.case(group, name, work, |stream| {
        let args = DecodeArgs {
            q: &View::device(&q, stream),
            pages: &View::device(&store, stream),
            block_table: &block_table,
            out: ViewMut::device(&mut out, stream),
            lse: ViewMut::device(&mut lse, stream),
        };
        decode.run(stream, args, &step, workspace.view_mut(stream)).expect("launch");
    });
    drop(step);
    assert_eq!(status.read(&stream).expect("read the status"), None, "{name}");
}

/// The dense kernel over full keys and values, which are rebuilt from a low-rank cache first where ranks are given. Bytes are
/// those that the method has to read: uncompressed vectors, or the low-rank cache.
fn over_dense(
    bench: &mut GpuBench,
    group: &mut GpuGroup<'_>,
    name: &str,
    ranks: Option<&Ranks>,
    kv_lens: &[usize],
) {
    let pages = pages(kv_lens);
    let hnd = PageLayout::hnd(PAGE, KV_HEADS, DIM);
    let max_pages = max_pages(kv_lens);
    let plan = dense::DecodePlan::new(dense::DecodeConfig {
        shape: shape(),
        score: score(),
        mask: Mask::Causal,
        batch: kv_lens.len(),
        q_len: 1,
        max_kv_len: kv_lens.iter().copied().max().expect("a sequence"),
        cache: dense::CacheLayout::Paged {
            page_size: PAGE,
            pages,
            max_pages,
            per_head: false,
            k: hnd,
            v: hnd,
        },
        splits: dense::Splits::Balanced,
        sm_count: bench.gpu.sm_count(),
    })
    .expect("a valid plan");
    let planner = dense::DecodeStep::prepare(&bench.gpu, &plan).expect("prepare");
    let decode = dense::Decode::<_, bf16>::prepare(&bench.gpu, &plan).expect("prepare");
    let stream = bench.stream.clone();
    let page = PAGE * KV_HEADS * DIM;
    let upload = |elements, piece, seed| stream.clone_htod(&random(elements, piece, seed)).expect("copy");
    let (mut k, mut v) = (upload(pages * page, page, 5), upload(pages * page, page, 6));
    let q = upload(kv_lens.len() * Q_HEADS * DIM, Q_HEADS * DIM, 1);
    let lens: Vec<u32> = kv_lens.iter().map(|len| *len as u32).collect();
    let lens = stream.clone_htod(&lens).expect("copy");
    let table = stream.clone_htod(&block_table(kv_lens)).expect("copy");
    let mut out = stream.alloc_zeros::<bf16>(kv_lens.len() * Q_HEADS * DIM).expect("allocate");
    let mut lse = stream.alloc_zeros::<f32>(kv_lens.len() * Q_HEADS).expect("allocate");
    let mut status = StatusWord::new(&stream).expect("allocate");
    let mut step_workspace = Workspace::zeroed(&stream, plan.step_workspace().bytes()).expect("allocate");
    let mut workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
    let rebuild = ranks.map(|ranks| Rebuild::new(bench, ranks, pages));
    let block_table = View::device(&table, &stream);
    let step = dense::DecodeStepArgs {
        kv_len: &View::device(&lens, &stream),
        block_table: Some(&block_table),
        kv_start: None,
        status: status.view_mut(&stream),
    };
    let step = planner.run(&stream, step, step_workspace.view_mut(&stream)).expect("plan the step");
    let dense_bytes = plan.bytes_moved(kv_lens, DType::BF16);
    let bytes = rebuild.as_ref().map_or(dense_bytes, |rebuild| rebuild.cache_bytes);
    bench.case(group, name, (bytes, plan.flops(kv_lens)), |stream| {
        if let Some(rebuild) = &rebuild {
            let args = ReconstructArgs {
                pages: &View::device(&rebuild.cache, stream),
                back_k: &View::device(&rebuild.back_k, stream),
                back_v: &View::device(&rebuild.back_v, stream),
                k: ViewMut::device(&mut k, stream),
                v: ViewMut::device(&mut v, stream),
            };
            rebuild.kernel.run(stream, args).expect("launch");
        }
        let args = dense::DecodeArgs {
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

/// A low-rank cache and what rebuilds dense keys and values from it.
struct Rebuild {
    kernel: Reconstruct<longkv_cuda::driver::GpuFunction, bf16>,
    cache: CudaSlice<bf16>,
    cache_bytes: u64,
    back_k: CudaSlice<bf16>,
    back_v: CudaSlice<bf16>,
}

impl Rebuild {
    fn new(bench: &GpuBench, ranks: &Ranks, pages: usize) -> Self {
        let layout = layout(ranks);
        let plan = ReconstructPlan::new(shape(), &layout, pages).expect("a valid plan");
        let upload =
            |elements, piece, seed| bench.stream.clone_htod(&random(elements, piece, seed)).expect("copy");
        let (k_sum, v_sum) = ranks.iter().fold((0, 0), |(k, v), ranks| (k + ranks.0, v + ranks.1));
        Rebuild {
            kernel: Reconstruct::prepare(&bench.gpu, &plan).expect("prepare"),
            cache: upload(pages * layout.page_elements(), layout.page_elements(), 7),
            cache_bytes: (pages * layout.page_bytes()) as u64,
            back_k: upload(k_sum * DIM, k_sum * DIM, 8),
            back_v: upload(v_sum * DIM, v_sum * DIM, 9),
        }
    }
}
