//! Scores and selection: a context of 128K tokens in pages of 16, 8 KV heads of 4 query heads.

use std::sync::Arc;

use ::sparse_attn::gpu::{Extent, Select, SelectArgs, SelectConfig, SelectPlan};
use ::sparse_attn::index::pages::{PageIndex, Scorer};
use ::sparse_attn::index::{Closing, GroupQuery, Index};
use ::sparse_attn::metadata::NONE;
use ::sparse_attn::page::PageSpec;
use ::sparse_attn::select::{Aggregation, SelectRule, aggregate, top_k};
use criterion::{BenchmarkId, Criterion};
use half::bf16;
use longkv_attention::testing::{Comparison, Inputs, Tolerance};
use longkv_attention::{DType, HeadShape, Score};
use longkv_benches::data::{Vectors, poisoned, repeated};
use longkv_benches::{Case, GpuBench, Work, check, throughput};
use longkv_cuda::cudarc::driver::{CudaSlice, CudaStream};
use longkv_cuda::memory::{View, ViewMut};
use longkv_cuda::status::StatusWord;
use longkv_cuda::workspace::Workspace;

const PAGE: usize = 16;
const DIM: usize = 128;
/// (Requests, partitions of a row, pages selected).
const CASES: [(usize, usize, usize); 3] = [(1, 2048, 128), (1, 8192, 128), (8, 8192, 128)];

/// Selection for `requests` requests.
fn plan(requests: usize, partitions: usize, pages: usize, sm_count: u32) -> SelectPlan {
    let shape = HeadShape::new(32, 8, DIM, DIM).expect("a valid shape");
    let extent = Extent {
        requests,
        shape,
        page: PageSpec::new(PAGE, DIM, DIM, DType::BF16).expect("a valid page"),
        max_pages: partitions,
        max_selected: pages,
        slots: 6 * pages,
        max_open: 1,
        runs: requests * 8 * (6 * pages + 1),
        host_pages: 1,
    };
    let score = Score::new(0.088).expect("a finite scale");
    let rule =
        SelectRule { aggregation: Aggregation::Mean, score, pages, sinks: 1, recent: 1, estimate: 0.0 };
    let config =
        SelectConfig { extent, scorer: Scorer::MinMax, partition_pages: 1, rule, max_closing: 1, sm_count };
    SelectPlan::new(config).expect("a valid plan")
}

pub(super) fn cpu(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sparse-attn/select/cpu-reference/bf16");
    group.sample_size(10);
    let (partitions, pages) = (2048, 128);
    let k = Inputs::Normal.values(partitions * PAGE, DIM, 1);
    let q = Inputs::Normal.values(4, DIM, 2);
    let mut index = PageIndex::new(Scorer::MinMax, PAGE, DIM);
    index.close(&Closing { k: &k, k_unrotated: None, v: &k, position: 0 }).expect("whole chunks");
    let plan = plan(1, partitions, pages, 1);
    group.throughput(throughput(plan.bytes_moved(partitions), plan.flops(partitions)));
    group.bench_function(BenchmarkId::from_parameter(format!("1x1x{partitions}")), |bencher| {
        let score = Score::new(0.088).expect("a finite scale");
        let (mut raw, mut scores) = (Vec::new(), Vec::new());
        bencher.iter(|| {
            let query = GroupQuery { q: &q, q_unrotated: None, position: 0 };
            index.score(&query, &mut raw).expect("a query of the index");
            aggregate(Aggregation::Mean, &score, &raw, partitions, &mut scores);
            top_k(&scores, pages)
        });
    });
}

pub(super) fn gpu(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    let mut group = bench.group(criterion, "sparse-attn/select", "bf16");
    for (requests, partitions, pages) in CASES {
        bench.case(&mut group, &format!("{requests}x8x{partitions}"), |case| {
            select(case, requests, partitions, pages);
        });
    }
}

/// Least and greatest keys of partitions `[∞, 2, DIM]`.
pub(super) struct Summaries(Vec<bf16>);

impl Summaries {
    pub(super) fn new(seed: u64) -> Self {
        // A prime number of pairs, so that no two rows see the same.
        let values: Vec<bf16> = Inputs::Normal.generate(2 * 4093, DIM, seed);
        let pairs = values.chunks_exact(2 * DIM).flat_map(|pair| {
            let (a, b) = pair.split_at(DIM);
            let low = a.iter().zip(b).map(|(a, b)| if a < b { *a } else { *b });
            let high = a.iter().zip(b).map(|(a, b)| if a < b { *b } else { *a });
            low.chain(high).collect::<Vec<_>>()
        });
        Summaries(pairs.collect())
    }

    pub(super) fn upload(&self, stream: &Arc<CudaStream>, elements: usize) -> CudaSlice<bf16> {
        repeated(stream, &self.0, elements)
    }

    /// The bound of a query over partition `index`.
    fn bound(&self, q: &[bf16], index: usize) -> f32 {
        let pair = &self.0[index * 2 * DIM % self.0.len()..][..2 * DIM];
        let (low, high) = pair.split_at(DIM);
        let product = |q: bf16, k: bf16| f64::from(q.to_f32()) * f64::from(k.to_f32());
        let of = |c: usize| product(q[c], low[c]).max(product(q[c], high[c]));
        (0..DIM).map(of).sum::<f64>() as f32
    }
}

fn select(case: &mut Case<'_, '_>, requests: usize, partitions: usize, pages: usize) {
    let (gpu, stream) = (&case.bench.gpu, case.bench.stream.clone());
    let plan = plan(requests, partitions, pages, gpu.sm_count());
    let kernel = Select::<_, bf16>::prepare(gpu, &plan).expect("prepare");
    let rows = 8 * requests;
    let (summaries, q) = (Summaries::new(1), Vectors::<bf16>::new(DIM, 2));
    let summaries_device = summaries.upload(&stream, plan.summary_elements());
    let q_device = q.upload(&stream, requests * 32);
    let counts = stream.clone_htod(&vec![partitions as u32; rows]).expect("copy");
    let budget = stream.clone_htod(&vec![pages as u32; rows]).expect("copy");
    let aggregated = poisoned::<f32>(&stream, rows * partitions);
    let selected = repeated(&stream, &[NONE], rows * pages);
    let mut workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
    let status = StatusWord::new(&stream).expect("allocate");
    let work = Work::new(plan.bytes_moved(rows * partitions), plan.flops(rows * partitions))
        .note("scores and selection");
    let (.., status) = case.time(
        work,
        (aggregated, selected, status),
        |(aggregated, selected, status), stream| {
            let args = SelectArgs {
                q: &View::device(&q_device, stream),
                summaries: &View::device(&summaries_device, stream),
                num_partitions: &View::device(&counts, stream),
                budget: &View::device(&budget, stream),
                rows: None,
                epoch: None,
                aggregated: ViewMut::device(aggregated, stream),
                selected: ViewMut::device(selected, stream),
                status: status.view_mut(stream),
            };
            kernel.run(stream, args, workspace.view_mut(stream)).expect("run");
        },
        |(aggregated, selected, status), stream| {
            check::no_fault(stream, status);
            for row in [0, rows - 1] {
                let bounds: Vec<f32> = (0..4)
                    .flat_map(|head| (0..partitions).map(move |partition| (head, partition)))
                    .map(|(head, partition)| {
                        summaries
                            .bound(q.get(row / 8 * 32 + row % 8 * 4 + head), row * partitions + partition)
                    })
                    .collect();
                let mut expected = Vec::new();
                let score = Score::new(0.088).expect("a finite scale");
                aggregate(Aggregation::Mean, &score, &bounds, partitions, &mut expected);
                let found = check::download(stream, aggregated, row * partitions, partitions);
                let wide: Vec<f64> = expected.into_iter().map(f64::from).collect();
                Comparison::new(&found, &wide, Tolerance::new(1e-7, 1e-3))
                    .assert(format!("scores of row {row}"));
                // Of the kernel's own scores the largest, the first page and the last one, in order.
                let chosen = check::download(stream, selected, row * pages, pages);
                let kept = |page: usize| page == 0 || page == partitions - 1;
                let mut others: Vec<usize> = (1..partitions - 1).collect();
                others.sort_by(|a, b| found[*b].total_cmp(&found[*a]).then(a.cmp(b)));
                let mut expected: Vec<u32> =
                    (0..partitions).filter(|page| kept(*page)).map(|page| page as u32).collect();
                expected.extend(others[..pages - 2].iter().map(|page| *page as u32));
                expected.sort_unstable();
                assert!(chosen == expected, "pages of row {row}");
            }
        },
    );
    check::no_fault(&stream, &status);
}
