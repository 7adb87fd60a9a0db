//! Products whose weights lie in HBM, in pinned host memory or in both: gate and up of an 8B Llama, `[28672, 4096]`.
//!
//! Cases are `tokens/share in HBM`, for many tokens also alpha. Figures are of bytes over the link and from HBM together;
//! int4 from host memory stands beside bf16 from host memory under the same names.

use criterion::{BenchmarkId, Criterion, criterion_group};
use half::bf16;
use hybrid_gemm::cpu::{Gemm as CpuGemm, GemmArgs as CpuArgs};
use hybrid_gemm::gpu::{DeviceSchedule, Gemm, GemmArgs, Plan, ResidentWeights};
use hybrid_gemm::{
    Alpha, DType, DeviceProfile, Format, GemmConfig, GemmPlan, MatrixView, MatrixViewMut, Residency,
    RowMajor, Summation, Weights,
};
use longkv_attention::testing::Inputs;
use longkv_benches::{GpuBench, throughput};
use longkv_cuda::memory::{View, ViewMut};
use longkv_cuda::status::StatusWord;
use longkv_cuda::workspace::Workspace;

const N: usize = 28672;
const K: usize = 4096;
const FORMATS: [(&str, Format); 3] =
    [("bf16", Format::Float(DType::BF16)), ("int8", Format::Int8), ("int4", Format::Int4 { group: 128 })];

/// Random values, never zeros, which draw less power; a few megabytes of them, repeated, are enough for that.
fn values(len: usize, seed: u64) -> Vec<bf16> {
    let block: Vec<bf16> = Inputs::Normal.generate(1 << 10, 1 << 10, seed);
    block.into_iter().cycle().take(len).collect()
}

fn weights([n, k]: [usize; 2], format: Format, residency: Residency) -> Weights {
    let values = values(n * k, 1);
    let matrix = RowMajor::from_slice(&values, [n, k]).expect("a matrix");
    Weights::pack(matrix, format, residency).expect("packed weights")
}

fn cpu(criterion: &mut Criterion) {
    let ([n, k], tokens) = ([4096, 4096], 8);
    for (name, format) in FORMATS {
        let mut group = criterion.benchmark_group(format!("hybrid-gemm/gemm/cpu-reference/{name}"));
        group.sample_size(10);
        let weights = weights([n, k], format, Residency::HbmFraction(0.5));
        let config = GemmConfig::new(tokens, DType::BF16, DeviceProfile::h200());
        let plan = GemmPlan::new(*weights.placement(), config).expect("a plan");
        let predicted = plan.predict(tokens).expect("a prediction");
        let gemm = CpuGemm::prepare(&plan, weights).expect("the plan's weights");
        let x = values(tokens * k, 2);
        let mut out = vec![bf16::ZERO; tokens * n];
        let mut workspace = vec![0.0; plan.workspace_len(tokens)];
        group.throughput(throughput(
            predicted.traffic.link_bytes + predicted.hbm_bytes,
            predicted.traffic.flops,
        ));
        group.bench_function(BenchmarkId::from_parameter(format!("{tokens}/0.5")), |bencher| {
            bencher.iter(|| {
                let args = CpuArgs {
                    x: MatrixView::new(&x, tokens, k).expect("x"),
                    bias: None,
                    residual: None,
                    out: MatrixViewMut::new(&mut out, tokens, n).expect("out"),
                };
                gemm.run(args, &mut workspace).expect("valid inputs")
            });
        });
    }
}

/// Times products of each number of tokens and alpha with weights where they are.
fn products(
    criterion: &mut Criterion,
    bench: &mut GpuBench,
    (name, format): (&str, Format),
    fraction: f64,
    calls: &[(usize, Option<f64>)],
) {
    let stream = bench.stream.clone();
    let weights = weights([N, K], format, Residency::HbmFraction(fraction));
    let weights = ResidentWeights::new(&bench.gpu, &stream, &weights).expect("room for the weights");
    for &(tokens, alpha) in calls {
        let device = DeviceProfile { sm_count: bench.gpu.sm_count() as usize, ..DeviceProfile::h200() };
        let config = GemmConfig {
            summation: Summation::Fast,
            alpha: alpha.map_or(Alpha::Auto, Alpha::Fixed),
            ..GemmConfig::new(tokens, DType::BF16, device)
        };
        let plan = Plan::new(*weights.weights().placement(), config).expect("a plan");
        let kernel = if plan.is_large() { "hybrid_large_m" } else { "hybrid_small_m" };
        let mut group = bench.group(criterion, &format!("hybrid-gemm/{kernel}"), name);
        let predicted = plan.predict(tokens).expect("a prediction");
        let gemm = Gemm::<_, bf16>::prepare(&bench.gpu, &plan).expect("prepare");
        let x = stream.clone_htod(&values(tokens * K, 2)).expect("copy");
        let mut out = stream.alloc_zeros::<bf16>(tokens * N).expect("allocate");
        let schedule = plan.schedule(tokens).expect("a schedule");
        let schedule = DeviceSchedule::new(&stream, &schedule).expect("allocate");
        let mut status = StatusWord::new(&stream).expect("allocate");
        let mut workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
        let case = match alpha {
            Some(alpha) => format!("{tokens}/{fraction}/alpha={alpha}"),
            None => format!("{tokens}/{fraction}"),
        };
        let work = (predicted.traffic.link_bytes + predicted.hbm_bytes, predicted.traffic.flops);
        bench.case(&mut group, &case, work, |stream| {
            weights
                .with(stream, |weights| {
                    let args = GemmArgs {
                        x: &View::device(&x, stream),
                        weights,
                        bias: None,
                        residual: None,
                        out: ViewMut::device(&mut out, stream),
                        strides: None,
                        schedule: &schedule.view(stream),
                        traffic: None,
                        status: status.view_mut(stream),
                    };
                    gemm.run(stream, args, workspace.view_mut(stream))
                })
                .expect("launch");
        });
        assert_eq!(status.read(&stream).expect("read the status"), None, "{case}");
    }
}

/// A decoding step: all in HBM, split, all in host memory.
fn few_tokens(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    for format in FORMATS {
        for fraction in [1.0, 0.99, 0.9, 0.5, 0.0] {
            let calls = [1, 8, 16, 32, 64].map(|tokens| (tokens, None));
            products(criterion, &mut bench, format, fraction, &calls);
        }
    }
}

/// A prompt: all in HBM, then all in host memory by either dataflow and by both.
fn many_tokens(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    for format in [FORMATS[0], FORMATS[1]] {
        products(criterion, &mut bench, format, 1.0, &[512, 2048, 8192].map(|tokens| (tokens, None)));
        let calls: Vec<_> =
            [512, 2048].into_iter().flat_map(|tokens| [0.0, 0.5, 1.0].map(|a| (tokens, Some(a)))).collect();
        products(criterion, &mut bench, format, 0.0, &calls);
    }
}

criterion_group!(benches, cpu, few_tokens, many_tokens);
