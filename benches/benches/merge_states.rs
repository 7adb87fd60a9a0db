//! Merge of partial attention states `[rows, splits, 128]` f32 into bf16.

use criterion::{BenchmarkId, Criterion, criterion_group};
use half::bf16;
use longkv_attention::gpu::{Merge, MergeArgs, MergeConfig, MergePlan};
use longkv_attention::testing::Inputs;
use longkv_attention::{DType, reference};
use longkv_benches::{GpuBench, throughput};
use longkv_cuda::memory::{View, ViewMut};
use longkv_cuda::status::StatusWord;
use longkv_cuda::workspace::Workspace;

const V_DIM: usize = 128;
/// One decode step of 32 heads with few and many splits, and batches of it.
const SHAPES: [(usize, usize); 4] = [(32, 16), (32, 512), (2048, 8), (32768, 8)];
/// The oracle is slow: only shapes it finishes in milliseconds.
const CPU_STATES: usize = 1 << 15;

fn states(rows: usize, splits: usize) -> (Vec<f32>, Vec<f32>) {
    (Inputs::Normal.values(rows * splits, V_DIM, 1), Inputs::Normal.values(rows, splits, 2))
}

fn plan(rows: usize, splits: usize, sm_count: u32) -> MergePlan {
    MergePlan::new(MergeConfig { rows, max_splits: splits, v_dim: V_DIM, sm_count }).expect("a valid plan")
}

fn cpu(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention/merge_states/cpu-reference/f32");
    for (rows, splits) in SHAPES.into_iter().filter(|(rows, splits)| rows * splits <= CPU_STATES) {
        let plan = plan(rows, splits, 1);
        let (out, lse) = states(rows, splits);
        group.throughput(throughput(plan.bytes_moved(DType::F32), plan.flops()));
        group.bench_function(BenchmarkId::from_parameter(format!("{rows}x{splits}")), |bencher| {
            bencher.iter(|| {
                reference::merge_states(&out, &lse, None, rows, splits, V_DIM).expect("valid states")
            });
        });
    }
}

fn gpu(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    let mut group = bench.group(criterion, "attention/merge_states", "bf16");
    for (rows, splits) in SHAPES {
        let plan = plan(rows, splits, bench.gpu.sm_count());
        let merge = Merge::<_, bf16>::prepare(&bench.gpu, &plan).expect("prepare");
        let (out, lse) = states(rows, splits);
        let stream = bench.stream.clone();
        let partial_out = stream.clone_htod(&out).expect("copy");
        let partial_lse = stream.clone_htod(&lse).expect("copy");
        let mut out = stream.alloc_zeros::<bf16>(rows * V_DIM).expect("allocate");
        let mut lse = stream.alloc_zeros::<f32>(rows).expect("allocate");
        let mut status = StatusWord::new(&stream).expect("allocate");
        let mut workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
        let work = (plan.bytes_moved(DType::BF16), plan.flops());
        bench.case(&mut group, &format!("{rows}x{splits}"), work, |stream| {
            let args = MergeArgs {
                partial_out: &View::device(&partial_out, stream),
                partial_lse: &View::device(&partial_lse, stream),
                num_splits: None,
                out: ViewMut::device(&mut out, stream),
                lse: ViewMut::device(&mut lse, stream),
                status: status.view_mut(stream),
            };
            merge.run(stream, args, workspace.view_mut(stream)).expect("launch");
        });
        assert_eq!(status.read(&stream).expect("read the status"), None, "{rows}x{splits}");
    }
}

criterion_group!(benches, cpu, gpu);
