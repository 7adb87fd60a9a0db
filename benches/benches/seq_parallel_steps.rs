//! Ring steps in bf16: 32 query heads over 8 KV heads of 128 channels, every rank on one device; and the packing of messages.

use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, criterion_group};
use half::bf16;
use longkv_attention::testing::Inputs;
use longkv_attention::{AttentionSpec, DType, HeadShape, Mask, Score};
use longkv_benches::data::{Vectors, poisoned, repeated};
use longkv_benches::{Case, GpuBench, Work, check, throughput};
use longkv_cuda::cudarc::driver::{CudaSlice, CudaStream};
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
type Shape = (&'static str, usize, usize, Mask, Option<(usize, usize)>);

/// - a step of 16K queries and as many keys, alone, at the start, in the middle and at the end of a ring;
/// - the same of 4K, where the carried state weighs most;
/// - all of 8 ranks with 8K tokens each, one after another, against one launch over all tokens.
const CASES: [Shape; 9] = [
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
    for shape in &CASES {
        bench.case(&mut group, shape.0, |case| step(case, shape));
    }
}

/// What the ranks hold: all of them the same queries and the same block, K `[own, KV_HEADS, DIM]`, then V, so that one of each is enough.
struct Held {
    ring: RingPlan,
    /// Tokens of a rank.
    own: usize,
    q: Vectors<bf16>,
    block: Vectors<bf16>,
}

impl Held {
    fn new(tokens: usize, ranks: usize, mask: Mask) -> Self {
        let own = tokens / ranks;
        Held { ring: ring(tokens, ranks, mask), own, q: Vectors::new(DIM, 1), block: Vectors::new(DIM, 2) }
    }

    fn upload(&self, stream: &Arc<CudaStream>) -> [CudaSlice<bf16>; 2] {
        [self.q.upload(stream, self.own * Q_HEADS), self.block.upload(stream, self.own * KV_HEADS * 2)]
    }

    /// Some rows of a rank, each with attention over the block of each of `sources`, as far as the mask shows its keys.
    fn rows(&self, rank: usize, sources: &[usize]) -> Vec<(usize, check::Row)> {
        let shards = self.ring.shards();
        let positions: Vec<usize> =
            shards.queries(rank).iter().flat_map(|segment| segment.positions()).collect();
        let keys: Vec<(usize, usize)> = sources
            .iter()
            .flat_map(|source| shards.keys(*source))
            .flat_map(|segment| segment.positions().zip(segment.row..))
            .collect();
        let samples = [(0, 0), (self.own / 2 + 1, 13), (self.own - 1, Q_HEADS - 1)];
        let row = |(query, head): (usize, usize)| {
            let seen = |(position, _): &&(usize, usize)| {
                self.ring.spec().mask == Mask::Full || *position <= positions[query]
            };
            let rows: Vec<usize> = keys.iter().filter(seen).map(|(_, row)| *row).collect();
            let at = |token: usize| rows[token] * KV_HEADS + head * KV_HEADS / Q_HEADS;
            let (k, v) =
                (|token| self.block.get(at(token)), |token| self.block.get(self.own * KV_HEADS + at(token)));
            let row = query * Q_HEADS + head;
            (row, check::attention(self.ring.spec().score, self.q.get(row), rows.len(), k, v))
        };
        samples.map(row).to_vec()
    }
}

/// What a step leaves.
struct Left {
    o: CudaSlice<f32>,
    ml: CudaSlice<f32>,
    out: CudaSlice<bf16>,
    lse: CudaSlice<f32>,
    status: StatusWord,
}

impl Left {
    fn new(stream: &Arc<CudaStream>, rows: usize) -> Self {
        Left {
            // A state that has seen no key: steps that continue one add their block to it.
            o: stream.alloc_zeros(rows * DIM).expect("allocate"),
            ml: repeated(stream, &[f32::NEG_INFINITY, 0.0], rows * 2),
            out: poisoned(stream, rows * DIM),
            lse: poisoned(stream, rows),
            status: StatusWord::new(stream).expect("allocate"),
        }
    }
}

fn step(case: &mut Case<'_, '_>, &(_, tokens, ranks, mask, only): &Shape) {
    let (gpu, stream) = (&case.bench.gpu, case.bench.stream.clone());
    let held = Held::new(tokens, ranks, mask);
    let plans: Vec<RingStepPlan> = match only {
        Some((rank, _)) => vec![RingStepPlan::new(&held.ring, rank).expect("a valid plan")],
        None => (0..ranks).map(|rank| RingStepPlan::new(&held.ring, rank).expect("a valid plan")).collect(),
    };
    let runs: Vec<(usize, usize)> = match only {
        Some((_, step)) => vec![(0, step)],
        None => (0..ranks).flat_map(|rank| (0..ranks).map(move |step| (rank, step))).collect(),
    };
    let [q, block] = held.upload(&stream);
    let mut workspace = Workspace::zeroed(&stream, plans[0].workspace().bytes()).expect("allocate");
    let prepared: Vec<_> = plans
        .iter()
        .map(|plan| {
            let step = RingStep::<_, bf16>::prepare(gpu, plan).expect("prepare");
            let tiles = stream.clone_htod(bytemuck::cast_slice::<_, u8>(plan.tiles())).expect("copy");
            (step, tiles, stream.clone_htod(plan.tile_counts()).expect("copy"))
        })
        .collect();
    stream.synchronize().expect("the copies ran");
    let bytes = runs.iter().map(|&(rank, step)| plans[rank].bytes_moved(step, DType::BF16)).sum();
    let flops = runs.iter().map(|&(rank, step)| plans[rank].flops(step)).sum();
    let left = case.time(
        Work::new(bytes, flops).note("tiles planned on the host"),
        Left::new(&stream, held.own * Q_HEADS),
        |left, stream| {
            for &(rank, index) in &runs {
                let (step, tiles, counts) = &prepared[rank];
                let args = RingStepArgs {
                    tiles: &View::device(tiles, stream).cast(),
                    tile_counts: &View::device(counts, stream),
                    q: &View::device(&q, stream),
                    block: &View::device(&block, stream),
                    o: ViewMut::device(&mut left.o, stream),
                    ml: ViewMut::device(&mut left.ml, stream),
                    out: Some(ViewMut::device(&mut left.out, stream)),
                    lse: ViewMut::device(&mut left.lse, stream),
                    status: left.status.view_mut(stream),
                };
                step.run(stream, index, args, workspace.view_mut(stream)).expect("launch");
            }
        },
        |left, stream| {
            check::no_fault(stream, &left.status);
            match only {
                // One block, whatever rank it comes from, for all hold the same and nothing is masked where there are several.
                Some((rank, step)) if step + 1 < ranks => {
                    check::states(stream, &left.o, &left.ml, &held.rows(rank, &[rank]));
                }
                Some((rank, _)) => check::rows(stream, &left.out, &left.lse, &held.rows(rank, &[rank])),
                // The last rank is the last that wrote.
                None => {
                    let all: Vec<usize> = (0..ranks).collect();
                    check::rows(stream, &left.out, &left.lse, &held.rows(ranks - 1, &all));
                }
            }
        },
    );
    check::no_fault(&stream, &left.status);
}

/// 8 ranks with 8K tokens each on one GPU whose blocks really go round, each exchange beside the step before; against
/// `65536-causal`, one launch over all tokens, and `8-ranks-of-8192-causal`, the steps alone.
fn moving(criterion: &mut Criterion, bench: &mut GpuBench) {
    let mut group = bench.group(criterion, "seq-parallel/ring", "bf16");
    group.group.sample_size(10);
    bench.case(&mut group, "8-ranks-of-8192-causal", |case| ring_of_ranks(case, 65_536, 8));
}

fn ring_of_ranks(case: &mut Case<'_, '_>, tokens: usize, ranks: usize) {
    let (gpu, stream) = (&case.bench.gpu, case.bench.stream.clone());
    let held = Held::new(tokens, ranks, Mask::Causal);
    let q = held.q.upload(&stream, held.own * Q_HEADS);
    let kernels: Vec<_> = (0..ranks)
        .map(|rank| {
            let plan = RingStepPlan::new(&held.ring, rank).expect("a valid plan");
            RingStep::<_, bf16>::prepare(gpu, &plan).expect("prepare")
        })
        .collect();
    let rows = held.own * Q_HEADS;
    let ends = World::new(ranks).expect("ranks").1.into_iter();
    let ends = ends.map(|end| (end, case.bench.second_stream()));
    let of_ranks: Vec<_> = OneGpu::group(ends)
        .into_iter()
        .zip(&kernels)
        .map(|(end, kernel)| {
            let plan = kernel.plan();
            let copy = || held.block.upload_bytes(&stream, held.own * KV_HEADS * 2);
            let blocks = (copy(), Some(copy()));
            let tiles = stream.clone_htod(bytemuck::cast_slice::<_, u8>(plan.tiles())).expect("copy");
            let counts = stream.clone_htod(plan.tile_counts()).expect("copy");
            let workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
            (end, Some(blocks), tiles, counts, Left::new(&stream, rows), workspace)
        })
        .collect();
    stream.synchronize().expect("the copies ran");
    let plans = || kernels.iter().map(RingStep::plan);
    let all = |of: &dyn Fn(&RingStepPlan, usize) -> u64| -> u64 {
        plans().map(|plan| (0..ranks).map(|step| of(plan, step)).sum::<u64>()).sum()
    };
    let bytes = all(&|plan, step| plan.bytes_moved(step, DType::BF16));
    let flops = all(&|plan, step| plan.flops(step));
    let of_ranks = case.time(
        Work::new(bytes, flops).one_by_one().note("steps and exchanges of all ranks, launched one by one"),
        of_ranks,
        |of_ranks, stream| {
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
                for (ring, (end, _, tiles, counts, left, workspace)) in rings.iter_mut().zip(&mut *of_ranks) {
                    let args = DeviceRingArgs {
                        tiles: &View::device(tiles, stream).cast(),
                        tile_counts: &View::device(counts, stream),
                        q: &View::device(&q, stream),
                        o: ViewMut::device(&mut left.o, stream),
                        ml: ViewMut::device(&mut left.ml, stream),
                        out: ViewMut::device(&mut left.out, stream),
                        lse: ViewMut::device(&mut left.lse, stream),
                        status: left.status.view_mut(stream),
                    };
                    let mut carrier = DeviceCarrier { transport: end, after: stream };
                    ring.step(&mut carrier, stream, args, workspace.view_mut(stream)).expect("a step");
                }
            }
            for (ring, (_, blocks, ..)) in rings.into_iter().zip(of_ranks) {
                *blocks = Some(ring.into_blocks().expect("nothing is under way"));
            }
        },
        |of_ranks, stream| {
            let sources: Vec<usize> = (0..ranks).collect();
            for rank in [0, ranks - 1] {
                let (.., left, _) = &of_ranks[rank];
                check::no_fault(stream, &left.status);
                check::rows(stream, &left.out, &left.lse, &held.rows(rank, &sources));
            }
        },
    );
    of_ranks.iter().for_each(|(.., left, _)| check::no_fault(&stream, &left.status));
}

/// Messages of Ulysses' first all-to-all among 8 ranks with 8K tokens each.
fn messages(criterion: &mut Criterion, bench: &mut GpuBench) {
    let mut group = bench.group(criterion, "seq-parallel/pack", "bf16");
    let shape = HeadShape::new(Q_HEADS, KV_HEADS, DIM, DIM).expect("a valid shape");
    let (ranks, types) = (8, (DType::BF16, DType::BF16));
    let rows = Rows { queries: 8192, keys: 8192 };
    bench.case(&mut group, "8192-to-heads-of-8", |case| {
        pack(case, &PackPlan::to_heads(&shape, rows, ranks, types).expect("a valid plan"));
    });
    bench.case(&mut group, "8192-from-tokens-of-8", |case| {
        pack(case, &PackPlan::from_tokens(&shape, &[rows; 8], 0, types).expect("a valid plan"));
    });
}

fn pack(case: &mut Case<'_, '_>, plan: &PackPlan) {
    let stream = case.bench.stream.clone();
    let pack = Pack::prepare(&case.bench.gpu, plan).expect("prepare");
    let copies = stream.clone_htod(bytemuck::cast_slice::<_, u8>(plan.copies())).expect("copy");
    // A prime number of bytes, so that no two rows hold the same.
    let block: Vec<bf16> = Inputs::Normal.generate(1, 500_002, 1);
    let block = &bytemuck::cast_slice::<bf16, u8>(&block)[..1_000_003];
    let sources: Vec<_> = plan.sources().iter().map(|&bytes| repeated(&stream, block, bytes)).collect();
    let destinations: Vec<_> =
        plan.destinations().iter().map(|&bytes| repeated(&stream, &[u8::MAX], bytes)).collect();
    let status = StatusWord::new(&stream).expect("allocate");
    let (_, status) = case.time(
        Work::new(2 * plan.bytes_moved(), 0),
        (destinations, status),
        |(destinations, status), stream| {
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
        },
        |(destinations, status), stream| {
            check::no_fault(stream, status);
            let list = plan.copies();
            for copy in [&list[0], &list[list.len() / 2], &list[list.len() - 1]] {
                let last = u64::from(copy.rows - 1);
                let from = (copy.source_offset + last * copy.source_stride) as usize;
                let to = (copy.destination_offset + last * copy.destination_stride) as usize;
                let len = copy.row_bytes as usize;
                let found = check::download(stream, &destinations[copy.destination as usize], to, len);
                let expected: Vec<u8> = (from..from + len).map(|at| block[at % block.len()]).collect();
                assert!(found == expected, "the last row of a copy to {to}");
            }
        },
    );
    check::no_fault(&stream, &status);
}

criterion_group!(benches, cpu, gpu);
