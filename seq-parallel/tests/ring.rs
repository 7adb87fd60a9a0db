//! Ring attention equals attention, whatever the ranks, placement, mask, heads, lengths and direction.

use attention::{Element, Mask};
use half::{bf16, f16};
use seq_parallel::placement::{Placement, Shards};
use seq_parallel::ring::{Direction, RingPlan};
use seq_parallel::testing::{Contents, on_ranks, sequences, spec};
use seq_parallel::{Error, Output};

const RANKS: [usize; 8] = [1, 2, 3, 4, 5, 7, 8, 16];

fn run<E: Element>(contents: &Contents<E>, shards: &Shards, direction: Direction) -> Vec<Output> {
    let plan = RingPlan::new(contents.spec, shards.clone()).unwrap().passing(direction);
    on_ranks(
        shards.ranks(),
        |end| end,
        |rank, transport| {
            let rows = contents.rows(&shards.queries(rank), &plan.keys(rank));
            plan.fingerprint::<E, E>().agree(transport).unwrap();
            plan.run(rows.inputs(), transport).unwrap()
        },
    )
}

fn check<E: Element>(case: &str, contents: &Contents<E>, shards: &Shards, direction: Direction) -> f64 {
    let case = format!(
        "{case}, {} {:?}, {} ranks, {}, {direction:?}",
        contents.spec.shape,
        contents.spec.mask,
        shards.ranks(),
        shards.placement()
    );
    let queries: Vec<_> = (0..shards.ranks()).map(|rank| shards.queries(rank)).collect();
    contents.check(&case, &queries, &run(contents, shards, direction))
}

/// Every rank count and placement on these contents; the direction alternates.
fn check_all<E: Element>(
    case: &str,
    lens: &[(usize, usize)],
    heads: (usize, usize),
    dim: usize,
    mask: Mask,
    seed: u64,
) {
    let contents = Contents::<E>::new(spec(heads.0, heads.1, dim, mask), sequences(lens), seed);
    for (i, ranks) in RANKS.into_iter().enumerate() {
        for (j, placement) in Placement::ALL.into_iter().enumerate() {
            let cached = Placement::ALL[(i + seed as usize) % 3];
            let shards =
                Shards::new(contents.sequences.clone(), placement, ranks).unwrap().with_cached(cached);
            let direction =
                if (i + j + seed as usize).is_multiple_of(3) { Direction::PassQ } else { Direction::PassKv };
            check(case, &contents, &shards, direction);
        }
    }
}

#[test]
fn every_rank_count_placement_and_mask() {
    let window = |window, sinks| Mask::SlidingWindow { window, sinks };
    let masks = [Mask::Causal, Mask::Full, window(17, 0), window(9, 3), Mask::Prefix { prefix: 20 }];
    for (seed, mask) in masks.into_iter().enumerate() {
        check_all::<bf16>("one sequence", &[(0, 67)], (2, 1), 64, mask, seed as u64);
        check_all::<f16>("packed", &[(0, 31), (0, 0), (0, 1), (0, 48)], (2, 2), 32, mask, 10 + seed as u64);
        check_all::<f32>(
            "prefixes",
            &[(40, 20), (1, 13), (0, 7), (25, 1)],
            (3, 1),
            32,
            mask,
            20 + seed as u64,
        );
    }
}

#[test]
fn every_head_ratio() {
    for (seed, heads) in [(1, 1), (4, 1), (8, 1), (16, 1), (6, 2), (7, 1), (10, 2)].into_iter().enumerate() {
        check_all::<bf16>(
            "head ratios",
            &[(0, 40)],
            heads,
            [64, 128][seed % 2],
            Mask::Causal,
            30 + seed as u64,
        );
    }
}

#[test]
fn every_length_edge() {
    for ranks in RANKS {
        for len in [0, 1, ranks - 1, ranks, ranks + 1, 2 * ranks - 1, 2 * ranks, 2 * ranks + 1] {
            let contents = Contents::<f32>::new(spec(2, 1, 16, Mask::Causal), sequences(&[(0, len)]), 40);
            for placement in Placement::ALL {
                let shards = Shards::new(contents.sequences.clone(), placement, ranks).unwrap();
                check(&format!("{len} tokens"), &contents, &shards, Direction::PassKv);
            }
        }
    }
}

#[test]
fn published_lengths() {
    // Lengths and packed lengths of other people's tests, which break what assumes multiples of 2P or of a tile.
    for (seed, lens) in
        [vec![(0, 3816)], vec![(0, 128), (0, 1120), (0, 2992)], vec![(0, 120), (0, 1128), (0, 2984)]]
            .into_iter()
            .enumerate()
    {
        let contents =
            Contents::<bf16>::new(spec(1, 1, 16, Mask::Causal), sequences(&lens), 50 + seed as u64);
        let shards = Shards::new(contents.sequences.clone(), Placement::Zigzag, [4, 8, 3][seed]).unwrap();
        check("published lengths", &contents, &shards, Direction::PassKv);
    }
}

/// The same at their published size, which take minutes: `EXHAUSTIVE=1`.
#[test]
fn published_lengths_at_full_size() {
    if std::env::var_os("EXHAUSTIVE").is_none_or(|value| value != "1") {
        return;
    }
    let packed = |cumulative: &[usize]| -> Vec<(usize, usize)> {
        cumulative.windows(2).map(|pair| (0, pair[1] - pair[0])).collect()
    };
    for (seed, (lens, ranks)) in [
        (vec![(0, 3816)], 4),
        (vec![(0, 3824)], 8),
        (vec![(0, 4096)], 16),
        (packed(&[0, 128, 1248, 4240]), 8),
        (packed(&[0, 120, 1248, 4232]), 3),
        (vec![(8192, 1000)], 4),
    ]
    .into_iter()
    .enumerate()
    {
        let contents =
            Contents::<bf16>::new(spec(5, 5, 128, Mask::Causal), sequences(&lens), 100 + seed as u64);
        let shards = Shards::new(contents.sequences.clone(), Placement::Zigzag, ranks).unwrap();
        for direction in [Direction::PassKv, Direction::PassQ] {
            check("published sizes", &contents, &shards, direction);
        }
    }
}

#[test]
fn prefixes_of_every_size() {
    for (seed, (cached, new)) in [(0, 64), (1, 1), (127, 64), (1000, 1), (1000, 64)].into_iter().enumerate() {
        let contents = Contents::<bf16>::new(
            spec(4, 2, 64, Mask::Causal),
            sequences(&[(cached, new)]),
            60 + seed as u64,
        );
        for direction in [Direction::PassKv, Direction::PassQ] {
            for cached in Placement::ALL {
                let shards = Shards::new(contents.sequences.clone(), Placement::Zigzag, 4)
                    .unwrap()
                    .with_cached(cached);
                check("prefix", &contents, &shards, direction);
            }
        }
    }
}

#[test]
fn uneven_ranks() {
    let contents = Contents::<bf16>::new(spec(4, 2, 32, Mask::Causal), sequences(&[(20, 61), (0, 30)]), 70);
    for shares in [vec![1, 3, 2], vec![0, 1, 5, 1], vec![2, 0]] {
        for placement in Placement::ALL {
            let shards = Shards::uneven(contents.sequences.clone(), placement, &shares).unwrap();
            for direction in [Direction::PassKv, Direction::PassQ] {
                check(&format!("shares {shares:?}"), &contents, &shards, direction);
            }
        }
    }
}

/// f32 partial states: the error does not grow with the ring.
#[test]
fn the_error_does_not_depend_on_the_ranks() {
    let contents = Contents::<bf16>::new(spec(2, 1, 64, Mask::Causal), sequences(&[(0, 1024)]), 80);
    let rms = |ranks| {
        let shards = Shards::new(contents.sequences.clone(), Placement::Zigzag, ranks).unwrap();
        let outputs = run(&contents, &shards, Direction::PassKv);
        let mut square = 0.0;
        for (rank, output) in outputs.iter().enumerate() {
            for (row, token) in shards.packed(rank).into_iter().enumerate() {
                for i in 0..2 * 64 {
                    square +=
                        (f64::from(output.out[row * 128 + i]) - contents.oracle.out[token * 128 + i]).powi(2);
                }
            }
        }
        (square / contents.oracle.out.len() as f64).sqrt()
    };
    let (one, sixteen) = (rms(1), rms(16));
    assert!(sixteen <= 1.2 * one, "rms error {sixteen:e} on 16 ranks, {one:e} on 1");
}

#[test]
fn runs_are_bitwise_equal() {
    let contents = Contents::<bf16>::new(spec(4, 2, 32, Mask::Causal), sequences(&[(0, 100)]), 90);
    let shards = Shards::new(contents.sequences.clone(), Placement::Zigzag, 4).unwrap();
    for direction in [Direction::PassKv, Direction::PassQ] {
        assert_eq!(run(&contents, &shards, direction), run(&contents, &shards, direction), "{direction:?}");
    }
}

/// A ring of bf16 keys against queries in f32, as an engine has them: types need not agree.
#[test]
fn what_a_ring_refuses() {
    let contents = Contents::<f32>::new(spec(2, 1, 16, Mask::Causal), sequences(&[(0, 10)]), 95);
    let shards = Shards::new(contents.sequences.clone(), Placement::Contiguous, 2).unwrap();
    let plan = RingPlan::new(contents.spec, shards.clone()).unwrap();
    let rows = contents.rows(&shards.queries(0), &shards.keys(0));
    let named = |result: Result<Output, Error>, name: &str| match result {
        Err(Error::Argument { argument, .. }) => assert_eq!(argument, name),
        other => panic!("{name}: {other:?}"),
    };
    on_ranks(
        1,
        |end| end,
        |_, transport| {
            named(plan.run(rows.inputs(), transport), "transport");
            let mut short = rows.inputs();
            short.k = &short.k[1..];
            named(plan.run(short, transport), "k");
        },
    );
    assert!(matches!(Shards::new([], Placement::Zigzag, 0), Err(Error::Argument { argument: "ranks", .. })));
    assert!(matches!(
        Shards::uneven([], Placement::Zigzag, &[0, 0]),
        Err(Error::Argument { argument: "shares", .. })
    ));
    let tiny = Shards::new(sequences(&[(0, 3)]), Placement::Zigzag, 4).unwrap();
    assert!(matches!(tiny.require_every_rank(), Err(Error::Argument { argument: "sequences", .. })));
}
