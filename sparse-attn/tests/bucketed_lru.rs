//! Replacement: bucketed LRU by hand, against exact LRU and Belady's optimum, and its invariants.

use std::collections::HashSet;

use attention::testing::Rng;
use sparse_attn::Error;
use sparse_attn::bucketed_lru::{BUCKETS, BucketedLru, Miss};
use sparse_attn::metadata::{Metadata, NONE, SlotScan, TwoLevel};
use sparse_attn::replacement::{Belady, ExactLru, Random, Replacement, hit_rate};
use sparse_attn::select::top_k;
use sparse_attn::trace::{Drift, Trace};

fn lru(slots: usize) -> BucketedLru {
    BucketedLru::new(slots, BUCKETS).unwrap()
}

#[test]
fn a_few_steps_by_hand() {
    let mut lru = lru(4);
    let miss = |place, page, slot, evicted| Miss { place, page, slot, evicted };
    let step = lru.resolve(&[7, 3]).unwrap();
    assert_eq!((step.slots.as_slice(), step.hits()), (&[0, 1][..], 0));
    assert_eq!(step.misses, [miss(0, 7, 0, NONE), miss(1, 3, 1, NONE)]);
    let step = lru.resolve(&[3, NONE, 9]).unwrap();
    assert_eq!((step.slots.as_slice(), step.hits()), (&[1, NONE, 2][..], 1));
    assert_eq!(lru.ages()[..3], [1, 0, 0]);
    // 7 is oldest, but the free slot goes before it.
    assert_eq!(lru.resolve(&[1]).unwrap().misses, [miss(0, 1, 3, NONE)]);
    assert_eq!(lru.resolve(&[2]).unwrap().misses, [miss(0, 2, 0, 7)]);
    // 3 and 9 are of one age: the first slot goes.
    assert_eq!(lru.resolve(&[4]).unwrap().misses, [miss(0, 4, 1, 3)]);
    assert_eq!(lru.histogram()[..5], [1, 1, 1, 1, 0]);
    assert_eq!((lru.working_set(2), lru.working_set(12)), (2, 4));
}

#[test]
fn what_a_step_refuses_changes_nothing() {
    let mut lru = lru(3);
    lru.resolve(&[1, 2]).unwrap();
    let before = format!("{lru:?}");
    for selected in [&[5, 6, 7, 8][..], &[5, 1, 5]] {
        let refused = lru.resolve(selected);
        assert!(matches!(refused, Err(Error::Argument { argument: "selected", .. })), "{refused:?}");
        assert_eq!(format!("{lru:?}"), before, "{selected:?}");
    }
    for buckets in [0, 1, 255] {
        assert!(BucketedLru::<SlotScan>::new(4, buckets).is_err());
    }
}

/// A cold cache fills from the first slot on; the same selection again is a fixed point.
#[test]
fn replays_are_fixed_points() {
    for selected in [1u32, 31, 32, 33, 63, 64, 65, 128, 2048] {
        for ratio in [2, 5] {
            let mut lru = lru(ratio * selected as usize);
            let pages: Vec<u32> = (0..selected).map(|i| i * 7 + 3).collect();
            let first = lru.resolve(&pages).unwrap();
            assert_eq!(first.slots, (0..selected).collect::<Vec<_>>(), "{selected} × {ratio}");
            assert_eq!(first.misses.len(), selected as usize);
            let owners = lru.metadata().clone();
            let again = lru.resolve(&pages).unwrap();
            assert_eq!((again.slots, again.misses.len()), (first.slots, 0), "{selected} × {ratio}");
            assert_eq!(*lru.metadata(), owners);
        }
    }
}

/// What goes, by age, when more buckets than steps tell all ages apart.
#[test]
fn victims_are_exactly_the_oldest() {
    let mut rng = Rng::new(4);
    let mut lru = lru(40);
    let mut used = std::collections::HashMap::new();
    for step in 0..60u32 {
        let mut pages: Vec<u32> = (0..60).collect();
        (0..60).for_each(|i| pages.swap(i, i + rng.below(60 - i)));
        pages.truncate(12);
        let resident: Vec<u32> = lru.residents().map(|(_, page)| page).collect();
        let misses = lru.resolve(&pages).unwrap().misses;
        let evicted: Vec<u32> = misses.iter().map(|miss| miss.evicted).filter(|&page| page != NONE).collect();
        let stay = resident.iter().filter(|page| !evicted.contains(page) && !pages.contains(page));
        let youngest_gone = evicted.iter().map(|page| used[page]).max();
        assert!(stay.clone().all(|page| Some(used[page]) >= youngest_gone), "step {step}");
        pages.iter().for_each(|&page| _ = used.insert(page, step));
    }
}

fn drift(correlation: f64, seed: u64) -> Trace {
    Drift { pages: 4096, selected: 64, steps: 400, correlation, seed }.trace()
}

#[test]
fn sixty_four_buckets_are_as_good_as_exact() {
    // How far exact LRU stays behind the optimum with room for 2 to 6 steps.
    for (correlation, seed, behind) in
        [(0.8, 1, 0.09..=0.14), (0.95, 2, 0.035..=0.055), (0.99, 3, 0.002..=0.016)]
    {
        let trace = drift(correlation, seed);
        let steps = || trace.stream(0);
        let mut last = 0.0;
        for ratio in 1..=6 {
            let slots = 64 * ratio;
            let name = format!("ρ {correlation}, seed {seed}, {slots} slots");
            let exact = hit_rate(&mut ExactLru::new(slots), steps()).unwrap();
            let bucketed = |buckets| {
                hit_rate(&mut BucketedLru::<SlotScan>::new(slots, buckets).unwrap(), steps()).unwrap()
            };
            let (fine, coarse) = (bucketed(64), bucketed(16));
            let best = hit_rate(&mut Belady::new(slots, steps()), steps()).unwrap();
            let random = hit_rate(&mut Random::new(slots, 5), steps()).unwrap();
            println!(
                "{name}: {fine:.4}, exact {exact:.4}, 16 buckets {coarse:.4}, Belady {best:.4}, random {random:.4}"
            );
            assert!((fine - exact).abs() <= 0.003, "{name}: {fine}, exact {exact}");
            assert!((coarse - exact).abs() <= 0.012, "{name}: 16 buckets {coarse}, exact {exact}");
            assert!(best >= fine && best >= exact && best >= random, "{name}: Belady {best}");
            assert!(fine >= last, "{name}: fewer hits than with fewer slots");
            assert!(ratio == 1 || behind.contains(&(best - exact)), "{name}: {} behind Belady", best - exact);
            last = fine;
            if ratio == 1 {
                // Without room for more than one step, hits are what neighbouring selections share.
                let all: Vec<HashSet<u32>> = steps().map(|pages| pages.iter().copied().collect()).collect();
                let shared: usize = all.windows(2).map(|pair| pair[0].intersection(&pair[1]).count()).sum();
                let overlap = shared as f64 / (64 * all.len()) as f64;
                assert!((overlap - fine).abs() <= 0.005, "{name}: {fine}, overlap {overlap}");
            }
        }
    }
}

/// Most of what buffering gains, its first multiple gains; SPIN finds saturation at four.
#[test]
fn the_gain_of_slots_saturates() {
    for (correlation, seed) in [(0.8, 1), (0.95, 2), (0.99, 3)] {
        let trace = drift(correlation, seed);
        let rate = |ratio: usize| hit_rate(&mut lru(64 * ratio), trace.stream(0)).unwrap();
        let (first, last) = (rate(2) - rate(1), rate(6) - rate(5));
        assert!(first >= 0.05 && last <= 0.02, "ρ {correlation}: {first} at first, {last} at last");
    }
}

/// One page more than slots, round and round: the worst case of LRU. From 64 slots on the oldest bucket is a tie, and ties
/// by slot keep most of the pages.
#[test]
fn cyclic_scans() {
    for slots in [16usize, 63, 64, 80] {
        let pages = slots as u32 + 1;
        let steps: Vec<[u32; 1]> = (0..400 * pages).map(|step| [step % pages]).collect();
        let steps = || steps.iter().map(|step| &step[..]);
        let rate = hit_rate(&mut lru(slots), steps()).unwrap();
        let exact = hit_rate(&mut ExactLru::new(slots), steps()).unwrap();
        let best = hit_rate(&mut Belady::new(slots, steps()), steps()).unwrap();
        println!("{slots} slots: {rate:.3}, exact {exact:.3}, Belady {best:.3}");
        assert_eq!(exact, 0.0, "{slots} slots");
        let ideal = (slots - 1) as f64 / slots as f64;
        assert!((best - ideal).abs() < 0.01, "{slots} slots: Belady {best}, not {ideal}");
        if slots < 64 {
            assert_eq!(rate, 0.0, "{slots} slots");
        } else {
            assert!(rate > 0.3 && rate <= best, "{slots} slots: {rate}");
        }
    }
}

/// A query that turns away at one step misses much more there, and somewhat more for a while: no reason to change a budget.
#[test]
fn a_turn_of_the_query_is_a_spike() {
    const DIM: usize = 64;
    let mut rng = Rng::new(6);
    let mut normal = |count: usize| (0..count).map(|_| rng.normal() as f32).collect::<Vec<f32>>();
    let keys = normal(4096 * DIM);
    let mut query = normal(DIM);
    let mut lru = lru(6 * 64);
    let mut misses = Vec::new();
    for step in 0..400 {
        let (keep, renew) = if step == 300 { (0.0, 1.0) } else { (0.95, (1.0f32 - 0.95 * 0.95).sqrt()) };
        let noise = normal(DIM);
        query.iter_mut().zip(noise).for_each(|(q, noise)| *q = keep * *q + renew * noise);
        let score = |key: &[f32]| key.iter().zip(&query).map(|(k, q)| k * q).sum::<f32>();
        let scores: Vec<f32> = keys.chunks_exact(DIM).map(score).collect();
        misses.push(lru.resolve(&top_k(&scores, 64)).unwrap().misses.len() as f64);
    }
    let mean = |steps: std::ops::Range<usize>| misses[steps.clone()].iter().sum::<f64>() / steps.len() as f64;
    let (before, at, after) = (mean(200..300), misses[300], mean(301..311));
    println!("misses: {before:.1} before, {at} at the turn, {after:.1} in the ten steps after");
    assert!(at >= 4.0 * before, "{at} misses at the turn, {before} before");
    assert!((1.2 * before..3.0 * before).contains(&after), "{after} misses after, {before} before");
}

/// 10⁵ operations of all kinds: the tables agree after each, and neither a selected page nor one in flight is lost.
#[test]
fn invariants_hold_under_random_operations() {
    fn run<M: Metadata>(seed: u64, operations: usize) {
        let mut rng = Rng::new(seed);
        let mut lru = BucketedLru::<M>::new(24, 16).unwrap();
        let mut in_flight: HashSet<u32> = HashSet::new();
        let mut next_page = 1000;
        for operation in 0..operations {
            let name = format!("seed {seed}, operation {operation}");
            let mut pages: Vec<u32> = (0..rng.below(9)).map(|_| rng.below(80) as u32).collect();
            pages.sort_unstable();
            pages.dedup();
            match rng.below(12) {
                0 => {
                    let slots = 16 + rng.below(24);
                    let kept = lru.residents().count().min(slots);
                    let ages: Vec<u8> = lru.ages().to_vec();
                    let owners: Vec<(usize, u32)> = lru.residents().collect();
                    let moves = lru.resize(slots).unwrap();
                    assert_eq!((moves.len(), lru.slots()), (kept, slots), "{name}");
                    for &(from, to) in &moves {
                        let page = owners.iter().find(|owner| owner.0 == from).unwrap().1;
                        assert_eq!((lru.metadata().owner(to), lru.ages()[to]), (page, ages[from]), "{name}");
                    }
                    // What went is not younger than what stayed, apart from pages in flight.
                    let stayed = |slot: &usize| moves.iter().any(|(from, _)| from == slot);
                    let gone = owners.iter().filter(|(slot, _)| !stayed(slot)).map(|(slot, _)| ages[*slot]);
                    let oldest = owners
                        .iter()
                        .filter(|(slot, page)| stayed(slot) && !in_flight.contains(page))
                        .map(|(slot, _)| ages[*slot])
                        .max();
                    assert!(gone.min() >= oldest || lru.residents().count() == owners.len(), "{name}");
                }
                1 if in_flight.len() < 6 => {
                    next_page += 1;
                    lru.insert_dirty(next_page).unwrap();
                    in_flight.insert(next_page);
                }
                2 | 3 => {
                    let dirty: Vec<(usize, u32)> = lru.dirty().collect();
                    for (slot, page) in dirty {
                        assert!(in_flight.remove(&page), "{name}: page {page} was not in flight");
                        lru.written_back(slot);
                    }
                }
                4 => drop(lru.prefetch(&pages)),
                _ => {
                    let before: HashSet<u32> = lru.residents().map(|(_, page)| page).collect();
                    let step = lru.resolve(&pages).unwrap();
                    let misses: Vec<u32> = step.misses.iter().map(|miss| miss.page).collect();
                    for (&page, &slot) in pages.iter().zip(&step.slots) {
                        assert_eq!(lru.metadata().owner(slot as usize), page, "{name}");
                        assert_eq!(lru.ages()[slot as usize], 0, "{name}");
                        assert_ne!(before.contains(&page), misses.contains(&page), "{name}: page {page}");
                    }
                    assert!(step.misses.iter().all(|miss| !pages.contains(&miss.evicted)), "{name}");
                }
            }
            assert_eq!(lru.check(), None, "{name}");
            let resident: HashSet<u32> = lru.residents().map(|(_, page)| page).collect();
            assert!(in_flight.is_subset(&resident), "{name}: lost a page in flight");
            assert_eq!(lru.histogram().iter().sum::<usize>(), lru.slots(), "{name}");
        }
    }
    run::<SlotScan>(1, 100_000);
    run::<TwoLevel>(2, 20_000);
}

/// Both tables make the same cache.
#[test]
fn tables_do_not_change_decisions() {
    let trace = Drift { pages: 600, selected: 20, steps: 300, correlation: 0.9, seed: 8 }.trace();
    let (mut scan, mut two) = (lru(50), BucketedLru::<TwoLevel>::new(50, BUCKETS).unwrap());
    for step in trace.stream(0) {
        assert_eq!(scan.resolve(step).unwrap(), two.resolve(step).unwrap());
        assert_eq!(scan.ages(), two.ages());
    }
    assert!(scan.step(&[1]).is_ok());
}
