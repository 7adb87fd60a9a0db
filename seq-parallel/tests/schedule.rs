//! Schedules: work counted to the pair, balance, and no work for what is masked.

use std::time::{Duration, Instant};

use attention::Mask;
use proptest::prelude::*;
use seq_parallel::placement::{Placement, Sequence, Shards};
use seq_parallel::schedule::{TileMask, Work, source, tiles};

fn work(mask: Mask, len: usize, placement: Placement, ranks: usize) -> Work {
    Work::of(&mask, &Shards::new([Sequence::new(len)], placement, ranks).unwrap())
}

/// Ideal time over lockstep time: contiguous P / (2P - 1) (with chunks that fill, in the limit), zigzag 1, striped (Pc + 1) / (P(c + 1)).
#[test]
fn balance_is_what_the_formulas_say() {
    for ranks in [1, 2, 4, 8, 16, 64, 128] {
        let chunk = if ranks < 64 { 8192 } else { 1024 };
        let (p, c) = (ranks as f64, chunk as f64);
        let len = ranks * chunk;
        let pairs = len as u64 * (len as u64 + 1) / 2;
        for placement in Placement::ALL {
            let work = work(Mask::Causal, len, placement, ranks);
            assert_eq!(work.total(), pairs, "{placement}, {ranks} ranks");
            let expected = match placement {
                // The first step is a triangle, every other a square: (c(c+1)/2 + (P-1)c²) per rank in lockstep.
                Placement::Contiguous => (p * c + 1.0) / ((2.0 * p - 1.0) * c + 1.0),
                Placement::Zigzag => 1.0,
                Placement::Striped => (p * c + 1.0) / (p * (c + 1.0)),
            };
            let found = work.efficiency();
            assert!((found - expected).abs() < 1e-12, "{placement}, {ranks} ranks: {found}, not {expected}");
        }
    }
    // The table of the literature, to its two decimals.
    for (ranks, percent) in [(2, 66.67), (4, 57.14), (8, 53.33), (16, 51.61), (64, 50.39), (128, 50.20)] {
        let found = 100.0 * work(Mask::Causal, ranks * 8192, Placement::Contiguous, ranks).efficiency();
        assert!((found - percent).abs() < 0.01, "{ranks} ranks: {found} %, not {percent} %");
    }
}

#[test]
fn zigzag_work_is_the_same_on_every_rank() {
    for ranks in [2, 3, 5, 8, 16] {
        let work = work(Mask::Causal, 2 * ranks * 37, Placement::Zigzag, ranks);
        assert!(work.per_rank.iter().all(|&pairs| pairs == work.per_rank[0]), "{:?}", work.per_rank);
    }
}

/// Step i of zigzag: all queries against the first half of the keys, or the second half of the queries against all keys; unmasked.
#[test]
fn zigzag_steps_are_rectangles() {
    let (ranks, half) = (4, 10);
    let shards = Shards::new([Sequence::new(2 * ranks * half)], Placement::Zigzag, ranks).unwrap();
    for rank in 0..ranks {
        for step in 1..ranks {
            let visitor = source(rank, step, ranks);
            let tiles = tiles(&Mask::Causal, &shards.queries(rank), &shards.keys(visitor));
            assert!(
                tiles.iter().all(|tile| tile.mask == TileMask::Full),
                "rank {rank}, step {step}: {tiles:?}"
            );
            let pairs: u64 = tiles.iter().map(|tile| tile.pairs(&Mask::Causal)).sum();
            assert_eq!(pairs, (2 * half * half) as u64);
            for tile in &tiles {
                match step <= rank {
                    true => assert!(tile.kv.end <= half, "the first half of the keys: {tile:?}"),
                    false => assert!(tile.q.start >= half, "the second half of the queries: {tile:?}"),
                }
            }
        }
    }
}

#[test]
fn what_is_masked_is_no_tile() {
    let shards = Shards::new([Sequence::new(80)], Placement::Contiguous, 4).unwrap();
    for rank in 0..4 {
        for step in 0..4 {
            let tiles = tiles(&Mask::Causal, &shards.queries(rank), &shards.keys(source(rank, step, 4)));
            let expected = match step {
                0 => 1,
                _ => usize::from(step <= rank),
            };
            assert_eq!(tiles.len(), expected, "rank {rank}, step {step}: {tiles:?}");
        }
    }
    // A window that ends before the chunk of two ranks ago.
    let window = Mask::SlidingWindow { window: 20, sinks: 0 };
    assert!(tiles(&window, &shards.queries(3), &shards.keys(1)).is_empty());
    assert_eq!(tiles(&window, &shards.queries(3), &shards.keys(2)).len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Tiles show every visible pair once and no other: counted by the mask, token by token.
    #[test]
    fn tiles_are_the_mask(
        lens in prop::collection::vec((0usize..12, 0usize..14), 1..4),
        shares in prop::collection::vec(0usize..4, 1..5),
        placement in prop::sample::select(Placement::ALL.to_vec()),
        cached_placement in prop::sample::select(Placement::ALL.to_vec()),
        mask in prop::sample::select(vec![
            Mask::Causal,
            Mask::Full,
            Mask::SlidingWindow { window: 1, sinks: 0 },
            Mask::SlidingWindow { window: 5, sinks: 0 },
            Mask::SlidingWindow { window: 4, sinks: 3 },
            Mask::Prefix { prefix: 6 },
        ]),
    ) {
        let mut shares = shares;
        shares[0] = shares[0].max(1);
        let sequences: Vec<_> = lens.iter().map(|&(cached, new)| Sequence { cached, new }).collect();
        let shards = Shards::uneven(sequences, placement, &shares).unwrap().with_cached(cached_placement);
        for rank in 0..shards.ranks() {
            for visitor in 0..shards.ranks() {
                let (queries, keys) = (shards.queries(rank), shards.keys(visitor));
                let mut seen = std::collections::BTreeMap::<(usize, usize), usize>::new();
                for tile in tiles(&mask, &queries, &keys) {
                    prop_assert!(!tile.q.is_empty() && !tile.kv.is_empty());
                    let mut pairs = 0;
                    for (i, q) in tile.q.clone().enumerate() {
                        for key in tile.seen(&mask, i).keys() {
                            prop_assert!(tile.kv.start + key < tile.kv.end);
                            *seen.entry((q, tile.kv.start + key)).or_default() += 1;
                            pairs += 1;
                        }
                    }
                    prop_assert_eq!(pairs, tile.pairs(&mask));
                }
                let mut expected = std::collections::BTreeMap::new();
                for q in &queries {
                    for k in keys.iter().filter(|k| k.sequence == q.sequence) {
                        for (i, position) in q.positions().enumerate() {
                            for (j, key) in k.positions().enumerate() {
                                if mask.sees(position as i64, key as u64) {
                                    expected.insert((q.row + i, k.row + j), 1);
                                }
                            }
                        }
                    }
                }
                prop_assert_eq!(seen, expected);
            }
        }
    }
}

/// Planning is formulas: 1024 ranks and 256 packed sequences take no time to speak of. The bound is generous, and of five tries one has to
/// keep it: machines are busy.
#[test]
fn planning_for_a_thousand_ranks_is_quick() {
    let took: Vec<_> = (0..5).map(|_| plan_for_a_thousand_ranks()).collect();
    assert!(took.iter().any(|took| took.as_millis() < 500), "{took:?}");
}

fn plan_for_a_thousand_ranks() -> Duration {
    let start = Instant::now();
    let lens = (0..256).map(|i| Sequence { cached: i, new: 1000 + 37 * i });
    let shards = Shards::new(lens, Placement::Zigzag, 1024).unwrap();
    let spec = attention::AttentionSpec {
        shape: attention::HeadShape::new(8, 1, 128, 128).unwrap(),
        score: attention::Score::new(1.0).unwrap(),
        mask: Mask::Causal,
    };
    let plan = seq_parallel::ring::RingPlan::new(spec, shards).unwrap();
    let tiles = plan.tiles(700, 300);
    let took = start.elapsed();
    assert!(!tiles.is_empty() && plan.workspace_bytes(2, 2) > 0);
    took
}
