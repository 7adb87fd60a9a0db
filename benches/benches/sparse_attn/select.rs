//! Scores and selection: a context of 128K tokens in pages of 16, 8 KV heads of 4 query heads.

use ::sparse_attn::gpu::{Extent, Select, SelectArgs, SelectConfig, SelectPlan};
use ::sparse_attn::index::pages::{PageIndex, Scorer};
use ::sparse_attn::index::{Closing, GroupQuery, Index};
use ::sparse_attn::page::PageSpec;
use ::sparse_attn::select::{Aggregation, SelectRule, aggregate, top_k};
use criterion::{BenchmarkId, Criterion};
use half::bf16;
use longkv_attention::testing::Inputs;
use longkv_attention::{DType, HeadShape, Score};
use longkv_benches::{GpuBench, throughput};
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
        let plan = plan(requests, partitions, pages, bench.gpu.sm_count());
        let kernel = Select::<_, bf16>::prepare(&bench.gpu, &plan).expect("prepare");
        let (stream, rows) = (bench.stream.clone(), 8 * requests);
        let some: Vec<bf16> = Inputs::Normal.generate(1024, DIM, 1);
        let summaries: Vec<bf16> = some.into_iter().cycle().take(plan.summary_elements()).collect();
        let summaries = stream.clone_htod(&summaries).expect("copy");
        let q = stream.clone_htod(&Inputs::Normal.generate::<bf16>(requests * 32, DIM, 2)).expect("copy");
        let counts = stream.clone_htod(&vec![partitions as u32; rows]).expect("copy");
        let budget = stream.clone_htod(&vec![pages as u32; rows]).expect("copy");
        let mut aggregated = stream.alloc_zeros::<f32>(rows * partitions).expect("allocate");
        let mut selected = stream.alloc_zeros::<u32>(rows * pages).expect("allocate");
        let mut workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
        let mut status = StatusWord::new(&stream).expect("allocate");
        let work = (plan.bytes_moved(rows * partitions), plan.flops(rows * partitions));
        bench.case(&mut group, &format!("{requests}x8x{partitions}"), work, |stream| {
            let args = SelectArgs {
                q: &View::device(&q, stream),
                summaries: &View::device(&summaries, stream),
                num_partitions: &View::device(&counts, stream),
                budget: &View::device(&budget, stream),
                rows: None,
                epoch: None,
                aggregated: ViewMut::device(&mut aggregated, stream),
                selected: ViewMut::device(&mut selected, stream),
                status: status.view_mut(stream),
            };
            kernel.run(stream, args, workspace.view_mut(stream)).expect("run");
        });
        assert_eq!(status.read(&stream).expect("read the status"), None);
    }
}
