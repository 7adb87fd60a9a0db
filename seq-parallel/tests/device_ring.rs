//! Rings over transports of device memory: stand-ins for the CUDA driver and NCCL move the blocks, the emulator runs the kernels on them.
//!
//! What this proves is that ring, transport and kernel fit together on the host: which block is posted when, which memory a kernel sees, bytes,
//! pauses and faults. That exchanges really run beside kernels is proven on a GPU alone.

mod support;

use std::sync::Arc;

use attention::Mask;
use attention::gpu::PrefillKernel;
use attention::testing::{Comparison, Tolerance};
use cuda::cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use cuda::launch::Device;
use cuda::memory::{Space, View, ViewMut};
use cuda::workspace::HostWorkspace;
use emulator::{Emulator, Order, Queue};
use half::f16;
use seq_parallel::gpu::transport::{DeviceTransport, Incoming, Nccl, NcclLibrary, Outgoing};
use seq_parallel::gpu::{Block, DeviceCarrier, DeviceRing, DeviceRingArgs, RingStep, RingStepPlan};
use seq_parallel::placement::{Placement, Shards};
use seq_parallel::ring::{Carrier, RingPlan};
use seq_parallel::testing::faults::{NEVER_PASSES, PASSES};
use seq_parallel::testing::{Contents, sequences, spec};
use seq_parallel::transport::local::{self, Local, World};
use seq_parallel::transport::{Operation, Tag, Ticket, Transport};
use seq_parallel::{Error, PeerFault};
use support::{on_nccl, one_gpu, with_fakes};

/// Memory of the stand-in driver, which is the host's: the emulator's kernels see it where it is.
struct Memory {
    slice: Arc<CudaSlice<u8>>,
    stream: Arc<CudaStream>,
}

impl Block<Queue> for Memory {
    fn view<'a>(&'a self, _: &'a Queue) -> Result<View<'a, u8>, Error> {
        use cuda::cudarc::driver::DevicePtr;
        let (address, _guard) = self.slice.device_ptr(&self.stream);
        // SAFETY: the stand-in's memory is the host's, and the emulator runs a launch at once, while this borrow lasts.
        Ok(unsafe { View::from_raw(address, self.slice.len(), Space::Host) })
    }
}

/// As `DeviceCarrier`, for this memory.
struct OnFakes<'a, D> {
    transport: &'a mut D,
    after: &'a Arc<CudaStream>,
}

impl<D: DeviceTransport> Carrier for OnFakes<'_, D> {
    type Block = Memory;

    fn post(
        &mut self,
        tag: Tag,
        (to, held, send_len): (usize, &mut Arc<Memory>, usize),
        (from, space, recv_len): (usize, Memory, usize),
    ) -> Result<Ticket, Error> {
        let space = Arc::try_unwrap(space.slice).expect("space has one owner");
        let send = Outgoing { to, block: held.slice.clone(), len: send_len };
        self.transport.exchange(tag, send, Incoming { from, space, len: recv_len }, self.after)
    }

    fn take(&mut self, ticket: Ticket) -> Result<Memory, Error> {
        Ok(Memory { slice: Arc::new(self.transport.wait(ticket)?), stream: self.after.clone() })
    }
}

fn contents(tokens: usize) -> Contents<f16> {
    Contents::new(spec(2, 1, 64, Mask::Causal), sequences(&[(0, tokens), (0, 5)]), 1)
}

type Kernel = RingStep<<Emulator as Device>::Function, f16>;

fn kernel(ring: &RingPlan, rank: usize) -> Result<Kernel, Error> {
    let plan = RingStepPlan::new(ring, rank)?.with_kernel(PrefillKernel::MmaSync)?;
    RingStep::prepare(&Emulator::new(), &plan)
}

/// One rank: its ring, and what its kernels use.
struct Rank<'k> {
    ring: DeviceRing<'k, <Emulator as Device>::Function, f16, Memory>,
    plan: &'k RingStepPlan,
    queue: Queue,
    stream: Arc<CudaStream>,
    q: Vec<f16>,
    o: Vec<f32>,
    ml: Vec<f32>,
    out: Vec<f16>,
    lse: Vec<f32>,
    status: [u64; 1],
    workspace: HostWorkspace,
}

impl<'k> Rank<'k> {
    fn new(
        context: &Arc<CudaContext>,
        contents: &Contents<f16>,
        ring: &RingPlan,
        (rank, kernel): (usize, &'k Kernel),
    ) -> Result<Self, Error> {
        let (plan, shape, stream) = (kernel.plan(), contents.spec.shape, context.new_stream().unwrap());
        let rows = contents.rows(&ring.shards().queries(rank), &ring.keys(rank));
        let memory = |contents: &[f16]| {
            let mut bytes = bytemuck::cast_slice(contents).to_vec();
            bytes.resize(2 * plan.max_block_len(), 0xff);
            Memory { slice: Arc::new(stream.clone_htod(&bytes).unwrap()), stream: stream.clone() }
        };
        let (own, spare) = (memory(&[rows.k, rows.v].concat()), memory(&[]));
        let states = plan.query_tokens(0) * shape.q_heads();
        Ok(Rank {
            ring: DeviceRing::new(kernel, rank, own, Some(spare))?,
            plan,
            queue: Queue::new(Order::Forward),
            stream,
            q: rows.q,
            o: vec![f32::NAN; states * shape.v_dim()],
            ml: vec![f32::NAN; 2 * states],
            out: vec![f16::NAN; states * shape.v_dim()],
            lse: vec![f32::NAN; states],
            status: [0],
            workspace: HostWorkspace::zeroed(plan.workspace().bytes()),
        })
    }

    fn step<D: DeviceTransport>(&mut self, transport: &mut D) -> Result<(), Error> {
        let args = DeviceRingArgs {
            tiles: &View::host(self.plan.tiles()),
            tile_counts: &View::host(self.plan.tile_counts()),
            q: &View::host(&self.q),
            o: ViewMut::host(&mut self.o),
            ml: ViewMut::host(&mut self.ml),
            out: ViewMut::host(&mut self.out),
            lse: ViewMut::host(&mut self.lse),
            status: ViewMut::host(&mut self.status),
        };
        let mut carrier = OnFakes { transport, after: &self.stream };
        self.ring.step(&mut carrier, &self.queue, args, self.workspace.view_mut())?;
        assert_eq!(self.status, [0]);
        Ok(())
    }

    fn pause<D: DeviceTransport>(&mut self, transport: &mut D) -> Result<(), Error> {
        self.ring.pause(&mut OnFakes { transport, after: &self.stream })
    }
}

/// One rank's ring, up to step `until`; pauses after every step where it is told to.
fn run<D: DeviceTransport>(
    context: &Arc<CudaContext>,
    transport: &mut D,
    contents: &Contents<f16>,
    ring: &RingPlan,
    (until, pauses): (usize, bool),
) -> Rows {
    let rank = transport.control().rank();
    let kernel = kernel(ring, rank)?;
    let mut of = Rank::new(context, contents, ring, (rank, &kernel))?;
    while of.ring.steps_done() < until {
        of.step(transport)?;
        if pauses {
            of.pause(transport)?;
            transport.control().barrier()?;
        }
    }
    Ok((of.out, of.lse))
}

/// Outputs and LSEs of a rank's queries.
type Rows = Result<(Vec<f16>, Vec<f32>), Error>;
/// [`run`] of a rank; gives its rows and the bytes that it sent.
type Run<'a> = dyn FnMut(&RingPlan, &Contents<f16>, (usize, bool)) -> (Rows, u64) + 'a;

/// Runs `body` on the ranks of both transports.
fn on_both<R: Send>(
    context: &Arc<CudaContext>,
    ranks: usize,
    body: impl Fn(usize, &mut Run<'_>) -> R + Sync,
) -> [Vec<R>; 2] {
    let ends = || -> Vec<Local> {
        let mut ends = World::new(ranks).unwrap().1;
        ends.iter_mut().for_each(|end| end.set_deadline(NEVER_PASSES));
        ends
    };
    let on_one_gpu = local::run_on(one_gpu(context, ends()), |mut transport| {
        let rank = transport.control().rank();
        body(rank, &mut |ring, contents, how| {
            let result = run(context, &mut transport, contents, ring, how);
            (result, DeviceTransport::traffic(&transport).sent)
        })
    });
    let library = NcclLibrary::open().unwrap();
    // A rank that is connected first must not fail before the others are: they would hear of it while they connect.
    let connected = std::sync::Barrier::new(ranks);
    let over_nccl = local::run_on(ends(), |end| {
        let rank = end.rank();
        let transport = Nccl::connect(library.clone(), end, context.new_stream().unwrap());
        connected.wait();
        let mut transport = transport.unwrap();
        body(rank, &mut |ring, contents, how| {
            let result = run(context, &mut transport, contents, ring, how);
            (result, DeviceTransport::traffic(&transport).sent)
        })
    });
    [on_one_gpu, over_nccl]
}

/// Compares what all ranks computed with the oracle.
fn compare(case: &str, contents: &Contents<f16>, shards: &Shards, ranks: &[(Vec<f16>, Vec<f32>)]) {
    let shape = contents.spec.shape;
    let (heads, width, tokens) = (shape.q_heads(), shape.q_heads() * shape.v_dim(), shards.new_tokens());
    let (mut out, mut lse) = (vec![f16::NAN; tokens * width], vec![f32::NAN; tokens * heads]);
    for (rank, (rank_out, rank_lse)) in ranks.iter().enumerate() {
        shards.put(rank, rank_out, width, &mut out).unwrap();
        shards.put(rank, rank_lse, heads, &mut lse).unwrap();
    }
    Comparison::attention(&out, &contents.oracle.out, shape.v_dim()).assert(format!("{case}: outputs"));
    Comparison::new(&lse, &contents.oracle.lse, Tolerance::LSE).assert(format!("{case}: LSEs"));
}

#[test]
fn rings_over_device_memory_equal_the_oracle() {
    emulator::emulator_or_skip!();
    with_fakes("rings_over_device_memory_equal_the_oracle", |fakes| {
        let context = fakes.context();
        let contents = contents(60);
        for ranks in [1, 2, 3, 4] {
            for pauses in [false, true] {
                let shards =
                    Shards::new(contents.sequences.iter().copied(), Placement::Zigzag, ranks).unwrap();
                let ring = RingPlan::new(contents.spec, shards.clone()).unwrap();
                let both = on_both(&context, ranks, |rank, run| {
                    let (result, sent) = run(&ring, &contents, (ranks, pauses));
                    assert_eq!(sent, ring.bytes_sent(rank, 2, 2), "rank {rank} of {ranks}");
                    result.unwrap()
                });
                for (results, transport) in both.into_iter().zip(["one GPU", "NCCL"]) {
                    let case = format!("{ranks} ranks on {transport}, pauses: {pauses}");
                    compare(&case, &contents, &shards, &results);
                }
            }
        }
    });
}

/// A rank that stops after a step: every other says which rank and of what, long before the deadline.
#[test]
fn a_rank_that_stops_is_named() {
    emulator::emulator_or_skip!();
    with_fakes("a_rank_that_stops_is_named", |fakes| {
        let context = fakes.context();
        let (contents, ranks) = (contents(30), 3);
        let shards = Shards::new(contents.sequences.iter().copied(), Placement::Zigzag, ranks).unwrap();
        let ring = RingPlan::new(contents.spec, shards).unwrap();
        let both = on_both(&context, ranks, |rank, run| {
            // Rank 1 is gone after its first step, whose exchange it never waits for.
            let until = if rank == 1 { 1 } else { ranks };
            run(&ring, &contents, (until, false)).0.map(drop)
        });
        for results in both {
            assert_eq!(results[1], Ok(()));
            for rank in [0, 2] {
                match &results[rank] {
                    Err(Error::Peer { peer: 1, at, fault: PeerFault::Gone, .. }) => {
                        assert_eq!(at.operation, Operation::PassKv);
                    }
                    other => panic!("rank {rank}: {other:?}"),
                }
            }
        }
    });
}

/// One thread can turn all ranks of a GPU, step by step: a rank's step asks of the others that they have posted, no more.
#[test]
fn one_thread_turns_all_ranks() {
    emulator::emulator_or_skip!();
    with_fakes("one_thread_turns_all_ranks", |fakes| {
        let (context, contents, ranks) = (fakes.context(), contents(60), 4);
        let shards = Shards::new(contents.sequences.iter().copied(), Placement::Striped, ranks).unwrap();
        let ring = RingPlan::new(contents.spec, shards.clone()).unwrap();
        let kernels: Vec<Kernel> = (0..ranks).map(|rank| kernel(&ring, rank).unwrap()).collect();
        let mut ends = one_gpu(&context, World::new(ranks).unwrap().1);
        let of = |of| Rank::new(&context, &contents, &ring, of).unwrap();
        let mut all: Vec<Rank<'_>> = kernels.iter().enumerate().map(of).collect();
        for _ in 0..ranks {
            all.iter_mut().zip(&mut ends).for_each(|(of, end)| of.step(end).unwrap());
        }
        let results: Vec<_> = all.into_iter().map(|of| (of.out, of.lse)).collect();
        compare("one thread", &contents, &shards, &results);
    });
}

/// A step does not wait for the exchange that it posts: with a copy engine that never ends anything, each rank's first step is enqueued and
/// computed; the second waits for what the first has posted, until the deadline.
#[test]
fn a_step_runs_beside_the_exchange_that_it_posts() {
    emulator::emulator_or_skip!();
    with_fakes("a_step_runs_beside_the_exchange_that_it_posts", |fakes| {
        let (context, contents, ranks) = (fakes.context(), contents(40), 2);
        let shards = Shards::new(contents.sequences.iter().copied(), Placement::Zigzag, ranks).unwrap();
        let ring = RingPlan::new(contents.spec, shards).unwrap();
        let (_, mut ends) = World::new(ranks).unwrap();
        ends.iter_mut().for_each(|end| end.set_deadline(PASSES));
        let [started, computed] = [(); 2].map(|()| std::sync::Barrier::new(ranks));
        let results = local::run_on(one_gpu(&context, ends), |mut transport| {
            let rank = transport.control().rank();
            let kernel = kernel(&ring, rank).unwrap();
            let mut of = Rank::new(&context, &contents, &ring, (rank, &kernel)).unwrap();
            started.wait();
            fakes.stuck(true);
            // One that waited for its exchange would fail at the deadline, which begins for none before both have computed.
            let first = of.step(&mut transport);
            computed.wait();
            first.unwrap();
            assert!(of.o.iter().any(|x| x.is_finite()), "rank {rank} has computed");
            of.step(&mut transport)
        });
        fakes.stuck(false);
        for (rank, result) in results.into_iter().enumerate() {
            assert!(matches!(result, Err(Error::Peer { .. })), "rank {rank}: {result:?}");
        }
    });
}

/// Blocks of another stream than the kernels' could be freed under them.
#[test]
fn blocks_belong_to_the_stream_of_the_kernels() {
    with_fakes("blocks_belong_to_the_stream_of_the_kernels", |fakes| {
        let context = fakes.context();
        let [kernels, other] = [(); 2].map(|()| context.new_stream().unwrap());
        let block = |stream: &Arc<CudaStream>| stream.alloc_zeros::<u8>(64).unwrap();
        assert!(block(&kernels).view(&*kernels).is_ok());
        let refused = block(&other).view(&*kernels).map(drop).unwrap_err();
        assert!(matches!(refused, Error::Argument { argument: "block", .. }), "{refused}");
        fn check<D: DeviceTransport>(
            mut end: D,
            block: impl Fn(&Arc<CudaStream>) -> CudaSlice<u8>,
            [kernels, other]: [&Arc<CudaStream>; 2],
        ) -> D {
            let peer = 1 - end.control().rank();
            for (held, space, argument) in [(other, kernels, "send"), (kernels, other, "recv")] {
                let mut carrier = DeviceCarrier { transport: &mut end, after: kernels };
                let tag = Tag::new(Operation::PassKv, 0);
                let (mut held, space) = (Arc::new(block(held)), block(space));
                let refused =
                    carrier.post(tag, (peer, &mut held, 64), (peer, space, 64)).map(drop).unwrap_err();
                let words = refused.to_string();
                assert!(
                    matches!(refused, Error::Argument { argument: found, .. } if found == argument)
                        && words.contains("memory of the kernels' stream"),
                    "{words}"
                );
            }
            // The two that were refused have left nothing behind.
            assert_eq!(end.traffic().messages, 0);
            end.control().barrier().unwrap();
            end
        }
        local::run_on(one_gpu(&context, World::new(2).unwrap().1), |end| {
            drop(check(end, block, [&kernels, &other]));
        });
        on_nccl(&context, World::new(2).unwrap().1, |_, nccl| {
            check(nccl, block, [&kernels, &other]).close().unwrap();
        });
    });
}
