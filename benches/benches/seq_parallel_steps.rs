//! Ring steps in bf16: 32 query heads over 8 KV heads of 128 channels, every rank on one device; and the packing of messages.

use criterion::{BenchmarkId, Criterion, criterion_group};
use half::bf16;
use longkv_attention::testing::Inputs;
use longkv_attention::{AttentionSpec, DType, HeadShape, Mask, Score};
use longkv_benches::{GpuBench, throughput};
use longkv_cuda::memory::{View, ViewMut};
use longkv_cuda::status::StatusWord;
use longkv_cuda::workspace::Workspace;
use seq_parallel::gpu::transport::OneGpu;
use seq_parallel::gpu::{
    DeviceCarrier, DeviceRing, DeviceRingArgs, Pack, PackArgs, PackPlan, RingStep, RingStepArgs,
    RingStepPlan, Rows,
};
use seq_parallel::placement::{Placement, Sequence, Shards};
use seq_parallel::ring::RingPlan;
use seq_parallel::transport::local::World;

const Q_HEADS: usize = 32;
const KV_HEADS: usize = 8;
const DIM: usize = 128;

/// (name, tokens, ranks, mask, rank and step; all ranks and steps where there is none).
type Case = (&'static str, usize, usize, Mask, Option<(usize, usize)>);

/// - a step of 16K queries and as many keys, alone, at the start, in the middle and at the end of a ring;
/// - the same of 4K, where the carried state weighs most;
/// - all of 8 ranks with 8K tokens each, one after another, against one launch over all tokens.
const CASES: [Case; 9] = [
    ("16384-full", 16_384, 1, Mask::Full, Some((0, 0))),
    ("16384-causal", 16_384, 1, Mask::Causal, Some((0, 0))),
    ("16384-full-first", 16_384 * 4, 4, Mask::Full, Some((0, 0))),
    ("16384-full-middle", 16_384 * 4, 4, Mask::Full, Some((0, 1))),
    ("16384-full-last", 16_384 * 4, 4, Mask::Full, Some((0, 3))),
    ("4096-full", 4096, 1, Mask::Full, Some((0, 0))),
    ("4096-full-middle", 4096 * 4, 4, Mask::Full, Some((0, 1))),
    ("65536-causal", 65_536, 1, Mask::Causal, None),
    ("8-ranks-of-8192-causal", 65_536, 8, Mask::Causal, None),
];

fn ring(tokens: usize, ranks: usize, mask: Mask) -> RingPlan {
    let spec = AttentionSpec {
        shape: HeadShape::new(Q_HEADS, KV_HEADS, DIM, DIM).expect("a valid shape"),
        score: Score::new((DIM as f32).powf(-0.5)).expect("a finite scale"),
        mask,
    };
    let shards = Shards::new([Sequence::new(tokens)], Placement::Zigzag, ranks).expect("valid shards");
    RingPlan::new(spec, shards).expect("a valid ring")
}

fn cpu(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("seq-parallel/ring-step/cpu/bf16");
    group.sample_size(10);
    let tokens = 256;
    let ring = ring(tokens, 1, Mask::Causal);
    let q = Inputs::Normal.generate::<bf16>(tokens * Q_HEADS, DIM, 1);
    let (k, v) = (
        Inputs::Normal.generate::<bf16>(tokens * KV_HEADS, DIM, 2),
        Inputs::Normal.generate::<bf16>(tokens * KV_HEADS, DIM, 3),
    );
    let plan = RingStepPlan::new(&ring, 0).expect("a valid plan");
    group.throughput(throughput(plan.bytes_moved(0, DType::BF16), plan.flops(0)));
    group.bench_function(BenchmarkId::from_parameter("256-causal"), |bencher| {
        let inputs = seq_parallel::ring::Inputs { q: &q, k: &k, v: &v };
        bencher.iter(|| {
            let (_, mut ends) = seq_parallel::transport::local::World::new(1).expect("one rank");
            ring.run(inputs, &mut ends[0]).expect("valid inputs")
        });
    });
}

fn gpu(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    steps(criterion, &mut bench);
    moving(criterion, &mut bench);
    messages(criterion, &mut bench);
}

fn steps(criterion: &mut Criterion, bench: &mut GpuBench) {
    let mut group = bench.group(criterion, "seq-parallel/ring-step", "bf16");
    group.group.sample_size(10);
    for (name, tokens, ranks, mask, only) in CASES {
        let ring = ring(tokens, ranks, mask);
        let plans: Vec<RingStepPlan> = match only {
            Some((rank, _)) => vec![RingStepPlan::new(&ring, rank).expect("a valid plan")],
            None => (0..ranks).map(|rank| RingStepPlan::new(&ring, rank).expect("a valid plan")).collect(),
        };
        let runs: Vec<(usize, usize)> = match only {
            Some((_, step)) => vec![(0, step)],
            None => (0..ranks).flat_map(|rank| (0..ranks).map(move |step| (rank, step))).collect(),
        };
        let stream = bench.stream.clone();
        let upload = |vectors, seed| {
            stream.clone_htod(&Inputs::Normal.generate::<bf16>(vectors, DIM, seed)).expect("copy")
        };
        // Every rank has the same number of tokens, so that all may read the same queries and the same block.
        let own = tokens / ranks;
        let (q, block) = (upload(own * Q_HEADS, 1), upload(own * KV_HEADS * 2, 2));
        let rows = own * Q_HEADS;
        let mut o = stream.alloc_zeros::<f32>(rows * DIM).expect("allocate");
        let mut ml = stream.alloc_zeros::<f32>(rows * 2).expect("allocate");
        let mut out = stream.alloc_zeros::<bf16>(rows * DIM).expect("allocate");
        let mut lse = stream.alloc_zeros::<f32>(rows).expect("allocate");
        let mut status = StatusWord::new(&stream).expect("allocate");
        let mut workspace = Workspace::zeroed(&stream, plans[0].workspace().bytes()).expect("allocate");
        let prepared: Vec<_> = plans
            .iter()
            .map(|plan| {
                let step = RingStep::<_, bf16>::prepare(&bench.gpu, plan).expect("prepare");
                let tiles = stream.clone_htod(bytemuck::cast_slice::<_, u8>(plan.tiles())).expect("copy");
                (step, tiles, stream.clone_htod(plan.tile_counts()).expect("copy"))
            })
            .collect();
        let bytes = runs.iter().map(|&(rank, step)| plans[rank].bytes_moved(step, DType::BF16)).sum();
        let flops = runs.iter().map(|&(rank, step)| plans[rank].flops(step)).sum();
        bench.case(&mut group, name, (bytes, flops), |stream| {
            for &(rank, index) in &runs {
                let (step, tiles, counts) = &prepared[rank];
                let args = RingStepArgs {
                    tiles: &View::device(tiles, stream).cast(),
                    tile_counts: &View::device(counts, stream),
                    q: &View::device(&q, stream),
                    block: &View::device(&block, stream),
                    o: ViewMut::device(&mut o, stream),
                    ml: ViewMut::device(&mut ml, stream),
                    out: Some(ViewMut::device(&mut out, stream)),
                    lse: ViewMut::device(&mut lse, stream),
                    status: status.view_mut(stream),
                };
                step.run(stream, index, args, workspace.view_mut(stream)).expect("launch");
            }
        });
        assert_eq!(status.read(&stream).expect("read the status"), None, "{name}");
    }
}

/// 8 ranks with 8K tokens each on one GPU whose blocks really go round, each exchange beside the step before; against
/// `65536-causal`, one launch over all tokens, and `8-ranks-of-8192-causal`, the steps alone.
fn moving(criterion: &mut Criterion, bench: &mut GpuBench) {
    let mut group = bench.group(criterion, "seq-parallel/ring", "bf16");
    group.group.sample_size(10);
    let (tokens, ranks) = (65_536, 8);
    let ring = ring(tokens, ranks, Mask::Causal);
    let stream = bench.stream.clone();
    let own = tokens / ranks;
    let q = stream.clone_htod(&Inputs::Normal.generate::<bf16>(own * Q_HEADS, DIM, 1)).expect("copy");
    let block = Inputs::Normal.generate::<bf16>(own * KV_HEADS * 2, DIM, 2);
    let kernels: Vec<_> = (0..ranks)
        .map(|rank| {
            let plan = RingStepPlan::new(&ring, rank).expect("a valid plan");
            RingStep::<_, bf16>::prepare(&bench.gpu, &plan).expect("prepare")
        })
        .collect();
    let rows = own * Q_HEADS;
    let ends = World::new(ranks).expect("ranks").1.into_iter();
    let ends = ends.map(|end| (end, stream.context().new_stream().expect("a stream")));
    let mut of_ranks: Vec<_> = OneGpu::group(ends)
        .into_iter()
        .zip(&kernels)
        .map(|(end, kernel)| {
            let plan = kernel.plan();
            let block = || stream.clone_htod(bytemuck::cast_slice::<_, u8>(&block)).expect("copy");
            let blocks = (block(), Some(block()));
            let tiles = stream.clone_htod(bytemuck::cast_slice::<_, u8>(plan.tiles())).expect("copy");
            let counts = stream.clone_htod(plan.tile_counts()).expect("copy");
            let state =
                [rows * DIM, rows * 2, rows].map(|len| stream.alloc_zeros::<f32>(len).expect("allocate"));
            let out = stream.alloc_zeros::<bf16>(rows * DIM).expect("allocate");
            let workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
            (end, Some(blocks), tiles, counts, state, out, workspace)
        })
        .collect();
    let mut status = StatusWord::new(&stream).expect("allocate");
    let plans = || kernels.iter().map(RingStep::plan);
    let all = |of: &dyn Fn(&RingStepPlan, usize) -> u64| -> u64 {
        plans().map(|plan| (0..ranks).map(|step| of(plan, step)).sum::<u64>()).sum()
    };
    let bytes = all(&|plan, step| plan.bytes_moved(step, DType::BF16));
    let flops = all(&|plan, step| plan.flops(step));
    bench.case(&mut group, "8-ranks-of-8192-causal", (bytes, flops), |stream| {
        let mut rings: Vec<_> = of_ranks
            .iter_mut()
            .zip(&kernels)
            .enumerate()
            .map(|(rank, ((_, blocks, ..), kernel))| {
                // Whose block it is matters to no time.
                let (own, spare) = blocks.take().expect("the ring before has ended");
                DeviceRing::new(kernel, rank, own, spare).expect("a ring")
            })
            .collect();
        for _ in 0..ranks {
            for (ring, (end, _, tiles, counts, [o, ml, lse], out, workspace)) in
                rings.iter_mut().zip(&mut of_ranks)
            {
                let args = DeviceRingArgs {
                    tiles: &View::device(tiles, stream).cast(),
                    tile_counts: &View::device(counts, stream),
                    q: &View::device(&q, stream),
                    o: ViewMut::device(o, stream),
                    ml: ViewMut::device(ml, stream),
                    out: ViewMut::device(out, stream),
                    lse: ViewMut::device(lse, stream),
                    status: status.view_mut(stream),
                };
                let mut carrier = DeviceCarrier { transport: end, after: stream };
                ring.step(&mut carrier, stream, args, workspace.view_mut(stream)).expect("a step");
            }
        }
        for (ring, (_, blocks, ..)) in rings.into_iter().zip(&mut of_ranks) {
            *blocks = Some(ring.into_blocks().expect("nothing is under way"));
        }
    });
    assert_eq!(status.read(&stream).expect("read the status"), None);
}

/// Messages of Ulysses' first all-to-all among 8 ranks with 8K tokens each.
fn messages(criterion: &mut Criterion, bench: &mut GpuBench) {
    let mut group = bench.group(criterion, "seq-parallel/pack", "bf16");
    let shape = HeadShape::new(Q_HEADS, KV_HEADS, DIM, DIM).expect("a valid shape");
    let (ranks, types) = (8, (DType::BF16, DType::BF16));
    let rows = Rows { queries: 8192, keys: 8192 };
    let plans = [
        ("8192-to-heads-of-8", PackPlan::to_heads(&shape, rows, ranks, types)),
        ("8192-from-tokens-of-8", PackPlan::from_tokens(&shape, &[rows; 8], 0, types)),
    ];
    for (name, plan) in plans {
        let plan = plan.expect("a valid plan");
        let stream = bench.stream.clone();
        let pack = Pack::prepare(&bench.gpu, &plan).expect("prepare");
        let copies = stream.clone_htod(bytemuck::cast_slice::<_, u8>(plan.copies())).expect("copy");
        let buffers = |sizes: &[usize]| -> Vec<_> {
            sizes.iter().map(|&bytes| stream.alloc_zeros::<u8>(bytes).expect("allocate")).collect()
        };
        let (sources, mut destinations) = (buffers(plan.sources()), buffers(plan.destinations()));
        let mut status = StatusWord::new(&stream).expect("allocate");
        bench.case(&mut group, name, (2 * plan.bytes_moved(), 0), |stream| {
            let sources: Vec<_> = sources.iter().map(|source| View::device(source, stream)).collect();
            let mut destinations: Vec<_> =
                destinations.iter_mut().map(|destination| ViewMut::device(destination, stream)).collect();
            let args = PackArgs {
                copies: &View::device(&copies, stream).cast(),
                sources: &sources,
                destinations: &mut destinations,
                status: status.view_mut(stream),
            };
            pack.run(stream, args).expect("launch");
        });
        assert_eq!(status.read(&stream).expect("read the status"), None, "{name}");
    }
}

criterion_group!(benches, cpu, gpu);
