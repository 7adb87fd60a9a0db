//! All ranks that live keep a step, or none, whoever fails and when; home is where it is decided.

use seq_parallel::commit::commit;
use seq_parallel::testing::faults::{NEVER_PASSES, PASSES};
use seq_parallel::transport::local::{World, run_on};
use seq_parallel::transport::{Failure, Faulty, Operation, Tag, Transport};
use seq_parallel::{Error, PeerFault};

const RANKS: usize = 4;

/// One rank fails at one of its exchanges; gives what every rank makes of the step, and then of a barrier.
fn run(home: usize, culprit: usize, failure: Failure, exchange: usize) -> Vec<[Result<(), Error>; 2]> {
    let ends = World::new(RANKS).unwrap().1.into_iter();
    let turn = |rank| if rank == culprit { exchange } else { usize::MAX };
    let ends: Vec<_> = ends.map(|end| (end.rank(), end)).collect();
    run_on(ends, |(rank, end)| {
        let mut end = Faulty::new(end, failure, turn(rank));
        // Home alone waits for the others.
        let passes = matches!(failure, Failure::Silent) && rank == home;
        end.set_deadline(if passes { PASSES } else { NEVER_PASSES });
        let step = commit(&mut end, home);
        let is_dead = matches!(failure, Failure::Dies) && rank == culprit;
        let next = if is_dead { Ok(()) } else { end.barrier() };
        [step, next]
    })
}

/// What the ranks but the culprit make of it: who keeps the step; whoever does not, and whoever goes on, names the culprit.
fn kept_by(case: &str, culprit: usize, results: &[[Result<(), Error>; 2]]) -> Vec<usize> {
    let mut kept = Vec::new();
    for (rank, [step, next]) in results.iter().enumerate().filter(|(rank, _)| *rank != culprit) {
        match step {
            Ok(()) => kept.push(rank),
            Err(Error::Peer { peer, at: Tag { operation: Operation::Commit, .. }, .. })
                if *peer == culprit => {}
            Err(error) => panic!("{case}, rank {rank}: {error}"),
        }
        let named = matches!(next, Err(Error::Peer { peer, .. }) if *peer == culprit);
        assert!(named, "{case}, rank {rank}: then {next:?}");
    }
    kept
}

#[test]
fn without_faults_all_keep_it() {
    for ranks in [1, 2, 3, 7] {
        for home in [0, ranks - 1] {
            let messages = run_on(World::new(ranks).unwrap().1, |mut end| {
                commit(&mut end, home).unwrap();
                let refused = commit(&mut end, ranks).unwrap_err();
                assert!(matches!(refused, Error::Argument { argument: "home", .. }), "{refused}");
                assert_eq!(end.traffic().sent, 0);
                end.traffic().messages as usize
            });
            for (rank, messages) in messages.into_iter().enumerate() {
                assert_eq!(
                    messages,
                    if rank == home { 3 * (ranks - 1) } else { 3.min(3 * (ranks - 1)) },
                    "rank {rank}, home {home}"
                );
            }
        }
    }
}

/// A rank that dies before it was heard of takes the step with it; after that all others keep it.
#[test]
fn another_rank_that_dies_is_on_one_side() {
    for home in [0, 2] {
        for culprit in (0..RANKS).filter(|rank| *rank != home) {
            for exchange in 0..3 {
                let case = format!("home {home}, rank {culprit} dies at {exchange}");
                let results = run(home, culprit, Failure::Dies, exchange);
                let kept = kept_by(&case, culprit, &results);
                assert_eq!(kept.len(), exchange.min(1) * (RANKS - 1), "{case}: kept by {kept:?}");
            }
        }
    }
}

/// Home that dies before it has decided takes the step with it; while it tells, those keep it that have heard so.
#[test]
fn home_that_dies_has_told_some_or_none() {
    for exchange in 0..3 * (RANKS - 1) {
        let case = format!("home dies at {exchange}");
        let results = run(0, 0, Failure::Dies, exchange);
        let kept = kept_by(&case, 0, &results);
        match exchange.checked_sub(RANKS - 1) {
            None => assert!(kept.is_empty(), "{case}: kept by {kept:?}"),
            // Whom it told while it lived, or everybody, once all had heard.
            Some(told) if told < RANKS - 1 => {
                assert!(kept.iter().all(|rank| (1..=told).contains(rank)), "{case}: kept by {kept:?}")
            }
            Some(_) => assert_eq!(kept, [1, 2, 3], "{case}"),
        }
    }
}

/// The same of ranks that are silent, who hear on which side they were.
#[test]
fn a_silent_rank_is_on_one_side() {
    run_on(vec![0, 1, 2], |exchange| {
        let case = format!("rank 1 is silent at {exchange}");
        let results = run(0, 1, Failure::Silent, exchange);
        let kept = kept_by(&case, 1, &results);
        assert_eq!(kept.len(), exchange.min(1) * (RANKS - 1), "{case}: kept by {kept:?}");
        let own = &results[1][0];
        let stalled = matches!(own, Err(Error::Peer { peer: 1, fault: PeerFault::Stalled { .. }, .. }));
        assert!(if exchange == 0 { stalled } else { own.is_ok() }, "{case}: it makes {own:?} of it");
    });
}
