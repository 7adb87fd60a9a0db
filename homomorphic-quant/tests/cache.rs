//! States of the cache: the same bytes whatever the chunks, shared pages, and what is refused.

mod common;

use attention::DType;
use attention::testing::Rng;
use common::{Tokens, cache, config, filled, kv, out_of_pages, state};
use homomorphic_quant::{Bits, BitsOverride, Cache, Capacity, Error, Layout, OpenBlock, Rounding};

fn chunks(tokens: usize, seed: u64) -> Vec<usize> {
    let mut rng = Rng::new(seed);
    let mut ends = vec![0];
    for chunk in [13, 1, 1, 7, 20] {
        ends.push((ends[ends.len() - 1] + chunk).min(tokens));
    }
    while ends[ends.len() - 1] < tokens {
        ends.push((ends[ends.len() - 1] + rng.below(150)).min(tokens));
    }
    ends
}

#[test]
fn chunks_do_not_matter() {
    for (partition, sinks, tokens) in
        [(32, 0, 100), (32, 4, 333), (64, 4, 517), (128, 3, 300), (64, 100, 250)]
    {
        for layout in [Layout::PerChannelKey, Layout::PerTokenKey] {
            for rounding in [Rounding::Nearest, Rounding::Stochastic { seed: 11 }] {
                for open_block in [OpenBlock::Exact, OpenBlock::Requantized] {
                    if open_block == OpenBlock::Requantized && partition > 32 {
                        continue; // the same code, and slow
                    }
                    let name = format!("Π {partition}, S {sinks}, {tokens} tokens, {layout:?}, {rounding:?}");
                    let config = config(2, 4, partition, sinks)
                        .with_layout(layout)
                        .with_rounding(rounding)
                        .with_open_block(open_block);
                    let tokens = Tokens::new(kv(2, 32, 48), tokens, 3);
                    let (whole, expected) = filled(&config, &tokens);
                    for seed in 0..2 {
                        let mut cache = cache(&config, tokens.shape, 1, tokens.tokens);
                        let mut sequence = cache.sequence();
                        for ends in chunks(tokens.tokens, seed).windows(2) {
                            tokens.append(&mut cache, &mut sequence, ends[0], ends[1]);
                        }
                        assert_eq!(state(&cache, &sequence), state(&whole, &expected), "{name}");
                    }
                }
            }
        }
    }
}

#[test]
fn tokens_are_sinks_closed_blocks_and_the_open_one() {
    let tokens = Tokens::new(kv(1, 16, 32), 300, 3);
    for (partition, sinks) in [(32, 4), (32, 0), (64, 7), (128, 4)] {
        let config = config(2, 2, partition, sinks);
        let mut cache = cache(&config, tokens.shape, 1, 300);
        let mut sequence = cache.sequence();
        for n in 1..=300usize {
            tokens.append(&mut cache, &mut sequence, n - 1, n);
            let name = format!("Π {partition}, S {sinks}, {n} tokens");
            let (held, closed) = (n.min(sinks), n.saturating_sub(sinks) / partition);
            let open = n - held - closed * partition;
            assert_eq!(sequence.tokens(), n);
            assert_eq!(
                (cache.sink_tokens(n), cache.closed_blocks(n), cache.open_tokens(n)),
                (held, closed, open)
            );
            assert_eq!(sequence.blocks().len(), closed, "{name}");
            assert_eq!(sequence.open().is_some(), open > 0, "{name}: a full block is closed at once");
            assert_eq!(sequence.sinks().is_some(), held > 0, "{name}");
            let usage = cache.usage();
            assert_eq!((usage.blocks.used, usage.open.used), (closed, usize::from(open > 0)), "{name}");
        }
    }
    // 100 tokens, Π = 32, S = 4: 96 in codes, none open.
    let (cache, sequence) = filled(&config(2, 2, 32, 4), &Tokens::new(kv(1, 16, 16), 100, 3));
    assert_eq!((sequence.blocks().len() * 32, cache.open_tokens(100)), (96, 0));
}

#[test]
fn what_is_in_16_bits_is_exact_unless_it_is_requantized() {
    let tokens = Tokens::new(kv(2, 32, 32), 60, 5);
    for dtype in [DType::F16, DType::BF16] {
        let config = config(2, 2, 64, 4).with_dtype(dtype).unwrap();
        let (cache, sequence) = filled(&config, &tokens);
        let all = cache.dequantize(&sequence).unwrap();
        let stored = |values: &[f32]| -> Vec<f32> {
            values.iter().map(|&x| homomorphic_quant::quantizer::store(x, dtype)).collect()
        };
        assert_eq!(all.k, stored(&tokens.k));
        assert_eq!(all.v, stored(&tokens.v));
        let (cache, sequence) = filled(&config.with_open_block(OpenBlock::Requantized), &tokens);
        let lossy = cache.dequantize(&sequence).unwrap();
        assert_eq!(lossy.k[..4 * 64], all.k[..4 * 64], "sinks stay exact");
        assert_ne!(lossy.k, all.k);
    }
}

#[test]
fn a_fork_shares_until_one_of_the_two_writes() {
    let shape = kv(2, 32, 32);
    let tokens = Tokens::new(shape, 200, 1);
    let other = Tokens::new(shape, 200, 2);
    let config = config(4, 4, 32, 4);
    let mut cache = cache(&config, shape, 4, 200);
    let mut a = cache.sequence();
    tokens.append(&mut cache, &mut a, 0, 110); // 4 sinks, 3 blocks, 10 open
    let mut b = cache.fork(&a).unwrap();
    let usage = cache.usage();
    assert_eq!((usage.blocks.used, usage.blocks.shared, usage.open.shared), (3, 3, 1));
    let before = state(&cache, &a);
    other.append(&mut cache, &mut b, 110, 150); // closes b's fourth block
    assert_eq!(state(&cache, &a), before, "the parent does not change");
    let usage = cache.usage();
    assert_eq!((usage.blocks.used, usage.blocks.shared), (4, 3));
    assert_eq!((usage.open.used, usage.open.shared, usage.open.copies), (2, 0, 1));
    tokens.append(&mut cache, &mut a, 110, 140);
    assert_eq!(state(&cache, &a), state_of(&config, &tokens, 140));

    // A prefix: sinks and two blocks, then another continuation.
    let mut c = cache.fork_prefix(&a, 2).unwrap();
    assert_eq!((c.tokens(), c.open()), (4 + 64, None));
    assert_eq!(cache.block_pool().owners(a.blocks()[0]).unwrap(), 3);
    tokens.append(&mut cache, &mut c, 68, 200);
    assert_eq!(state(&cache, &c), state_of(&config, &tokens, 200), "as if it had been computed alone");
    assert!(matches!(cache.fork_prefix(&b, 5), Err(Error::Argument { argument: "blocks", .. })));

    for sequence in [b, a, c] {
        cache.release(sequence).unwrap();
    }
    let usage = cache.usage();
    assert_eq!((usage.bytes(), usage.blocks.used, usage.open.used, usage.sinks.unwrap().used), (0, 0, 0, 0));
}

fn state_of(config: &homomorphic_quant::Config, tokens: &Tokens, len: usize) -> Vec<Vec<u8>> {
    let mut cache = cache(config, tokens.shape, 1, len);
    let mut sequence = cache.sequence();
    tokens.append(&mut cache, &mut sequence, 0, len);
    state(&cache, &sequence)
}

/// Forked inside the sinks: the sink page is copied too.
#[test]
fn sinks_are_copied_when_a_fork_fills_them() {
    let shape = kv(1, 16, 16);
    let (tokens, other) = (Tokens::new(shape, 40, 1), Tokens::new(shape, 40, 2));
    let config = config(2, 2, 32, 8);
    let mut cache = cache(&config, shape, 2, 64);
    let mut a = cache.sequence();
    tokens.append(&mut cache, &mut a, 0, 5);
    let mut b = cache.fork(&a).unwrap();
    other.append(&mut cache, &mut b, 5, 40);
    tokens.append(&mut cache, &mut a, 5, 40);
    assert_eq!(state(&cache, &a), state_of(&config, &tokens, 40));
    assert_eq!(cache.usage().sinks.unwrap().copies, 1);
}

/// Sequences join, grow and leave; each is what it would be alone, whichever pages it got.
#[test]
fn sequences_do_not_touch_each_other() {
    let shape = kv(2, 16, 32);
    let config = config(2, 8, 32, 4);
    let mut rng = Rng::new(77);
    let mut cache = cache(&config, shape, 6, 400);
    let mut live: Vec<(u64, homomorphic_quant::Sequence)> = Vec::new();
    for step in 0..60 {
        if live.len() < 6 && rng.below(3) > 0 {
            live.push((step, cache.sequence()));
        }
        if live.len() > 2 && rng.below(6) == 0 {
            let (_, sequence) = live.swap_remove(rng.below(live.len()));
            cache.release(sequence).unwrap();
        }
        for (seed, sequence) in &mut live {
            let (from, to) = (sequence.tokens(), (sequence.tokens() + rng.below(40)).min(400));
            Tokens::new(shape, 400, *seed).append(&mut cache, sequence, from, to);
        }
    }
    assert!(live.len() > 2);
    for (seed, sequence) in &live {
        let expected = state_of(&config, &Tokens::new(shape, 400, *seed), sequence.tokens());
        assert_eq!(state(&cache, sequence), expected, "sequence {seed} of {} tokens", sequence.tokens());
    }
}

/// A sequence of another cache is refused by whoever reads or grows it, whichever of its parts this cache misses.
#[test]
fn a_sequence_of_another_cache_is_refused() {
    let shape = kv(2, 32, 32);
    let spec = common::spec(2, shape, attention::Mask::Causal);
    // (partition, sinks) of the sequence's cache and of the other, and tokens.
    for (own, other, len) in [
        ((32, 0), (32, 4), 10),   // no sinks
        ((32, 4), (64, 4), 36),   // no open block
        ((64, 0), (32, 0), 32),   // no closed block
        ((32, 4), (32, 0), 36),   // sinks too many
        ((32, 0), (32, 0), 32),   // the same parts, a block alone
        ((32, 0), (32, 0), 10),   // the same parts, an open block alone
        ((32, 12), (32, 12), 10), // the same parts, sinks alone
    ] {
        let name = format!("{len} tokens of (Π, S) {own:?} in {other:?}");
        let tokens = Tokens::new(shape, len + 1, 1);
        let config_of = |(partition, sinks)| config(2, 4, partition, sinks);
        let mut home = cache(&config_of(own), shape, 1, len + 1);
        let mut sequence = home.sequence();
        tokens.append(&mut home, &mut sequence, 0, len);
        let mut foreign = cache(&config_of(other), shape, 2, 100);
        let before = foreign.usage();
        let refused = |what: &str, result: Result<(), Error>| {
            assert!(matches!(result, Err(Error::Attention(_))), "{what}, {name}: {result:?}");
        };

        let q = vec![0.5; 2 * 32];
        let q = attention::HeadsView::nhd(&q, 1, 2, 32).unwrap();
        let (mut out, mut lse) = (vec![0.0; 2 * 32], vec![0.0; 2]);
        let attended =
            homomorphic_quant::reference::attend(&spec, &foreign, &sequence, q, None, &mut out, &mut lse);
        refused("attend", attended);
        refused("dequantize", foreign.dequantize(&sequence).map(drop));
        let sides = foreign.sinks(&sequence, 0).and_then(|_| foreign.open_block(&sequence, 0));
        let blocks = (0..sequence.blocks().len()).try_for_each(|b| foreign.block(&sequence, b, 0).map(drop));
        refused("its parts", sides.map(drop).and(blocks));
        let header = homomorphic_quant::wire::Header {
            tag: 1,
            tokens: len as u64,
            model: homomorphic_quant::wire::Model { layers: 1, kv_heads: 2, qk_dim: 32, v_dim: 32 },
            config: foreign.config().clone(),
            page_layout: foreign.geometry().layout(),
        };
        let mut sender = homomorphic_quant::wire::Sender::new(Vec::new(), header).unwrap();
        refused("send", sender.segment(&foreign, &sequence, 1));
        refused("fork", foreign.fork(&sequence).map(drop));
        match foreign.fork_prefix(&sequence, sequence.blocks().len()) {
            Ok(nothing) => assert_eq!(nothing.tokens(), 0, "{name}"),
            Err(error) => refused("fork_prefix", Err(error)),
        }
        let next = (tokens.k().slice(len..len + 1), tokens.v().slice(len..len + 1));
        refused("append", foreign.append(&mut sequence, next.0, next.1));
        assert_eq!(foreign.usage(), before, "{name}: nothing changes");
        assert_eq!(sequence.tokens(), len, "{name}");
        home.append(&mut sequence, next.0, next.1).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[test]
fn bytes_are_those_of_the_tables() {
    // Qwen3-8B: one of 36 layers at 4096 tokens.
    let config = config(2, 2, 64, 4);
    let cache = Cache::new(&config, 0, kv(8, 128, 128), Capacity { blocks: 0, sequences: 0 }).unwrap();
    assert_eq!(cache.content_bytes(4096), 63 * 43_008 + 64 * 8 * 128 * 2 * 2);
    let mib = (36 * cache.content_bytes(4096)) as f64 / f64::from(1 << 20);
    assert!((mib - 102.02).abs() < 0.005, "{mib}");
    let tokens = Tokens::new(kv(2, 32, 64), 4 + 32 * 3 + 5, 1);
    let (cache, _) = filled(&common::config(2, 2, 32, 4), &tokens);
    let usage = cache.usage();
    assert_eq!(usage.bytes(), 3 * cache.geometry().bytes() + (4 + 32) * 2 * (32 + 64) * 2);
    assert_eq!(cache.content_bytes(tokens.tokens), usage.bytes() - 27 * 2 * (32 + 64) * 2);
}

#[test]
fn overrides_change_some_heads_and_layers() {
    let only = |layer, kv_head| BitsOverride { layer, kv_head, k: Some(Bits::Eight), v: None };
    let config = config(2, 2, 32, 0).with_override(only(Some(0), Some(1)));
    let tokens = Tokens::new(kv(3, 32, 32), 64, 1);
    let plain = Cache::new(&config, 1, tokens.shape, Capacity { blocks: 2, sequences: 1 }).unwrap();
    let (cache, sequence) = filled(&config, &tokens);
    assert_eq!(cache.geometry().bytes() - plain.geometry().bytes(), 32 * 32 * 6 / 8 + 32);
    let largest = |head| *cache.block(&sequence, 0, head).unwrap().k_codes.iter().max().unwrap();
    assert_eq!([0, 1, 2].map(largest), [3, 255, 3]);
}

#[test]
fn nothing_changes_when_an_append_is_refused() {
    let shape = kv(2, 16, 16);
    let config = config(2, 2, 32, 4).with_dtype(DType::F16).unwrap();
    let tokens = Tokens::new(shape, 200, 1);
    let mut cache = Cache::new(&config, 0, shape, Capacity { blocks: 2, sequences: 1 }).unwrap();
    let mut sequence = cache.sequence();
    tokens.append(&mut cache, &mut sequence, 0, 50);
    let before = state(&cache, &sequence);

    for (case, index, value) in [
        ("NaN", 3, f32::NAN),
        ("infinity", 17, f32::INFINITY),
        ("-infinity", 63, f32::NEG_INFINITY),
        ("too large for f16", 40, 65520.0),
    ] {
        for argument in ["k", "v"] {
            let mut bad = Tokens::new(shape, 2, 1);
            if argument == "k" {
                bad.k[index] = value
            } else {
                bad.v[index] = value
            }
            let error = cache.append(&mut sequence, bad.k(), bad.v()).expect_err(case);
            assert!(
                matches!(error, Error::NotFinite { argument: a, index: i, .. } if (a, i) == (argument, index)),
                "{case}: {error}"
            );
        }
    }
    let narrow = Tokens::new(kv(2, 32, 16), 2, 1);
    let result = cache.append(&mut sequence, narrow.k(), narrow.v());
    assert!(matches!(result, Err(Error::Argument { argument: "k", .. })));
    let result = cache.append(&mut sequence, tokens.k().slice(0..3), tokens.v().slice(0..2));
    assert!(matches!(result, Err(Error::Argument { argument: "v", .. })));
    let result = cache.append(&mut sequence, tokens.k().slice(50..150), tokens.v().slice(50..150));
    assert!(matches!(&result, Err(error) if out_of_pages(error)), "{result:?}");
    let result = cache.fork(&sequence).map(|mut fork| {
        // The open block must be copied, and there is no page for it.
        let result = cache.append(&mut fork, tokens.k().slice(50..51), tokens.v().slice(50..51));
        cache.release(fork).unwrap();
        result
    });
    assert!(matches!(&result, Ok(Err(error)) if out_of_pages(error)), "{result:?}");
    assert_eq!(state(&cache, &sequence), before);
    tokens.append(&mut cache, &mut sequence, 50, 68);
    assert_eq!(state(&cache, &sequence), state_of(&config, &tokens, 68));
    assert!(cache.block_bytes(&sequence, 2, 0).is_err() && cache.block_bytes(&sequence, 0, 2).is_err());
}
