//! Merge of partial attention states `[rows, splits, 128]` f32 into bf16.

use criterion::{BenchmarkId, Criterion, criterion_group};
use half::bf16;
use longkv_attention::gpu::{Merge, MergeArgs, MergeConfig, MergePlan};
use longkv_attention::testing::Inputs;
use longkv_attention::{DType, reference};
use longkv_benches::data::{Vectors, poisoned};
use longkv_benches::{Case, GpuBench, Work, check, throughput};
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
        bench.case(&mut group, &format!("{rows}x{splits}"), |case| merge(case, rows, splits));
    }
}

fn merge(case: &mut Case<'_, '_>, rows: usize, splits: usize) {
    let (gpu, stream) = (&case.bench.gpu, case.bench.stream.clone());
    let plan = plan(rows, splits, gpu.sm_count());
    let merge = Merge::<_, bf16>::prepare(gpu, &plan).expect("prepare");
    let (states, lses) = (Vectors::<f32>::new(V_DIM, 1), Inputs::Normal.values(rows, splits, 2));
    let partial_out = states.upload(&stream, rows * splits);
    let partial_lse = stream.clone_htod(&lses).expect("copy");
    let (out, lse) = (poisoned::<bf16>(&stream, rows * V_DIM), poisoned::<f32>(&stream, rows));
    let status = StatusWord::new(&stream).expect("allocate");
    let mut workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
    let (.., status) = case.time(
        Work::new(plan.bytes_moved(DType::BF16), plan.flops()),
        (out, lse, status),
        |(out, lse, status), stream| {
            let args = MergeArgs {
                partial_out: &View::device(&partial_out, stream),
                partial_lse: &View::device(&partial_lse, stream),
                num_splits: None,
                out: ViewMut::device(out, stream),
                lse: ViewMut::device(lse, stream),
                status: status.view_mut(stream),
            };
            merge.run(stream, args, workspace.view_mut(stream)).expect("launch");
        },
        |(out, lse, status), stream| {
            check::no_fault(stream, status);
            let expected = [0, rows - 1].map(|row| {
                let first = row * splits;
                let states: Vec<f32> = (first..first + splits).flat_map(|i| states.get(i)).copied().collect();
                let merged =
                    reference::merge_states(&states, &lses[first..][..splits], None, 1, splits, V_DIM);
                let merged = merged.expect("valid states");
                (row, check::Row { out: merged.out, lse: merged.lse[0] })
            });
            check::rows(stream, out, lse, &expected);
        },
    );
    check::no_fault(&stream, &status);
}

criterion_group!(benches, cpu, gpu);
