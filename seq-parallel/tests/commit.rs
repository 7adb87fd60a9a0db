//! All ranks that live keep a step, or none, whoever fails and when; home is where it is decided.

use std::sync::Arc;
use std::time::{Duration, Instant};

use seq_parallel::commit::commit;
use seq_parallel::testing::faults::{NEVER_PASSES, PASSES};
use seq_parallel::transport::local::{World, run_on};
use seq_parallel::transport::{Buffer, Failure, Faulty, Operation, Subgroup, Tag, Transport};
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
                    if rank == home { 4 * (ranks - 1) } else { 4.min(4 * (ranks - 1)) },
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
            for exchange in 0..4 {
                let case = format!("home {home}, rank {culprit} dies at {exchange}");
                let results = run(home, culprit, Failure::Dies, exchange);
                let kept = kept_by(&case, culprit, &results);
                assert_eq!(kept.len(), exchange / 2 * (RANKS - 1), "{case}: kept by {kept:?}");
            }
        }
    }
}

/// Home that dies before it has decided takes the step with it; while it tells, those keep it that have heard so.
#[test]
fn home_that_dies_has_told_some_or_none() {
    for exchange in 0..4 * (RANKS - 1) {
        let case = format!("home dies at {exchange}");
        let results = run(0, 0, Failure::Dies, exchange);
        let kept = kept_by(&case, 0, &results);
        match exchange.checked_sub(2 * (RANKS - 1)) {
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
    run_on(vec![0, 1, 2, 3], |exchange| {
        let case = format!("rank 1 is silent at {exchange}");
        let results = run(0, 1, Failure::Silent, exchange);
        let kept = kept_by(&case, 1, &results);
        assert_eq!(kept.len(), exchange / 2 * (RANKS - 1), "{case}: kept by {kept:?}");
        let own = &results[1][0];
        let stalled = matches!(own, Err(Error::Peer { peer: 1, fault: PeerFault::Stalled { .. }, .. }));
        assert!(if exchange < 2 { stalled } else { own.is_ok() }, "{case}: it makes {own:?} of it");
    });
}

/// Ranks that live, with equal deadlines, and one that comes just as these end: whoever is quicker, all keep the step or none does.
#[test]
fn a_rank_that_comes_at_the_deadline_is_on_one_side() {
    // Home has three exchanges of each step.
    let cases = [(1, 0), (1, 1), (1, 2), (1, 3), (0, 0), (0, 1), (0, 3), (0, 4), (0, 6), (0, 7)];
    run_on(cases.to_vec(), |(late, exchange)| {
        let ends: Vec<_> = World::new(RANKS).unwrap().1.into_iter().map(|end| (end.rank(), end)).collect();
        let results = run_on(ends, |(rank, end)| {
            let turn = if rank == late { exchange } else { usize::MAX };
            let mut end = Faulty::new(end, Failure::Late(PASSES), turn);
            end.set_deadline(PASSES);
            let step = commit(&mut end, 0);
            assert_eq!(end.deadline(), PASSES, "as it was");
            step
        });
        let kept = results.iter().filter(|result| result.is_ok()).count();
        assert!([0, RANKS].contains(&kept), "rank {late} is late at {exchange}: {results:?}");
    });
}

/// Home hears of a fault, whoever has found it, when all wait for its word: it keeps the step only if it has told somebody.
#[test]
fn home_that_can_tell_nobody_keeps_nothing() {
    let home_is_accused = |exchange: usize| {
        let ends: Vec<_> = World::new(RANKS).unwrap().1.into_iter().map(|end| (end.rank(), end)).collect();
        run_on(ends, |(rank, end)| {
            let mut end = Faulty::new(end, Failure::Silent, if rank == 0 { exchange } else { usize::MAX });
            end.set_deadline(if rank == 0 { NEVER_PASSES } else { PASSES });
            commit(&mut end, 0)
        })
    };
    // The first that is told, and the second.
    run_on(vec![2 * (RANKS - 1), 2 * (RANKS - 1) + 1], |exchange| {
        let results = home_is_accused(exchange);
        let kept: Vec<usize> = (0..RANKS).filter(|&rank| results[rank].is_ok()).collect();
        let told: &[usize] = if exchange % 2 == 0 { &[] } else { &[0, 1] };
        assert_eq!(kept, told, "home is silent at {exchange}: {results:?}");
        for error in results.iter().filter_map(|result| result.as_ref().err()) {
            assert!(
                matches!(error, Error::Peer { peer: 0, fault: PeerFault::Stalled { .. }, .. }),
                "{error}"
            );
        }
    });
}

/// A fault of an old step that is heard of when all wait: nobody is told, and nobody keeps it.
#[test]
fn a_fault_of_before_is_no_word_of_home() {
    let ends: Vec<_> = World::new(3).unwrap().1.into_iter().map(|end| (end.rank(), end)).collect();
    let results = run_on(ends, |(rank, mut end)| {
        end.set_deadline(NEVER_PASSES);
        if rank != 2 {
            // Home is silent until it hears of the fault, when it would tell the first.
            let turn = if rank == 0 { 4 } else { usize::MAX };
            return commit(&mut Faulty::new(end, Failure::Silent, turn), 0);
        }
        for step in [0, 1] {
            let tag = Tag::new(Operation::Commit, step);
            let mut nothing = Buffer::new(0);
            end.seal(&mut nothing, tag);
            let ticket = end.exchange(tag, 0, Arc::new(nothing), 0, Buffer::new(0)).unwrap();
            end.wait(ticket).unwrap();
        }
        Err(end.accuse(1, Tag::new(Operation::Commit, 0), PeerFault::Gone))
    });
    for (rank, result) in results.into_iter().enumerate() {
        let (peer, at) = (1, Tag::new(Operation::Commit, 0));
        assert_eq!(result, Err(Error::Peer { rank, peer, at, fault: PeerFault::Gone }));
    }
}

/// Two steps with nothing between them: of a rank that dies at the end of the first, the second is not kept.
#[test]
fn the_end_of_a_step_is_no_word_on_the_next() {
    for exchange in 0..8 {
        let ends: Vec<_> = World::new(RANKS).unwrap().1.into_iter().map(|end| (end.rank(), end)).collect();
        let results = run_on(ends, |(rank, end)| {
            let mut end = Faulty::new(end, Failure::Dies, if rank == 3 { exchange } else { usize::MAX });
            end.set_deadline(NEVER_PASSES);
            [commit(&mut end, 0).is_ok(), commit(&mut end, 0).is_ok()]
        });
        for (rank, kept) in results.into_iter().enumerate().take(3) {
            assert_eq!(kept, [exchange >= 2, exchange >= 6], "rank 3 dies at {exchange}, rank {rank}");
        }
    }
}

/// Members have other numbers in the group than errors give them; ranks that are no members decide nothing.
#[test]
fn members_of_a_group_keep_it_together() {
    // Home is rank 3 of the transport; rank 1 of it has home's number in the group, or the number that home has in it.
    for (members, home) in [([3, 1, 0], 0), ([1, 0, 3], 2), ([0, 3, 1], 1)] {
        for culprit in members.into_iter().filter(|member| *member != 3) {
            for exchange in 0..4 {
                let ends: Vec<_> =
                    World::new(RANKS).unwrap().1.into_iter().map(|end| (end.rank(), end)).collect();
                let results = run_on(ends, |(rank, end)| {
                    let turn = if rank == culprit { exchange } else { usize::MAX };
                    let mut end = Faulty::new(end, Failure::Dies, turn);
                    end.set_deadline(NEVER_PASSES);
                    if rank == 2 {
                        let start = Instant::now();
                        while end.check().is_ok() {
                            assert!(start.elapsed() < Duration::from_secs(60), "nobody has failed");
                            std::thread::sleep(Duration::from_millis(1));
                        }
                        return false;
                    }
                    let mut group = Subgroup::new(&mut end, members.to_vec()).unwrap();
                    assert_eq!(group.name_of(home), 3);
                    let kept = commit(&mut group, home).is_ok();
                    assert!(
                        rank == culprit || end.barrier().is_err(),
                        "rank {rank} of {members:?} hears of it"
                    );
                    kept
                });
                let case = format!("rank {culprit} of {members:?} dies at {exchange}: {results:?}");
                for rank in members.into_iter().filter(|rank| *rank != culprit) {
                    assert_eq!(results[rank], exchange >= 2, "{case}");
                }
            }
        }
    }
}
