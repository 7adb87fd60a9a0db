//! Transports of device memory against stand-ins for the CUDA driver and for NCCL, which write down what they are asked.
//!
//! What this proves is what the host does: order, bytes, deadlines, errors. That blocks really move on a GPU, or between two, is proven
//! there alone.

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use cuda::cudarc::driver::CudaContext;
use seq_parallel::gpu::transport::{
    DeviceTransport, Incoming, Nccl, NcclLibrary, OneGpu, Outgoing, Shared, Staged,
};
use seq_parallel::ring::Direction;
use seq_parallel::testing::conform;
use seq_parallel::testing::faults::Scenario;
use seq_parallel::transport::local::{self, Local, World};
use seq_parallel::transport::{Failure, Operation, Tag, Transport};
use seq_parallel::{Error, PeerFault};
use support::with_fakes;

const DEADLINE: Duration = Duration::from_millis(300);

/// Ranks on one GPU, each with a stream of the caller.
fn one_gpu(context: &Arc<CudaContext>, ends: Vec<Local>) -> Vec<OneGpu<Local>> {
    let shared = Shared::default();
    let end = |end| OneGpu::new(end, shared.clone(), context.new_stream().unwrap());
    ends.into_iter().map(end).collect()
}

/// Ranks of an NCCL communicator: connecting is collective, so each connects on its thread.
fn on_nccl<R: Send>(
    context: &Arc<CudaContext>,
    ends: Vec<Local>,
    body: impl Fn(usize, Nccl<Local>) -> R + Sync,
) -> Vec<R> {
    let library = NcclLibrary::open().unwrap();
    // A rank that is connected first must not fail before the others are: they would hear of it while they connect.
    let connected = std::sync::Barrier::new(ends.len());
    local::run_on(ends, |end| {
        let rank = end.rank();
        let nccl = Nccl::connect(library.clone(), end, context.new_stream().unwrap());
        connected.wait();
        body(rank, nccl.unwrap())
    })
}

fn ends(ranks: usize) -> Vec<Local> {
    World::new(ranks).unwrap().1
}

/// The suite that every transport passes, with every message copied to the device and back.
#[test]
fn ranks_on_one_gpu_conform() {
    with_fakes("ranks_on_one_gpu_conform", |fakes| {
        let context = fakes.context();
        for ranks in [1, 2, 3, 4] {
            local::run_on(one_gpu(&context, ends(ranks)), |end| conform(&mut Staged::new(end)));
            let copies = fakes.cuda_log().iter().filter(|line| line.starts_with("cuMemcpyDtoDAsync")).count();
            assert_eq!(copies == 0, ranks == 1, "{ranks} ranks: {copies} copies");
        }
    });
}

#[test]
fn ranks_over_nccl_conform() {
    with_fakes("ranks_over_nccl_conform", |fakes| {
        let context = fakes.context();
        for ranks in [1, 2, 3, 4] {
            on_nccl(&context, ends(ranks), |_, nccl| {
                let mut end = Staged::new(nccl);
                conform(&mut end);
                end.into_inner().close().unwrap();
            });
            let log = fakes.nccl_log();
            let starting = |with: &str| log.iter().filter(|line| line.starts_with(with)).count();
            assert_eq!(starting("ncclCommInitRankConfig"), ranks);
            assert!(log.iter().filter(|line| line.contains("Init")).all(|line| line.ends_with("blocking=0")));
            assert_eq!((starting("ncclCommDestroy"), starting("ncclCommAbort")), (ranks, 0));
            // Every group is one send and one receive.
            let groups: Vec<_> = log.iter().filter(|line| line.starts_with("group")).collect();
            assert!(
                groups.iter().all(|line| line.matches('>').count() == 1 && line.matches('<').count() == 1)
            );
            assert_eq!(groups.is_empty(), ranks == 1);
        }
        assert_eq!(fakes.nccl_alive(), 0);
    });
}

/// Blocks go from device to device, bytes past the asked ones stay, and the two fixed buffers of a ring take turns.
#[test]
fn blocks_go_round_on_the_device() {
    with_fakes("blocks_go_round_on_the_device", |fakes| {
        let context = fakes.context();
        let ranks = 3;
        let round = |rank: usize, transport: &mut dyn DeviceTransport<Control = Local>| {
            let stream = context.new_stream().unwrap();
            let mut held = stream.clone_htod(&[rank as u8; 64]).unwrap();
            let mut spare = Some(stream.clone_htod(&[99u8; 64]).unwrap());
            for step in 0..ranks - 1 {
                let (right, left) = ((rank + 1) % ranks, (rank + ranks - 1) % ranks);
                let tag = Tag::new(Operation::PassKv, step);
                let send = Arc::new(held);
                let recv = spare.take().unwrap();
                let outgoing = Outgoing { to: right, block: send.clone(), len: 48 };
                let incoming = Incoming { from: left, space: recv, len: 48 };
                let ticket = transport.exchange(tag, outgoing, incoming, &stream).unwrap();
                held = transport.wait(ticket).unwrap();
                spare = Some(Arc::try_unwrap(send).expect("nobody reads what was sent"));
                let source = (rank + ranks - 1 - step) % ranks;
                let bytes = stream.clone_dtoh(&held).unwrap();
                assert_eq!(bytes[..48], [source as u8; 48], "rank {rank}, step {step}");
                // What lies behind is what the buffer had: not a byte more was moved.
                assert_ne!(bytes[48..], [source as u8; 16], "rank {rank}, step {step}");
            }
            let traffic = transport.traffic();
            assert_eq!((traffic.sent, traffic.received, traffic.messages), (96, 96, 2));
            let long = Arc::new(stream.alloc_zeros(8).unwrap());
            let recv = stream.alloc_zeros(8).unwrap();
            let tag = Tag::new(Operation::PassKv, 0);
            let (right, left) = ((rank + 1) % ranks, (rank + ranks - 1) % ranks);
            let outgoing = Outgoing { to: right, block: long, len: 9 };
            let incoming = Incoming { from: left, space: recv, len: 8 };
            let refused = transport.exchange(tag, outgoing, incoming, &stream);
            assert!(matches!(refused, Err(Error::Argument { argument: "send", .. })));
        };
        local::run_on(one_gpu(&context, ends(ranks)), |mut end| {
            let rank = end.control().rank();
            round(rank, &mut end);
        });
        on_nccl(&context, ends(ranks), |rank, mut nccl| {
            round(rank, &mut nccl);
            nccl.close().unwrap();
        });
    });
}

/// Every failure at every place, as on threads; every survivor aborts its communicator.
#[test]
fn every_rank_names_the_culprit() {
    with_fakes("every_rank_names_the_culprit", |fakes| {
        let context = fakes.context();
        let (world, _) = World::new(4).unwrap();
        for (i, scenario) in Scenario::all(4, DEADLINE).into_iter().enumerate() {
            let mut ends = world.rebuild(4);
            ends.iter_mut().for_each(|end| end.set_deadline(DEADLINE));
            fakes.nccl_log();
            let begin = Instant::now();
            let over_nccl = i % 2 == 0;
            let results = if over_nccl {
                on_nccl(&context, ends, |_, nccl| scenario.run(Staged::new(nccl)))
            } else {
                local::run_on(one_gpu(&context, ends), |end| scenario.run(Staged::new(end)))
            };
            let survivors = results.iter().enumerate().filter(|(rank, _)| *rank != scenario.culprit);
            for (rank, result) in survivors {
                scenario.check_survivor(rank, result);
            }
            assert!(begin.elapsed() < 8 * DEADLINE, "{scenario:?}: {:?}", begin.elapsed());
            if over_nccl {
                let aborts = fakes.nccl_log().iter().filter(|line| line.starts_with("ncclCommAbort")).count();
                assert_eq!(
                    aborts, 4,
                    "{scenario:?}: one by each survivor, and the culprit's when it is dropped"
                );
            }
        }
    });
}

fn ring(direction: Direction) -> Scenario {
    Scenario { culprit: usize::MAX, failure: Failure::Dies, exchange: 0, direction }
}

/// A communicator that breaks under way is noticed by polling, and the peer that it cannot reach is named.
#[test]
fn asynchronous_errors_are_polled() {
    with_fakes("asynchronous_errors_are_polled", |fakes| {
        let context = fakes.context();
        let results = on_nccl(&context, ends(3), |rank, mut nccl| {
            nccl.control().barrier().unwrap();
            if rank == 0 {
                // What was enqueued does not end any more, and rank 1 hears of the network.
                fakes.stuck(true);
                fakes.nccl_break(1, 6);
            }
            nccl.control().barrier().unwrap();
            let mut end = Staged::new(nccl);
            end.set_deadline(DEADLINE);
            let result = ring(Direction::PassKv).ring(&mut end);
            drop(end);
            result.unwrap_err()
        });
        fakes.stuck(false);
        for (rank, error) in results.into_iter().enumerate() {
            let words = error.to_string();
            let known = matches!(error, Error::Library { code: 6, .. })
                || matches!(
                    &error,
                    Error::Peer { fault: PeerFault::Unreachable(_) | PeerFault::Aborted(_), .. }
                );
            assert!(known && words.contains("network error"), "rank {rank}: {words}");
        }
        assert_eq!(fakes.nccl_alive(), 0, "every rank has aborted");
    });
}

/// A stream that is stuck, whoever's fault, is given up at the deadline, without a wait that has none.
#[test]
fn stuck_streams_are_given_up() {
    with_fakes("stuck_streams_are_given_up", |fakes| {
        let context = fakes.context();
        let check = |results: Vec<Error>, begin: Instant| {
            for (rank, error) in results.into_iter().enumerate() {
                let stalled = matches!(&error, Error::Peer { fault: PeerFault::Stalled { waited_ms }, .. } if *waited_ms >= 300);
                assert!(stalled, "rank {rank}: {error}");
            }
            assert!(begin.elapsed() < 5 * DEADLINE, "{:?}", begin.elapsed());
        };
        let run = |mut end: Box<dyn Transport>| {
            end.set_deadline(DEADLINE);
            ring(Direction::PassQ).ring(&mut *end).unwrap_err()
        };
        fakes.stuck(true);
        let begin = Instant::now();
        check(local::run_on(one_gpu(&context, ends(3)), |end| run(Box::new(Staged::new(end)))), begin);
        let begin = Instant::now();
        check(on_nccl(&context, ends(3), |_, nccl| run(Box::new(Staged::new(nccl)))), begin);
        fakes.cuda_log();
        fakes.stuck(false);
        assert_eq!(fakes.nccl_alive(), 0);
        // A driver that has lost its context says so.
        fakes.cuda_fail("cuEventQuery", 700);
        let results = local::run_on(one_gpu(&context, ends(2)), |end| {
            let mut end = Staged::new(end);
            ring(Direction::PassKv).ring(&mut end).unwrap_err().to_string()
        });
        fakes.cuda_fail("cuEventQuery", 0);
        assert!(results.iter().all(|error| error.contains("cuEventQuery failed with 700")), "{results:?}");
    });
}

#[test]
fn set_up_that_fails_or_hangs_ends() {
    with_fakes("set_up_that_fails_or_hangs_ends", |fakes| {
        let context = fakes.context();
        let library = NcclLibrary::open().unwrap();
        assert_eq!(library.version(), Ok(22809));
        fakes.nccl_version(21706);
        let old = NcclLibrary::open().unwrap_err();
        assert!(matches!(old, Error::Library { call: "ncclGetVersion", code: 21706, .. }), "{old}");
        fakes.nccl_version(22809);
        let connect = |ends| {
            local::run_on(ends, |mut end: Local| {
                end.set_deadline(DEADLINE);
                let stream = context.new_stream().unwrap();
                Nccl::connect(library.clone(), end, stream).map(drop).unwrap_err().to_string()
            })
        };
        fakes.nccl_fail("ncclCommInitRankConfig", 1);
        let errors = connect(ends(2));
        assert!(
            errors
                .iter()
                .any(|error| error.contains("ncclCommInitRankConfig failed with 1: unhandled cuda error")),
            "{errors:?}"
        );
        fakes.nccl_fail("ncclCommInitRankConfig", 0);
        fakes.nccl_hang("ncclCommInitRankConfig");
        let begin = Instant::now();
        let errors = connect(ends(3));
        assert!(errors.iter().all(|error| error.contains("not done after 3")), "{errors:?}");
        assert!(begin.elapsed() < 4 * DEADLINE, "{:?}", begin.elapsed());
        assert_eq!(fakes.nccl_alive(), 0);
    });
}

#[test]
fn groups_that_fail_abort_and_aborts_that_hang_are_left() {
    with_fakes("groups_that_fail_abort_and_aborts_that_hang_are_left", |fakes| {
        let context = fakes.context();
        let run = || {
            on_nccl(&context, ends(2), |_, nccl| {
                let mut end = Staged::new(nccl);
                end.set_deadline(DEADLINE);
                ring(Direction::PassKv).ring(&mut end).unwrap_err().to_string()
            })
        };
        for call in ["ncclSend", "ncclRecv", "ncclGroupEnd"] {
            fakes.nccl_fail(call, 1);
            let errors = run();
            fakes.nccl_fail(call, 0);
            let expected = format!("{call} failed with 1: unhandled cuda error");
            assert!(errors.iter().all(|error| error.contains(&expected)), "{call}: {errors:?}");
            assert_eq!(fakes.nccl_alive(), 0, "{call}");
        }
        fakes.nccl_fail("ncclGroupEnd", 1);
        fakes.nccl_hang("ncclCommAbort");
        let begin = Instant::now();
        assert_eq!(run().len(), 2);
        assert!(begin.elapsed() < 5 * DEADLINE, "{:?}", begin.elapsed());
    });
}

#[test]
fn without_nccl_there_is_an_error() {
    // The test's process, whose environment has no stand-in.
    if std::env::var_os(seq_parallel::gpu::transport::NCCL_VARIABLE).is_some() {
        return;
    }
    match NcclLibrary::open() {
        Ok(library) => eprintln!("skipped: this machine has NCCL {:?}", library.version()),
        Err(Error::Library { library: "NCCL", call: "dlopen", message, .. }) => {
            assert!(message.contains("libnccl.so.2"), "{message}");
        }
        Err(other) => panic!("{other}"),
    }
}

/// The same suite where blocks really are copied by a GPU, each rank on a stream of its own.
mod one_gpu {
    use super::{CudaContext, OneGpu, Shared, Staged, World, conform, local};

    #[test]
    fn gpu() {
        let Some(_rig) = emulator::rig::gpu_or_skip("one_gpu") else { return };
        let context = CudaContext::new(0).unwrap();
        for ranks in [1, 2, 3, 4, 8] {
            let shared = Shared::default();
            let ends = World::new(ranks).unwrap().1.into_iter();
            let ends = ends.map(|end| OneGpu::new(end, shared.clone(), context.new_stream().unwrap()));
            local::run_on(ends.collect(), |end| conform(&mut Staged::new(end)));
        }
    }
}

/// The same suite over a real NCCL, a GPU for each rank.
mod nccl {
    use super::{CudaContext, Nccl, NcclLibrary, Staged, World, conform, local};
    use seq_parallel::transport::Transport;

    #[test]
    fn gpus() {
        let Some(_rig) = emulator::rig::gpu_or_skip("nccl") else { return };
        let devices = CudaContext::device_count().unwrap() as usize;
        if devices < 2 {
            println!("SKIPPED nccl: two GPUs are needed, this machine has {devices}");
            return;
        }
        let library = NcclLibrary::open().unwrap();
        for ranks in 2..=devices.min(8) {
            local::run_on(World::new(ranks).unwrap().1, |end| {
                let stream = CudaContext::new(end.rank()).unwrap().new_stream().unwrap();
                let mut end = Staged::new(Nccl::connect(library.clone(), end, stream).unwrap());
                conform(&mut end);
                end.into_inner().close().unwrap();
            });
        }
    }
}
