//! Rotary embedding against independently computed tables and its defining properties.

mod common;

use attention::Error;
use attention::rope::{Rope, RopeConfig, RopeLayout, RopeScaling, YarnAttention};
use attention::testing::{Comparison, Inputs, Tolerance};
use longkv_attention as attention;
use proptest::prelude::*;

type Planes = &'static [(usize, f64)];

fn yarn(factor: f64, original_positions: usize, attention: YarnAttention, truncate: bool) -> RopeScaling {
    RopeScaling::Yarn { factor, original_positions, beta_fast: 32.0, beta_slow: 1.0, attention, truncate }
}

/// Expected values are the output of `tests/rope_tables.py`.
#[test]
#[allow(clippy::excessive_precision, clippy::unreadable_literal)]
#[rustfmt::skip]
fn frequencies_of_real_configurations() {
    let llama3 = |factor| RopeScaling::Llama3 {
        factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original_positions: 8192,
    };
    let dynamic = |sequence_length| RopeScaling::DynamicNtk {
        factor: 2.0, original_positions: 4096, sequence_length,
    };
    let deepseek = YarnAttention::Mscale { mscale: 1.0, mscale_all_dim: 0.707 };
    let cases: [(&str, usize, f64, RopeScaling, f64, Planes); 9] = [
        ("plain, Llama 2", 128, 1e4, RopeScaling::None,
            1.0, &[(0, 1.0), (1, 0.8659643233600653), (16, 0.1), (24, 0.03162277660168379), (32, 0.01), (40, 0.003162277660168379), (48, 0.001), (63, 0.00011547819846894582)]),
        ("linear, 4x", 128, 1e4, RopeScaling::Linear { factor: 4.0 },
            1.0, &[(0, 0.25), (1, 0.21649108084001634), (16, 0.025), (24, 0.007905694150420948), (32, 0.0025), (40, 0.0007905694150420947), (48, 0.00025), (63, 2.8869549617236455e-05)]),
        ("dynamic, 2x at 10000 of 4096", 128, 1e4, dynamic(10000),
            1.0, &[(0, 1.0), (1, 0.8475170999915892), (16, 0.07085581742395913), (24, 0.018860937195171998), (32, 0.005020546862817429), (40, 0.001336407122345867), (48, 0.00035573495188022256), (63, 2.9740863992002142e-05)]),
        ("dynamic, shorter than training", 128, 1e4, dynamic(100),
            1.0, &[(0, 1.0), (1, 0.8659643233600653), (16, 0.1), (24, 0.03162277660168379), (32, 0.01), (40, 0.003162277660168379), (48, 0.001), (63, 0.00011547819846894582)]),
        ("llama3, Llama 3.1 8B", 128, 5e5, llama3(8.0),
            1.0, &[(0, 1.0), (1, 0.8146172338565447), (16, 0.03760603093086393), (24, 0.0072926647372171085), (32, 0.0005248461609929547), (40, 3.428102195952591e-05), (48, 6.647869871181236e-06), (63, 3.068925988914511e-07)]),
        ("llama3, Llama 3.2 1B", 64, 5e5, llama3(32.0),
            1.0, &[(0, 1.0), (1, 0.6636012376960885), (8, 0.03760603093086393), (12, 0.0072926647372171085), (16, 0.00042955679655936815), (20, 8.570255489881478e-06), (24, 1.661967467795309e-06), (31, 9.418306725434909e-08)]),
        ("yarn, Qwen 2.5", 128, 1e6, yarn(4.0, 32768, YarnAttention::Paper, true),
            1.138629436111989, &[(0, 1.0), (1, 0.8058421877614819), (16, 0.03162277660168379), (24, 0.005375321490790102), (32, 0.0006029411764705882), (40, 4.445698525097307e-05), (48, 7.905694150420949e-06), (63, 3.102344401879299e-07)]),
        ("yarn, DeepSeek", 64, 1e4, yarn(40.0, 4096, deepseek, true),
            1.0857263992561355, &[(0, 1.0), (1, 0.7498942093324559), (8, 0.1), (12, 0.026879360111431223), (16, 0.0055), (20, 0.0007905694150420945), (24, 2.5e-05), (31, 3.3338035804083097e-06)]),
        ("yarn, gpt-oss", 64, 1.5e5, yarn(32.0, 4096, YarnAttention::Paper, false),
            1.3465735902799727, &[(0, 1.0), (1, 0.6890443058881633), (8, 0.050813274815461475), (12, 0.006794959489732219), (16, 0.00045648391922324086), (20, 1.818833668168956e-05), (24, 4.0999784818029795e-06), (31, 3.0235114281192144e-07)]),
    ];
    for (case, dim, base, scaling, attention, planes) in cases {
        let (frequencies, factor) = RopeConfig { scaling, ..RopeConfig::new(dim, base) }.frequencies().unwrap();
        assert_eq!(frequencies.len(), dim / 2, "{case}");
        assert!((factor - attention).abs() < 1e-14, "{case}: attention factor {factor}, not {attention}");
        for &(plane, expected) in planes {
            let found = frequencies[plane];
            assert!((found - expected).abs() <= 1e-13 * expected, "{case}, plane {plane}: {found:e}, not {expected:e}");
        }
    }
}

#[test]
fn attention_factor_is_in_the_tables() {
    let scaling = yarn(4.0, 32, YarnAttention::Fixed(1.5), true);
    let rope = Rope::new(RopeConfig { scaling, ..RopeConfig::new(8, 100.0) }, 3).unwrap();
    assert_eq!(rope.attention_factor(), 1.5);
    assert_eq!(rope.cos()[..4], [1.5; 4], "position 0 turns nothing, but is scaled");
    assert_eq!(rope.sin()[..4], [0.0; 4]);
    let mut x: Vec<f32> = (1..=8).map(|i| i as f32).collect();
    rope.apply(&mut x, 1, &[0]).unwrap();
    assert_eq!(x, [1.5, 3.0, 4.5, 6.0, 7.5, 9.0, 10.5, 12.0]);
}

#[test]
fn one_plane_by_hand_in_both_layouts() {
    // Base 4 and four channels: frequencies 1 and 1/2.
    let x = [1.0f32, 2.0, 3.0, 4.0];
    let (s, c) = 3f64.sin_cos();
    let (s2, c2) = 1.5f64.sin_cos();
    for (layout, expected) in [
        (RopeLayout::HalfSplit, [c - 3.0 * s, 2.0 * c2 - 4.0 * s2, 3.0 * c + s, 4.0 * c2 + 2.0 * s2]),
        (RopeLayout::Interleaved, [c - 2.0 * s, 2.0 * c + s, 3.0 * c2 - 4.0 * s2, 4.0 * c2 + 3.0 * s2]),
    ] {
        let rope = Rope::new(RopeConfig { layout, ..RopeConfig::new(4, 4.0) }, 4).unwrap();
        let mut turned = x;
        rope.apply(&mut turned, 1, &[3]).unwrap();
        Comparison::new(&turned, &expected, Tolerance::new(1e-6, 0.0)).assert(format!("{layout:?}"));
    }
}

#[test]
fn partial_rotary_leaves_the_rest() {
    let config = RopeConfig { rotary_dim: 32, ..RopeConfig::new(96, 1e4) };
    let rope = Rope::new(config, 50).unwrap();
    let whole = Rope::new(RopeConfig::new(32, 1e4), 50).unwrap();
    let x = Inputs::Normal.values(2 * 3, 96, 5);
    let mut turned = x.clone();
    rope.apply(&mut turned, 3, &[49, 7]).unwrap();
    for (head, (before, after)) in x.chunks(96).zip(turned.chunks(96)).enumerate() {
        assert_eq!(before[32..], after[32..], "head {head}");
        let mut front = before[..32].to_vec();
        whole.apply(&mut front, 1, &[[49, 7][head / 3]]).unwrap();
        assert_eq!(front, after[..32], "head {head}: as a head of 32 channels");
    }
}

#[test]
fn long_positions_keep_their_angle() {
    // At a million tokens an angle computed in f32 is off by up to 0.03 rad. The fastest plane turns 1 rad per token.
    let rope = Rope::new(RopeConfig::new(4, 1e6), 1_000_001).unwrap();
    let (s, c) = 1e6f64.sin_cos();
    assert!((f64::from(rope.cos()[2 * 1_000_000]) - c).abs() < 1e-7);
    assert!((f64::from(rope.sin()[2 * 1_000_000]) - s).abs() < 1e-7);
}

#[test]
fn refused_configurations_name_the_argument() {
    let base = RopeConfig::new(64, 1e4);
    let scaled = |scaling| RopeConfig { scaling, ..RopeConfig::new(64, 1e4) };
    let yarn_with = |beta_fast, beta_slow, attention| {
        let (factor, original_positions, truncate) = (4.0, 64, true);
        scaled(RopeScaling::Yarn { factor, original_positions, beta_fast, beta_slow, attention, truncate })
    };
    let llama3 = |low_freq_factor, high_freq_factor| {
        scaled(RopeScaling::Llama3 { factor: 8.0, low_freq_factor, high_freq_factor, original_positions: 8 })
    };
    for (case, config, named) in [
        ("odd", RopeConfig { rotary_dim: 63, ..base.clone() }, "rotary_dim"),
        ("none", RopeConfig { rotary_dim: 0, ..base.clone() }, "rotary_dim"),
        ("wide", RopeConfig { rotary_dim: 66, ..base.clone() }, "rotary_dim"),
        ("base 1", RopeConfig { base: 1.0, ..base.clone() }, "base"),
        ("base NaN", RopeConfig { base: f64::NAN, ..base.clone() }, "base"),
        ("factor below 1", scaled(RopeScaling::Linear { factor: 0.5 }), "factor"),
        ("factor NaN", scaled(RopeScaling::Linear { factor: f64::NAN }), "factor"),
        ("yarn, no original", scaled(yarn(4.0, 0, YarnAttention::Paper, true)), "original_positions"),
        ("yarn, betas swapped", yarn_with(1.0, 32.0, YarnAttention::Paper), "beta_fast"),
        ("yarn, beta_slow 0", yarn_with(32.0, 0.0, YarnAttention::Paper), "beta_slow"),
        ("yarn, factor 0", yarn_with(32.0, 1.0, YarnAttention::Fixed(0.0)), "attention_factor"),
        ("llama3, factors swapped", llama3(4.0, 1.0), "high_freq_factor"),
        ("llama3, factors equal", llama3(4.0, 4.0), "high_freq_factor"),
        ("llama3, low 0", llama3(0.0, 4.0), "low_freq_factor"),
        (
            "dynamic, two channels",
            RopeConfig {
                rotary_dim: 2,
                ..scaled(RopeScaling::DynamicNtk { factor: 2.0, original_positions: 1, sequence_length: 1 })
            },
            "rotary_dim",
        ),
    ] {
        match Rope::new(config, 1) {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, named, "{case}"),
            other => panic!("{case}: {other:?}"),
        }
    }
}

#[test]
fn positions_past_the_tables_change_nothing() {
    let rope = Rope::new(RopeConfig::new(4, 1e4), 10).unwrap();
    let mut x = vec![1.0f32; 8];
    assert!(matches!(rope.apply(&mut x, 1, &[3, 10]), Err(Error::Argument { argument: "positions", .. })));
    assert!(matches!(rope.apply(&mut x, 1, &[3]), Err(Error::Argument { argument: "x", .. })));
    assert_eq!(x, [1.0; 8]);
    rope.apply(&mut [], 3, &[]).unwrap();
    for positions in [usize::MAX, usize::MAX / 64] {
        let refused = Rope::new(RopeConfig::new(64, 1e4), positions);
        assert!(
            matches!(refused, Err(Error::Argument { argument: "positions", .. })),
            "{positions} positions"
        );
    }
}

fn configs() -> impl Strategy<Value = RopeConfig> {
    let scalings = prop_oneof![
        Just(RopeScaling::None),
        (1.0..8.0).prop_map(|factor| RopeScaling::Linear { factor }),
        Just(RopeScaling::DynamicNtk { factor: 2.0, original_positions: 64, sequence_length: 200 }),
        Just(RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_positions: 64
        }),
        any::<bool>().prop_map(|truncate| yarn(8.0, 64, YarnAttention::Paper, truncate)),
    ];
    let dims =
        prop_oneof![Just((64, 64)), Just((96, 96)), Just((128, 128)), Just((256, 256)), Just((80, 32))];
    (dims, prop_oneof![Just(1e4), Just(5e5)], any::<bool>(), scalings).prop_map(
        |((head_dim, rotary_dim), base, half, scaling)| {
            let layout = if half { RopeLayout::HalfSplit } else { RopeLayout::Interleaved };
            RopeConfig { head_dim, rotary_dim, base, layout, scaling }
        },
    )
}

proptest! {
    #![proptest_config(common::config(64))]

    /// Scores depend on the distance of two positions only, and norms grow by the attention factor alone.
    #[test]
    fn scores_are_relative(config in configs(), a in 0u32..400, b in 0u32..400, shift in 0u32..100, seed in 0u64..1000) {
        let (dim, rotary) = (config.head_dim, config.rotary_dim);
        let rope = Rope::new(config.clone(), 500).unwrap();
        let turned = |seed: u64, position: u32| {
            let mut x = Inputs::Normal.values(1, dim, seed);
            rope.apply(&mut x, 1, &[position]).unwrap();
            x.into_iter().map(f64::from).collect::<Vec<f64>>()
        };
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
        let here = dot(&turned(seed, a), &turned(seed + 1, b));
        let there = dot(&turned(seed, a + shift), &turned(seed + 1, b + shift));
        prop_assert!((here - there).abs() < 2e-4 * dim as f64, "{config:?} at {a}, {b} by {shift}: {here} and {there}");

        let plain: Vec<f64> = Inputs::Normal.values(1, dim, seed).into_iter().map(f64::from).collect();
        let norm = |x: &[f64]| dot(x, x).sqrt();
        let expected = rope.attention_factor() * norm(&plain[..rotary]);
        let found = norm(&turned(seed, a)[..rotary]);
        prop_assert!((found - expected).abs() < 1e-5 * expected, "{config:?} at {a}: norm {found}, not {expected}");
    }

    /// Two layouts of one head are the same rotation under a permutation of channels.
    #[test]
    fn layouts_are_a_permutation(position in 0u32..500, seed in 0u64..1000) {
        let dim = 64;
        let x = Inputs::Normal.values(1, dim, seed);
        let rope = |layout| Rope::new(RopeConfig { layout, ..RopeConfig::new(dim, 1e4) }, 500).unwrap();
        let mut half = x.clone();
        rope(RopeLayout::HalfSplit).apply(&mut half, 1, &[position]).unwrap();
        // Channel j and j + 32 of the half-split head are channels 2j and 2j + 1 of the interleaved one.
        let interleave = |x: &[f32]| (0..dim).map(|c| x[c / 2 + (c % 2) * dim / 2]).collect::<Vec<f32>>();
        let mut pairs = interleave(&x);
        rope(RopeLayout::Interleaved).apply(&mut pairs, 1, &[position]).unwrap();
        prop_assert_eq!(interleave(&half), pairs);
    }
}
