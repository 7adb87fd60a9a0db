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
use longkv_attention::testing::{Comparison, Inputs, Tolerance, shuffled_pages};
use longkv_attention::{BlockTable, DType, Mask, PageLayout, Score};
use longkv_benches::data::{Vectors, poisoned, repeated};
use longkv_benches::{Case, GpuBench, Work, check, throughput};
use longkv_cuda::cudarc::driver::CudaSlice;
use longkv_cuda::memory::{View, ViewMut};
use longkv_cuda::status::StatusWord;
use longkv_cuda::workspace::Workspace;

use super::{DIM, EVEN, KV_HEADS, MIXED, ONE_WIDE, PAGE, Q_HEADS, Ranks, UNIFORM, layout, shape};

/// What the times of decoding cover.
const PLAN: &str = "decode and merge, without the plan of the step";

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
    for (lengths, kv_lens) in &lengths() {
        for (layer, ranks, splits) in LAYERS {
            bench.case(&mut group, &format!("{layer}/{lengths}"), |case| {
                low_rank(case, &ranks, splits, kv_lens);
            });
        }
        bench.case(&mut group, &format!("dense/{lengths}"), |case| over_dense(case, None, kv_lens));
        bench.case(&mut group, &format!("reconstruct/{lengths}"), |case| {
            over_dense(case, Some(&UNIFORM), kv_lens);
        });
    }
}

fn low_rank(case: &mut Case<'_, '_>, ranks: &Ranks, splits: Splits, kv_lens: &[usize]) {
    let (gpu, stream) = (&case.bench.gpu, case.bench.stream.clone());
    let plan = plan(ranks, splits, kv_lens, gpu.sm_count());
    let planner = DecodeStep::prepare(gpu, &plan).expect("prepare");
    let decode = Decode::<_, bf16>::prepare(gpu, &plan).expect("prepare");
    let (k_sum, v_sum) = ranks.iter().fold((0, 0), |(k, v), ranks| (k + ranks.0, v + ranks.1));
    let layout = layout(ranks);
    let page = random(layout.page_elements(), layout.page_elements(), 5);
    let store = repeated(&stream, &page, pages(kv_lens) * page.len());
    let q = random(GROUP * k_sum, GROUP * k_sum, 1);
    let q_device = repeated(&stream, &q, kv_lens.len() * q.len());
    let lens: Vec<u32> = kv_lens.iter().map(|len| *len as u32).collect();
    let lens = stream.clone_htod(&lens).expect("copy");
    let table = stream.clone_htod(&block_table(kv_lens)).expect("copy");
    let out = poisoned::<bf16>(&stream, kv_lens.len() * GROUP * v_sum);
    let lse = poisoned::<f32>(&stream, kv_lens.len() * Q_HEADS);
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
    let work = Work::new(plan.bytes_moved(kv_lens, DType::BF16), plan.flops(kv_lens)).note(PLAN);
    case.time(
        work,
        (out, lse),
        |(out, lse), stream| {
            let args = DecodeArgs {
                q: &View::device(&q_device, stream),
                pages: &View::device(&store, stream),
                block_table: &block_table,
                out: ViewMut::device(out, stream),
                lse: ViewMut::device(lse, stream),
            };
            decode.run(stream, args, &step, workspace.view_mut(stream)).expect("launch");
        },
        |(out, lse), stream| {
            // All pages hold the same, so that attention over n of them is that over one, with an LSE that is ln n more.
            let view = PagedView {
                layout: &layout,
                pages: &page,
                block_table: BlockTable::shared(&[0], 1, 1).expect("a block table"),
                lengths: &[PAGE as u32],
            };
            let attend = Attend { group: GROUP, score: score(), mask: Mask::Causal };
            let expected = reference::attend(&attend, &q, &[0, 1], &view, Probabilities::Rounded);
            let expected = expected.expect("valid inputs");
            let longest = (0..kv_lens.len()).max_by_key(|sequence| kv_lens[*sequence]).expect("a sequence");
            for sequence in [0, longest] {
                let found = check::download(stream, out, sequence * GROUP * v_sum, GROUP * v_sum);
                Comparison::attention(&found, &expected.out, GROUP * v_sum)
                    .assert(format!("sequence {sequence}"));
                let copies = (kv_lens[sequence] as f64 / PAGE as f64).ln();
                let lses: Vec<f64> = expected.lse.iter().map(|lse| lse + copies).collect();
                let found = check::download(stream, lse, sequence * Q_HEADS, Q_HEADS);
                Comparison::new(&found, &lses, Tolerance::LSE).assert(format!("LSE of sequence {sequence}"));
            }
        },
    );
    drop(step);
    check::no_fault(&stream, &status);
}

/// The dense kernel over full keys and values, which are rebuilt from a low-rank cache first where ranks are given. Bytes are
/// those that the method has to read: uncompressed vectors, or the low-rank cache.
fn over_dense(case: &mut Case<'_, '_>, ranks: Option<&Ranks>, kv_lens: &[usize]) {
    let (gpu, stream) = (&case.bench.gpu, case.bench.stream.clone());
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
        sm_count: gpu.sm_count(),
    })
    .expect("a valid plan");
    let planner = dense::DecodeStep::prepare(gpu, &plan).expect("prepare");
    let decode = dense::Decode::<_, bf16>::prepare(gpu, &plan).expect("prepare");
    let (k, v, q) = (Vectors::new(DIM, 5), Vectors::new(DIM, 6), Vectors::<bf16>::new(DIM, 1));
    let vectors = pages * PAGE * KV_HEADS;
    let (k_device, v_device) = (k.upload(&stream, vectors), v.upload(&stream, vectors));
    let q_device = q.upload(&stream, kv_lens.len() * Q_HEADS);
    let lens: Vec<u32> = kv_lens.iter().map(|len| *len as u32).collect();
    let lens = stream.clone_htod(&lens).expect("copy");
    let numbers = block_table(kv_lens);
    let table = stream.clone_htod(&numbers).expect("copy");
    let out = poisoned::<bf16>(&stream, kv_lens.len() * Q_HEADS * DIM);
    let lse = poisoned::<f32>(&stream, kv_lens.len() * Q_HEADS);
    let mut status = StatusWord::new(&stream).expect("allocate");
    let mut step_workspace = Workspace::zeroed(&stream, plan.step_workspace().bytes()).expect("allocate");
    let mut workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
    let rebuild = ranks.map(|ranks| Rebuild::new(case.bench, ranks, pages));
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
    case.time(
        Work::new(bytes, plan.flops(kv_lens)).note(PLAN),
        (k_device, v_device, out, lse),
        |(k, v, out, lse), stream| {
            if let Some(rebuild) = &rebuild {
                let args = ReconstructArgs {
                    pages: &View::device(&rebuild.cache, stream),
                    back_k: &View::device(&rebuild.back_k, stream),
                    back_v: &View::device(&rebuild.back_v, stream),
                    k: ViewMut::device(k, stream),
                    v: ViewMut::device(v, stream),
                };
                rebuild.kernel.run(stream, args).expect("launch");
            }
            let args = dense::DecodeArgs {
                q: &View::device(&q_device, stream),
                k: &View::device(k, stream),
                v: &View::device(v, stream),
                block_table: Some(&block_table),
                kv_start: None,
                out: ViewMut::device(out, stream),
                lse: ViewMut::device(lse, stream),
            };
            decode.run(stream, args, &step, workspace.view_mut(stream)).expect("launch");
        },
        |(k_device, v_device, out, lse), stream| {
            let (head, kv_head) = (Q_HEADS - 1, KV_HEADS - 1);
            // What the decode has read, where a kernel made it: all pages of the low-rank cache hold the same.
            let page_of = |device: &CudaSlice<bf16>, page: usize| {
                check::download(stream, device, (page * KV_HEADS + kv_head) * PAGE * DIM, PAGE * DIM)
            };
            let made = rebuild.is_some().then(|| {
                let page = numbers[0] as usize;
                let made = [page_of(k_device, page), page_of(v_device, page)];
                assert!(made.iter().flatten().any(|x| x.to_f32() != 0.0), "nothing was rebuilt");
                made
            });
            let at = |token: usize| {
                let page = numbers[token / PAGE] as usize;
                (page * KV_HEADS + kv_head) * PAGE + token % PAGE
            };
            let vector = |part: usize, token: usize| match (&made, part) {
                (Some(made), _) => &made[part][token % PAGE * DIM..][..DIM],
                (None, 0) => k.get(at(token)),
                (None, _) => v.get(at(token)),
            };
            let row = check::attention(
                score(),
                q.get(head),
                kv_lens[0],
                |token| vector(0, token),
                |token| vector(1, token),
            );
            check::rows(stream, out, lse, &[(head, row)]);
        },
    );
    drop(step);
    check::no_fault(&stream, &status);
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
        let upload = |elements, piece, seed| repeated(&bench.stream, &random(piece, piece, seed), elements);
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
