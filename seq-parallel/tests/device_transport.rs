//! Transports of device memory against stand-ins for the CUDA driver and for NCCL, which write down what they are asked.
//!
//! What this proves is what the host does: order, bytes, deadlines, errors. That blocks really move on a GPU, or between two, is proven
//! there alone.

mod support;

use std::sync::Arc;

use cuda::cudarc::driver::CudaContext;
use seq_parallel::Error;
use seq_parallel::gpu::transport::{DeviceTransport, Incoming, Nccl, NcclLibrary, OneGpu, Outgoing, Staged};
use seq_parallel::testing::conform;
use seq_parallel::transport::local::{self, Local, World};
use seq_parallel::transport::{Operation, Tag, Transport};
use support::{ends, on_nccl, one_gpu, post, with_fakes, with_ordered_fakes};

/// The suite that every transport passes, with every message copied to the device and back.
#[test]
fn ranks_on_one_gpu_conform() {
    with_fakes("ranks_on_one_gpu_conform", |fakes| {
        let context = fakes.context();
        for ranks in [1, 2, 3, 4] {
            local::run_on(one_gpu(&context, ends(ranks)), |end| conform(&mut Staged::new(end)));
            let log = fakes.cuda_log();
            let starting = |with: &str| log.iter().filter(|line| line.starts_with(with)).count();
            let copies = starting("cuMemcpyDtoDAsync");
            assert_eq!(copies == 0, ranks == 1, "{ranks} ranks: {copies} copies");
            // Pinned buffers are used again, and nobody waits in the driver.
            let pinned = starting("cuMemHostAlloc");
            assert_eq!(pinned == 0, ranks == 1, "{ranks} ranks: {pinned} pinned buffers");
            assert!(pinned <= 32 * ranks, "{ranks} ranks: {pinned} pinned buffers for {copies} copies");
            assert_eq!(starting("cuStreamSynchronize"), 0);
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

/// A copy is enqueued as soon as both of its ends have posted, before anybody waits, on the receiver's stream, after the work of both
/// ends; and a wait asks of the others no more than to have posted: here one thread is both ranks.
#[test]
fn copies_overlap_and_come_after_the_work_of_both_ends() {
    with_ordered_fakes("copies_overlap_and_come_after_the_work_of_both_ends", |fakes| {
        let context = fakes.context();
        // What the driver calls a stream, and the events that were recorded on it since the last time.
        let name = |stream: &Arc<cuda::cudarc::driver::CudaStream>| {
            fakes.cuda_log();
            stream.record_event(None).unwrap();
            fakes.cuda_log().last().unwrap().split_once("stream=").unwrap().1.to_string()
        };
        let mut ranks = one_gpu(&context, ends(2));
        let compute = [(); 2].map(|()| context.new_stream().unwrap());
        let compute_names = [0, 1].map(|rank| name(&compute[rank]));
        let names = [0, 1].map(|rank| name(ranks[rank].stream()));
        fakes.cuda_log();
        let first = post(&mut ranks[0], 0, 10, &compute[0]).unwrap();
        let mut log = fakes.cuda_log();
        let copies = |log: &[String]| log.iter().filter(|line| line.starts_with("cuMemcpyDtoDAsync")).count();
        assert_eq!(copies(&log), 0, "nobody to copy with: {log:#?}");
        let second = post(&mut ranks[1], 0, 20, &compute[1]).unwrap();
        log.extend(fakes.cuda_log());
        assert_eq!(copies(&log), 2, "before anybody waits: {log:#?}");
        for receiver in [0, 1] {
            let stream = format!("stream={}", names[receiver]);
            let copy = format!("cuMemcpyDtoDAsync 64 {stream}");
            let at = log.iter().position(|line| *line == copy).unwrap_or_else(|| panic!("{copy}: {log:#?}"));
            for (rank, compute) in compute_names.iter().enumerate() {
                let after = log[..at].iter().any(|line| {
                    let waits =
                        line.strip_prefix("cuStreamWaitEvent ").and_then(|rest| rest.strip_suffix(&stream));
                    waits.is_some_and(|event| log.contains(&format!("cuEventRecord {event}stream={compute}")))
                });
                assert!(after, "the copy to rank {receiver} comes after the work of rank {rank}: {log:#?}");
            }
        }
        for (rank, ticket) in [first, second].into_iter().enumerate() {
            let block = ranks[rank].wait(ticket).unwrap();
            assert_eq!(compute[rank].clone_dtoh(&block).unwrap(), [[20, 10][rank]; 64], "rank {rank}");
        }
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
    use super::{CudaContext, OneGpu, Staged, World, conform, local};

    #[test]
    fn gpu() {
        let Some(_rig) = emulator::rig::gpu_or_skip("one_gpu") else { return };
        let context = CudaContext::new(0).unwrap();
        for ranks in [1, 2, 3, 4, 8] {
            let ends = World::new(ranks).unwrap().1.into_iter();
            let ends = OneGpu::group(ends.map(|end| (end, context.new_stream().unwrap())));
            local::run_on(ends, |end| conform(&mut Staged::new(end)));
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
