//! Attention on codes against f64 attention over what the codes stand for.

mod common;

use attention::testing::{Comparison, Inputs, Tolerance, head_ratios, shuffled_pages};
use attention::{AttentionSpec, HeadsView, Mask};
use common::{Tokens, attend, cache, config, filled, kv, oracle, relative, spec, state, to_f64};
use homomorphic_quant::quantizer::eight_bit;
use homomorphic_quant::reference::{Prefill, decode, prefill};
use homomorphic_quant::{Cache, Capacity, Config, Error, Layout, Sequence};

const LAYOUTS: [Layout; 2] = [Layout::PerChannelKey, Layout::PerTokenKey];

/// (query heads, KV heads, dim, Π, sinks, tokens)
const SHAPES: [(usize, usize, usize, usize, usize, usize); 9] = [
    (8, 8, 64, 32, 0, 96),
    (8, 8, 64, 32, 4, 100),
    (8, 8, 64, 64, 4, 200),
    (16, 2, 128, 64, 4, 300),
    (64, 8, 128, 64, 4, 1028),
    (8, 1, 128, 32, 0, 517),
    (8, 1, 128, 128, 4, 700),
    (4, 4, 64, 64, 4, 40), // only open
    (8, 2, 128, 64, 4, 3), // fewer tokens than sinks
];

#[test]
fn named_shapes() {
    for (q_heads, kv_heads, dim, partition, sinks, tokens) in SHAPES {
        let shape = kv(kv_heads, dim, dim);
        let data = Tokens::of_kinds(shape, tokens, (Inputs::Normal, Inputs::Normal), 1);
        for (k, v) in [(2, 2), (4, 4), (8, 8), (8, 2)] {
            let (cache, sequence) = filled(&config(k, v, partition, sinks), &data);
            for (mask, queries) in [(Mask::Causal, 1), (Mask::Full, 3), (Mask::Causal, 50)] {
                let name = format!(
                    "{q_heads}/{kv_heads} d{dim} Π{partition} S{sinks} T{tokens} {k}/{v} {mask:?} {queries}"
                );
                if queries == 50 && (k, v) != (2, 2) {
                    continue; // many queries are the same rows again
                }
                let spec = spec(q_heads, shape, mask);
                let queries = if tokens > 1000 { queries.min(3) } else { queries };
                let q = Inputs::Normal.values(queries * q_heads, dim, 7);
                let (out, lse) = attend(&spec, &cache, &sequence, &q, None);
                let expected = oracle(&spec, &cache, &sequence, &q);
                let error = relative(&out, &expected.out);
                let bound = if sequence.blocks().is_empty() { 1e-5 } else { 0.03 };
                assert!(error < bound, "{name}: relative error {error}");
                Comparison::new(&lse, &expected.lse, Tolerance::new(0.1, 0.0)).assert(&name);
            }
        }
    }
}

/// Each score errs by at most half a step of the query's codes: `scale · Σ_p α_p / 2 · ksum`. With a window of one
/// token the LSE of a row is the score of its own token.
#[test]
fn every_score_is_within_half_a_step_of_the_query() {
    let (tokens, dim, heads) = (4 + 64 * 2, 128, 2);
    let shape = kv(heads, dim, 64);
    for kind in [Inputs::Normal, Inputs::OutlierChannels, Inputs::OutlierElements, Inputs::Constant] {
        let data = Tokens::of_kinds(shape, tokens, (kind, Inputs::Normal), 4);
        for bits in [2, 4, 8] {
            let (cache, sequence) = filled(&config(bits, 4, 64, 4), &data);
            let spec = spec(heads, shape, Mask::SlidingWindow { window: 1, sinks: 0 });
            let q = Inputs::Normal.values(tokens * heads, dim, 5);
            let (_, lse) = attend(&spec, &cache, &sequence, &q, Some(1));
            let expected = oracle(&spec, &cache, &sequence, &q).lse;
            let mut worst = 0.0f64;
            for (row, (&found, expected)) in lse.iter().zip(expected).enumerate() {
                let (token, head) = (row / heads, row % heads);
                let q = &q[row * dim..][..dim];
                let mut bound = 1e-5 * q.iter().map(|x| f64::from(x.abs())).sum::<f64>();
                if token >= 4 {
                    let block = cache.block(&sequence, (token - 4) / 64, head).unwrap();
                    let slot = (token - 4) % 64;
                    for p in 0..2 {
                        let scaled: Vec<f32> =
                            (p * 64..(p + 1) * 64).map(|d| q[d] * block.k_groups[d].scale).collect();
                        let alpha = f64::from(eight_bit(&scaled, &mut [0; 64]).scale);
                        bound += alpha / 2.0 * f64::from(block.k_sums[slot * 2 + p]);
                    }
                }
                let bound = bound * f64::from(spec.score.scale()) + 1e-6;
                let error = (f64::from(found) - expected).abs();
                worst = worst.max(error / bound);
                assert!(
                    error <= bound,
                    "{kind:?}, {bits}-bit, token {token}, head {head}: {found}, not {expected} ± {bound}"
                );
            }
            // Constant keys have codes of 0, which nothing multiplies.
            assert!(
                worst > 0.05 || kind == Inputs::Constant,
                "{kind:?}, {bits}-bit: the bound is not tight, {worst}"
            );
        }
    }
}

/// With a query of zeros P is exactly 1 everywhere, and each output errs by at most `Σ_b a_b / 2 · vsum` (divided by
/// l).
#[test]
fn every_output_is_within_half_a_step_of_the_probabilities() {
    let (tokens, dim) = (64 * 3, 96);
    let shape = kv(1, 32, dim);
    for kind in [Inputs::Normal, Inputs::OutlierChannels, Inputs::OutlierElements, Inputs::Constant] {
        let data = Tokens::of_kinds(shape, tokens, (Inputs::Normal, kind), 4);
        for bits in [2, 4, 8] {
            let (cache, sequence) = filled(&config(2, bits, 64, 0), &data);
            let spec = spec(1, shape, Mask::Causal);
            let (out, lse) = attend(&spec, &cache, &sequence, &[0.0; 32], Some(1));
            assert!((lse[0] - (tokens as f32).ln()).abs() < 1e-5, "scores are 0");
            let expected = oracle(&spec, &cache, &sequence, &[0.0; 32]).out;
            let mut bounds = vec![1e-5; dim];
            for b in 0..3 {
                let block = cache.block(&sequence, b, 0).unwrap();
                let channels = cache.geometry().head(0).v_channels;
                for g in 0..dim / channels {
                    let scales: Vec<f32> =
                        block.v_groups[g..].iter().step_by(dim / channels).map(|group| group.scale).collect();
                    let a = f64::from(eight_bit(&scales, &mut [0; 64]).scale);
                    let mine = g * channels..(g + 1) * channels;
                    for (bound, &v_sum) in bounds[mine.clone()].iter_mut().zip(&block.v_sums[mine]) {
                        *bound += a / 2.0 * f64::from(v_sum) / tokens as f64;
                    }
                }
            }
            for (c, ((&found, expected), bound)) in out.iter().zip(expected).zip(bounds).enumerate() {
                let error = (f64::from(found) - expected).abs();
                let bound = bound + 2e-6 * expected.abs();
                assert!(
                    error <= bound,
                    "{kind:?}, {bits}-bit, channel {c}: {found}, not {expected} ± {bound}"
                );
            }
        }
    }
}

/// Ratios of heads, unequal dims, both layouts, masks, a soft-cap, and every split count.
#[test]
fn masks_ratios_and_splits() {
    let masks = [
        Mask::Causal,
        Mask::Full,
        Mask::SlidingWindow { window: 70, sinks: 0 },
        Mask::SlidingWindow { window: 40, sinks: 4 },
        Mask::SlidingWindow { window: 1, sinks: 0 },
        Mask::Prefix { prefix: 90 },
    ];
    for (i, (q_heads, kv_heads)) in head_ratios().into_iter().enumerate() {
        for layout in LAYOUTS {
            let (qk_dim, v_dim) = [(64, 32), (32, 96), (80, 64)][i % 3];
            let shape = kv(kv_heads, qk_dim, v_dim);
            let data = Tokens::new(shape, 333, i as u64);
            let (cache, sequence) = filled(&config(4, 4, 32, 4).with_layout(layout), &data);
            for (m, &mask) in masks.iter().enumerate() {
                // Pairs of everything: each ratio meets every mask, in one of the layouts.
                if (m + i) % 2 == usize::from(layout == Layout::PerTokenKey) {
                    continue;
                }
                let name = format!("{q_heads}/{kv_heads} {qk_dim}/{v_dim} {layout:?} {mask:?}");
                let mut spec = spec(q_heads, shape, mask);
                if m % 2 == 1 {
                    spec.score = spec.score.with_soft_cap(20.0).unwrap();
                }
                let q: Vec<f32> =
                    Inputs::Normal.values(12 * q_heads, qk_dim, 7).iter().map(|x| x * 0.3).collect();
                let (out, lse) = attend(&spec, &cache, &sequence, &q, Some(1));
                let expected = oracle(&spec, &cache, &sequence, &q);
                let error = relative(&out, &expected.out);
                assert!(error < 0.04, "{name}: relative error {error}");
                for splits in [2, 8, 15, 1000] {
                    let (split_out, split_lse) = attend(&spec, &cache, &sequence, &q, Some(splits));
                    let case = format!("{name}, {splits} splits");
                    Comparison::new(&split_out, &to_f64(&out), Tolerance::MERGE).assert(&case);
                    Comparison::new(&split_lse, &to_f64(&lse), Tolerance::LSE).assert(&case);
                }
            }
        }
    }
}

/// Rows that see nothing, caches that hold nothing, queries before the first key.
#[test]
fn no_key_gives_zero_and_minus_infinity() {
    let shape = kv(1, 16, 16);
    let spec = spec(2, shape, Mask::Causal);
    let data = Tokens::new(shape, 2, 1);
    let config = config(2, 2, 32, 4);
    let mut cache = cache(&config, shape, 1, 64);
    let mut sequence = cache.sequence();
    let (out, lse) = attend(&spec, &cache, &sequence, &[1.0; 32], None);
    assert!(out.iter().all(|&x| x == 0.0) && lse.iter().all(|&x| x == f32::NEG_INFINITY));
    data.append(&mut cache, &mut sequence, 0, 2);
    let (out, lse) = attend(&spec, &cache, &sequence, &[1.0; 4 * 32], None);
    assert!(out[..64].iter().all(|&x| x == 0.0) && lse[..4].iter().all(|&x| x == f32::NEG_INFINITY));
    assert!(out[64..].iter().all(|x| x.is_finite()) && lse[4..].iter().all(|x| x.is_finite()));
}

#[test]
fn cached_sums_change_nothing_but_bytes() {
    let shape = kv(2, 64, 64);
    let data = Tokens::new(shape, 300, 6);
    let spec = spec(8, shape, Mask::Causal);
    let q = Inputs::Normal.values(5 * 8, 64, 7);
    for layout in LAYOUTS {
        for bits in [2, 4, 8] {
            let config = config(bits, bits, 64, 4).with_layout(layout);
            let (with, a) = filled(&config, &data);
            let (without, b) = filled(&config.with_cached_sums(false), &data);
            assert!(with.geometry().bytes() > without.geometry().bytes());
            assert_eq!(
                attend(&spec, &with, &a, &q, None),
                attend(&spec, &without, &b, &q, None),
                "{layout:?} {bits}"
            );
        }
    }
}

/// Pages in another order, other sequences between them: the same bits, alone or in a batch.
#[test]
fn pages_and_batches_do_not_matter() {
    let shape = kv(2, 64, 32);
    let spec = spec(4, shape, Mask::Causal);
    let config = config(2, 4, 64, 4);
    let lengths = [3, 70, 517, 1028, 260, 131];
    let data: Vec<Tokens> = (0..6).map(|i| Tokens::new(shape, lengths[i], i as u64)).collect();
    // Pages are handed out in a random order, and chunks of the sequences take turns.
    let mut shared = Cache::new(&config, 0, shape, Capacity { blocks: 40, sequences: 6 }).unwrap();
    scatter(&mut shared);
    let mut sequences: Vec<Sequence> = (0..6).map(|_| shared.sequence()).collect();
    for start in (0..1028).step_by(150) {
        for (data, sequence) in data.iter().zip(&mut sequences) {
            let end = (start + 150).min(data.tokens);
            if start < end {
                data.append(&mut shared, sequence, start, end);
            }
        }
    }
    let q = Inputs::Normal.values(6 * 4, 64, 3);
    let (mut out, mut lse) = (vec![f32::NAN; 6 * 4 * 32], vec![f32::NAN; 24]);
    let all: Vec<&Sequence> = sequences.iter().collect();
    decode(&spec, &shared, &all, HeadsView::nhd(&q, 6, 4, 64).unwrap(), None, &mut out, &mut lse).unwrap();
    for (i, data) in data.iter().enumerate() {
        let (alone, sequence) = filled(&config, data);
        assert_eq!(state(&shared, &sequences[i]), state(&alone, &sequence), "{} tokens", data.tokens);
        let (expected, expected_lse) = attend(&spec, &alone, &sequence, &q[i * 256..][..256], None);
        assert_eq!(out[i * 128..][..128], expected, "{} tokens", data.tokens);
        assert_eq!(lse[i * 4..][..4], expected_lse);
    }
    let pages: Vec<u32> = sequences[3].blocks().iter().map(|page| page.index()).collect();
    assert!(!pages.is_sorted(), "pages are scattered: {pages:?}");
}

/// Takes every page and gives them back in a random order, so that the next owners get them so.
fn scatter(cache: &mut Cache) {
    let shape = cache.shape();
    let partition = cache.config().partition();
    let blocks = cache.block_pool().usage().capacity;
    let fill = Tokens::new(shape, 4 + partition, 99);
    let mut held: Vec<Option<Sequence>> = Vec::new();
    for _ in 0..blocks {
        let mut sequence = cache.sequence();
        let parent = held.first().and_then(Option::as_ref);
        // All share one sink page: there are fewer of those.
        if let Some(parent) = parent {
            sequence = cache.fork_prefix(parent, 0).unwrap();
        }
        fill.append(cache, &mut sequence, 4 * usize::from(parent.is_some()), 4 + partition);
        held.push(Some(sequence));
    }
    for i in shuffled_pages(blocks, 5) {
        cache.release(held[i as usize].take().unwrap()).unwrap();
    }
    assert_eq!(cache.usage().bytes(), 0);
}

/// A prompt at once or in chunks, exact or on codes, then decoding: the cache is the same, and outputs are what they
/// claim.
#[test]
fn prefill_in_both_modes() {
    let shape = kv(4, 128, 128);
    let spec = spec(8, shape, Mask::Causal);
    let config = config(4, 4, 32, 4);
    let data = Tokens::new(shape, 150, 2);
    let q = Inputs::Normal.values(150 * 8, 128, 3);
    let q = HeadsView::nhd(&q, 150, 8, 128).unwrap();
    let exact = {
        let dtype = config.dtype();
        let round = |x: &[f32]| -> Vec<f32> {
            x.iter().map(|&x| homomorphic_quant::quantizer::store(x, dtype)).collect()
        };
        let (k, v) = (round(&data.k), round(&data.v));
        let keys = attention::RaggedKv::single(
            HeadsView::nhd(&k, 150, 4, 128).unwrap(),
            HeadsView::nhd(&v, 150, 4, 128).unwrap(),
        )
        .unwrap();
        let q = attention::RaggedView::single(q).unwrap();
        attention::reference::prefill(&spec, &q, &keys, attention::reference::Probabilities::Exact)
            .unwrap()
            .out
    };
    let row = 8 * 128;
    for mode in [Prefill::Exact, Prefill::Codes] {
        for ends in [vec![0, 120], vec![0, 5, 40, 41, 120]] {
            let name = format!("{mode:?} {ends:?}");
            let mut cache = cache(&config, shape, 1, 150);
            let mut sequence = cache.sequence();
            let run = |cache: &mut Cache, sequence: &mut Sequence, from: usize, to: usize, mode| {
                let (mut out, mut lse) = (vec![f32::NAN; (to - from) * row], vec![f32::NAN; (to - from) * 8]);
                let (q, k, v) = (q.slice(from..to), data.k().slice(from..to), data.v().slice(from..to));
                prefill(&spec, cache, sequence, q, k, v, mode, &mut out, &mut lse).unwrap();
                assert!(lse.iter().all(|x| x.is_finite()));
                out
            };
            let mut out = Vec::new();
            for ends in ends.windows(2) {
                out.extend(run(&mut cache, &mut sequence, ends[0], ends[1], mode));
            }
            let error = relative(&out, &exact[..120 * row]);
            match (mode, ends.len()) {
                (Prefill::Exact, 2) => {
                    assert!(error < 1e-5, "{name}: a whole prompt is exact, but for {error}")
                }
                _ => assert!((1e-3..0.3).contains(&error), "{name}: {error}"),
            }
            // Then decode.
            for token in 120..150 {
                run(&mut cache, &mut sequence, token, token + 1, Prefill::Codes);
            }
            let (whole, expected) = filled(&config, &data);
            assert_eq!(state(&cache, &sequence), state(&whole, &expected), "{name}");
            assert_eq!((sequence.blocks().len(), cache.open_tokens(150)), (4, 18));
        }
    }
}

/// Extreme but finite inputs make no NaN.
#[test]
fn extreme_inputs_stay_finite() {
    let shape = kv(1, 32, 32);
    let spec = spec(1, shape, Mask::Causal);
    type Make = fn(usize) -> f32;
    let cases: [(&str, Make); 6] = [
        ("constant", |_| 3.0),
        ("zero", |_| 0.0),
        ("huge", |i| if i % 3 == 0 { 6e4 } else { -6e4 }),
        ("huge, one sign", |i| 6e4 - (i % 2) as f32 * 32.0),
        ("f16 subnormal", |i| (i % 5) as f32 * 6e-8),
        ("one outlier", |i| if i == 777 { 6e4 } else { 1e-4 }),
    ];
    for (case, value) in cases {
        for dtype in [attention::DType::F16, attention::DType::BF16] {
            for layout in LAYOUTS {
                for bits in [2, 4, 8] {
                    let n = 64 * 32;
                    let data = Tokens {
                        shape,
                        tokens: 64,
                        k: (0..n).map(value).collect(),
                        v: (0..n).map(value).collect(),
                    };
                    let config = config(bits, bits, 32, 0).with_dtype(dtype).unwrap().with_layout(layout);
                    let (cache, sequence) = filled(&config, &data);
                    let q: Vec<f32> = Inputs::Normal.values(1, 32, 1);
                    let (out, lse) = attend(&spec, &cache, &sequence, &q, None);
                    let name = format!("{case} {dtype} {layout:?} {bits}");
                    assert!(out.iter().chain(&lse).all(|x| x.is_finite()), "{name}: {out:?} {lse:?}");
                    let largest = data.v.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                    assert!(out.iter().all(|x| x.abs() <= largest * 1.1 + 1e-3), "{name}: {out:?}");
                }
            }
        }
    }
}

#[test]
fn refused_arguments() {
    let shape = kv(2, 16, 32);
    let data = Tokens::new(shape, 10, 1);
    let (cache, sequence) = filled(&config(2, 2, 32, 4), &data);
    let good = spec(4, shape, Mask::Causal);
    let call = |spec: &AttentionSpec, q: &[f32], heads, dim, out: usize, lse: usize| {
        let q = HeadsView::nhd(q, q.len() / (heads * dim), heads, dim).unwrap();
        let (mut out, mut lse) = (vec![0.0; out], vec![0.0; lse]);
        homomorphic_quant::reference::attend(spec, &cache, &sequence, q, None, &mut out, &mut lse)
    };
    assert!(call(&good, &[0.0; 64], 4, 16, 128, 4).is_ok());
    for (case, result, named) in [
        ("other dims", call(&spec(4, kv(2, 32, 32), Mask::Causal), &[0.0; 128], 4, 32, 128, 4), "spec"),
        ("other heads", call(&spec(4, kv(4, 16, 32), Mask::Causal), &[0.0; 64], 4, 16, 128, 4), "spec"),
        ("query heads", call(&good, &[0.0; 32], 2, 16, 128, 4), "q"),
        ("short out", call(&good, &[0.0; 64], 4, 16, 127, 4), "out"),
        ("short lse", call(&good, &[0.0; 64], 4, 16, 128, 3), "lse"),
    ] {
        match result {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, named, "{case}"),
            other => panic!("{case}: {other:?}"),
        }
    }
    let mut q = [0.0; 64];
    q[5] = f32::NAN;
    assert!(matches!(call(&good, &q, 4, 16, 128, 4), Err(Error::NotFinite { argument: "q", index: 5, .. })));
    let _: &Config = cache.config();
}

/// 4096 tokens are decoded in milliseconds, so that tests with thousands of cases stay fast.
#[test]
fn decoding_four_thousand_tokens_is_quick() {
    let shape = kv(8, 128, 128);
    let data = Tokens::of_kinds(shape, 4096, (Inputs::Normal, Inputs::Normal), 1);
    let spec = spec(32, shape, Mask::Causal);
    let q = Inputs::Normal.values(32, 128, 7);
    for bits in [2, 4, 8] {
        let (cache, sequence) = filled(&config(bits, bits, 64, 4), &data);
        let best = (0..5)
            .map(|_| {
                let begin = std::time::Instant::now();
                attend(&spec, &cache, &sequence, &q, None);
                begin.elapsed()
            })
            .min()
            .unwrap();
        println!("{bits}-bit, 32 q / 8 kv heads, d 128: {best:?}");
        // Generous: other tests run at the same time. A quadratic or scalar path would take far longer.
        assert!(best.as_millis() < 150, "{best:?}");
    }
}
