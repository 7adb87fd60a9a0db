//! Decoding over shards equals attention over the whole sequence, whoever holds what, and moves what it says.

use attention::{Element, Mask};
use half::{bf16, f16};
use seq_parallel::decode::{DecodeStep, Shard};
use seq_parallel::placement::{Placement, Segment, Sequence, Shards};
use seq_parallel::ring::Inputs;
use seq_parallel::testing::{Contents, on_ranks, sequences, spec};
use seq_parallel::transport::{Failure, Faulty, Operation, Transport};
use seq_parallel::{Error, Output};

/// The steps of a case: new tokens of each.
const STEPS: [usize; 6] = [1, 1, 4, 1, 9, 1];

/// Prefills `cached` tokens into shards, then decodes with rank `home`; gives what every rank sent and holds.
fn decode<E: Element>(
    contents: &Contents<E>,
    placement: Placement,
    ranks: usize,
    home: usize,
    layers: usize,
) -> (Vec<Output>, Vec<(u64, Vec<usize>)>) {
    let Sequence { cached, .. } = contents.sequences[0];
    let shape = contents.spec.shape;
    let prefilled = Shards::new([Sequence::new(cached)], placement, ranks).unwrap();
    let results = on_ranks(
        ranks,
        |end| end,
        |rank, transport| {
            let rows = contents.rows(&[], &prefilled.keys(rank));
            let mut shards = vec![Shard::<E>::new(shape); layers];
            shards
                .iter_mut()
                .for_each(|shard| shard.append(&prefilled.keys(rank), &rows.k, &rows.v).unwrap());
            let mut held: Vec<usize> = (0..ranks).map(|rank| prefilled.key_tokens(rank)).collect();
            let mut output = Output { out: Vec::new(), lse: Vec::new() };
            let mut bytes = 0;
            for new in STEPS {
                let step = DecodeStep::new(contents.spec, &held, new, home).unwrap();
                let start: usize = held.iter().sum();
                let segment = Segment { sequence: 0, start, stride: 1, len: new, row: 0 };
                let rows = contents.rows(&[segment], &[segment]);
                let q: Vec<f32> = rows.q.iter().map(|x| x.to_f32()).collect();
                for (layer, shard) in shards.iter_mut().enumerate() {
                    if rank == home {
                        let inputs = Inputs { q: &q, k: &rows.k, v: &rows.v };
                        let found = step.ask(layer, inputs, shard, transport).unwrap();
                        if layer == 0 {
                            output.out.extend(found.out);
                            output.lse.extend(found.lse);
                        }
                    } else {
                        step.answer(layer, shard, transport).unwrap();
                    }
                    bytes += step.bytes_sent(rank, E::DTYPE.size());
                }
                held.iter_mut().zip(step.dealt()).for_each(|(held, new)| *held += new);
            }
            let found: Vec<usize> = shards.iter().map(Shard::tokens).collect();
            assert_eq!(found, vec![held[rank]; layers], "rank {rank}");
            let width = shape.kv_heads() * (shape.qk_dim() + shape.v_dim());
            assert_eq!(shards[0].bytes(), held[rank] * width * E::DTYPE.size());
            assert_eq!(transport.traffic().sent, bytes, "rank {rank} of {ranks}, home {home}");
            (output, bytes, held)
        },
    );
    results.into_iter().map(|(output, bytes, held)| (output, (bytes, held))).unzip()
}

fn check<E: Element>(heads: (usize, usize), dim: usize, mask: Mask, cached: usize, seed: u64) {
    let new: usize = STEPS.iter().sum();
    let contents = Contents::<E>::new(spec(heads.0, heads.1, dim, mask), sequences(&[(cached, new)]), seed);
    let queries = vec![Segment { sequence: 0, start: cached, stride: 1, len: new, row: 0 }];
    for ranks in [1, 2, 3, 4, 7] {
        for (i, placement) in Placement::ALL.into_iter().enumerate() {
            let home = i % ranks;
            let case = format!("{mask:?}, {cached} cached, {ranks} ranks, home {home}, {placement}");
            let (outputs, ranks) = decode(&contents, placement, ranks, home, 2);
            contents.check(&case, std::slice::from_ref(&queries), &outputs[home..=home]);
            let held = &ranks[0].1;
            let (least, most) = (held.iter().min().unwrap(), held.iter().max().unwrap());
            assert!(most - least <= 1, "{case}: {held:?}");
            assert_eq!(held.iter().sum::<usize>(), cached + new, "{case}");
        }
    }
}

#[test]
fn shards_equal_attention() {
    check::<bf16>((8, 2), 32, Mask::Causal, 61, 1);
    check::<f16>((3, 1), 64, Mask::Causal, 5, 2);
    check::<f32>((2, 2), 16, Mask::Causal, 0, 3);
    check::<bf16>((4, 1), 32, Mask::SlidingWindow { window: 11, sinks: 0 }, 40, 4);
    check::<f32>((4, 2), 32, Mask::SlidingWindow { window: 6, sinks: 3 }, 33, 5);
    check::<f16>((2, 1), 32, Mask::Prefix { prefix: 20 }, 30, 6);
}

#[test]
fn runs_are_bitwise_equal() {
    let contents = Contents::<bf16>::new(spec(4, 2, 32, Mask::Causal), sequences(&[(50, 17)]), 7);
    let run = || decode(&contents, Placement::Zigzag, 4, 0, 1).0;
    assert_eq!(run(), run());
}

/// What a token costs does not grow with the sequence: a query there, an output back, its keys and values once.
#[test]
fn bytes_do_not_grow_with_the_sequence() {
    let spec = spec(32, 8, 128, Mask::Causal);
    for held in [[10, 10, 10, 9], [1 << 20, 1 << 20, 1 << 20, (1 << 20) - 1]] {
        let step = DecodeStep::new(spec, &held, 1, 0).unwrap();
        assert_eq!(step.dealt().collect::<Vec<_>>(), [0, 0, 0, 1]);
        assert_eq!(step.bytes_sent(0, 2), 3 * 4 * 32 * 128 + 2 * 8 * 256);
        assert_eq!(step.bytes_sent(3, 2), 4 * 32 * 129);
    }
}

/// A shard that dies under way is named, with the layer; so is home.
#[test]
fn the_culprit_is_named() {
    for culprit in [0, 2] {
        let results = on_ranks(
            3,
            |end| {
                // Two exchanges of a layer with each other rank.
                let exchange = match end.rank() {
                    rank if rank != culprit => usize::MAX,
                    0 => 5,
                    _ => 3,
                };
                Faulty::new(end, Failure::Dies, exchange)
            },
            |rank, transport| -> Result<(), Error> {
                let step = DecodeStep::new(spec(2, 1, 16, Mask::Causal), &[0; 3], 1, 0)?;
                for layer in 0..3 {
                    let mut shard = Shard::<f32>::new(spec(2, 1, 16, Mask::Causal).shape);
                    let inputs = Inputs { q: &[0.5; 32], k: &[0.5; 16], v: &[0.5; 16] };
                    if rank == 0 {
                        step.ask(layer, inputs, &mut shard, transport)?;
                    } else {
                        step.answer(layer, &mut shard, transport)?;
                    }
                }
                Ok(())
            },
        );
        for (rank, result) in results.into_iter().enumerate().filter(|(rank, _)| *rank != culprit) {
            match result {
                Err(Error::Peer { peer, at, .. }) => {
                    let decoding = matches!(at.operation, Operation::DecodeQuery | Operation::DecodePartial);
                    assert!(peer == culprit && decoding && at.step == 1, "rank {rank}: {peer} at {at}");
                }
                other => panic!("rank {rank}: {other:?}"),
            }
        }
    }
}

#[test]
fn what_a_step_refuses() {
    let spec = spec(2, 1, 16, Mask::Causal);
    let named = |error: Error, name: &str| match error {
        Error::Argument { argument, .. } => assert_eq!(argument, name),
        other => panic!("{name}: {other}"),
    };
    named(DecodeStep::new(spec, &[], 1, 0).unwrap_err(), "home");
    named(DecodeStep::new(spec, &[1, 1], 1, 2).unwrap_err(), "home");
    let step = DecodeStep::new(spec, &[3, 2], 1, 1).unwrap();
    let mut shard = Shard::<f32>::new(spec.shape);
    on_ranks(
        1,
        |end| end,
        |_, transport| named(step.answer(0, &mut shard.clone(), transport).unwrap_err(), "transport"),
    );
    on_ranks(
        2,
        |end| end,
        |rank, transport| {
            let inputs = Inputs { q: &[0.0; 31], k: &[0.0; 16], v: &[0.0; 16] };
            let refused = step.ask(0, inputs, &mut shard.clone(), transport).unwrap_err();
            named(refused, if rank == 1 { "q" } else { "transport" });
            if rank == 1 {
                named(step.answer(0, &mut shard.clone(), transport).unwrap_err(), "transport");
            }
        },
    );
    named(shard.append(&[], &[1.0], &[]).unwrap_err(), "k");
}
