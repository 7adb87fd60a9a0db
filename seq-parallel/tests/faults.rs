//! Faults: a rank that dies, stalls or sends garbage makes every other rank fail in time, with an error that names it and the step.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use attention::Mask;
use half::bf16;
use seq_parallel::placement::{Placement, Shards};
use seq_parallel::ring::{Ring, RingPlan};
use seq_parallel::testing::faults::{NEVER_PASSES, PASSES, Scenario};
use seq_parallel::testing::{Contents, sequences, spec};
use seq_parallel::transport::local::{Local, World, run_on};
use seq_parallel::transport::sim::{Link, Sim};
use seq_parallel::transport::{Buffer, Failure, Faulty, Operation, Tag, Transport};
use seq_parallel::ulysses::UlyssesPlan;
use seq_parallel::{Error, Output, PeerFault};

const RANKS: usize = 4;

fn contents() -> (Contents<bf16>, Shards) {
    let contents = Contents::new(spec(4, 4, 16, Mask::Causal), sequences(&[(0, 64)]), 1);
    let shards = Shards::new(contents.sequences.clone(), Placement::Zigzag, RANKS).unwrap();
    (contents, shards)
}

/// Runs `body` with rank `culprit` failing at its exchange `exchange`; gives every rank's result.
fn with_failure(
    world: &World,
    culprit: usize,
    failure: Failure,
    exchange: usize,
    body: impl Fn(usize, &mut dyn Transport) -> Result<Output, Error> + Sync,
) -> Vec<Result<Output, Error>> {
    let ends = world.rebuild(RANKS).into_iter().enumerate();
    // One that never fails is one whose turn never comes.
    let turn = |rank| if rank == culprit { exchange } else { usize::MAX };
    let ends: Vec<_> = ends.map(|(rank, end)| Faulty::new(end, failure, turn(rank))).collect();
    run_on(ends, |mut end| {
        end.set_deadline(NEVER_PASSES);
        let rank = end.rank();
        body(rank, &mut end)
    })
}

fn check(
    case: &str,
    culprit: usize,
    operation: Operation,
    results: &[Result<Output, Error>],
    fits: impl Fn(&PeerFault) -> bool,
) {
    let mut steps = Vec::new();
    for (rank, result) in results.iter().enumerate().filter(|(rank, _)| *rank != culprit) {
        match result {
            Err(Error::Peer { rank: reporter, peer, at, fault }) => {
                assert_eq!((*reporter, *peer), (rank, culprit), "{case}: {result:?}");
                assert!(fits(fault), "{case}, rank {rank}: {fault:?}");
                assert_eq!(at.operation, operation, "{case}, rank {rank}");
                steps.push(at.step);
            }
            Err(other) => panic!("{case}, rank {rank}: {other}"),
            Ok(_) => panic!("{case}, rank {rank} believes that all is well"),
        }
    }
    assert!(steps.iter().all(|step| *step == steps[0]), "{case}: ranks name steps {steps:?}");
}

#[test]
fn every_rank_names_the_culprit() {
    every_scenario(|end| end);
}

#[test]
fn every_rank_names_the_culprit_with_modelled_delay() {
    every_scenario(|end| Sim::new(end, Link::NIC_100G, 1e9).unwrap());
}

fn every_scenario<X: Transport>(wrap: impl Fn(Local) -> X + Sync) {
    let run = |scenario: Scenario, ends: Vec<Local>| {
        let results = run_on(ends.into_iter().map(&wrap).collect(), |mut end: X| {
            end.set_deadline(scenario.deadline());
            scenario.run(end)
        });
        let survivors = results.iter().enumerate().filter(|(rank, _)| *rank != scenario.culprit);
        let steps: Vec<_> = survivors.map(|(rank, result)| scenario.check_survivor(rank, result)).collect();
        assert!(steps.iter().all(|step| *step == steps[0]), "{scenario:?}: ranks name steps {steps:?}");
    };
    // Deadlines pass side by side; the others one after the other, in one group that is made anew.
    let (silent, others): (Vec<_>, Vec<_>) =
        Scenario::all(RANKS).into_iter().partition(|scenario| matches!(scenario.failure, Failure::Silent));
    let (world, _) = World::new(RANKS).unwrap();
    others.into_iter().for_each(|scenario| run(scenario, world.rebuild(RANKS)));
    run_on(silent, |scenario| run(scenario, World::new(RANKS).unwrap().1));
}

/// However many things a wait waits for: here for a message that is late, then for one that nobody takes. Were there a deadline for each,
/// the second would begin when the message is here.
#[test]
fn a_wait_has_one_deadline() {
    let (_, ends) = World::new(3).unwrap();
    let posted = Mutex::new(None);
    let waited = run_on(ends, |mut end| {
        let (rank, tag) = (end.rank(), Tag::new(Operation::PassKv, 0));
        end.set_deadline(if rank == 0 { PASSES } else { NEVER_PASSES });
        let mut message = Buffer::of(&[1u8]);
        end.seal(&mut message, tag);
        match rank {
            1 => {
                while end.check().is_ok() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                return None;
            }
            2 => std::thread::sleep(PASSES / 2),
            _ => {}
        }
        let (to, from) = if rank == 0 { (1, 2) } else { (0, 1) };
        let ticket = end.exchange(tag, to, Arc::new(message), from, Buffer::new(1)).unwrap();
        let begin = Instant::now();
        if rank == 2 {
            *posted.lock().unwrap() = Some(begin);
        }
        let error = end.wait(ticket).unwrap_err();
        assert!(matches!(error, Error::Peer { peer: 1, fault: PeerFault::Stalled { .. }, .. }), "{error}");
        Some((begin, Instant::now()))
    });
    let (begin, end) = waited[0].unwrap();
    let posted = posted.into_inner().unwrap().unwrap();
    assert!(end >= begin + PASSES && end < posted + PASSES, "{:?} after {:?}", end - begin, posted - begin);
}

#[test]
fn collectives_name_the_culprit_too() {
    let (contents, shards) = contents();
    let plan = UlyssesPlan::new(contents.spec, shards.clone()).unwrap();
    let (world, _) = World::new(RANKS).unwrap();
    for (failure, exchange) in [(Failure::Dies, 0), (Failure::Dies, 4), (Failure::SendsGarbage, 2)] {
        let results = with_failure(&world, 1, failure, exchange, |rank, transport| {
            let rows = contents.rows(&shards.queries(rank), &shards.keys(rank));
            plan.run(rows.inputs(), transport)
        });
        check(&format!("{failure:?} at {exchange}"), 1, Operation::AllToAll, &results, |_| true);
    }
}

#[test]
fn a_late_rank_is_only_late() {
    let (contents, shards) = contents();
    let plan = RingPlan::new(contents.spec, shards.clone()).unwrap();
    let (world, _) = World::new(RANKS).unwrap();
    let results = with_failure(&world, 2, Failure::Late(Duration::from_millis(100)), 1, |rank, transport| {
        let rows = contents.rows(&shards.queries(rank), &shards.keys(rank));
        plan.run(rows.inputs(), transport)
    });
    let outputs: Vec<Output> = results.into_iter().map(Result::unwrap).collect();
    let queries: Vec<_> = (0..RANKS).map(|rank| shards.queries(rank)).collect();
    contents.check("a straggler", &queries, &outputs);
}

#[test]
fn a_failed_group_can_be_made_anew() {
    let (contents, shards) = contents();
    let plan = RingPlan::new(contents.spec, shards.clone()).unwrap();
    let (world, ends) = World::new(RANKS).unwrap();
    let mut old = ends.into_iter();
    let mut straggler = old.next().unwrap();
    drop(old);
    // Of the first generation all but one died. Its end is spent once the group is made anew.
    let failed = with_failure(&world, 3, Failure::Dies, 1, |rank, transport| {
        let rows = contents.rows(&shards.queries(rank), &shards.keys(rank));
        plan.run(rows.inputs(), transport)
    });
    assert!(failed.iter().all(Result::is_err));
    assert!(matches!(straggler.barrier(), Err(Error::Peer { fault: PeerFault::Aborted(_), .. })));
    let outputs = run_on(world.rebuild(RANKS), |mut end| {
        let rank = end.rank();
        let rows = contents.rows(&shards.queries(rank), &shards.keys(rank));
        plan.run(rows.inputs(), &mut end).unwrap()
    });
    let queries: Vec<_> = (0..RANKS).map(|rank| shards.queries(rank)).collect();
    contents.check("after a failure", &queries, &outputs);
    // And without the rank that is lost.
    let fewer = Shards::new(contents.sequences.clone(), Placement::Zigzag, 3).unwrap();
    let plan = RingPlan::new(contents.spec, fewer.clone()).unwrap();
    let outputs = run_on(world.rebuild(3), |mut end| {
        let rank = end.rank();
        let rows = contents.rows(&fewer.queries(rank), &fewer.keys(rank));
        plan.run(rows.inputs(), &mut end).unwrap()
    });
    let queries: Vec<_> = (0..3).map(|rank| fewer.queries(rank)).collect();
    contents.check("without the lost rank", &queries, &outputs);
}

#[test]
fn who_gives_up_says_why() {
    let (contents, shards) = contents();
    let plan = RingPlan::new(contents.spec, shards.clone()).unwrap();
    let (world, _) = World::new(RANKS).unwrap();
    let results = with_failure(&world, 0, Failure::Dies, usize::MAX, |rank, transport| {
        let rows = contents.rows(&shards.queries(rank), &shards.keys(rank));
        let mut ring = Ring::new(&plan, rank, rows.inputs())?;
        ring.step(transport, |_| {})?;
        if rank == 0 {
            transport.abort(Tag::new(Operation::PassKv, 1), "out of memory");
        }
        while !ring.is_done() {
            ring.step(transport, |_| {})?;
        }
        ring.finish(transport)
    });
    check("abort", 0, Operation::PassKv, &results, |fault| {
        *fault == PeerFault::Aborted("out of memory".into())
    });
}
