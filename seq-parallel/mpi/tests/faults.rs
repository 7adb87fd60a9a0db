//! Faults between processes: whoever dies, stops or sends garbage is named, with the step, by every survivor within the deadline.
//!
//! Processes really die (SIGKILL) and really stop (SIGSTOP); `mpirun --enable-recovery` lets the others go on. Calls of MPI that fail or
//! hang are those of a library that is loaded before MPI's.

mod support;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use seq_parallel::fingerprint::Fingerprint;
use seq_parallel::ring::Direction;
use seq_parallel::testing::faults::{NEVER_PASSES, Scenario};
use seq_parallel::transport::{Buffer, Failure, Operation, Tag, Transport};
use seq_parallel::{Error, PeerFault};
use seq_parallel_mpi::Mpi;
use support::Job;

const RANKS: usize = 4;
/// A deadline that passes. Whoever is alive comes to its next wait long before, and says in a fraction of it for whom it waits, on a
/// machine whose cores are busy with other things, too.
const DEADLINE: Duration = Duration::from_secs(3);

/// For what comes soon: a test that waits for it in vain fails after this.
const PATIENCE: Duration = Duration::from_secs(60);

/// Starts together; `deadline` is that of what comes next.
fn start(deadline: Duration) -> Mpi {
    let mut end = Mpi::start_within(NEVER_PASSES).unwrap();
    end.barrier().unwrap();
    // Who fails next finds nobody in this barrier.
    support::meet(end.rank(), end.ranks());
    end.set_deadline(deadline);
    end
}

/// Waits until the others have reported that they have given this rank up.
fn sleep_until_given_up(folder: &Path, end: &Mpi) {
    let others = (0..end.ranks()).filter(|rank| *rank != end.rank());
    support::wait_for(folder, others.map(|rank| rank.to_string()));
}

fn signal(name: &str) {
    let pid = std::process::id().to_string();
    Command::new("kill").args([name, &pid]).status().unwrap();
    // Another thread may be the first to get it, and take its time to be scheduled.
    std::thread::sleep(Duration::from_secs(5));
}

/// It ends this process.
fn killed() {
    signal("-KILL");
}

/// It stops this process, rank 1 of four, until the others have reported.
fn stopped() {
    let wakes = format!(
        "(cd \"$SEQ_PARALLEL_MPI_TEST\"; until [ -e 0 ] && [ -e 2 ] && [ -e 3 ]; do sleep 0.1; done; kill -CONT {}) >/dev/null 2>&1 &",
        std::process::id()
    );
    Command::new("sh").args(["-c", &wakes]).status().unwrap();
    signal("-STOP");
}

/// Leaves what a survivor has to say for the parent.
fn report(folder: &Path, rank: usize, text: impl std::fmt::Display) {
    std::fs::write(folder.join(rank.to_string()), text.to_string()).unwrap();
}

/// Runs `body` in four processes whose ends are recorded. In the parent: every survivor has reported, they all say the same, which is
/// returned with the job, and each has come to a good end; the culprit has ended with `ended`.
fn recorded(test: &str, culprit: usize, ended: i32, body: impl FnOnce(&Path)) -> Option<(Job, String)> {
    let job = support::with_ranks(test, RANKS, support::record, body)?;
    let folder = job.folder.path();
    let all = format!("{}{}", job.words[0], job.words[1]);
    let mut reports = Vec::new();
    for rank in (0..RANKS).filter(|rank| *rank != culprit) {
        let report = std::fs::read_to_string(folder.join(rank.to_string()));
        reports.push(report.unwrap_or_else(|_| panic!("{test}: rank {rank} has no report:\n{all}")));
        assert_eq!(support::status(folder, rank), Some(0), "{test}: rank {rank} ends badly:\n{all}");
    }
    assert!(reports.iter().all(|report| *report == reports[0]), "{test}: ranks differ: {reports:?}");
    assert_eq!(support::status(folder, culprit), Some(ended), "{test}: the culprit, rank {culprit}:\n{all}");
    let passed = RANKS - usize::from(ended != 0);
    assert_eq!(job.words[0].matches("1 passed").count(), passed, "{test}:\n{all}");
    Some((job, reports.swap_remove(0)))
}

/// One rank fails as the scenario says, by itself or by what is called in it.
fn scenario(test: &str, scenario: Scenario, fails_by: Option<fn()>) {
    let culprit = scenario.culprit;
    // Of a process that is killed, a shell says 128 and the signal.
    let ended = if matches!(scenario.failure, Failure::Dies) { 137 } else { 0 };
    recorded(test, culprit, ended, |folder| {
        let stops = matches!(scenario.failure, Failure::Silent);
        let end = start(if stops { DEADLINE } else { NEVER_PASSES });
        let rank = end.rank();
        let result = match fails_by {
            Some(function) => Scenario { failure: Failure::Calls(function), ..scenario }.run(end),
            None => scenario.run(end),
        };
        if rank == culprit {
            assert!(result.is_err(), "the others have gone on without it");
            return;
        }
        report(folder, rank, scenario.check_survivor(rank, &result));
    });
}

fn dies(test: &str, culprit: usize, exchange: usize, direction: Direction) {
    scenario(test, Scenario { culprit, failure: Failure::Dies, exchange, direction }, Some(killed));
}

#[test]
fn a_rank_is_killed_at_the_first_step() {
    dies("a_rank_is_killed_at_the_first_step", 2, 0, Direction::PassKv);
}

#[test]
fn a_rank_is_killed_at_a_middle_step() {
    dies("a_rank_is_killed_at_a_middle_step", 3, 1, Direction::PassQ);
}

#[test]
fn a_rank_is_killed_at_the_last_step() {
    dies("a_rank_is_killed_at_the_last_step", 0, 2, Direction::PassKv);
}

/// It wakes to hear that the others have given it up.
#[test]
fn a_rank_is_stopped() {
    let stops = Scenario { culprit: 1, failure: Failure::Silent, exchange: 1, direction: Direction::PassKv };
    scenario("a_rank_is_stopped", stops, Some(stopped));
}

#[test]
fn a_rank_sends_garbage() {
    let garbage = Failure::SendsGarbage;
    let sends = Scenario { culprit: 2, failure: garbage, exchange: 1, direction: Direction::PassKv };
    scenario("a_rank_sends_garbage", sends, None);
}

#[test]
fn a_rank_sends_too_little() {
    let failure = Failure::SendsTooLittle;
    let sends = Scenario { culprit: 0, failure, exchange: 0, direction: Direction::PassQ };
    scenario("a_rank_sends_too_little", sends, None);
}

/// Late, but within the deadline: nobody minds.
#[test]
fn a_late_rank_is_only_late() {
    support::on_ranks("a_late_rank_is_only_late", RANKS, |_| {
        let late = Scenario {
            culprit: 2,
            failure: Failure::Late(Duration::from_millis(300)),
            exchange: 1,
            direction: Direction::PassKv,
        };
        let mut end = seq_parallel::transport::Faulty::new(
            start(NEVER_PASSES),
            late.failure,
            if std::env::var("OMPI_COMM_WORLD_RANK").as_deref() == Ok("2") { 1 } else { usize::MAX },
        );
        late.ring(&mut end).unwrap();
        end.into_inner().close().unwrap();
    });
}

#[test]
fn who_gives_up_says_why() {
    recorded("who_gives_up_says_why", 3, 0, |folder| {
        let mut end = start(NEVER_PASSES);
        let (rank, at) = (end.rank(), Tag::new(Operation::PassKv, 1));
        if rank == 3 {
            end.abort(at, "out of memory");
            return;
        }
        let fault = PeerFault::Aborted("out of memory".into());
        assert_eq!(end.barrier(), Err(Error::Peer { rank, peer: 3, at, fault }));
        assert!(end.close().is_err(), "the end is spent");
        report(folder, rank, at);
    });
}

/// A process that ends in order without having been asked to is missed by those who need it.
#[test]
fn who_leaves_is_gone() {
    recorded("who_leaves_is_gone", 1, 0, |folder| {
        let mut end = start(NEVER_PASSES);
        let rank = end.rank();
        if rank == 1 {
            drop(end);
            // Its process is still there.
            return support::wait_for(folder, [0, 2, 3].map(|rank: usize| rank.to_string()));
        }
        let result = end.all_gather_v(&[rank as u8], &[1; RANKS]);
        assert!(end.is_gone(1));
        match result {
            Err(Error::Peer { peer: 1, fault: PeerFault::Gone, at, .. }) => report(folder, rank, at),
            other => panic!("rank {rank}: {other:?}"),
        }
    });
}

/// Posts `bytes` bytes for one rank, and as many of another, and waits.
fn exchange(end: &mut Mpi, bytes: usize, to: usize, from: usize) -> Result<Buffer, Error> {
    let tag = Tag::new(Operation::PassKv, 0);
    let mut message = Buffer::new(bytes);
    end.seal(&mut message, tag);
    let ticket = end.exchange(tag, to, Arc::new(message), from, Buffer::new(bytes))?;
    end.wait(ticket)
}

/// A look makes MPI see what has come; the next one finds it.
fn hears(end: &mut Mpi) {
    let start = Instant::now();
    while end.check().is_ok() {
        assert!(start.elapsed() < PATIENCE, "nobody has failed");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A short message that nobody asks for: MPI could keep it aside and call it sent, but who should take it is waited for, and named. What
/// moves blocks between devices knows by this that both peers have posted.
#[test]
fn who_does_not_take_a_short_message_is_named() {
    recorded("who_does_not_take_a_short_message_is_named", 1, 0, |folder| {
        let mut end = start(NEVER_PASSES);
        let rank = end.rank();
        let result = match rank {
            // What it receives is here; only its own message stays.
            0 => {
                end.set_deadline(DEADLINE);
                exchange(&mut end, 8, 1, 3)
            }
            1 => {
                sleep_until_given_up(folder, &end);
                return hears(&mut end);
            }
            2 => exchange(&mut end, 8, 3, 1),
            _ => exchange(&mut end, 8, 0, 2).and_then(|_| end.barrier().map(|()| Buffer::new(0))),
        };
        match result.unwrap_err() {
            Error::Peer { peer: 1, at, fault: PeerFault::Stalled { .. }, .. } => report(folder, rank, at),
            other => panic!("rank {rank}: {other}"),
        }
    });
}

/// Rank 1 begins to wait for rank 2 just before rank 0 gives up waiting for rank 1: it says so, and rank 2 is named.
#[test]
fn who_has_just_begun_to_wait_is_not_silent() {
    recorded("who_has_just_begun_to_wait_is_not_silent", 2, 0, |folder| {
        let mut end = start(NEVER_PASSES);
        let rank = end.rank();
        let result = match rank {
            0 => {
                end.set_deadline(DEADLINE / 2 * 3);
                exchange(&mut end, 8, 2, 1)
            }
            1 => {
                // Rank 0 asks about now, and has a fourth of its deadline left.
                std::thread::sleep(DEADLINE / 8 * 9);
                exchange(&mut end, 8, 3, 2)
            }
            2 => {
                sleep_until_given_up(folder, &end);
                return hears(&mut end);
            }
            _ => {
                let received = exchange(&mut end, 8, 2, 1);
                received.and_then(|_| end.barrier().map(|()| Buffer::new(0)))
            }
        };
        match result.unwrap_err() {
            Error::Peer { peer: 2, at, fault: PeerFault::Stalled { .. }, .. } => report(folder, rank, at),
            other => panic!("rank {rank}: {other}"),
        }
    });
}

/// Nor is one that waits for rank 2 by other means, as for a copy between devices, and says so.
#[test]
fn who_waits_by_other_means_is_not_silent() {
    recorded("who_waits_by_other_means_is_not_silent", 2, 0, |folder| {
        let mut end = start(DEADLINE);
        let (rank, at) = (end.rank(), Tag::new(Operation::PassQ, 3));
        let error = match rank {
            1 => {
                end.waits_for(Some(2), at);
                let start = Instant::now();
                loop {
                    assert!(start.elapsed() < PATIENCE, "nobody has failed");
                    match end.check() {
                        Ok(()) => std::thread::sleep(Duration::from_millis(1)),
                        Err(error) => break error,
                    }
                }
            }
            2 => {
                sleep_until_given_up(folder, &end);
                return hears(&mut end);
            }
            _ => exchange(&mut end, 8, 3 - rank, 1).unwrap_err(),
        };
        match error {
            Error::Peer { peer: 2, at: found, fault: PeerFault::Stalled { .. }, .. } if found == at => {
                report(folder, rank, at);
            }
            other => panic!("rank {rank}: {other}"),
        }
    });
}

/// However many things a wait waits for: here for a message that is late, then for a long one that nobody takes. Were there a deadline for
/// each, the second would begin when the message is here.
#[test]
fn a_wait_has_one_deadline() {
    recorded("a_wait_has_one_deadline", 1, 0, |folder| {
        let mut end = start(NEVER_PASSES);
        let rank = end.rank();
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let result = match rank {
            0 => {
                end.set_deadline(DEADLINE);
                let result = exchange(&mut end, 1 << 20, 1, 2);
                let given_up = now();
                let posted = std::fs::read_to_string(folder.join("posted")).unwrap();
                let posted = Duration::from_millis(posted.parse().unwrap());
                assert!(given_up < posted + DEADLINE, "{:?} after the other had posted", given_up - posted);
                result
            }
            1 => {
                sleep_until_given_up(folder, &end);
                return hears(&mut end);
            }
            2 => {
                std::thread::sleep(DEADLINE / 2);
                std::fs::write(folder.join("posted"), now().as_millis().to_string()).unwrap();
                exchange(&mut end, 1 << 20, 0, 1)
            }
            _ => end.barrier().map(|()| Buffer::new(0)),
        };
        match result.unwrap_err() {
            Error::Peer { peer: 1, fault: PeerFault::Stalled { .. }, .. } => report(folder, rank, "rank 1"),
            other => panic!("rank {rank}: {other}"),
        }
    });
}

/// Prepares a job whose ranks call a stand-in before MPI, which lets a call fail or hang once a file of its name and the rank is there.
fn interposed(command: &mut Command, folder: &Path) {
    let library = folder.join("interposed.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/interposed.c");
    let built = Command::new("mpicc")
        .args(["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", source, "-o"])
        .arg(&library)
        .output();
    let built = built.expect("whoever has MPI's headers has mpicc");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    support::record(command, folder);
    command.arg("env").arg(format!("LD_PRELOAD={}", library.display()));
}

/// Lets a call of MPI fail or hang from now on, in this rank.
fn interpose(folder: &Path, call: &str, rank: usize) {
    std::fs::write(folder.join(format!("{call}.{rank}")), "").unwrap();
}

/// A call of MPI that fails is somebody's fault, with a name and a step: whom it should have reached, or the rank itself.
fn fails(test: &'static str, call: &'static str, peer: usize, fault: fn(&PeerFault) -> bool) {
    let job = support::with_ranks(test, 3, interposed, |folder| {
        let mut end = start(NEVER_PASSES);
        let rank = end.rank();
        if rank == 2 {
            interpose(folder, call, rank);
        }
        match exchange(&mut end, 8, (rank + 1) % 3, (rank + 2) % 3).and_then(|_| end.barrier()).unwrap_err() {
            Error::Peer { rank: reporter, peer: found, at, fault: known } => {
                assert_eq!((reporter, found), (rank, peer), "{known}");
                assert!(fault(&known), "{known}");
                report(folder, rank, at);
            }
            other => panic!("rank {rank}: {other}"),
        }
    });
    let Some(job) = job else { return };
    for rank in 0..3 {
        let at = std::fs::read_to_string(job.folder.path().join(rank.to_string()));
        assert_eq!(at.unwrap_or_default(), "ring (pass-KV) step 0", "{test}, rank {rank}: {:?}", job.words);
        assert_eq!(support::status(job.folder.path(), rank), Some(0), "{test}, rank {rank}: {:?}", job.words);
    }
}

#[test]
fn a_receive_that_cannot_be_posted_names_its_rank() {
    let unreachable = |fault: &PeerFault| matches!(fault, PeerFault::Unreachable(_));
    fails("a_receive_that_cannot_be_posted_names_its_rank", "MPI_Irecv", 1, unreachable);
}

#[test]
fn who_cannot_hear_gives_up() {
    let deaf =
        |fault: &PeerFault| matches!(fault, PeerFault::Aborted(why) if why.contains("MPI_Iprobe failed"));
    fails("who_cannot_hear_gives_up", "MPI_Iprobe", 2, deaf);
}

/// A process whose MPI does not come back ends, and says where; the others name it, as any that is silent.
#[test]
fn mpi_that_hangs_ends_its_process() {
    let test = "mpi_that_hangs_ends_its_process";
    let job = support::with_ranks(test, 2, interposed, |folder| {
        let mut end = start(DEADLINE);
        let rank = end.rank();
        if rank == 1 {
            interpose(folder, "MPI_Test", rank);
        }
        let error = exchange(&mut end, 8, 1 - rank, 1 - rank).and_then(|_| end.barrier()).unwrap_err();
        assert!(matches!(error, Error::Peer { rank: 0, peer: 1, .. }), "{error}");
    });
    let Some(job) = job else { return };
    let statuses = [0, 1].map(|rank| support::status(job.folder.path(), rank));
    assert_eq!(statuses, [Some(0), Some(1)], "{:?}", job.words);
    let words = "rank 1: MPI, waiting for rank 0 at ring (pass-KV) step 0, did not come back within 6000 ms";
    assert!(job.words[1].contains(words), "{:?}", job.words);
}

/// A rank that never comes keeps the others in MPI_Init, which only ends with their processes.
#[test]
fn a_start_that_hangs_ends_its_process() {
    let test = "a_start_that_hangs_ends_its_process";
    let job = support::with_ranks(test, 2, support::record, |folder| {
        if std::env::var("OMPI_COMM_WORLD_RANK").as_deref() == Ok("1") {
            return support::wait_for(folder, ["0.status".to_string()]);
        }
        let begin = Instant::now();
        let end = Mpi::start_within(DEADLINE).map(|end| end.rank());
        panic!("{end:?} after {:?}", begin.elapsed());
    });
    let Some(job) = job else { return };
    let statuses = [0, 1].map(|rank| support::status(job.folder.path(), rank));
    assert_eq!(statuses, [Some(1), Some(0)], "{:?}", job.words);
    let words = "MPI_Init and the meeting of all processes did not come back within 3000 ms";
    assert!(job.words[1].contains(words), "{:?}", job.words);
}

#[test]
fn mismatched_configurations_are_refused_at_set_up() {
    support::on_ranks("mismatched_configurations_are_refused_at_set_up", RANKS, |_| {
        let mut end = start(NEVER_PASSES);
        let rank = end.rank();
        let scale = |rank: usize| if rank == 2 { 7 } else { 5 };
        let peer = if rank == 2 { 0 } else { 2 };
        let found = Fingerprint::new().with("the scale", scale(rank)).agree(&mut end);
        let expected =
            Error::Mismatch { rank, peer, what: "the scale", here: scale(rank), there: scale(peer) };
        assert_eq!(found, Err(expected));
        end.close().unwrap();
    });
}
