//! Ulysses, Megatron and the hybrid compute what one rank computes.

use attention::{Element, Mask};
use half::{bf16, f16};
use seq_parallel::hybrid::HybridPlan;
use seq_parallel::placement::{Placement, Shards};
use seq_parallel::ring::Inputs;
use seq_parallel::testing::{Contents, on_ranks, sequences, spec};
use seq_parallel::transport::{Subgroup, Transport};
use seq_parallel::ulysses::{UlyssesPlan, local_heads};
use seq_parallel::{Error, megatron};

fn ulysses<E: Element>(heads: (usize, usize), lens: &[(usize, usize)], mask: Mask, seed: u64) {
    let contents = Contents::<E>::new(spec(heads.0, heads.1, 32, mask), sequences(lens), seed);
    for ranks in (1..=8).filter(|&ranks| local_heads(&contents.spec.shape, ranks, 0).is_ok()) {
        for placement in Placement::ALL {
            let shards = Shards::new(contents.sequences.clone(), placement, ranks).unwrap();
            let plan = UlyssesPlan::new(contents.spec, shards.clone()).unwrap();
            let outputs = on_ranks(
                ranks,
                |end| end,
                |rank, transport| {
                    let rows = contents.rows(&shards.queries(rank), &shards.keys(rank));
                    plan.fingerprint::<E, E>().agree(transport).unwrap();
                    plan.run(rows.inputs(), transport).unwrap()
                },
            );
            let queries: Vec<_> = (0..ranks).map(|rank| shards.queries(rank)).collect();
            contents.check(
                &format!("Ulysses, {heads:?} heads, {ranks} ranks, {placement}"),
                &queries,
                &outputs,
            );
        }
    }
}

#[test]
fn ulysses_equals_attention() {
    ulysses::<bf16>((8, 8), &[(0, 45)], Mask::Causal, 1);
    ulysses::<f16>((8, 2), &[(0, 20), (0, 3), (7, 16)], Mask::Causal, 2);
    ulysses::<f32>((6, 1), &[(9, 21)], Mask::SlidingWindow { window: 6, sinks: 2 }, 3);
    ulysses::<bf16>((4, 2), &[(0, 33)], Mask::Full, 4);
}

#[test]
fn hybrids_of_every_degree_equal_attention() {
    for (seed, (lens, mask)) in [
        (vec![(0, 61)], Mask::Causal),
        (vec![(0, 30), (12, 17), (0, 1)], Mask::Causal),
        (vec![(5, 40)], Mask::Full),
    ]
    .into_iter()
    .enumerate()
    {
        let contents = Contents::<bf16>::new(spec(8, 2, 32, mask), sequences(&lens), 10 + seed as u64);
        for (ulysses, ring) in [(1, 1), (1, 4), (2, 2), (4, 1), (2, 3), (4, 2), (8, 1)] {
            for placement in Placement::ALL {
                let groups = Shards::new(contents.sequences.clone(), placement, ring).unwrap();
                let plan = HybridPlan::new(contents.spec, groups, ulysses).unwrap();
                let outputs = on_ranks(
                    plan.ranks(),
                    |end| end,
                    |rank, transport| {
                        let rows = contents.rows(&plan.queries(rank), &plan.keys(rank));
                        plan.fingerprint::<bf16, bf16>().agree(transport).unwrap();
                        let before = transport.traffic().sent;
                        let output = plan.run(rows.inputs(), transport).unwrap();
                        let sent = transport.traffic().sent - before;
                        assert_eq!(
                            sent,
                            plan.bytes_sent(rank, 2, 2).unwrap(),
                            "rank {rank} of {ulysses} × {ring}"
                        );
                        output
                    },
                );
                let queries: Vec<_> = (0..plan.ranks()).map(|rank| plan.queries(rank)).collect();
                contents.check(
                    &format!("hybrid {ulysses} × {ring}, {placement}, {lens:?}"),
                    &queries,
                    &outputs,
                );
            }
        }
    }
}

/// A stage y = W₂ relu(W₁ x), the inner dimension dealt to ranks.
#[test]
fn megatron_stages_equal_the_whole() {
    let (width, inner) = (6, 12);
    let mut rng = fastrand::Rng::with_seed(5);
    let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.f32() - 0.5).collect() };
    let (w1, w2) = (random(inner * width), random(width * inner));
    let part = |x: &[f32], channels: std::ops::Range<usize>| -> Vec<f32> {
        let mut y = vec![0.0; x.len()];
        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            for channel in channels.clone() {
                let h: f32 = x.iter().zip(&w1[channel * width..]).map(|(x, w)| x * w).sum();
                y.iter_mut().enumerate().for_each(|(i, y)| *y += w2[i * inner + channel] * h.max(0.0));
            }
        }
        y
    };
    for ranks in [1, 2, 3, 4] {
        for placement in Placement::ALL {
            let shards =
                Shards::new(seq_parallel::testing::sequences(&[(0, 11), (3, 5)]), placement, ranks).unwrap();
            let x = random(shards.new_tokens() * width);
            let whole = part(&x, 0..inner);
            let results = on_ranks(
                ranks,
                |end| end,
                |rank, transport| {
                    let rows = shards.take(rank, &x, width).unwrap();
                    let channels = megatron::part("the inner dimension", inner, ranks, rank).unwrap();
                    let y: Vec<f32> = megatron::stage::<_, Error>(&shards, &rows, width, transport, |x| {
                        Ok(part(x, channels))
                    })
                    .unwrap();
                    assert_eq!(transport.traffic().sent, megatron::bytes_sent(&shards, rank, width));
                    y
                },
            );
            let mut y = vec![f32::NAN; whole.len()];
            for (rank, rows) in results.iter().enumerate() {
                shards.put(rank, rows, width, &mut y).unwrap();
            }
            for (i, (found, expected)) in y.iter().zip(&whole).enumerate() {
                assert!(
                    (found - expected).abs() < 1e-5,
                    "{ranks} ranks, {placement}, element {i}: {found}, not {expected}"
                );
            }
        }
    }
}

/// Megatron's attention over a ring of regions: each rank has its heads of its region's tokens, and hands on keys that others keep.
#[test]
fn rings_of_regions_equal_attention() {
    let contents = Contents::<bf16>::new(spec(8, 2, 32, Mask::Causal), sequences(&[(0, 53)]), 30);
    let shape = contents.spec.shape;
    for (region, ring) in [(1, 3), (2, 1), (2, 3), (4, 2), (8, 1)] {
        let groups = Shards::new(contents.sequences.clone(), Placement::Zigzag, ring).unwrap();
        let plan = HybridPlan::new(contents.spec, groups.clone(), region).unwrap();
        let first = megatron::first_kv_heads(&shape, region).unwrap();
        let outputs = on_ranks(
            plan.ranks(),
            |end| end,
            |rank, transport| {
                let heads = megatron::local_heads(&shape, region, rank % region).unwrap();
                let group = rank / region;
                let rows = contents.rows(&groups.queries(group), &groups.keys(group));
                let part = |x: &[bf16], all: usize, part: &std::ops::Range<usize>| -> Vec<bf16> {
                    x.chunks_exact(all * 32)
                        .flat_map(|x| x[part.start * 32..part.end * 32].to_vec())
                        .collect()
                };
                let (q, k) = (part(&rows.q, 8, &heads.q), part(&rows.k, 2, &heads.kv));
                let v = part(&rows.v, 2, &heads.kv);
                let output = plan.run_heads(Inputs { q: &q, k: &k, v: &v }, transport).unwrap();
                assert_eq!(transport.traffic().sent, plan.ring_bytes_sent(rank, 2, 2).unwrap());

                // Own tokens, all heads.
                let (tokens, own) = (plan.group_tokens(rank), &first[rank % region]);
                let own_k = part(&rows.k, 2, own);
                let own_k: Vec<f32> = own_k.iter().map(|x| x.to_f32()).collect();
                let before = transport.traffic().sent;
                let kept = {
                    let mut region = Subgroup::new(transport, plan.node(rank)).unwrap();
                    megatron::heads_to_tokens(&tokens, &first, 32, &own_k, &mut region).unwrap()
                };
                let others: usize = tokens.iter().sum::<usize>() - tokens[rank % region];
                assert_eq!(transport.traffic().sent - before, (4 * others * own.len() * 32) as u64);
                let expected = contents.rows(&[], &plan.keys(rank)).k;
                assert!(kept.iter().zip(&expected).all(|(a, b)| *a == b.to_f32()), "rank {rank}");
                assert_eq!(kept.len(), expected.len(), "rank {rank}");
                output
            },
        );
        // Heads of all ranks of a region, side by side.
        let (mut queries, mut whole) = (Vec::new(), Vec::new());
        for group in 0..ring {
            let of = &outputs[group * region..(group + 1) * region];
            let (heads, tokens) = (8 / region, groups.query_tokens(group));
            let rows = |token: usize, width: usize| token * heads * width..(token + 1) * heads * width;
            queries.push(groups.queries(group));
            whole.push(seq_parallel::Output {
                out: (0..tokens)
                    .flat_map(|t| of.iter().flat_map(move |of| of.out[rows(t, 32)].to_vec()))
                    .collect(),
                lse: (0..tokens)
                    .flat_map(|t| of.iter().flat_map(move |of| of.lse[rows(t, 1)].to_vec()))
                    .collect(),
            });
        }
        contents.check(&format!("regions of {region}, a ring of {ring}"), &queries, &whole);
    }
}

#[test]
fn heads_that_cannot_be_dealt_say_why() {
    for (q, kv, ranks, what) in
        [(6, 2, 4, "q_heads"), (12, 3, 4, "kv_heads"), (15, 3, 5, "kv_heads"), (8, 8, 16, "q_heads")]
    {
        let spec = spec(q, kv, 16, Mask::Causal);
        let shards = Shards::new(sequences(&[(0, 40)]), Placement::Zigzag, ranks).unwrap();
        let groups = Shards::new(sequences(&[(0, 40)]), Placement::Zigzag, 2).unwrap();
        for (scheme, error) in [
            ("Ulysses", UlyssesPlan::new(spec, shards).map(drop).unwrap_err()),
            ("hybrid", HybridPlan::new(spec, groups, ranks).map(drop).unwrap_err()),
        ] {
            match error {
                Error::Divisibility { what: found, count, ranks: by, .. } => {
                    let expected = if what == "q_heads" { q } else { kv };
                    assert_eq!((found, count, by), (what, expected, ranks), "{scheme}");
                }
                other => panic!("{scheme}, {q}/{kv} on {ranks}: {other}"),
            }
        }
    }
    assert!(matches!(megatron::part("q_heads", 6, 4, 0), Err(Error::Divisibility { count: 6, .. })));
    // Replicated KV heads: 4 ranks, 2 KV heads, each read by two ranks.
    let heads: Vec<_> =
        (0..4).map(|rank| local_heads(&spec(8, 2, 16, Mask::Causal).shape, 4, rank).unwrap()).collect();
    assert_eq!(heads.iter().map(|heads| heads.kv.clone()).collect::<Vec<_>>(), [0..1, 0..1, 1..2, 1..2]);
}
