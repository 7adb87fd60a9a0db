//! Faults between processes: whoever dies, stops or sends garbage is named, with the step, by every survivor within the deadline.
//!
//! Processes really die (SIGKILL) and really stop (SIGSTOP); `mpirun --enable-recovery` lets the others go on.

mod support;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use seq_parallel::fingerprint::Fingerprint;
use seq_parallel::ring::Direction;
use seq_parallel::testing::faults::Scenario;
use seq_parallel::transport::{Buffer, Failure, Operation, Tag, Ticket, Traffic, Transport};
use seq_parallel::{Error, PeerFault};
use seq_parallel_mpi::Mpi;

const RANKS: usize = 4;
const DEADLINE: Duration = Duration::from_millis(1500);
/// For a machine whose cores are busy.
const SLACK: Duration = Duration::from_millis(1500);

/// Starts together. The culprit, if any, waits a little more, so that nobody is still in this barrier when it fails.
fn start(culprit: Option<usize>) -> Mpi {
    let mut end = Mpi::start().unwrap();
    end.set_deadline(DEADLINE);
    end.barrier().unwrap();
    if culprit == Some(end.rank()) {
        std::thread::sleep(Duration::from_millis(300));
    }
    end
}

fn signal(name: &str) {
    let pid = std::process::id().to_string();
    Command::new("kill").args([name, &pid]).status().unwrap();
    // Another thread may be the first to get it, and take its time to be scheduled.
    std::thread::sleep(Duration::from_secs(1));
}

/// An end whose process gets a signal at an exchange.
struct Signalled {
    inner: Mpi,
    signal: &'static str,
    left: usize,
}

impl Transport for Signalled {
    fn rank(&self) -> usize {
        self.inner.rank()
    }
    fn ranks(&self) -> usize {
        self.inner.ranks()
    }
    fn exchange(
        &mut self,
        tag: Tag,
        to: usize,
        send: Arc<Buffer>,
        from: usize,
        recv: Buffer,
    ) -> Result<Ticket, Error> {
        if self.left == 0 {
            signal(self.signal);
        }
        self.left = self.left.wrapping_sub(1);
        self.inner.exchange(tag, to, send, from, recv)
    }
    fn wait(&mut self, ticket: Ticket) -> Result<Buffer, Error> {
        self.inner.wait(ticket)
    }
    fn abort(&mut self, at: Tag, reason: &str) {
        self.inner.abort(at, reason);
    }
    fn check(&mut self) -> Result<(), Error> {
        self.inner.check()
    }
    fn is_gone(&mut self, peer: usize) -> bool {
        self.inner.is_gone(peer)
    }
    fn accuse(&mut self, peer: usize, at: Tag, fault: PeerFault) -> Error {
        self.inner.accuse(peer, at, fault)
    }
    fn traffic(&self) -> Traffic {
        self.inner.traffic()
    }
    fn deadline(&self) -> Duration {
        self.inner.deadline()
    }
    fn set_deadline(&mut self, deadline: Duration) {
        self.inner.set_deadline(deadline);
    }
}

/// Leaves what a survivor has to say for the parent.
fn report(folder: &Path, rank: usize, text: impl std::fmt::Display) {
    std::fs::write(folder.join(rank.to_string()), text.to_string()).unwrap();
}

/// In the parent: every survivor has reported, and they all name the same.
fn check_reports(test: &str, job: Option<(std::process::Output, tempfile::TempDir)>, culprit: usize) {
    let Some((output, folder)) = job else { return };
    let words = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    let reports: Vec<String> = (0..RANKS)
        .filter(|rank| *rank != culprit)
        .map(|rank| {
            std::fs::read_to_string(folder.path().join(rank.to_string()))
                .unwrap_or_else(|_| panic!("{test}: rank {rank} has no report:\n{}{}", words[0], words[1]))
        })
        .collect();
    assert!(reports.iter().all(|report| *report == reports[0]), "{test}: ranks differ: {reports:?}");
}

/// One rank fails as the scenario says, by itself or by a signal.
fn scenario(test: &str, scenario: Scenario, fails_by: Option<&'static str>) {
    let culprit = scenario.culprit;
    let job = support::with_ranks(test, RANKS, &["--enable-recovery"], |folder| {
        let end = start(Some(culprit));
        let rank = end.rank();
        let begin = Instant::now();
        let result = match fails_by {
            Some(signal) if rank == culprit => {
                let wakes = format!("(sleep 4; kill -CONT {}) >/dev/null 2>&1 &", std::process::id());
                if signal == "-STOP" {
                    Command::new("sh").args(["-c", &wakes]).status().unwrap();
                }
                scenario.ring(&mut Signalled { inner: end, signal, left: scenario.exchange })
            }
            Some(_) => {
                let mut end = end;
                scenario.ring(&mut end)
            }
            None => scenario.run(end),
        };
        if rank == culprit {
            assert!(result.is_err(), "the others have gone on without it");
            return;
        }
        let took = begin.elapsed();
        let at = scenario.check_survivor(rank, &result);
        let in_time = match scenario.failure {
            // The process table knows at once.
            Failure::Dies => took < DEADLINE,
            _ => took < DEADLINE + SLACK,
        };
        assert!(in_time, "rank {rank} took {took:?}");
        report(folder, rank, at);
    });
    check_reports(test, job, culprit);
}

fn dies(test: &str, culprit: usize, exchange: usize, direction: Direction) {
    scenario(test, Scenario { culprit, failure: Failure::Dies, exchange, direction }, Some("-KILL"));
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

/// It wakes after four seconds to hear that the others have given it up.
#[test]
fn a_rank_is_stopped() {
    let failure = Failure::Stalls(Duration::from_secs(4));
    let stops = Scenario { culprit: 1, failure, exchange: 1, direction: Direction::PassKv };
    scenario("a_rank_is_stopped", stops, Some("-STOP"));
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
            failure: Failure::Stalls(DEADLINE / 3),
            exchange: 1,
            direction: Direction::PassKv,
        };
        let mut end = seq_parallel::transport::Faulty::new(
            start(None),
            late.failure,
            if std::env::var("OMPI_COMM_WORLD_RANK").as_deref() == Ok("2") { 1 } else { usize::MAX },
        );
        late.ring(&mut end).unwrap();
        end.into_inner().close().unwrap();
    });
}

#[test]
fn who_gives_up_says_why() {
    let test = "who_gives_up_says_why";
    let job = support::with_ranks(test, RANKS, &["--enable-recovery"], |folder| {
        let mut end = start(Some(3));
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
    check_reports(test, job, 3);
}

/// A process that ends in order without having been asked to is missed by those who need it.
#[test]
fn who_leaves_is_gone() {
    let test = "who_leaves_is_gone";
    let job = support::with_ranks(test, RANKS, &["--enable-recovery"], |folder| {
        let mut end = start(Some(1));
        let rank = end.rank();
        if rank == 1 {
            drop(end);
            return;
        }
        let result = end.all_gather_v(&[rank as u8], &[1; RANKS]);
        match result {
            Err(Error::Peer { peer: 1, fault: PeerFault::Gone, at, .. }) => report(folder, rank, at),
            other => panic!("rank {rank}: {other:?}"),
        }
    });
    check_reports(test, job, 1);
}

#[test]
fn mismatched_configurations_are_refused_at_set_up() {
    support::on_ranks("mismatched_configurations_are_refused_at_set_up", RANKS, |_| {
        let mut end = start(None);
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
