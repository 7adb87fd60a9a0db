//! Products whose weights lie in HBM, in pinned host memory or in both: gate and up of an 8B Llama, `[28672, 4096]`.
//!
//! Cases are `tokens/share in HBM`, for many tokens also alpha or `staged`. Figures are of bytes over the link and from HBM
//! together; int4, with zero points too, and fp8 in blocks from host memory stand beside bf16 from host memory under the same
//! names. Group `link` has what the same weights take by the copy engine and by loads of the SMs alone, which is what products
//! from host memory are measured by.
//!
//! Experts are those of Qwen3-30B-A3B, gate and up, `[1536, 2048]` × 128, eight to a token.

use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, criterion_group};
use half::bf16;
use hybrid_gemm::cpu::{Gemm as CpuGemm, GemmArgs as CpuArgs};
use hybrid_gemm::gpu::{
    DeviceReceipt, DeviceSchedule, DeviceTable, DeviceWeights, Gemm, GemmArgs, GroupedArgs, GroupedGemm,
    GroupedPlan, Plan, ResidentExperts, ResidentWeights,
};
use hybrid_gemm::{
    Alpha, DType, DeviceProfile, Format, GemmConfig, GemmPlan, MatrixView, MatrixViewMut, Path, PathChoice,
    Residency, RowMajor, Summation, Weights,
};
use longkv_attention::testing::Inputs;
use longkv_benches::{GpuBench, throughput};
use longkv_cuda::cudarc::driver::CudaStream;
use longkv_cuda::driver::SideStream;
use longkv_cuda::kernels::ceilings::StreamRead;
use longkv_cuda::memory::{View, ViewMut};
use longkv_cuda::status::StatusWord;
use longkv_cuda::workspace::Workspace;

const N: usize = 28672;
const K: usize = 4096;
const FORMATS: [(&str, Format); 5] = [
    ("bf16", Format::Float(DType::BF16)),
    ("int8", Format::Int8),
    ("int4", Format::Int4 { group: 128 }),
    ("int4-zero-points", Format::Int4ZeroPoints { group: 128 }),
    ("fp8-blocks", Format::Fp8Blocks),
];

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

/// A call: tokens, path and what it is called.
#[derive(Clone, Copy)]
struct Call {
    tokens: usize,
    path: PathChoice,
    alpha: Alpha,
    name: &'static str,
}

impl Call {
    const fn direct(tokens: usize) -> Self {
        Call { tokens, path: PathChoice::Direct, alpha: Alpha::Auto, name: "" }
    }

    const fn alpha(tokens: usize, alpha: f64, name: &'static str) -> Self {
        Call { alpha: Alpha::Fixed(alpha), name, ..Call::direct(tokens) }
    }

    /// Slabs of about 16 MB of bf16.
    const fn staged(tokens: usize) -> Self {
        Call {
            path: PathChoice::Only(Path::Staged { slab_columns: 32 }),
            name: "/staged",
            ..Call::direct(tokens)
        }
    }
}

/// A stream for copies. The context goes on without events per slice: all work of a bench is ordered by its stream.
fn side_stream(bench: &GpuBench, slots: usize) -> SideStream {
    let context = bench.gpu.context();
    // SAFETY: slices are used on the bench's stream alone, apart from the slabs, which the marks of the side stream order.
    unsafe { context.disable_event_tracking() };
    SideStream::new(&bench.gpu, context.new_stream().expect("a second stream"), slots).expect("events")
}

/// Times calls with weights where they are.
fn products(
    criterion: &mut Criterion,
    bench: &mut GpuBench,
    (name, format): (&str, Format),
    fraction: f64,
    calls: &[Call],
) {
    let stream = bench.stream.clone();
    let weights = weights([N, K], format, Residency::HbmFraction(fraction));
    let weights = ResidentWeights::new(&bench.gpu, &stream, &weights).expect("room for the weights");
    for &Call { tokens, path, alpha, name: suffix } in calls {
        let config = GemmConfig { summation: Summation::Fast, path, alpha, ..config(bench, tokens) };
        let plan = Plan::new(*weights.weights().placement(), config).expect("a plan");
        let kernel = if plan.is_large() { "hybrid_large_m" } else { "hybrid_small_m" };
        let mut group = bench.group(criterion, &format!("hybrid-gemm/{kernel}"), name);
        let predicted = plan.predict(tokens).expect("a prediction");
        let gemm = Gemm::<_, bf16>::prepare(&bench.gpu, &plan).expect("prepare");
        let mut side = side_stream(bench, plan.slots());
        let x = stream.clone_htod(&values(tokens * K, 2)).expect("copy");
        let mut out = stream.alloc_zeros::<bf16>(tokens * N).expect("allocate");
        let schedules = plan.schedules(tokens).expect("schedules");
        let schedule = DeviceSchedule::new(&stream, &schedules).expect("allocate");
        let mut status = StatusWord::new(&stream).expect("allocate");
        let mut receipt = DeviceReceipt::new(&stream).expect("allocate");
        let mut workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
        let case = format!("{tokens}/{fraction}{suffix}");
        let work = (predicted.traffic.link_bytes + predicted.hbm_bytes, predicted.traffic.flops);
        let mut launch = |stream: &Arc<CudaStream>, receipt: Option<&mut DeviceReceipt>| {
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
                        traffic: receipt.map(|receipt| receipt.view_mut(stream)),
                        status: status.view_mut(stream),
                    };
                    gemm.run_staged(stream, &mut side, args, workspace.view_mut(stream))
                })
                .expect("launch");
        };
        bench.case(&mut group, &case, work, |stream| launch(stream, None));
        // What was timed moved what it should: no offload is a silent one.
        launch(&stream, Some(&mut receipt));
        let counted = receipt.read(&stream, &plan).expect("the receipt");
        assert_eq!(counted, predicted.traffic, "{case}");
        assert_eq!(status.read(&stream).expect("read the status"), None, "{case}");
    }
}

fn config(bench: &GpuBench, tokens: usize) -> GemmConfig {
    let device = DeviceProfile { sm_count: bench.gpu.sm_count() as usize, ..DeviceProfile::h200() };
    GemmConfig::new(tokens, DType::BF16, device)
}

/// The weights over the link and nothing else: the rates that products from host memory are held against.
fn link(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    let stream = bench.stream.clone();
    let weights = weights([N, K], FORMATS[0].1, Residency::Host);
    let weights = ResidentWeights::new(&bench.gpu, &stream, &weights).expect("room for the weights");
    let bytes = weights.weights().host_bytes().len();
    let mut device = stream.alloc_zeros::<u8>(bytes).expect("allocate");
    let mut group = bench.group(criterion, "hybrid-gemm/link", "bf16");
    group.group.throughput(throughput(bytes as u64, 0));
    group.group.bench_function(BenchmarkId::from_parameter("copy engine"), |bencher| {
        bench.iter_cold(bencher, |stream| {
            stream.memcpy_htod(weights.weights().host_bytes(), &mut device).expect("copy");
        });
    });
    let reader = StreamRead::prepare(&bench.gpu).expect("prepare");
    for blocks in [4, 8, 16, 32, bench.gpu.sm_count()] {
        let mut sums = stream.alloc_zeros::<u32>(blocks as usize * 8).expect("allocate");
        group.group.bench_function(
            BenchmarkId::from_parameter(format!("loads of {blocks} SMs")),
            |bencher| {
                bench.iter_cold(bencher, |stream| {
                    let read = |weights: DeviceWeights<'_>| {
                        let mut sums = ViewMut::device(&mut sums, stream);
                        let host = weights.host.expect("all of it in host memory");
                        Ok(reader.launch(stream, blocks, 1, host, &mut sums)?)
                    };
                    weights.with(stream, read).expect("launch");
                });
            },
        );
    }
}

/// A decoding step: all in HBM, split, all in host memory, in place and by slabs.
fn few_tokens(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    for format in FORMATS {
        for fraction in [1.0, 0.99, 0.9, 0.5, 0.0] {
            let mut calls = [1, 8, 16, 32, 64].map(Call::direct).to_vec();
            if fraction == 0.0 {
                calls.push(Call::staged(16));
            }
            products(criterion, &mut bench, format, fraction, &calls);
        }
    }
}

/// A prompt: all in HBM, then all in host memory by either dataflow, by both, and by slabs.
fn many_tokens(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    for format in FORMATS {
        products(criterion, &mut bench, format, 1.0, &[512, 2048, 8192].map(Call::direct));
        let mut calls = Vec::new();
        for tokens in [512, 2048] {
            calls.extend(
                [(0.0, "/alpha=0"), (0.5, "/alpha=0.5"), (1.0, "/alpha=1")]
                    .map(|(alpha, name)| Call::alpha(tokens, alpha, name)),
            );
            calls.push(Call::staged(tokens));
        }
        calls.push(Call::staged(16384));
        products(criterion, &mut bench, format, 0.0, &calls);
    }
}

/// Experts of a layer: a decoding step that needs few of them, a batch that needs most, all of them full.
fn experts(criterion: &mut Criterion) {
    const EXPERTS: usize = 128;
    const SHAPE: [usize; 2] = [1536, 2048];
    let Some(mut bench) = GpuBench::new() else { return };
    let stream = bench.stream.clone();
    for (place, residency) in [("host", Residency::Host), ("hbm", Residency::Hbm)] {
        let expert = weights(SHAPE, FORMATS[0].1, residency);
        let resident =
            ResidentExperts::new(&bench.gpu, &stream, &vec![expert.clone(); EXPERTS]).expect("room");
        for (case, rows) in [
            ("1 token", (0..EXPERTS).map(|expert| usize::from(expert % 16 == 3)).collect::<Vec<_>>()),
            ("32 tokens", (0..EXPERTS).map(|expert| 1 + expert % 3).collect()),
            ("4096 rows", vec![32; EXPERTS]),
        ] {
            let max_tokens = rows.iter().sum();
            let plan = GroupedPlan::new(vec![*expert.placement(); EXPERTS], config(&bench, max_tokens));
            let plan = plan.expect("a plan");
            let predicted = plan.predict(&rows).expect("a prediction");
            let gemm = GroupedGemm::<_, bf16>::prepare(&bench.gpu, &plan).expect("prepare");
            let x = stream.clone_htod(&values(max_tokens * SHAPE[1], 2)).expect("copy");
            let mut out = stream.alloc_zeros::<bf16>(max_tokens * SHAPE[0]).expect("allocate");
            let ends = rows.iter().scan(0, |end, rows| {
                *end += *rows as u32;
                Some(*end)
            });
            let offsets: Vec<u32> = std::iter::once(0).chain(ends).collect();
            let offsets = stream.clone_htod(&offsets).expect("copy");
            let table = DeviceTable::new(&stream, &plan).expect("allocate");
            let schedule = DeviceSchedule::new(&stream, &[plan.schedule()]).expect("allocate");
            let mut status = StatusWord::new(&stream).expect("allocate");
            let mut workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
            let kernel = if plan.is_large() { "hybrid_large_m" } else { "hybrid_small_m" };
            let mut group = bench.group(criterion, &format!("hybrid-gemm/{kernel}/experts"), "bf16");
            let work = (predicted.traffic.link_bytes + predicted.hbm_bytes, predicted.traffic.flops);
            bench.case(&mut group, &format!("{case}/{place}"), work, |stream| {
                resident
                    .with(stream, |weights| {
                        let args = GroupedArgs {
                            x: &View::device(&x, stream),
                            weights,
                            table: &table.view(stream),
                            offsets: &View::device(&offsets, stream),
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
}

criterion_group!(benches, cpu, link, few_tokens, many_tokens, experts);
