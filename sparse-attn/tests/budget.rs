//! Sharing device pages out: floors, thresholds and arrivals.

use attention::testing::Rng;
use sparse_attn::Error;
use sparse_attn::budget::{Budget, Holding, Ticket, age_cut};

#[test]
fn admission_by_hand() {
    let mut budget = Budget::new(100);
    let first = budget.try_admit(20, 60).unwrap();
    let second = budget.try_admit(20, 60).unwrap();
    assert_eq!((budget.grant(first).unwrap().held, budget.grant(second).unwrap().held), (60, 40));
    assert_eq!(budget.free(), 0);
    let refused = budget.try_admit(30, 30);
    assert_eq!(refused, Err(Error::Refused { needed: 30, available: 0, capacity: 100 }));
    // 40 and 20 can be spared.
    assert_eq!(budget.shortfall(30), Ok(30));
    assert_eq!(budget.shortfall(61), Err(Error::Refused { needed: 61, available: 60, capacity: 100 }));
    assert_eq!((budget.shrink(first, 25), budget.shrink(second, 99)), (Ok(25), Ok(20)));
    assert_eq!(budget.grow(first, 99), Ok(25), "up to what it wants");
    assert_eq!(budget.release(first), Ok(()));
    assert!(matches!(budget.release(first), Err(Error::StaleRequest { .. })));
    let third = budget.try_admit(1, 1).unwrap();
    assert!(budget.grant(first).is_err() && budget.grant(third).is_ok(), "the place is another's now");
}

#[test]
fn one_age_for_all() {
    // Ages 0, 1, 2 and free.
    let holdings = [
        Holding { ages: &[5, 4, 1, 2], spare: 9 },
        Holding { ages: &[5, 0, 6, 0], spare: 9 },
        Holding { ages: &[0, 9, 9, 9], spare: 3 },
    ];
    for (needed, expected) in [
        (0, Some((4, vec![0, 0, 0]))),
        (1, Some((3, vec![1, 0, 0]))),
        (5, Some((3, vec![2, 0, 3]))),
        (6, Some((2, vec![3, 0, 3]))),
        (12, Some((2, vec![3, 6, 3]))),
        (14, Some((1, vec![5, 6, 3]))),
        (21, Some((0, vec![9, 9, 3]))),
        (22, None),
    ] {
        assert_eq!(age_cut(needed, &holdings), expected, "{needed} pages");
    }
    assert_eq!(age_cut(0, &[]), Some((0, vec![])));
    assert_eq!(age_cut(1, &[]), None);
}

/// 10⁴ arrivals, departures and changes: what is held never passes the pool, and no one falls below its floor.
#[test]
fn random_arrivals() {
    let mut rng = Rng::new(1);
    let mut budget = Budget::new(1000);
    let mut live: Vec<Ticket> = Vec::new();
    for event in 0..10_000 {
        let pick = rng.below(live.len().max(1));
        match (rng.below(5), live.get(pick).copied()) {
            (0 | 1, _) => {
                let floor = 1 + rng.below(200);
                let before: Vec<_> = budget.grants().collect();
                match budget.try_admit(floor, floor + rng.below(300)) {
                    Ok(ticket) => live.push(ticket),
                    Err(error) => {
                        assert!(matches!(error, Error::Refused { .. }), "event {event}: {error}");
                        assert_eq!(budget.grants().collect::<Vec<_>>(), before, "event {event}");
                    }
                }
            }
            (2, Some(ticket)) => {
                budget.release(ticket).unwrap();
                live.swap_remove(pick);
            }
            (3, Some(ticket)) => drop(budget.shrink(ticket, rng.below(100)).unwrap()),
            (4, Some(ticket)) => drop(budget.grow(ticket, rng.below(100)).unwrap()),
            _ => {}
        }
        let held: usize = budget.grants().map(|(_, grant)| grant.held).sum();
        assert_eq!(held + budget.free(), 1000, "event {event}");
        assert!(
            budget.grants().all(|(_, grant)| (grant.floor..=grant.wanted).contains(&grant.held)),
            "event {event}"
        );
        assert_eq!(budget.grants().count(), live.len(), "event {event}");
    }
}
