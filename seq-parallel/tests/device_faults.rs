//! Faults of device transports, against the stand-ins: whoever is dead, late or stuck is named within the deadline, and nothing hangs.

mod support;

use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use cuda::cudarc::driver::{CudaSlice, CudaStream};
use seq_parallel::gpu::transport::{DeviceTransport, Incoming, Nccl, NcclLibrary, OneGpu, Outgoing, Staged};
use seq_parallel::ring::Direction;
use seq_parallel::testing::faults::{NEVER_PASSES, PASSES, Scenario};
use seq_parallel::transport::local::{self, Local, World};
use seq_parallel::transport::{Buffer, Failure, Tag, Ticket, Traffic, Transport};
use seq_parallel::{Error, PeerFault};
use support::{Fakes, on_nccl, one_gpu, post, ring_tag, with_fakes};

/// The ends of a group of threads, where a deadline has to pass or not.
fn ends(ranks: usize, deadline: Duration) -> Vec<Local> {
    let mut ends = support::ends(ranks);
    ends.iter_mut().for_each(|end| end.set_deadline(deadline));
    ends
}

/// For what comes soon: a test that waits for it in vain fails after this.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until somebody has failed, as one who is silent meanwhile.
fn hears(end: &mut Local) {
    let start = Instant::now();
    while end.check().is_ok() {
        assert!(start.elapsed() < PATIENCE, "nobody has failed");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Every failure at every place, as on threads, on each transport; every survivor aborts its communicator.
#[test]
fn every_rank_names_the_culprit() {
    with_fakes("every_rank_names_the_culprit", |fakes| {
        let context = fakes.context();
        let run = |(scenario, over_nccl): (Scenario, bool)| {
            let case = format!("{scenario:?}, {}", if over_nccl { "NCCL" } else { "one GPU" });
            let ends = ends(4, scenario.deadline());
            let results = if over_nccl {
                on_nccl(&context, ends, |_, nccl| scenario.run(Staged::new(nccl)))
            } else {
                local::run_on(one_gpu(&context, ends), |end| scenario.run(Staged::new(end)))
            };
            let survivors = results.iter().enumerate().filter(|(rank, _)| *rank != scenario.culprit);
            let steps: Vec<_> =
                survivors.map(|(rank, result)| scenario.check_survivor(rank, result)).collect();
            assert!(steps.iter().all(|step| *step == steps[0]), "{case}: ranks name steps {steps:?}");
        };
        let cases = Scenario::all(4).into_iter().flat_map(|scenario| [(scenario, false), (scenario, true)]);
        let count = cases.clone().filter(|(_, over_nccl)| *over_nccl).count();
        // Deadlines pass side by side.
        let (silent, others): (Vec<_>, Vec<_>) =
            cases.partition(|(scenario, _)| matches!(scenario.failure, Failure::Silent));
        others.into_iter().for_each(run);
        local::run_on(silent, run);
        let aborts = fakes.nccl_log().iter().filter(|line| line.starts_with("ncclCommAbort")).count();
        assert_eq!(aborts, 4 * count, "one by each survivor, and the culprit's when it is dropped");
    });
}

/// How long something of NCCL was waited for, as the error says.
fn given_up_after(error: &str) -> Duration {
    let number = error.split("not done after ").nth(1).and_then(|rest| rest.split(' ').next());
    Duration::from_millis(number.and_then(|ms| ms.parse().ok()).unwrap_or_default())
}

fn ring(direction: Direction) -> Scenario {
    Scenario { culprit: usize::MAX, failure: Failure::Dies, exchange: 0, direction }
}

/// A communicator that breaks while its kernels run is noticed by polling, and the peer that it cannot reach is named by all.
#[test]
fn asynchronous_errors_are_polled() {
    with_fakes("asynchronous_errors_are_polled", |fakes| {
        let context = fakes.context();
        let (polling, all) = mpsc::channel();
        let results = std::thread::scope(|scope| {
            let results = scope.spawn(|| {
                on_nccl(&context, ends(3, NEVER_PASSES), |_, mut nccl| {
                    let compute = context.new_stream().unwrap();
                    fakes.stick(&compute);
                    let ticket = post(&mut nccl, 0, 0, &compute).unwrap();
                    nccl.control().barrier().unwrap();
                    polling.send(()).unwrap();
                    let result = nccl.wait(ticket);
                    drop(nccl);
                    result.map(drop).unwrap_err()
                })
            });
            all.iter().take(3).for_each(drop);
            // Until every rank has found that its group was launched and is not done: it asks again and again.
            let asked = |rank| fakes.nccl_asked(rank);
            let before = [0, 1, 2].map(asked);
            let start = Instant::now();
            while [0, 1, 2].map(asked).iter().zip(&before).any(|(asked, before)| asked - before < 8) {
                assert!(start.elapsed() < PATIENCE, "a rank does not ask");
                std::thread::sleep(Duration::from_millis(1));
            }
            fakes.nccl_break(1, 6);
            results.join().unwrap()
        });
        let words = "NCCL: remote process exited or there was a network error (6)";
        for (rank, error) in results.into_iter().enumerate() {
            let fault = PeerFault::Unreachable(words.into());
            assert_eq!(error, Error::Peer { rank, peer: 0, at: ring_tag(0), fault });
        }
        assert_eq!(fakes.nccl_alive(), 0, "every rank has aborted");
    });
}

/// One that breaks before a group of it is launched is noticed when the next is posted.
#[test]
fn groups_that_are_never_launched_are_noticed() {
    with_fakes("groups_that_are_never_launched_are_noticed", |fakes| {
        let context = fakes.context();
        let words = "ncclGroupEnd failed with 6: remote process exited or there was a network error";
        on_nccl(&context, ends(2, NEVER_PASSES), |rank, mut nccl| {
            if rank == 0 {
                let compute = context.new_stream().unwrap();
                // Rank 1 posts nothing, so this group stays in progress.
                let _ticket = post(&mut nccl, 0, 1, &compute).unwrap();
                fakes.nccl_break(0, 6);
                let error = post(&mut nccl, 1, 1, &compute).map(drop).unwrap_err();
                assert!(error.to_string().contains(words), "{error}");
            } else {
                let error = nccl.control().barrier().unwrap_err();
                assert!(
                    matches!(&error, Error::Peer { peer: 0, fault: PeerFault::Aborted(_), .. }),
                    "{error}"
                );
                assert!(error.to_string().contains(words), "{error}");
            }
        });
        assert_eq!(fakes.nccl_alive(), 0, "every rank has aborted");
    });
}

/// A stream that is stuck, whoever's fault, is given up at the deadline (by its own rank shortly before), without a wait that has none.
#[test]
fn stuck_streams_are_given_up() {
    with_fakes("stuck_streams_are_given_up", |fakes| {
        let context = fakes.context();
        let run = |mut end: Box<dyn Transport>| ring(Direction::PassQ).ring(&mut *end).unwrap_err();
        fakes.stuck(true);
        local::run_on(vec![false, true], |over_nccl| {
            let ends = ends(3, PASSES);
            let results = match over_nccl {
                true => on_nccl(&context, ends, |_, nccl| run(Box::new(Staged::new(nccl)))),
                false => local::run_on(one_gpu(&context, ends), |end| run(Box::new(Staged::new(end)))),
            };
            for (rank, error) in results.into_iter().enumerate() {
                let stalled = matches!(
                    &error,
                    Error::Peer { fault: PeerFault::Stalled { waited_ms }, .. }
                        if u128::from(*waited_ms) >= (PASSES / 8 * 7).as_millis()
                );
                assert!(stalled, "rank {rank}: {error}");
            }
        });
        fakes.cuda_log();
        fakes.stuck(false);
        assert_eq!(fakes.nccl_alive(), 0);
        // A driver that has lost its context says so.
        fakes.cuda_fail("cuEventQuery", 700);
        let results = local::run_on(one_gpu(&context, ends(2, NEVER_PASSES)), |end| {
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
            local::run_on(ends, |end: Local| {
                let stream = context.new_stream().unwrap();
                Nccl::connect(library.clone(), end, stream).map(drop).unwrap_err().to_string()
            })
        };
        fakes.nccl_fail("ncclCommInitRankConfig", 1);
        let errors = connect(ends(2, NEVER_PASSES));
        assert!(
            errors
                .iter()
                .any(|error| error.contains("ncclCommInitRankConfig failed with 1: unhandled cuda error")),
            "{errors:?}"
        );
        fakes.nccl_fail("ncclCommInitRankConfig", 0);
        fakes.nccl_hang("ncclCommInitRankConfig", true);
        let errors = connect(ends(3, PASSES));
        assert!(errors.iter().all(|error| given_up_after(error) >= PASSES), "{errors:?}");
        fakes.nccl_hang("ncclCommInitRankConfig", false);
        assert_eq!(fakes.nccl_alive(), 0);
    });
}

/// A rank that dies or is silent while the others set the communicator up is named, not NCCL.
#[test]
fn who_is_missing_at_set_up_is_named() {
    with_fakes("who_is_missing_at_set_up_is_named", |fakes| {
        let (context, library) = (fakes.context(), NcclLibrary::open().unwrap());
        for dies in [true, false] {
            let results = local::run_on(ends(3, if dies { NEVER_PASSES } else { PASSES }), |mut end| {
                let rank = end.rank();
                if rank < 2 {
                    let stream = context.new_stream().unwrap();
                    return Some(Nccl::connect(library.clone(), end, stream).map(drop).unwrap_err());
                }
                // It has the communicator's name, and does not come, or is gone when the others have all begun.
                end.all_gather_v(&[], &[128, 0, 0]).unwrap();
                if dies {
                    end.barrier().unwrap();
                } else {
                    hears(&mut end);
                }
                None
            });
            for error in results.into_iter().flatten() {
                let fits = |fault: &PeerFault| match fault {
                    PeerFault::Gone => dies,
                    PeerFault::Stalled { .. } => !dies,
                    _ => false,
                };
                assert!(
                    matches!(&error, Error::Peer { peer: 2, fault, .. } if fits(fault)),
                    "dies: {dies}: {error}"
                );
            }
            assert_eq!(fakes.nccl_alive(), 0);
        }
    });
}

/// Ending takes time and every rank: what is destroyed before is in use, and what does not end is given up.
#[test]
fn closing_that_hangs_ends() {
    with_fakes("closing_that_hangs_ends", |fakes| {
        let context = fakes.context();
        let close = |deadline| on_nccl(&context, ends(3, deadline), |_, nccl| nccl.close());
        assert!(close(NEVER_PASSES).iter().all(Result::is_ok));
        fakes.nccl_hang("ncclCommFinalize", true);
        for closed in close(PASSES) {
            let words = closed.unwrap_err().to_string();
            assert!(words.contains("ncclCommFinalize failed with 7: "), "{words}");
            assert!(given_up_after(&words) >= PASSES, "{words}");
        }
        assert_eq!(fakes.nccl_alive(), 0);
    });
}

#[test]
fn groups_that_fail_abort_and_aborts_that_hang_are_left() {
    with_fakes("groups_that_fail_abort_and_aborts_that_hang_are_left", |fakes| {
        let context = fakes.context();
        let run = |deadline| {
            on_nccl(&context, ends(2, deadline), |_, nccl| {
                let mut end = Staged::new(nccl);
                ring(Direction::PassKv).ring(&mut end).unwrap_err().to_string()
            })
        };
        for call in ["ncclSend", "ncclRecv", "ncclGroupEnd"] {
            fakes.nccl_fail(call, 1);
            let errors = run(NEVER_PASSES);
            fakes.nccl_fail(call, 0);
            let expected = format!("{call} failed with 1: unhandled cuda error");
            assert!(errors.iter().all(|error| error.contains(&expected)), "{call}: {errors:?}");
            assert_eq!(fakes.nccl_alive(), 0, "{call}");
        }
        fakes.nccl_fail("ncclGroupEnd", 1);
        fakes.nccl_hang("ncclCommAbort", true);
        for error in run(PASSES) {
            assert!(error.contains("ncclGroupEnd failed with 1: unhandled cuda error"), "{error}");
        }
    });
}

/// Whose work is late, in the order in which ranks find out, is named: not whoever one receives from.
#[test]
fn late_work_is_told_from_late_peers() {
    with_fakes("late_work_is_told_from_late_peers", |fakes| {
        let context = fakes.context();
        // Of rank 1, what computes or what moves blocks is stuck. Rank 0 sends to it, rank 2 receives from it.
        let check = |case: &str, peer: usize, at_least: u128, results: Vec<Error>| {
            for (rank, error) in results.into_iter().enumerate() {
                let fits = matches!(
                    &error,
                    Error::Peer { peer: found, at, fault: PeerFault::Stalled { waited_ms }, .. }
                        if *found == peer && *at == ring_tag(0) && u128::from(*waited_ms) >= at_least
                );
                assert!(fits, "{case}, rank {rank}: {error}");
            }
        };
        let deadline = |rank, first| if rank == first { PASSES } else { NEVER_PASSES };
        let on_one_gpu = |(what, first): (&str, usize)| {
            let results = local::run_on(one_gpu(&context, ends(3, PASSES)), |mut end| {
                let rank = end.control().rank();
                end.control().set_deadline(deadline(rank, first));
                let compute = context.new_stream().unwrap();
                if rank == 1 {
                    fakes.stick(if what == "computes" { &compute } else { end.stream() });
                }
                let ticket = post(&mut end, 0, 0, &compute).unwrap();
                end.wait(ticket).map(drop).and_then(|()| end.control().barrier()).unwrap_err()
            });
            let case = format!("one GPU, what {what} is stuck, rank {first} finds out");
            check(&case, 1, PASSES.as_millis(), results);
        };
        // NCCL does not say which half of a group does not end.
        let over_nccl = |(what, peer, at_least): (&str, usize, Duration)| {
            let results = on_nccl(&context, ends(3, NEVER_PASSES), |rank, mut nccl| {
                nccl.control().set_deadline(deadline(rank, 1));
                let compute = context.new_stream().unwrap();
                if rank == 1 {
                    fakes.stick(if what == "computes" { &compute } else { nccl.stream() });
                }
                let ticket = post(&mut nccl, 0, 0, &compute).unwrap();
                nccl.wait(ticket).map(drop).and_then(|()| nccl.control().barrier()).unwrap_err()
            });
            check(&format!("NCCL, what {what} is stuck"), peer, at_least.as_millis(), results);
        };
        // Deadlines pass side by side.
        std::thread::scope(|scope| {
            let (on_one_gpu, over_nccl) = (&on_one_gpu, &over_nccl);
            for case in [("computes", 0), ("computes", 1), ("computes", 2), ("copies", 0), ("copies", 1)] {
                scope.spawn(move || on_one_gpu(case));
            }
            for case in [("computes", 1, PASSES / 8 * 7), ("communicates", 0, PASSES)] {
                scope.spawn(move || over_nccl(case));
            }
        });
    });
}

/// A block of another length than is expected is refused before it is copied, and its sender named.
#[test]
fn blocks_of_another_length_are_refused() {
    with_fakes("blocks_of_another_length_are_refused", |fakes| {
        let context = fakes.context();
        fn run<D: DeviceTransport>(mut end: D, compute: Arc<CudaStream>) -> Error {
            let (rank, tag) = (end.control().rank(), ring_tag(0));
            let blocks = [(); 2].map(|()| compute.alloc_zeros(64).unwrap());
            let [block, space] = blocks;
            let len = if rank == 1 { 32 } else { 64 };
            let send = Outgoing { to: 1 - rank, block: Arc::new(block), len };
            let recv = Incoming { from: 1 - rank, space, len: 64 };
            let waited =
                end.exchange(tag, send, recv, &compute).and_then(|ticket| end.wait(ticket)).map(drop);
            // Rank 1 may have what it asked for before rank 0 has seen what came; it hears of it at the barrier.
            waited.and_then(|()| end.control().barrier()).unwrap_err()
        }
        let stream = || context.new_stream().unwrap();
        for (case, errors) in [
            ("one GPU", local::run_on(one_gpu(&context, ends(2, NEVER_PASSES)), |end| run(end, stream()))),
            ("NCCL", on_nccl(&context, ends(2, NEVER_PASSES), |_, nccl| run(nccl, stream()))),
        ] {
            for (rank, error) in errors.into_iter().enumerate() {
                let fault = PeerFault::Garbage("32 bytes instead of 64".into());
                assert_eq!(error, Error::Peer { rank, peer: 1, at: ring_tag(0), fault }, "{case}");
            }
        }
    });
}

/// Who waits for a copy is not silent: whoever waits for that rank in turn names the one at the end of the chain.
#[test]
fn who_waits_for_a_copy_is_not_silent() {
    with_fakes("who_waits_for_a_copy_is_not_silent", |fakes| {
        let context = fakes.context();
        let results = local::run_on(one_gpu(&context, ends(4, NEVER_PASSES)), |mut end| {
            let rank = end.control().rank();
            if rank == 3 {
                end.control().set_deadline(PASSES);
            }
            let compute = context.new_stream().unwrap();
            if rank == 1 {
                fakes.stick(&compute);
            }
            let ticket = post(&mut end, 0, 0, &compute).unwrap();
            // Rank 3 has its block, and waits for the next of rank 2, which waits for that of rank 1.
            let waited = end.wait(ticket).map(drop);
            assert_eq!(waited.is_ok(), rank == 3, "rank {rank}: {waited:?}");
            let next = waited.and_then(|()| post(&mut end, 1, 0, &compute));
            next.and_then(|ticket| end.wait(ticket)).map(drop).unwrap_err()
        });
        for (rank, error) in results.into_iter().enumerate() {
            let stalled = matches!(
                &error,
                Error::Peer { peer: 1, at, fault: PeerFault::Stalled { .. }, .. } if *at == ring_tag(0)
            );
            assert!(stalled, "rank {rank}: {error}");
        }
    });
}

/// However many things a wait waits for: here for a peer that posts late, then for a copy that never ends. Were there a deadline for each,
/// the second would begin when the peer has posted.
#[test]
fn a_wait_has_one_deadline() {
    with_fakes("a_wait_has_one_deadline", |fakes| {
        let context = fakes.context();
        let posted = [(); 2].map(|()| Mutex::new(None));
        let run = |end: &mut dyn DeviceTransport<Control = Local>, over_nccl: bool| {
            let compute = context.new_stream().unwrap();
            fakes.stick(&compute);
            let rank = end.control().rank();
            if rank == 1 {
                std::thread::sleep(PASSES / 2);
            }
            let ticket = post(end, 0, 0, &compute).unwrap();
            let begin = Instant::now();
            if rank == 1 {
                *posted[usize::from(over_nccl)].lock().unwrap() = Some(begin);
            }
            end.wait(ticket).map(drop).unwrap_err();
            (begin, Instant::now())
        };
        let ends = || {
            let mut ends = ends(2, NEVER_PASSES);
            ends[0].set_deadline(PASSES);
            ends
        };
        local::run_on(vec![false, true], |over_nccl| {
            let waited = match over_nccl {
                true => on_nccl(&context, ends(), |_, mut nccl| run(&mut nccl, true)),
                false => local::run_on(one_gpu(&context, ends()), |mut end| run(&mut end, false)),
            };
            let ((begin, end), posted) = (waited[0], posted[usize::from(over_nccl)].lock().unwrap().unwrap());
            let case = format!("NCCL: {over_nccl}, {:?} after {:?}", end - begin, posted - begin);
            assert!(end < posted + PASSES, "{case}");
        });
    });
}

/// What is copied from the device is polled, too: this rank's own work is late.
#[test]
fn staging_copies_have_the_deadline() {
    with_fakes("staging_copies_have_the_deadline", |fakes| {
        /// Whose streams are stuck once a block is here.
        struct Sticks<'a>(OneGpu<Local>, &'a Fakes);
        impl DeviceTransport for Sticks<'_> {
            type Control = Local;
            fn control(&mut self) -> &mut Local {
                self.0.control()
            }
            fn control_ref(&self) -> &Local {
                self.0.control_ref()
            }
            fn stream(&self) -> &Arc<CudaStream> {
                self.0.stream()
            }
            fn exchange(
                &mut self,
                tag: Tag,
                send: Outgoing,
                recv: Incoming,
                after: &CudaStream,
            ) -> Result<Ticket, Error> {
                self.0.exchange(tag, send, recv, after)
            }
            fn wait(&mut self, ticket: Ticket) -> Result<CudaSlice<u8>, Error> {
                let block = self.0.wait(ticket)?;
                self.1.stuck(true);
                Ok(block)
            }
            fn traffic(&self) -> Traffic {
                self.0.traffic()
            }
        }
        let mut ranks = one_gpu(&fakes.context(), ends(2, NEVER_PASSES))
            .into_iter()
            .map(|end| Staged::new(Sticks(end, fakes)));
        let (mut first, mut second) = (ranks.next().unwrap(), ranks.next().unwrap());
        first.set_deadline(PASSES);
        let post = |end: &mut Staged<Sticks<'_>>, peer: usize| {
            let mut message = Buffer::of(&[7u64; 9]);
            end.seal(&mut message, ring_tag(0));
            end.exchange(ring_tag(0), peer, Arc::new(message), peer, Buffer::new(72)).unwrap()
        };
        let ticket = post(&mut first, 1);
        let _other = post(&mut second, 0);
        let error = first.wait(ticket).unwrap_err();
        fakes.stuck(false);
        let stalled = matches!(
            &error,
            Error::Peer { rank: 0, peer: 0, fault: PeerFault::Stalled { waited_ms }, .. }
                if u128::from(*waited_ms) >= PASSES.as_millis()
        );
        assert!(stalled, "{error}");
    });
}

/// What a fault leaves behind, posted and not matched, is nothing to the group that is made anew on the same streams.
#[test]
fn a_group_made_anew_gets_no_old_blocks() {
    with_fakes("a_group_made_anew_gets_no_old_blocks", |fakes| {
        let (context, (world, ends)) = (fakes.context(), World::new(2).unwrap());
        let compute = context.new_stream().unwrap();
        let streams = [(); 2].map(|()| context.new_stream().unwrap());
        let group = |ends: Vec<Local>| OneGpu::group(ends.into_iter().zip(streams.iter().cloned()));
        let mut old = group(ends);
        // Rank 0 has posted when rank 1 gives up: its block and its space stay.
        let _posted = post(&mut old[0], 0, 7, &compute).unwrap();
        old[1].control().abort(ring_tag(0), "planned to give up here");
        let mut new = group(world.rebuild(2));
        let tickets = [0, 1].map(|rank| post(&mut new[rank], 0, 10 + rank as u8, &compute).unwrap());
        for (rank, ticket) in tickets.into_iter().enumerate() {
            let block = new[rank].wait(ticket).unwrap();
            assert_eq!(compute.clone_dtoh(&block).unwrap(), [[11, 10][rank]; 64], "rank {rank}");
        }
        assert!(post(&mut old[0], 1, 7, &compute).is_err(), "the old group is spent");
    });
}
