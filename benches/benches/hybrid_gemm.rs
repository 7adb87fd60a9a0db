//! Products whose weights lie in HBM, in pinned host memory or in both: gate and up of an 8B Llama, `[28672, 4096]`.
//!
//! Cases are `tokens/share in HBM`, for many tokens from host memory by the path that the cost model finds fastest, and behind that by
//! `staged` and some alphas. Figures are of bytes over the link and from HBM together; int4, with zero points too, and fp8 in blocks
//! from host memory stand beside bf16 from host memory under the same names. Group `link` has what the same weights take by the
//! copy engine and by loads of the SMs alone, which is what products from host memory are measured by.
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
    Placement, Residency, RowMajor, Summation, Tiling, Weights,
};
use longkv_attention::testing::Inputs;
use longkv_benches::data::{poisoned, repeated};
use longkv_benches::{Case, GpuBench, Work, check, exhaustive, throughput};
use longkv_cuda::cudarc::driver::{CudaSlice, CudaStream};
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

/// Different values before the first comes again: not a multiple of any row.
const VALUES: usize = (1 << 20) - 3;

/// Random values, never zeros, which draw less power; a few megabytes of them, repeated, are enough for that.
fn values(len: usize, seed: u64) -> Vec<bf16> {
    let block: Vec<bf16> = Inputs::Normal.generate(1, VALUES, seed);
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

    /// The path that the cost model finds fastest: what a caller gets who asks for none.
    const fn fastest(tokens: usize) -> Self {
        Call { path: PathChoice::Fastest, ..Call::direct(tokens) }
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

/// Shares of the weights in HBM that a format is measured with.
fn fractions(format: Format) -> &'static [f64] {
    match format {
        _ if exhaustive() => &[1.0, 0.99, 0.9, 0.5, 0.0],
        Format::Float(_) => &[1.0, 0.99, 0.9, 0.5, 0.0],
        Format::Int8 | Format::Int4 { .. } => &[1.0, 0.0],
        // What they add to the others is what they unpack; the link shows whether it holds them up.
        _ => &[0.0],
    }
}

/// What is measured with weights of a format of which a share lies in HBM.
fn calls(format: Format, fraction: f64) -> Vec<Call> {
    let (all, floats) = (exhaustive(), matches!(format, Format::Float(_)));
    let few: &[usize] = match (all, floats) {
        (true, _) => &[1, 8, 16, 32, 64],
        (false, true) => &[1, 16, 64],
        // Ratios to bf16 and to bandwidth are asked for at few tokens.
        (false, false) => &[1, 16],
    };
    let mut calls: Vec<Call> = few.iter().map(|tokens| Call::direct(*tokens)).collect();
    if fraction == 1.0 {
        let many: &[usize] = if all || floats { &[512, 2048, 8192, 16384] } else { &[2048] };
        calls.extend(many.iter().map(|tokens| Call::direct(*tokens)));
    } else if fraction == 0.0 {
        calls.push(Call::staged(16));
        if all || floats {
            calls.extend([512, 2048, 8192, 16384].map(Call::fastest));
            calls.extend([2048, 16384].map(Call::staged));
            for tokens in if all { &[512, 2048][..] } else { &[2048] } {
                calls.extend(
                    [(0.0, "/alpha=0"), (0.5, "/alpha=0.5"), (1.0, "/alpha=1")]
                        .map(|(alpha, name)| Call::alpha(*tokens, alpha, name)),
                );
            }
        } else {
            calls.push(Call::staged(2048));
        }
    }
    calls
}

/// Products with all weights in HBM, split, and all in host memory.
fn products(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    for (name, format) in FORMATS {
        for &fraction in fractions(format) {
            // Packed by the first call that needs them.
            let mut resident = None;
            for call in calls(format, fraction) {
                // The plan says which kernel it is: one name per kernel, whatever the call's path.
                let plan = placement(format, fraction).and_then(|placement| plan(&bench, placement, call));
                let kernel = match &plan {
                    Ok(plan) if plan.is_large() => "hybrid_large_m",
                    Ok(_) => "hybrid_small_m",
                    Err(_) if call.tokens > 64 => "hybrid_large_m",
                    Err(_) => "hybrid_small_m",
                };
                let mut group = bench.group(criterion, &format!("hybrid-gemm/{kernel}"), name);
                let shape = format!("{}/{fraction}{}", call.tokens, call.name);
                bench.case(&mut group, &shape, |case| {
                    let weights = resident.get_or_insert_with(|| {
                        let weights = weights([N, K], format, Residency::HbmFraction(fraction));
                        ResidentWeights::new(&case.bench.gpu, &case.bench.stream, &weights)
                            .expect("room for the weights")
                    });
                    product(case, weights, plan.expect("a plan"), format, call);
                });
            }
        }
    }
}

/// Where weights of a share in HBM would lie.
fn placement(format: Format, fraction: f64) -> Result<Placement, hybrid_gemm::Error> {
    Placement::packed(Tiling::new(N, K, format)?, Residency::HbmFraction(fraction))
}

fn plan(bench: &GpuBench, placement: Placement, call: Call) -> Result<Plan, hybrid_gemm::Error> {
    let config = config(bench, call.tokens);
    Plan::new(
        placement,
        GemmConfig { summation: Summation::Fast, path: call.path, alpha: call.alpha, ..config },
    )
}

/// A row of `[n, k]` weights as a format stores it, of its block of 128 rows alone: no scale is shared by more.
fn stored_row([n, k]: [usize; 2], format: Format, row: usize) -> Vec<f32> {
    const BLOCK: usize = 128;
    let (all, first) = (values(VALUES, 1), row / BLOCK * BLOCK);
    let rows = BLOCK.min(n - first);
    let some: Vec<bf16> = (first * k..(first + rows) * k).map(|i| all[i % VALUES]).collect();
    let matrix = RowMajor::from_slice(&some, [rows, k]).expect("a matrix");
    let stored = Weights::pack(matrix, format, Residency::Hbm).expect("packed weights").dequantize();
    stored[(row - first) * k..][..k].to_vec()
}

/// Outputs `out` `[tokens, n]` at some tokens and columns against products of x with the stored weights.
fn check_products(
    stream: &Arc<CudaStream>,
    out: &CudaSlice<bf16>,
    [n, k]: [usize; 2],
    format: Format,
    tokens: &[usize],
) {
    let columns = [0, n / 3, n / 2 + 17, n - 1];
    let x = values(VALUES, 2);
    let stored = columns.map(|column| stored_row([n, k], format, column));
    let (mut found, mut expected) = (Vec::new(), Vec::new());
    for token in tokens {
        for (i, column) in columns.iter().enumerate() {
            found.extend(check::download(stream, out, token * n + column, 1));
            let product =
                |c: usize| f64::from(x[(token * k + c) % VALUES].to_f32()) * f64::from(stored[i][c]);
            expected.push((0..k).map(product).sum());
        }
    }
    check::products("outputs", &found, &expected);
}

fn product(
    case: &mut Case<'_, '_>,
    weights: &ResidentWeights,
    plan: Plan,
    format: Format,
    Call { tokens, .. }: Call,
) {
    let (gpu, stream) = (&case.bench.gpu, case.bench.stream.clone());
    let predicted = plan.predict(tokens).expect("a prediction");
    let gemm = Gemm::<_, bf16>::prepare(gpu, &plan).expect("prepare");
    let mut side = case.bench.side_stream(plan.slots());
    let x = repeated(&stream, &values(VALUES, 2), tokens * K);
    let schedules = plan.schedules(tokens).expect("schedules");
    let schedule = DeviceSchedule::new(&stream, &schedules).expect("allocate");
    let mut receipt = DeviceReceipt::new(&stream).expect("allocate");
    let mut workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
    let mut outputs = (poisoned::<bf16>(&stream, tokens * N), StatusWord::new(&stream).expect("allocate"));
    let mut launch = |(out, status): &mut (CudaSlice<bf16>, StatusWord),
                      stream: &Arc<CudaStream>,
                      receipt: Option<&mut DeviceReceipt>| {
        weights
            .with(stream, |weights| {
                let args = GemmArgs {
                    x: &View::device(&x, stream),
                    weights,
                    bias: None,
                    residual: None,
                    out: ViewMut::device(out, stream),
                    strides: None,
                    schedule: &schedule.view(stream),
                    traffic: receipt.map(|receipt| receipt.view_mut(stream)),
                    status: status.view_mut(stream),
                };
                gemm.run_staged(stream, &mut side, args, workspace.view_mut(stream))
            })
            .expect("launch");
    };
    // What is timed moves what it should: no offload is a silent one.
    launch(&mut outputs, &stream, Some(&mut receipt));
    let counted = receipt.read(&stream, &plan).expect("the receipt");
    assert_eq!(counted, predicted.traffic, "traffic");
    let traffic = predicted.traffic;
    let path = if plan.is_staged() { "staged by slabs" } else { "read in place" };
    let work = Work::new(traffic.link_bytes + predicted.hbm_bytes, traffic.flops)
        .over_link(traffic.link_bytes)
        .note(format!(
            "{path}, link {:.2} of the weights in host memory",
            of_host(weights, traffic.link_bytes)
        ));
    let (_, status) = case.time(
        work,
        outputs,
        |outputs, stream| launch(outputs, stream, None),
        |(out, status), stream| {
            check::no_fault(stream, status);
            check_products(stream, out, [N, K], format, &[0, tokens - 1]);
        },
    );
    check::no_fault(&stream, &status);
}

/// Bytes over the link per byte of the weights that lie in host memory.
fn of_host(weights: &ResidentWeights, link_bytes: u64) -> f64 {
    match weights.weights().host_bytes().len() {
        0 => 0.0,
        bytes => link_bytes as f64 / bytes as f64,
    }
}

fn config(bench: &GpuBench, tokens: usize) -> GemmConfig {
    let device = DeviceProfile { sm_count: bench.gpu.sm_count() as usize, ..DeviceProfile::h200() };
    GemmConfig::new(tokens, DType::BF16, device)
}

/// The weights over the link and nothing else: the rates that products from host memory are held against.
fn link(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    let mut group = bench.group(criterion, "hybrid-gemm/link", "bf16");
    let sms = bench.gpu.sm_count();
    let mut resident = None;
    for blocks in [None, Some(4), Some(8), Some(16), Some(32), Some(sms)] {
        let name = blocks.map_or("copy engine".to_string(), |blocks| format!("loads of {blocks} SMs"));
        bench.case(&mut group, &name, |case| {
            let weights = resident.get_or_insert_with(|| {
                let weights = weights([N, K], FORMATS[0].1, Residency::Host);
                ResidentWeights::new(&case.bench.gpu, &case.bench.stream, &weights)
                    .expect("room for the weights")
            });
            over_link(case, weights, blocks);
        });
    }
}

/// All of the weights by the copy engine, or by loads of so many blocks.
fn over_link(case: &mut Case<'_, '_>, weights: &ResidentWeights, blocks: Option<u32>) {
    let stream = case.bench.stream.clone();
    let bytes = weights.weights().host_bytes();
    let work = Work::new(bytes.len() as u64, 0).over_link(bytes.len() as u64);
    let Some(blocks) = blocks else {
        case.time(
            work,
            repeated(&stream, &[u8::MAX], bytes.len()),
            |device, stream| stream.memcpy_htod(bytes, device).expect("copy"),
            |device, stream| {
                let last = check::download(stream, device, bytes.len() - 128, 128);
                assert!(last == bytes[bytes.len() - 128..], "the last bytes");
            },
        );
        return;
    };
    let reader = StreamRead::prepare(&case.bench.gpu).expect("prepare");
    let sums = repeated(&stream, &[u32::MAX], blocks as usize * 8);
    case.time(
        work,
        sums,
        |sums, stream| {
            let read = |weights: DeviceWeights<'_>| {
                let mut sums = ViewMut::device(sums, stream);
                let host = weights.host.expect("all of it in host memory");
                Ok(reader.launch(stream, blocks, 1, host, &mut sums)?)
            };
            weights.with(stream, read).expect("launch");
        },
        |sums, stream| {
            let found: Vec<u32> = check::download(stream, sums, 0, blocks as usize * 8);
            let sum = found.iter().fold(0, |sum, word| sum ^ word);
            let words = bytemuck::cast_slice::<u8, u32>(bytes);
            assert_eq!(sum, words.iter().fold(0, |sum, word| sum ^ word), "exclusive-or of what was loaded");
        },
    );
}

/// Experts of a layer: a decoding step that needs few of them, a batch that needs most, all of them full.
fn experts(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    for (place, residency) in [("host", Residency::Host), ("hbm", Residency::Hbm)] {
        let mut resident = None;
        let placement = Tiling::new(EXPERT[0], EXPERT[1], FORMATS[0].1);
        let placement =
            placement.and_then(|tiling| Placement::packed(tiling, residency)).expect("a placement");
        for (name, rows) in [
            ("1 token", (0..EXPERTS).map(|expert| usize::from(expert % 16 == 3)).collect::<Vec<_>>()),
            ("32 tokens", (0..EXPERTS).map(|expert| 1 + expert % 3).collect()),
            ("4096 rows", vec![32; EXPERTS]),
        ] {
            let plan = GroupedPlan::new(vec![placement; EXPERTS], config(&bench, rows.iter().sum()));
            let plan = plan.expect("a plan");
            let kernel = if plan.is_large() { "hybrid_large_m" } else { "hybrid_small_m" };
            let mut group = bench.group(criterion, &format!("hybrid-gemm/{kernel}/experts"), "bf16");
            bench.case(&mut group, &format!("{name}/{place}"), |case| {
                let resident = resident.get_or_insert_with(|| {
                    let all = vec![weights(EXPERT, FORMATS[0].1, residency); EXPERTS];
                    ResidentExperts::new(&case.bench.gpu, &case.bench.stream, &all).expect("room")
                });
                grouped(case, &plan, resident, &rows);
            });
        }
    }
}

const EXPERTS: usize = 128;
const EXPERT: [usize; 2] = [1536, 2048];

fn grouped(case: &mut Case<'_, '_>, plan: &GroupedPlan, resident: &ResidentExperts, rows: &[usize]) {
    let (gpu, stream) = (&case.bench.gpu, case.bench.stream.clone());
    let [n, k] = EXPERT;
    let max_tokens = rows.iter().sum::<usize>();
    let predicted = plan.predict(rows).expect("a prediction");
    let gemm = GroupedGemm::<_, bf16>::prepare(gpu, plan).expect("prepare");
    let x = repeated(&stream, &values(VALUES, 2), max_tokens * k);
    let ends = rows.iter().scan(0, |end, rows| {
        *end += *rows as u32;
        Some(*end)
    });
    let offsets: Vec<u32> = std::iter::once(0).chain(ends).collect();
    let offsets = stream.clone_htod(&offsets).expect("copy");
    let table = DeviceTable::new(&stream, plan).expect("allocate");
    let schedule = DeviceSchedule::new(&stream, &[plan.schedule()]).expect("allocate");
    let mut workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
    let outputs = (poisoned::<bf16>(&stream, max_tokens * n), StatusWord::new(&stream).expect("allocate"));
    let traffic = predicted.traffic;
    let work =
        Work::new(traffic.link_bytes + predicted.hbm_bytes, traffic.flops).over_link(traffic.link_bytes);
    let (_, status) = case.time(
        work,
        outputs,
        |(out, status), stream| {
            resident
                .with(stream, |weights| {
                    let args = GroupedArgs {
                        x: &View::device(&x, stream),
                        weights,
                        table: &table.view(stream),
                        offsets: &View::device(&offsets, stream),
                        out: ViewMut::device(out, stream),
                        strides: None,
                        schedule: &schedule.view(stream),
                        traffic: None,
                        status: status.view_mut(stream),
                    };
                    gemm.run(stream, args, workspace.view_mut(stream))
                })
                .expect("launch");
        },
        |(out, status), stream| {
            check::no_fault(stream, status);
            // All experts have the same weights.
            check_products(stream, out, EXPERT, FORMATS[0].1, &[0, max_tokens - 1]);
        },
    );
    check::no_fault(&stream, &status);
}

criterion_group!(benches, cpu, link, products, experts);
