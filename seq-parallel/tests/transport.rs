//! Transports: bytes counted to the byte, collectives, overlap on a modelled clock.

mod common;

use attention::Mask;
use common::{Contents, on_ranks, sequences, spec};
use half::bf16;
use seq_parallel::Error;
use seq_parallel::fingerprint::Fingerprint;
use seq_parallel::placement::{Placement, Shards};
use seq_parallel::ring::{Direction, RingPlan};
use seq_parallel::transport::sim::{Link, Sim};
use seq_parallel::transport::{Buffer, Subgroup, Tag, Transport};
use seq_parallel::ulysses::UlyssesPlan;

/// The formulas of the literature: (P-1) · 2 · c · Hkv · D · e for pass-KV, (P-1) · c · Hq · D · e and the partial outputs for pass-Q,
/// (P-1)/P · c · (2 Hq + 2 Hkv) · D · e for Ulysses (plus our LSEs).
#[test]
fn rings_and_ulysses_send_what_the_formulas_say() {
    let (q_heads, kv_heads, dim, c) = (8, 4, 32, 24);
    for ranks in [1, 2, 4] {
        let contents =
            Contents::<f32>::new(spec(q_heads, kv_heads, dim, Mask::Causal), sequences(&[(0, ranks * c)]), 1);
        let shards = Shards::new(contents.sequences.clone(), Placement::Zigzag, ranks).unwrap();
        let (others, tokens) = (ranks - 1, c);
        let pass_kv = others * 2 * tokens * kv_heads * dim * 4;
        let pass_q = others * tokens * q_heads * dim * 4 + others * tokens * q_heads * (dim * 4 + 4);
        let ulysses = others * tokens * (2 * q_heads + 2 * kv_heads) * dim * 4 / ranks
            + others * tokens * q_heads * 4 / ranks;
        for (direction, expected) in [(Direction::PassKv, pass_kv), (Direction::PassQ, pass_q)] {
            let plan = RingPlan::new(contents.spec, shards.clone()).unwrap().passing(direction);
            on_ranks(
                ranks,
                |end| end,
                |rank, transport| {
                    let rows = contents.rows(&shards.queries(rank), &shards.keys(rank));
                    plan.run(rows.inputs(), transport).unwrap();
                    let traffic = transport.traffic();
                    assert_eq!(
                        (traffic.sent, traffic.received),
                        (expected as u64, expected as u64),
                        "{direction:?}, rank {rank} of {ranks}"
                    );
                    assert_eq!(plan.bytes_sent(rank, 4, 4), expected as u64);
                },
            );
        }
        let plan = UlyssesPlan::new(contents.spec, shards.clone()).unwrap();
        on_ranks(
            ranks,
            |end| end,
            |rank, transport| {
                let rows = contents.rows(&shards.queries(rank), &shards.keys(rank));
                plan.run(rows.inputs(), transport).unwrap();
                assert_eq!(transport.traffic().sent, ulysses as u64, "Ulysses, rank {rank} of {ranks}");
                assert_eq!(plan.bytes_sent(rank, 4, 4), ulysses as u64);
            },
        );
    }
}

/// What is said of uneven shards and prefixes is what is sent.
#[test]
fn uneven_rings_send_what_the_plan_says() {
    let contents = Contents::<bf16>::new(spec(4, 2, 32, Mask::Causal), sequences(&[(13, 30), (0, 9)]), 2);
    let shards = Shards::uneven(contents.sequences.clone(), Placement::Striped, &[2, 1, 4]).unwrap();
    for direction in [Direction::PassKv, Direction::PassQ] {
        let plan = RingPlan::new(contents.spec, shards.clone()).unwrap().passing(direction);
        on_ranks(
            3,
            |end| end,
            |rank, transport| {
                let rows = contents.rows(&shards.queries(rank), &shards.keys(rank));
                plan.run(rows.inputs(), transport).unwrap();
                assert_eq!(
                    transport.traffic().sent,
                    plan.bytes_sent(rank, 2, 2),
                    "{direction:?}, rank {rank}"
                );
            },
        );
    }
}

#[test]
fn collectives() {
    for ranks in [1, 2, 3, 4, 7] {
        on_ranks(
            ranks,
            |end| end,
            |rank, transport| {
                let at = format!("rank {rank} of {ranks}");
                let lens: Vec<usize> = (0..ranks).map(|of| 3 * of).collect();
                let gathered = transport.all_gather_v(&vec![rank as u8; 3 * rank], &lens).unwrap();
                let expected: Vec<u8> = (0..ranks).flat_map(|of| vec![of as u8; 3 * of]).collect();
                assert_eq!(gathered, expected, "all-gather, {at}");

                let send =
                    (0..ranks).map(|to| Buffer::of(&vec![(10 * rank + to) as u8; rank + to])).collect();
                let lens: Vec<usize> = (0..ranks).map(|from| from + rank).collect();
                for (from, buffer) in transport.all_to_all_v(send, &lens).unwrap().iter().enumerate() {
                    assert_eq!(
                        buffer.bytes(),
                        vec![(10 * from + rank) as u8; from + rank],
                        "all-to-all, {at} from {from}"
                    );
                }

                let lens: Vec<usize> = (0..ranks).map(|of| of % 3).collect();
                let all: usize = lens.iter().sum();
                let own: Vec<f32> = (0..all).map(|i| (i * (rank + 1)) as f32).collect();
                let sum = transport.reduce_scatter(&own, &lens).unwrap();
                let first: usize = lens[..rank].iter().sum();
                let factor = (ranks * (ranks + 1) / 2) as f32;
                let expected: Vec<f32> = (first..first + lens[rank]).map(|i| i as f32 * factor).collect();
                assert_eq!(sum, expected, "reduce-scatter, {at}");
                transport.barrier().unwrap();
            },
        );
    }
}

#[test]
fn nobody_passes_a_barrier_early() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    let arrived = AtomicUsize::new(0);
    for ranks in [2, 3, 5, 8] {
        arrived.store(0, Ordering::SeqCst);
        on_ranks(
            ranks,
            |end| end,
            |rank, transport| {
                std::thread::sleep(std::time::Duration::from_millis(3 * rank as u64));
                arrived.fetch_add(1, Ordering::SeqCst);
                transport.barrier().unwrap();
                assert_eq!(arrived.load(Ordering::SeqCst), ranks, "rank {rank} of {ranks}");
            },
        );
    }
}

#[test]
fn groups_of_ranks_do_not_mix() {
    on_ranks(
        6,
        |end| end,
        |rank, transport| {
            for members in
                [vec![0, 2, 4], vec![5, 3, 1]].into_iter().filter(|members| members.contains(&rank))
            {
                let place = members.iter().position(|&member| member == rank).unwrap();
                let mut group = Subgroup::new(transport, members.clone()).unwrap();
                assert_eq!((group.rank(), group.ranks()), (place, 3));
                let gathered = group.all_gather_v(&[rank as u8], &[1; 3]).unwrap();
                assert_eq!(gathered, members.iter().map(|&member| member as u8).collect::<Vec<_>>());
            }
            for bad in [vec![], vec![(rank + 1) % 6], vec![rank, rank], vec![rank, 6]] {
                assert!(matches!(
                    Subgroup::new(transport, bad),
                    Err(Error::Argument { argument: "members", .. })
                ));
            }
        },
    );
}

#[test]
fn differing_configurations_are_named() {
    let facts =
        |rank: usize| Fingerprint::new().with("kv_heads", 8).with("the scale", if rank == 2 { 7 } else { 5 });
    for (rank, result) in
        on_ranks(4, |end| end, |rank, transport| facts(rank).agree(transport)).into_iter().enumerate()
    {
        let (peer, here, there) = if rank == 2 { (0, 7, 5) } else { (2, 5, 7) };
        assert_eq!(result, Err(Error::Mismatch { rank, peer, what: "the scale", here, there }));
    }
    // Plans: what differs in a plan differs in its fingerprint.
    let spec = spec(4, 2, 32, Mask::Causal);
    let plan = |len, placement, mask| {
        let shards = Shards::new(sequences(&[(0, len)]), placement, 2).unwrap();
        RingPlan::new(attention::AttentionSpec { mask, ..spec }, shards).unwrap().fingerprint::<bf16, bf16>()
    };
    let base = plan(64, Placement::Zigzag, Mask::Causal);
    assert_eq!(base, plan(64, Placement::Zigzag, Mask::Causal));
    for (what, other) in [
        ("length", plan(65, Placement::Zigzag, Mask::Causal)),
        ("placement", plan(64, Placement::Striped, Mask::Causal)),
        ("mask", plan(64, Placement::Zigzag, Mask::Full)),
        ("window", plan(64, Placement::Zigzag, Mask::SlidingWindow { window: 3, sinks: 0 })),
    ] {
        assert_ne!(base, other, "{what}");
    }
}

/// Communication hides behind compute: what is exposed is (P - 1) · max(0, t_comm - t_comp), to the nanosecond of the modelled clock.
#[test]
fn overlap_on_the_modelled_clock() {
    let (ranks, c) = (4, 32);
    let contents = Contents::<bf16>::new(spec(4, 2, 32, Mask::Causal), sequences(&[(0, ranks * c)]), 3);
    let shards = Shards::new(contents.sequences.clone(), Placement::Zigzag, ranks).unwrap();
    let plan = RingPlan::new(contents.spec, shards.clone()).unwrap();
    // Every step but the first computes c²/2 pairs, in 1 ms; the first c(c+1)/2.
    let step_s = 1e-3;
    let pairs_per_s = (c * c / 2) as f64 / step_s;
    let first_s = (c * (c + 1) / 2) as f64 / pairs_per_s;
    let bytes = (2 * c * 2 * 32 * 2) as f64;
    for (ratio, alpha_s) in [(0.5, 0.0), (1.0, 0.0), (2.0, 0.0), (0.5, 0.2e-3), (2.0, 0.2e-3)] {
        let comm_s = ratio * step_s;
        let link = Link { alpha_s, bytes_per_s: bytes / (comm_s - alpha_s) };
        let times = on_ranks(
            ranks,
            |end| Sim::new(end, link, pairs_per_s).unwrap(),
            |rank, transport| {
                let rows = contents.rows(&shards.queries(rank), &shards.keys(rank));
                plan.run(rows.inputs(), transport).unwrap();
                (transport.clock_s(), transport.times())
            },
        );
        for (rank, (clock_s, times)) in times.into_iter().enumerate() {
            let steps = (ranks - 2) as f64;
            let expected = first_s.max(comm_s) + steps * step_s.max(comm_s) + step_s;
            let exposed = (comm_s - first_s).max(0.0) + steps * (comm_s - step_s).max(0.0);
            let at = format!("rank {rank}, t_comm / t_comp = {ratio}, α = {alpha_s}");
            assert!((clock_s - expected).abs() < 1e-9, "{at}: {clock_s} s, not {expected} s");
            assert!(
                (times.exposed_s - exposed).abs() < 1e-9,
                "{at}: {} s exposed, not {exposed} s",
                times.exposed_s
            );
            assert!((times.compute_s - (first_s + 3.0 * step_s)).abs() < 1e-9, "{at}");
        }
    }
}

#[test]
fn what_an_exchange_refuses() {
    on_ranks(
        2,
        |end| end,
        |rank, transport| {
            let tag = Tag::new(seq_parallel::transport::Operation::Barrier, 0);
            for (to, from) in [(rank, 1 - rank), (1 - rank, rank), (2, 1 - rank)] {
                let result = transport.exchange(tag, to, Buffer::new(0).into(), from, Buffer::new(0));
                assert!(matches!(result, Err(Error::Argument { .. })), "{to}, {from}");
            }
            assert!(transport.all_gather_v(&[1], &[2, 2]).is_err());
            assert!(transport.all_to_all_v(vec![], &[]).is_err());
            assert!(transport.reduce_scatter(&[1.0], &[1, 1]).is_err());
        },
    );
    on_ranks(
        1,
        |end| end,
        |_, end| {
            assert!(end.barrier().is_ok());
        },
    );
}
