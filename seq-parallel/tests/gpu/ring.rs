//! Whole rings on a device: P ranks on one GPU, whose blocks go round over a transport, against the oracle and against one launch.

use attention::gpu::{
    CacheLayout, Prefill, PrefillConfig, PrefillInputs, PrefillKernel, PrefillOutput, PrefillPlan,
    PrefillTiles, PrefillTilesArgs,
};
use attention::testing::{Comparison, Tolerance};
use attention::{AttentionSpec, Element, Mask, PageLayout};
use cuda::cudarc::driver::CudaSlice;
use cuda::launch::Function;
use cuda::params::PrefillTile;
use cuda::status::Fault;
use cuda::storage::Storage;
use emulator::rig::{EmulatorRig, GpuRig, Rig};
use half::{bf16, f16};
use seq_parallel::Error;
use seq_parallel::gpu::transport::{DeviceTransport, OneGpu};
use seq_parallel::gpu::{Block, DeviceCarrier, DeviceRing, DeviceRingArgs, RingStep, RingStepPlan};
use seq_parallel::placement::{Placement, Shards};
use seq_parallel::ring::{Carrier, Direction, HostCarrier, RingPlan};
use seq_parallel::testing::{Contents, sequences, spec};
use seq_parallel::transport::local::{Local, World};
use seq_parallel::transport::{Buffer, Transport};

emulator::device_test!(
    rings_equal_the_oracle,
    rings_equal_one_launch,
    sixteen_ranks_are_as_exact_as_one,
    paused_rings_go_on_bit_for_bit,
);

type Queue<R> = <<R as Rig>::Function as Function>::Queue;

/// A rig whose blocks a transport can move.
trait RingRig: Rig {
    /// Memory of a block.
    type Block: Block<Queue<Self>>;
    /// One rank's end of a transport of blocks.
    type End;

    fn block(&self, bytes: &[u8], room: usize) -> Self::Block;
    fn ends(&self, ends: Vec<Local>) -> Vec<Self::End>;
    fn carrier<'a>(&'a self, end: &'a mut Self::End) -> impl Carrier<Block = Self::Block> + 'a;
    /// Bytes sent.
    fn sent(end: &Self::End) -> u64;
}

impl RingRig for EmulatorRig {
    type Block = Buffer;
    type End = Local;

    fn block(&self, bytes: &[u8], room: usize) -> Buffer {
        let mut block = Buffer::new(room);
        block.bytes_mut().fill(0xff);
        block.resize(bytes.len());
        block.bytes_mut().copy_from_slice(bytes);
        block
    }

    fn ends(&self, ends: Vec<Local>) -> Vec<Local> {
        ends
    }

    fn carrier<'a>(&'a self, end: &'a mut Local) -> impl Carrier<Block = Buffer> + 'a {
        HostCarrier(end)
    }

    fn sent(end: &Local) -> u64 {
        end.traffic().sent
    }
}

impl RingRig for GpuRig {
    type Block = CudaSlice<u8>;
    type End = OneGpu<Local>;

    fn block(&self, bytes: &[u8], room: usize) -> CudaSlice<u8> {
        let mut padded = bytes.to_vec();
        padded.resize(room.max(1), 0xff);
        self.device().default_stream().clone_htod(&padded).expect("copy to the device")
    }

    /// Each rank moves its blocks on a stream of its own; the kernels of all are on the rig's.
    fn ends(&self, ends: Vec<Local>) -> Vec<OneGpu<Local>> {
        let context = self.device().context();
        OneGpu::group(ends.into_iter().map(|end| (end, context.new_stream().expect("a stream"))))
    }

    fn carrier<'a>(&'a self, end: &'a mut OneGpu<Local>) -> impl Carrier<Block = CudaSlice<u8>> + 'a {
        DeviceCarrier { transport: end, after: self.queue() }
    }

    fn sent(end: &OneGpu<Local>) -> u64 {
        DeviceTransport::traffic(end).sent
    }
}

/// Outputs and LSEs of a batch, packed `[new tokens, q_heads, v_dim]` and `[new tokens, q_heads]`.
#[derive(Debug, Clone, PartialEq)]
struct Packed<E> {
    out: Vec<E>,
    lse: Vec<f32>,
}

/// One rank: its ring and what its kernels use.
struct Rank<'k, R: RingRig, E: Storage> {
    ring: DeviceRing<'k, R::Function, E, R::Block>,
    end: R::End,
    tiles: R::Buffer<PrefillTile>,
    counts: R::Buffer<u32>,
    q: R::Buffer<E>,
    o: R::Buffer<f32>,
    ml: R::Buffer<f32>,
    out: R::Buffer<E>,
    lse: R::Buffer<f32>,
    status: R::Buffer<u64>,
    workspace: R::Workspace,
}

/// The kernels of all ranks.
fn kernels<R: RingRig, E: Storage>(rig: &R, ring: &RingPlan) -> Vec<RingStep<R::Function, E>> {
    let kernel = |rank| {
        let plan = RingStepPlan::new(ring, rank).unwrap().with_kernel(PrefillKernel::MmaSync).unwrap();
        RingStep::prepare(rig.device(), &plan).unwrap()
    };
    (0..ring.ranks()).map(kernel).collect()
}

/// All ranks of a ring over these contents.
fn ranks<'k, R: RingRig, E: Storage + Element>(
    rig: &R,
    contents: &Contents<E>,
    ring: &RingPlan,
    kernels: &'k [RingStep<R::Function, E>],
) -> Vec<Rank<'k, R, E>> {
    let shape = contents.spec.shape;
    let (_, ends) = World::new(ring.ranks()).unwrap();
    let rank = |(rank, end)| {
        let kernel: &RingStep<_, E> = &kernels[rank];
        let plan = kernel.plan();
        let rows = contents.rows(&ring.shards().queries(rank), &ring.keys(rank));
        let own = [rows.k, rows.v].concat();
        assert_eq!(own.len(), plan.block_len(0));
        let room = plan.max_block_len() * size_of::<E>();
        let spare = (ring.ranks() > 1).then(|| rig.block(&[], room));
        let own = rig.block(bytemuck::cast_slice(&own), room);
        let queries = plan.query_tokens(0) * shape.q_heads();
        Rank {
            ring: DeviceRing::new(kernel, rank, own, spare).unwrap(),
            end,
            tiles: rig.upload(plan.tiles()),
            counts: rig.upload(plan.tile_counts()),
            q: rig.upload(&rows.q),
            o: rig.poisoned(queries * shape.v_dim()),
            ml: rig.poisoned(queries * 2),
            out: rig.poisoned(queries * shape.v_dim()),
            lse: rig.poisoned(queries),
            status: rig.zeroed(1),
            workspace: rig.workspace(plan.workspace()),
        }
    };
    rig.ends(ends).into_iter().enumerate().map(rank).collect()
}

impl<R: RingRig, E: Storage + Element> Rank<'_, R, E> {
    fn step(&mut self, rig: &R) -> Result<(), Error> {
        let args = DeviceRingArgs {
            tiles: &rig.view(&self.tiles),
            tile_counts: &rig.view(&self.counts),
            q: &rig.view(&self.q),
            o: rig.view_mut(&mut self.o),
            ml: rig.view_mut(&mut self.ml),
            out: rig.view_mut(&mut self.out),
            lse: rig.view_mut(&mut self.lse),
            status: rig.view_mut(&mut self.status),
        };
        let workspace = rig.workspace_view(&mut self.workspace);
        self.ring.step(&mut rig.carrier(&mut self.end), rig.queue(), args, workspace)
    }
}

/// Takes what the ranks computed.
fn packed<R: RingRig, E: Storage + Element>(
    rig: &R,
    contents: &Contents<E>,
    ring: &RingPlan,
    kernels: &[RingStep<R::Function, E>],
    ranks: Vec<Rank<'_, R, E>>,
) -> Packed<E> {
    let shards = ring.shards();
    let shape = contents.spec.shape;
    let (width, heads, tokens) = (shape.q_heads() * shape.v_dim(), shape.q_heads(), shards.new_tokens());
    let mut packed = Packed { out: vec![E::zeroed(); tokens * width], lse: vec![f32::NAN; tokens * heads] };
    for (rank, mut of) in ranks.into_iter().enumerate() {
        let layout = kernels[rank].plan().workspace();
        assert!(of.ring.is_done() && rig.counters_are_zero(&mut of.workspace, layout), "rank {rank}");
        assert_eq!(Fault::decode(rig.download(&of.status)[0]), None, "rank {rank}");
        shards.put(rank, &rig.download(&of.out), width, &mut packed.out).unwrap();
        shards.put(rank, &rig.download(&of.lse), heads, &mut packed.lse).unwrap();
        assert!(of.ring.into_blocks().is_some(), "rank {rank}: nothing is under way");
    }
    packed
}

/// A whole ring, all ranks step by step; `pause_after` steps every rank pauses, and others use its transport.
fn run<R: RingRig, E: Storage + Element>(
    rig: &R,
    contents: &Contents<E>,
    (placement, count): (Placement, usize),
    pause_after: &[usize],
) -> Packed<E> {
    let shards = Shards::new(contents.sequences.iter().copied(), placement, count).unwrap();
    let plan = RingPlan::new(contents.spec, shards).unwrap();
    let kernels = kernels(rig, &plan);
    let mut all = ranks(rig, contents, &plan, &kernels);
    for step in 0..count {
        for rank in &mut all {
            rank.step(rig).unwrap();
            assert_eq!(rank.ring.steps_done(), step + 1);
        }
        if pause_after.contains(&(step + 1)) {
            for rank in &mut all {
                rank.ring.pause(&mut rig.carrier(&mut rank.end)).unwrap();
            }
        }
    }
    for (rank, of) in all.iter_mut().enumerate() {
        let bytes = size_of::<E>();
        assert_eq!(R::sent(&of.end), plan.bytes_sent(rank, bytes, bytes), "rank {rank} of {count}");
        assert!(matches!(of.step(rig), Err(Error::Argument { argument: "step", .. })), "rank {rank}");
    }
    packed(rig, contents, &plan, &kernels, all)
}

fn compare<E: Element>(case: &str, contents: &Contents<E>, packed: &Packed<E>) -> Comparison {
    let dim = contents.spec.shape.v_dim();
    let compared = Comparison::attention(&packed.out, &contents.oracle.out, dim);
    compared.assert(format!("{case}: outputs"));
    Comparison::new(&packed.lse, &contents.oracle.lse, Tolerance::LSE).assert(format!("{case}: LSEs"));
    compared
}

fn contents<E: Element>(spec: AttentionSpec, lens: &[(usize, usize)], seed: u64) -> Contents<E> {
    Contents::new(spec, sequences(lens), seed)
}

/// Blocks of unequal lengths, ranks without a token, masks that leave steps without work.
fn rings_equal_the_oracle<R: RingRig>(rig: &R) {
    use Placement::{Contiguous, Striped, Zigzag};
    let packed = contents::<f16>(spec(4, 1, 64, Mask::Causal), &[(0, 70), (0, 1), (0, 9)], 1);
    for way in [(Zigzag, 3), (Contiguous, 2)] {
        compare(&format!("{way:?} on {}", rig.name()), &packed, &run(rig, &packed, way, &[]));
    }
    let cached = contents::<bf16>(spec(2, 1, 128, Mask::Causal), &[(40, 9), (3, 30)], 2);
    compare(&format!("cached on {}", rig.name()), &cached, &run(rig, &cached, (Striped, 2), &[]));
    let short = contents::<f16>(spec(2, 2, 64, Mask::Full), &[(0, 3)], 3);
    compare(&format!("short on {}", rig.name()), &short, &run(rig, &short, (Zigzag, 4), &[]));
}

/// The monolithic kernel: one launch of dense prefill over all keys of one sequence.
fn one_launch<R: RingRig, E: Storage + Element>(rig: &R, contents: &Contents<E>) -> Packed<E> {
    let (spec, tokens) = (contents.spec, contents.sequences[0].new);
    let (shape, rows) = (spec.shape, tokens * spec.shape.q_heads());
    let layout = |dim| PageLayout::nhd(tokens, shape.kv_heads(), dim);
    let plan = PrefillPlan::new(PrefillConfig {
        spec,
        batch: 1,
        num_queries: tokens,
        max_kv_len: tokens,
        cache: CacheLayout::Contiguous { tokens, k: layout(shape.qk_dim()), v: layout(shape.v_dim()) },
        carry: false,
        kernel: PrefillKernel::MmaSync,
    })
    .unwrap();
    let (q, k, v) = (rig.upload(&contents.q), rig.upload(&contents.k), rig.upload(&contents.v));
    let (cu_queries, kv_len) = (rig.upload(&[0, tokens as u32]), rig.upload(&[tokens as u32]));
    let kv_start = rig.upload(&[0u32]);
    let mut status = rig.zeroed::<u64>(1);
    let (mut out, mut lse) = (rig.poisoned::<E>(rows * shape.v_dim()), rig.poisoned::<f32>(rows));
    let mut workspace = rig.workspace(plan.workspace());
    let args = PrefillTilesArgs {
        cu_queries: &rig.view(&cu_queries),
        kv_len: &rig.view(&kv_len),
        block_table: None,
        kv_start: Some(&rig.view(&kv_start)),
        status: rig.view_mut(&mut status),
    };
    let planner = PrefillTiles::prepare(rig.device(), &plan).unwrap();
    let mut tiles = planner.run(rig.queue(), args, rig.workspace_view(&mut workspace)).unwrap();
    let (q, k, v) = (rig.view(&q), rig.view(&k), rig.view(&v));
    let inputs = PrefillInputs { q: &q, k: &k, v: &v, block_table: None };
    let output = PrefillOutput { out: rig.view_mut(&mut out), lse: rig.view_mut(&mut lse) };
    let kernel = Prefill::<_, E>::prepare(rig.device(), &plan).unwrap();
    kernel.run(rig.queue(), inputs, output, &mut tiles).unwrap();
    drop(tiles);
    assert_eq!(Fault::decode(rig.download(&status)[0]), None);
    Packed { out: rig.download(&out), lse: rig.download(&lse) }
}

/// What P ranks compute is what the monolithic kernel computes, up to the order of sums: directly, not only by way of the oracle.
fn rings_equal_one_launch<R: RingRig>(rig: &R) {
    use Placement::{Contiguous, Striped, Zigzag};
    // More tokens, and more ranks, than the emulator has the time for.
    let on_gpu = rig.stress_launches() > 1000;
    let tokens = if on_gpu { 2048 } else { 150 };
    let ways = [(Contiguous, 1), (Zigzag, 4), (Striped, 2), (Zigzag, 8)];
    let contents = contents::<f16>(spec(4, 2, 64, Mask::Causal), &[(0, tokens)], 4);
    let one = one_launch(rig, &contents);
    compare(&format!("one launch on {}", rig.name()), &contents, &one);
    let whole: Vec<f64> = one.out.iter().map(|x| f64::from(x.to_f32())).collect();
    let lse: Vec<f64> = one.lse.iter().map(|x| f64::from(*x)).collect();
    for (placement, ranks) in ways.into_iter().filter(|(_, ranks)| on_gpu || *ranks < 8) {
        let case = format!("{placement}, {ranks} ranks on {}", rig.name());
        let ring = run(rig, &contents, (placement, ranks), &[]);
        Comparison::attention(&ring.out, &whole, contents.spec.shape.v_dim())
            .assert(format!("{case}: outputs"));
        Comparison::new(&ring.lse, &lse, Tolerance::LSE).assert(format!("{case}: LSEs"));
    }
}

/// The state is carried in f32, so that the error does not grow with the ranks.
fn sixteen_ranks_are_as_exact_as_one<R: RingRig>(rig: &R) {
    if !crate::runs(rig, 5) {
        return;
    }
    let contents = contents::<f16>(spec(2, 1, 64, Mask::Causal), &[(0, 128)], 5);
    let error = |ranks| {
        let case = format!("{ranks} ranks on {}", rig.name());
        compare(&case, &contents, &run(rig, &contents, (Placement::Zigzag, ranks), &[])).rms
    };
    let (one, many) = (error(1), error(16));
    assert!(many <= 1.2 * one, "rms {many:e} on 16 ranks, {one:e} on one, on {}", rig.name());
}

/// Pausing after any step, or after each, changes nothing.
fn paused_rings_go_on_bit_for_bit<R: RingRig>(rig: &R) {
    let contents = contents::<f16>(spec(2, 1, 64, Mask::Causal), &[(0, 60)], 6);
    let way = (Placement::Zigzag, 3);
    let whole = run(rig, &contents, way, &[]);
    for pauses in [&[1][..], &[2], &[1, 2, 3]] {
        assert_eq!(run(rig, &contents, way, pauses), whole, "{pauses:?} on {}", rig.name());
    }
}

#[test]
fn what_a_ring_in_device_memory_refuses() {
    emulator::emulator_or_skip!();
    let rig = EmulatorRig::new(emulator::Order::Forward);
    let contents = contents::<f16>(spec(2, 1, 64, Mask::Causal), &[(0, 10)], 7);
    let shards = Shards::new(contents.sequences.iter().copied(), Placement::Zigzag, 2).unwrap();
    let ring = |direction| RingPlan::new(contents.spec, shards.clone()).unwrap().passing(direction);
    let make = |direction, rank, spare: Option<Buffer>| {
        let plan = RingStepPlan::new(&ring(direction), 0).unwrap();
        let plan = plan.with_kernel(PrefillKernel::MmaSync).unwrap();
        let kernel = RingStep::<_, f16>::prepare(rig.device(), &plan).unwrap();
        DeviceRing::new(&kernel, rank, Buffer::new(8), spare).map(drop).unwrap_err().to_string()
    };
    for (error, named) in [
        (make(Direction::PassQ, 0, Some(Buffer::new(8))), "one that passes keys and values"),
        (make(Direction::PassKv, 2, Some(Buffer::new(8))), "`rank`"),
        (make(Direction::PassKv, 0, None), "a second block"),
    ] {
        assert!(error.contains(named), "{named}: {error}");
    }
}
