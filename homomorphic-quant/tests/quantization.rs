//! How much is lost: bounds per element, measured errors, and which axes to share scales along.

mod common;

use attention::testing::Inputs;
use attention::{DType, Mask};
use common::{attend, filled, kv, oracle, relative, spec, to_f64};
use homomorphic_quant::page::HeadGeometry;
use homomorphic_quant::quantizer::{Group, store};
use homomorphic_quant::{Bits, BlockPlace, Config, HeadBits, HeadBlock, Layout, Rounding};

/// Relative RMS error of N(0, 1) in groups of so many elements.
fn rms(bits: Bits, count: usize, rounding: Rounding) -> f64 {
    let values = Inputs::Normal.values(40_000 / count, count, 5);
    let levels = bits.levels();
    let mut error = 0.0;
    for (g, values) in values.chunks_exact(count).enumerate() {
        let group = Group::fit(values.iter().copied(), levels, DType::F32);
        for (i, &x) in values.iter().enumerate() {
            let code = match rounding {
                Rounding::Nearest => group.code(x, levels),
                Rounding::Stochastic { seed } => {
                    let tensor = homomorphic_quant::quantizer::Tensor::K;
                    let noise = homomorphic_quant::quantizer::noise(seed, 0, tensor, 0, g as u32, i as u32);
                    group.code_stochastic(x, levels, noise)
                }
            };
            error += (group.value(code) - f64::from(x)).powi(2);
        }
    }
    (error / values.len() as f64).sqrt()
}

#[test]
fn errors_of_normal_values() {
    let nearest = [
        (Bits::Two, [0.327, 0.393, 0.449, 0.502]),
        (Bits::Four, [0.065, 0.078, 0.090, 0.100]),
        (Bits::Eight, [0.0038, 0.0046, 0.0053, 0.0059]),
    ];
    for (bits, expected) in nearest {
        for (count, expected) in [16, 32, 64, 128].into_iter().zip(expected) {
            let found = rms(bits, count, Rounding::Nearest);
            assert!((found / expected - 1.0).abs() < 0.03, "{bits} Π {count}: {found}, not {expected}");
            let stochastic = rms(bits, count, Rounding::Stochastic { seed: 3 });
            let expected = expected * std::f64::consts::SQRT_2;
            assert!(
                (stochastic / expected - 1.0).abs() < 0.04,
                "{bits} Π {count}: {stochastic}, not {expected}"
            );
        }
    }
}

/// `|x - x̂|` is at most half a step (a whole one when stochastic) and what rounding the scale costs.
#[test]
fn every_element_is_within_its_step() {
    for layout in [Layout::PerChannelKey, Layout::PerTokenKey] {
        for dtype in [DType::F16, DType::BF16] {
            for bits in Bits::ALL {
                for rounding in [Rounding::Nearest, Rounding::Stochastic { seed: 9 }] {
                    for kind in Inputs::ALL {
                        let name = format!("{layout:?} {dtype} {bits} {rounding:?} {kind:?}");
                        let config = Config::new(bits, bits)
                            .with_partition(32)
                            .unwrap()
                            .with_layout(layout)
                            .with_dtype(dtype)
                            .unwrap();
                        let head = HeadGeometry::new(&config, HeadBits { k: bits, v: bits }, 48, 64).unwrap();
                        let round = |values: Vec<f32>| -> Vec<f32> {
                            values.into_iter().map(|x| store(x, dtype)).collect()
                        };
                        let (k, v) = (round(kind.values(32, 48, 1)), round(kind.values(32, 64, 2)));
                        let place = BlockPlace { layer: 3, kv_head: 2, token: 36 };
                        let block = HeadBlock::quantize(&head, rounding, place, &k, &v).unwrap();
                        let step = if rounding == Rounding::Nearest { 0.5 } else { 1.0 };
                        // The scale is off by half a unit in its last place, over all levels; position and its
                        // reciprocal round in f32.
                        let levels = f64::from(bits.levels());
                        let slack = levels * dtype.epsilon() / 2.0 + levels * 1e-6;
                        let check =
                            |what: &str, x: &[f32], back: Vec<f64>, group: &dyn Fn(usize) -> Group| {
                                for (i, (&x, back)) in x.iter().zip(back).enumerate() {
                                    let bound = f64::from(group(i).scale) * (step + slack);
                                    let error = (back - f64::from(x)).abs();
                                    assert!(error <= bound, "{name}: {what} {i}: {x} became {back}");
                                    if kind == Inputs::Constant {
                                        assert_eq!(back, f64::from(x), "{name}: constant groups are exact");
                                    }
                                }
                            };
                        check("key", &k, block.keys(&head), &|i| {
                            block.k_groups[head.k_group(i / 48, i % 48)]
                        });
                        check("value", &v, block.values(&head), &|i| {
                            block.v_groups[head.v_group(i / 64, i % 64)]
                        });
                    }
                }
            }
        }
    }
}

/// The mean over many seeds is the value itself, for every element; noise differs from element to element.
#[test]
fn stochastic_rounding_is_unbiased_and_reproducible() {
    let config = Config::new(Bits::Two, Bits::Four);
    let head = HeadGeometry::new(&config, config.bits(), 32, 32).unwrap();
    let round =
        |values: Vec<f32>| -> Vec<f32> { values.into_iter().map(|x| store(x, DType::BF16)).collect() };
    let (k, v) = (round(Inputs::Normal.values(64, 32, 1)), round(Inputs::Normal.values(64, 32, 2)));
    let place = BlockPlace { layer: 1, kv_head: 0, token: 4 };
    let quantize =
        |seed, place| HeadBlock::quantize(&head, Rounding::Stochastic { seed }, place, &k, &v).unwrap();
    assert_eq!(quantize(7, place), quantize(7, place));
    for (what, other) in [
        ("seed", quantize(8, place)),
        ("seed's upper half", quantize(7 | 1 << 40, place)),
        ("layer", quantize(7, BlockPlace { layer: 2, ..place })),
        ("head", quantize(7, BlockPlace { kv_head: 1, ..place })),
        ("token", quantize(7, BlockPlace { token: 5, ..place })),
    ] {
        assert_ne!(quantize(7, place).k_codes, other.k_codes, "noise depends on the {what}");
    }

    let runs = 400;
    let mut means = vec![0.0; k.len()];
    for seed in 0..runs {
        let keys = quantize(seed, place).keys(&head);
        means.iter_mut().zip(keys).for_each(|(mean, x)| *mean += x / runs as f64);
    }
    let groups = quantize(0, place).k_groups;
    let (mut worst, mut bias) = (0.0f64, 0.0);
    for (i, (mean, &x)) in means.iter().zip(&k).enumerate() {
        let scale = f64::from(groups[head.k_group(i / 32, i % 32)].scale);
        // What clamping at the top takes (the scale was rounded down) is no bias of the rounding.
        let error = (mean - f64::from(x)) / scale;
        worst = worst.max(error.abs());
        bias += error / k.len() as f64;
    }
    // One step of noise has a deviation of at most 1/2; over 400 runs 0.025, over all elements far less.
    assert!(worst < 0.125 && bias.abs() < 0.003, "worst {worst} steps, mean {bias} steps");
}

/// Keys with channel outliers: the reason for the ATC '26 axes.
#[test]
fn per_channel_keys_beat_per_token_keys_on_channel_outliers() {
    let shape = kv(2, 128, 128);
    let tokens = common::Tokens::new(shape, 4 + 8 * 64, 21);
    let spec = spec(8, shape, Mask::Causal);
    let q = Inputs::Normal.values(16 * 8, 128, 5);
    let exact = {
        let keys = attention::RaggedKv::single(tokens.k(), tokens.v()).unwrap();
        let q = attention::HeadsView::nhd(&q, 16, 8, 128).unwrap();
        let q = attention::RaggedView::single(q).unwrap();
        attention::reference::prefill(&spec, &q, &keys, attention::reference::Probabilities::Exact).unwrap()
    };
    for bits in [2, 4, 8] {
        let errors = |layout| {
            let config = common::config(bits, bits, 64, 4).with_layout(layout);
            let (cache, sequence) = filled(&config, &tokens);
            let of_cache: Vec<f32> =
                oracle(&spec, &cache, &sequence, &q).out.iter().map(|&x| x as f32).collect();
            let all = attend(&spec, &cache, &sequence, &q, None).0;
            (relative(&of_cache, &exact.out), relative(&all, &exact.out))
        };
        let (channel, token) = (errors(Layout::PerChannelKey), errors(Layout::PerTokenKey));
        println!(
            "{bits}-bit, error of the cache and with 8-bit Q and P: per-channel keys {channel:.4?}, per-token keys {token:.4?}"
        );
        assert!(channel.0 * 1.5 < token.0, "{bits}-bit: per channel {channel:?}, per token {token:?}");
        // With 8-bit keys the 8-bit queries lose more than the cache does, whatever its axes.
        assert!(
            bits == 8 || channel.1 * 1.5 < token.1,
            "{bits}-bit: per channel {channel:?}, per token {token:?}"
        );
    }
}

/// 8-bit codes are close to attention over the original keys and values.
#[test]
fn eight_bits_are_close_to_full_precision() {
    let shape = kv(2, 128, 128);
    let tokens = common::Tokens::of_kinds(shape, 300, (Inputs::Normal, Inputs::Normal), 2);
    let spec = spec(16, shape, Mask::Causal);
    let q = Inputs::Normal.values(10 * 16, 128, 5);
    let (cache, sequence) = filled(&common::config(8, 8, 64, 4), &tokens);
    let keys = attention::RaggedKv::single(tokens.k(), tokens.v()).unwrap();
    let view = attention::RaggedView::single(attention::HeadsView::nhd(&q, 10, 16, 128).unwrap()).unwrap();
    let exact =
        attention::reference::prefill(&spec, &view, &keys, attention::reference::Probabilities::Exact)
            .unwrap();
    let error = relative(&attend(&spec, &cache, &sequence, &q, None).0, &exact.out);
    assert!(error < 0.05, "relative error {error}");
}

/// Rounding stochastically, the mean of many caches approaches the exact attention output on average inputs.
#[test]
fn stochastic_outputs_average_out() {
    let shape = kv(1, 64, 64);
    let tokens = common::Tokens::of_kinds(shape, 4 + 4 * 32, (Inputs::Normal, Inputs::Normal), 8);
    let spec = spec(2, shape, Mask::Causal);
    // Small queries: the softmax is nearly linear, so that only the noise of values and the rounding matter.
    let q: Vec<f32> = Inputs::Normal.values(2, 64, 5).iter().map(|x| x * 0.05).collect();
    let nearest = filled(&common::config(8, 8, 32, 4), &tokens);
    let expected = oracle(&spec, &nearest.0, &nearest.1, &q).out;
    let runs = 64;
    let (mut mean, mut single) = (vec![0.0f32; expected.len()], 0.0);
    for seed in 0..runs {
        let config = common::config(2, 2, 32, 4).with_rounding(Rounding::Stochastic { seed });
        let (cache, sequence) = filled(&config, &tokens);
        let (out, _) = attend(&spec, &cache, &sequence, &q, None);
        single += relative(&out, &expected) / runs as f64;
        mean.iter_mut().zip(&out).for_each(|(mean, x)| *mean += x / runs as f32);
    }
    let averaged = relative(&mean, &expected);
    assert!(averaged < 0.3 * single, "one run is off by {single}, the mean of {runs} by {averaged}");
    assert!(to_f64(&mean).iter().all(|x| x.is_finite()));
}
