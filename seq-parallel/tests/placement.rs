//! Which rank owns which tokens: published placements, and maps both ways.

use proptest::prelude::*;
use seq_parallel::placement::{Placement, Segment, Sequence, Shards};

fn positions(segments: &[Segment], sequence: usize) -> Vec<usize> {
    segments.iter().filter(|segment| segment.sequence == sequence).flat_map(Segment::positions).collect()
}

/// The examples in the documentation of Transformer Engine and in PyTorch's tests.
#[test]
fn published_placements() {
    type Case<'a> = (&'a str, &'a [usize], Placement, usize, &'a [&'a [&'a [usize]]]);
    let cases: &[Case<'_>] = &[
        ("TE, 12 tokens", &[12], Placement::Zigzag, 2, &[&[&[0, 1, 2, 9, 10, 11]], &[&[3, 4, 5, 6, 7, 8]]]),
        (
            "TE, packed",
            &[8, 4],
            Placement::Zigzag,
            2,
            &[&[&[0, 1, 6, 7], &[0, 3]], &[&[2, 3, 4, 5], &[1, 2]]],
        ),
        ("PyTorch", &[8], Placement::Zigzag, 4, &[&[&[0, 7]], &[&[1, 6]], &[&[2, 5]], &[&[3, 4]]]),
        ("striped", &[7], Placement::Striped, 3, &[&[&[0, 3, 6]], &[&[1, 4]], &[&[2, 5]]]),
        ("contiguous", &[7], Placement::Contiguous, 3, &[&[&[0, 1]], &[&[2, 3]], &[&[4, 5, 6]]]),
        ("shorter than 2P", &[3], Placement::Zigzag, 2, &[&[&[2]], &[&[0, 1]]]),
        ("one token", &[1], Placement::Striped, 2, &[&[&[0]], &[&[]]]),
    ];
    for (case, lens, placement, ranks, expected) in cases {
        let shards = Shards::new(lens.iter().map(|&len| Sequence::new(len)), *placement, *ranks).unwrap();
        for (rank, expected) in expected.iter().enumerate() {
            for (sequence, expected) in expected.iter().enumerate() {
                assert_eq!(positions(&shards.queries(rank), sequence), *expected, "{case}, rank {rank}");
            }
        }
    }
}

#[test]
fn cached_tokens_come_first_and_new_ones_after_the_prefix() {
    let shards = Shards::new([Sequence { cached: 5, new: 4 }], Placement::Zigzag, 2).unwrap();
    assert_eq!(positions(&shards.queries(0), 0), [5, 8]);
    assert_eq!(positions(&shards.keys(0), 0), [0, 1, 5, 8]);
    assert_eq!(positions(&shards.keys(1), 0), [2, 3, 4, 6, 7]);
    let striped = shards.with_cached(Placement::Striped);
    assert_eq!(positions(&striped.keys(0), 0), [0, 2, 4, 5, 8]);
    assert_eq!(striped.locate_key(0, 3), Some((1, 1)));
    assert_eq!((striped.locate_query(0, 3), striped.locate_query(0, 8)), (None, Some((0, 1))));
    assert_eq!(striped.locate_key(1, 0), None);
}

#[test]
fn shares_decide_how_much() {
    for placement in Placement::ALL {
        let shards = Shards::uneven([Sequence::new(600)], placement, &[1, 0, 3, 2]).unwrap();
        let tokens: Vec<_> = (0..4).map(|rank| shards.query_tokens(rank)).collect();
        assert_eq!(tokens, [100, 0, 300, 200], "{placement}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Every token has one owner, at the row where its owner's segments have it, and chunks differ by at most one token each.
    #[test]
    fn maps_are_inverses(
        lens in prop::collection::vec((0usize..30, 0usize..40), 0..4),
        placement in prop::sample::select(Placement::ALL.to_vec()),
        cached_placement in prop::sample::select(Placement::ALL.to_vec()),
        ranks in 1usize..9,
    ) {
        let sequences: Vec<_> = lens.iter().map(|&(cached, new)| Sequence { cached, new }).collect();
        let shards = Shards::new(sequences.clone(), placement, ranks).unwrap().with_cached(cached_placement);
        for (i, sequence) in sequences.iter().enumerate() {
            for position in 0..sequence.kv_len() {
                let (rank, row) = shards.locate_key(i, position).expect("an owner");
                let owned: Vec<(usize, usize)> = shards
                    .keys(rank)
                    .iter()
                    .flat_map(|segment| segment.positions().map(move |position| (segment.sequence, position)))
                    .collect();
                prop_assert_eq!(owned[row], (i, position));
                let query = shards.locate_query(i, position);
                prop_assert_eq!(query.is_some(), position >= sequence.cached);
            }
        }
        let tokens: Vec<usize> = (0..shards.new_tokens()).collect();
        let mut back = vec![usize::MAX; tokens.len()];
        let mut keys = 0;
        for rank in 0..ranks {
            let own = shards.take(rank, &tokens, 1).unwrap();
            prop_assert_eq!(own.len(), shards.query_tokens(rank));
            shards.put(rank, &own, 1, &mut back).unwrap();
            keys += shards.key_tokens(rank);
            for sequence in &sequences {
                let even = Shards::new([*sequence], placement, ranks).unwrap();
                let (least, slack) = (sequence.new / ranks, if placement == Placement::Zigzag { 2 } else { 1 });
                prop_assert!((least.saturating_sub(1)..=least + slack).contains(&even.query_tokens(rank)));
            }
        }
        prop_assert_eq!(back, tokens);
        prop_assert_eq!(keys, sequences.iter().map(Sequence::kv_len).sum::<usize>());
    }
}

#[test]
fn what_a_placement_refuses() {
    let one = || [Sequence::new(8)];
    for (named, shards) in [
        ("ranks", Shards::new(one(), Placement::Zigzag, 0)),
        ("ranks", Shards::uneven(one(), Placement::Zigzag, &[])),
        ("shares", Shards::uneven(one(), Placement::Striped, &[0, 0])),
        ("shares", Shards::uneven(one(), Placement::Striped, &[1, 65])),
        ("sequences", Shards::new([Sequence::new(usize::MAX)], Placement::Zigzag, 2)),
        ("sequences", Shards::new([Sequence { cached: usize::MAX, new: 1 }], Placement::Zigzag, 2)),
    ] {
        let message = shards.unwrap_err().to_string();
        assert!(message.contains(&format!("`{named}`")), "{named}: {message}");
    }
    let shards = Shards::new(one(), Placement::Zigzag, 2).unwrap();
    assert!(shards.take(0, &[0; 7], 1).is_err() && shards.put(0, &[0; 3], 1, &mut [0; 8]).is_err());
    assert!(shards.require_every_rank().is_ok());
}
