//! Transports: the suite of every back-end, bytes counted to the byte, overlap on a modelled clock.

use attention::Mask;
use half::bf16;
use seq_parallel::placement::{Placement, Shards};
use seq_parallel::ring::{Direction, RingPlan};
use seq_parallel::testing::{Contents, conform, on_ranks, sequences, spec};
use seq_parallel::transport::Transport;
use seq_parallel::transport::sim::{Link, Sim};
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

/// The suite that every back-end passes, on threads and on threads with modelled delay. `seq-parallel/mpi` runs it on processes.
#[test]
fn threads_conform() {
    for ranks in [1, 2, 3, 4, 5, 7] {
        on_ranks(ranks, |end| end, |_, transport| conform(transport));
        let link = Link { alpha_s: 1e-4, bytes_per_s: 1e6 };
        on_ranks(ranks, |end| Sim::new(end, link, 1e6).unwrap(), |_, transport| conform(transport));
    }
}

/// What differs in a plan differs in its fingerprint.
#[test]
fn fingerprints_of_plans() {
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
            // The target where compute takes as long or longer: at most 1 %.
            assert!(ratio > 1.0 || times.exposed_s <= 0.01 * clock_s, "{at}: {} s exposed", times.exposed_s);
            assert!((times.compute_s - (first_s + 3.0 * step_s)).abs() < 1e-9, "{at}");
        }
    }
}
