//! Preemption: a ring that is paused, at any step, goes on bit for bit; one that is given up leaves the transport usable.

use attention::Mask;
use half::bf16;
use seq_parallel::placement::{Placement, Shards};
use seq_parallel::ring::{Direction, Ring, RingPlan};
use seq_parallel::testing::{Contents, on_ranks, sequences, spec};

#[test]
fn a_paused_ring_goes_on_bit_for_bit() {
    let ranks = 4;
    let long = Contents::<bf16>::new(spec(4, 2, 32, Mask::Causal), sequences(&[(10, 80), (0, 21)]), 1);
    let short = Contents::<bf16>::new(spec(4, 2, 32, Mask::Causal), sequences(&[(0, 12)]), 2);
    let shards = Shards::new(long.sequences.clone(), Placement::Zigzag, ranks).unwrap();
    let short_shards = Shards::new(short.sequences.clone(), Placement::Zigzag, ranks).unwrap();
    let short_plan = RingPlan::new(short.spec, short_shards.clone()).unwrap();
    for direction in [Direction::PassKv, Direction::PassQ] {
        let plan = RingPlan::new(long.spec, shards.clone()).unwrap().passing(direction);
        let whole = on_ranks(
            ranks,
            |end| end,
            |rank, transport| {
                let rows = long.rows(&shards.queries(rank), &shards.keys(rank));
                plan.run(rows.inputs(), transport).unwrap()
            },
        );
        for boundary in 0..=ranks {
            let outputs = on_ranks(
                ranks,
                |end| end,
                |rank, transport| {
                    let rows = long.rows(&shards.queries(rank), &shards.keys(rank));
                    let mut ring = Ring::new(&plan, rank, rows.inputs()).unwrap();
                    for _ in 0..boundary {
                        ring.step(transport, |_| {}).unwrap();
                    }
                    ring.pause(transport).unwrap();
                    // A short prefill comes first.
                    let rows = short.rows(&short_shards.queries(rank), &short_shards.keys(rank));
                    let between = short_plan.run(rows.inputs(), transport).unwrap();
                    while !ring.is_done() {
                        ring.step(transport, |_| {}).unwrap();
                    }
                    (ring.finish(transport).unwrap(), between)
                },
            );
            let (outputs, between): (Vec<_>, Vec<_>) = outputs.into_iter().unzip();
            assert_eq!(outputs, whole, "{direction:?}, paused after {boundary} steps");
            let queries: Vec<_> = (0..ranks).map(|rank| short_shards.queries(rank)).collect();
            short.check("the short prefill", &queries, &between);
        }
    }
}

/// Ranks that are at different steps when they hear of it pause at the same one.
#[test]
fn ranks_agree_where_to_pause() {
    let ranks = 4;
    let contents = Contents::<bf16>::new(spec(2, 1, 32, Mask::Causal), sequences(&[(0, 64)]), 3);
    let shards = Shards::new(contents.sequences.clone(), Placement::Zigzag, ranks).unwrap();
    let plan = RingPlan::new(contents.spec, shards.clone()).unwrap();
    for begun in [[0, 0, 0, 0], [1, 2, 1, 1], [2, 3, 2, 3]] {
        let results = on_ranks(
            ranks,
            |end| end,
            |rank, transport| {
                let rows = contents.rows(&shards.queries(rank), &shards.keys(rank));
                let mut ring = Ring::new(&plan, rank, rows.inputs()).unwrap();
                for _ in 0..begun[rank] {
                    ring.step(transport, |_| {}).unwrap();
                }
                ring.pause_together(transport, |_| {}).unwrap();
                let paused_at = ring.steps_done();
                while !ring.is_done() {
                    ring.step(transport, |_| {}).unwrap();
                }
                (ring.finish(transport).unwrap(), paused_at)
            },
        );
        let (outputs, paused): (Vec<_>, Vec<_>) = results.into_iter().unzip();
        let last = *begun.iter().max().unwrap();
        assert!(paused.iter().all(|&at| at == last), "{begun:?}: {paused:?}");
        let queries: Vec<_> = (0..ranks).map(|rank| shards.queries(rank)).collect();
        contents.check("paused together", &queries, &outputs);
    }
}

#[test]
fn a_ring_that_is_given_up_leaves_the_transport_usable() {
    let ranks = 3;
    let contents = Contents::<bf16>::new(spec(2, 1, 32, Mask::Causal), sequences(&[(0, 50)]), 4);
    let shards = Shards::new(contents.sequences.clone(), Placement::Striped, ranks).unwrap();
    for direction in [Direction::PassKv, Direction::PassQ] {
        let plan = RingPlan::new(contents.spec, shards.clone()).unwrap().passing(direction);
        let outputs = on_ranks(
            ranks,
            |end| end,
            |rank, transport| {
                let rows = contents.rows(&shards.queries(rank), &shards.keys(rank));
                let mut cancelled = Ring::new(&plan, rank, rows.inputs()).unwrap();
                cancelled.step(transport, |_| {}).unwrap();
                cancelled.pause(transport).unwrap();
                drop(cancelled);
                plan.run(rows.inputs(), transport).unwrap()
            },
        );
        let queries: Vec<_> = (0..ranks).map(|rank| shards.queries(rank)).collect();
        contents.check("after one that was given up", &queries, &outputs);
    }
}

/// Every rank sees every block of keys once: what a decoding rank keeps on the way is the whole cache.
#[test]
fn blocks_can_be_kept_on_their_way() {
    let ranks = 3;
    let contents = Contents::<bf16>::new(spec(2, 2, 8, Mask::Causal), sequences(&[(5, 30), (0, 7)]), 5);
    let shards = Shards::new(contents.sequences.clone(), Placement::Zigzag, ranks).unwrap();
    let plan = RingPlan::new(contents.spec, shards.clone()).unwrap();
    let kept = on_ranks(
        ranks,
        |end| end,
        |rank, transport| {
            let rows = contents.rows(&shards.queries(rank), &shards.keys(rank));
            let mut ring = Ring::new(&plan, rank, rows.inputs()).unwrap();
            let (mut k, mut v) = (vec![bf16::NAN; contents.k.len()], vec![bf16::NAN; contents.v.len()]);
            while !ring.is_done() {
                ring.step(transport, |chunk| {
                    for segment in chunk.segments {
                        let before: usize = contents.sequences[..segment.sequence]
                            .iter()
                            .map(|sequence| sequence.kv_len())
                            .sum();
                        for (i, position) in segment.positions().enumerate() {
                            for head in 0..2 {
                                let to = ((before + position) * 2 + head) * 8;
                                k[to..to + 8].copy_from_slice(chunk.k.vector(segment.row + i, head));
                                v[to..to + 8].copy_from_slice(chunk.v.vector(segment.row + i, head));
                            }
                        }
                    }
                })
                .unwrap();
            }
            (k, v)
        },
    );
    for (rank, (k, v)) in kept.into_iter().enumerate() {
        assert!(k == contents.k && v == contents.v, "rank {rank}");
    }
}
