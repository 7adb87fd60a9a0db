//! Conversions bit by bit, approximate functions within their stated error.

use cuda::kernels::conformance::{Approximation, Conversion, Convert, MathApprox};
use emulator::rig::Rig;
use half::{bf16, f16};

use crate::data::Random;

emulator::device_test!(
    widening_is_exact,
    narrowing_rounds_to_nearest_even,
    packing_keeps_the_order,
    tf32_rounds_ties_away,
    fp8_widening_is_exact,
    fp8_pairs_of_words_are_exact,
    fp8_narrowing_saturates,
    approximations_keep_their_error,
);

fn convert<R: Rig>(rig: &R, conversion: Conversion, first: &[u32], second: &[u32]) -> Vec<u32> {
    let kernel = Convert::prepare(rig.device()).expect("prepare");
    let n = first.len();
    let mut out = rig.poisoned::<u32>(n);
    let (first, second) = (rig.upload(first), rig.upload(second));
    let (first, second) = (rig.view(&first), rig.view(&second));
    kernel.launch(rig.queue(), conversion, n, &first, &second, &mut rig.view_mut(&mut out)).expect("launch");
    rig.download(&out)
}

/// Compares a conversion with `expected`, where `None` stands for any NaN according to `is_nan`.
fn check<R: Rig>(
    rig: &R,
    conversion: Conversion,
    input: &[u32],
    is_nan: impl Fn(u32) -> bool,
    expected: impl Fn(u32) -> Option<u32>,
) {
    let found = convert(rig, conversion, input, input);
    let agrees = |found: u32, input: u32| match expected(input) {
        Some(bits) => found == bits,
        None => is_nan(found),
    };
    let wrong: Vec<usize> = (0..input.len()).filter(|&i| !agrees(found[i], input[i])).collect();
    if let Some(&i) = wrong.first() {
        panic!(
            "{conversion:?}, {}: {} of {} differ; first {:#010x}: found {:#x}, expected {:x?}",
            rig.name(),
            wrong.len(),
            input.len(),
            input[i],
            found[i],
            expected(input[i])
        );
    }
}

fn nan_f32(bits: u32) -> bool {
    f32::from_bits(bits).is_nan()
}

/// The bits of `value`, or `None` for NaN.
fn bits_of(value: f32) -> Option<u32> {
    (!value.is_nan()).then_some(value.to_bits())
}

fn widening_is_exact<R: Rig>(rig: &R) {
    let all: Vec<u32> = (0..=0xffff).collect();
    for conversion in [Conversion::F32FromF16, Conversion::SoftwareF32FromF16, Conversion::F32FromLowF16] {
        check(rig, conversion, &all, nan_f32, |x| bits_of(f16::from_bits(x as u16).to_f32()));
    }
    check(rig, Conversion::F32FromBf16, &all, nan_f32, |x| bits_of(bf16::from_bits(x as u16).to_f32()));
    let high: Vec<u32> = all.iter().map(|x| x << 16 | 0x1234).collect();
    check(rig, Conversion::F32FromHighF16, &high, nan_f32, |x| {
        bits_of(f16::from_bits((x >> 16) as u16).to_f32())
    });
    check(rig, Conversion::F32FromHighBf16, &high, nan_f32, |x| {
        bits_of(bf16::from_bits((x >> 16) as u16).to_f32())
    });
}

/// Hard cases for narrowing: specials, random bits, and for each narrow value the f32 just below, at and just above the
/// midpoint to the next one.
fn narrowing_inputs(widened: impl Iterator<Item = f32>) -> Vec<u32> {
    let mut inputs = vec![
        0,
        0x8000_0000,
        1,
        0x007f_ffff,
        0x0080_0000,
        f32::MAX.to_bits(),
        f32::MIN.to_bits(),
        f32::INFINITY.to_bits(),
        f32::NEG_INFINITY.to_bits(),
        0x7fc0_0000,
        0xffc0_0001,
        0x7f80_0001,
    ];
    let mut random = Random::new(31);
    inputs.extend(random.words(20_000));
    let mut values: Vec<f32> = widened.filter(|value| value.is_finite() && *value >= 0.0).collect();
    values.sort_by(f32::total_cmp);
    values.push(values.last().copied().unwrap_or(0.0) * 1.125);
    for neighbours in values.windows(2) {
        let midpoint = ((f64::from(neighbours[0]) + f64::from(neighbours[1])) / 2.0) as f32;
        for bits in [midpoint.to_bits().saturating_sub(1), midpoint.to_bits(), midpoint.to_bits() + 1] {
            inputs.extend([bits, bits | 0x8000_0000]);
        }
    }
    inputs
}

fn narrowing_rounds_to_nearest_even<R: Rig>(rig: &R) {
    let inputs = narrowing_inputs((0..=0x7c00).map(|bits| f16::from_bits(bits).to_f32()));
    let expected = |x: u32| {
        let x = f32::from_bits(x);
        (!x.is_nan()).then(|| u32::from(f16::from_f32(x).to_bits()))
    };
    for conversion in [Conversion::F16FromF32, Conversion::SoftwareF16FromF32] {
        check(rig, conversion, &inputs, |x| f16::from_bits(x as u16).is_nan(), expected);
    }
    let inputs = narrowing_inputs((0..=0x7f80).map(|bits| bf16::from_bits(bits).to_f32()));
    let expected = |x: u32| {
        let x = f32::from_bits(x);
        (!x.is_nan()).then(|| u32::from(bf16::from_f32(x).to_bits()))
    };
    for conversion in [Conversion::Bf16FromF32, Conversion::SoftwareBf16FromF32] {
        check(rig, conversion, &inputs, |x| bf16::from_bits(x as u16).is_nan(), expected);
    }
}

fn packing_keeps_the_order<R: Rig>(rig: &R) {
    let mut random = Random::new(32);
    let mut values = || (0..4000).map(|_| random.unit() * 100.0).collect::<Vec<f32>>();
    let (low, high) = (values(), values());
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<u32>>();
    let pack = |low: u16, high: u16| u32::from(low) | u32::from(high) << 16;
    type Pack<'a> = &'a dyn Fn(f32, f32) -> u32;
    let byte = |table: &[f32], x: f32| u32::from(nearest_fp8(table, x));
    let (e4m3, e5m2) = (fp8_table(decode_e4m3), fp8_table(decode_e5m2));
    let cases: [(Conversion, Pack<'_>); 4] = [
        (Conversion::F16x2FromF32, &|a, b| pack(f16::from_f32(a).to_bits(), f16::from_f32(b).to_bits())),
        (Conversion::Bf16x2FromF32, &|a, b| pack(bf16::from_f32(a).to_bits(), bf16::from_f32(b).to_bits())),
        (Conversion::E4m3x2FromF32, &|a, b| byte(&e4m3, a) | byte(&e4m3, b) << 8),
        (Conversion::E5m2x2FromF32, &|a, b| byte(&e5m2, a) | byte(&e5m2, b) << 8),
    ];
    for (conversion, expected) in cases {
        let found = convert(rig, conversion, &bits(&low), &bits(&high));
        for i in 0..low.len() {
            let expected = expected(low[i], high[i]);
            assert_eq!(found[i], expected, "{conversion:?}, {}: {} and {}", rig.name(), low[i], high[i]);
        }
    }
    let pairs: Vec<u32> = (0..=0xffff).collect();
    type Decode = fn(u8) -> f32;
    let cases: [(Conversion, Decode); 2] =
        [(Conversion::F16x2FromE4m3x2, decode_e4m3), (Conversion::F16x2FromE5m2x2, decode_e5m2)];
    for (conversion, decode) in cases {
        let found = convert(rig, conversion, &pairs, &pairs);
        for (&pair, &found) in pairs.iter().zip(&found) {
            for (byte, half) in [(pair as u8, found as u16), ((pair >> 8) as u8, (found >> 16) as u16)] {
                let (value, half) = (decode(byte), f16::from_bits(half).to_f32());
                let same = value.to_bits() == half.to_bits() || value.is_nan() && half.is_nan();
                assert!(same, "{conversion:?}, {}: {pair:#06x} gave {found:#010x}", rig.name());
            }
        }
    }
}

fn tf32_rounds_ties_away<R: Rig>(rig: &R) {
    let mut random = Random::new(33);
    let mut inputs = random.words(20_000);
    inputs.extend((0..2000).flat_map(|i| [0x3f80_0fff, 0x3f80_1000, 0x3f80_1001].map(|x| x + (i << 13))));
    inputs.retain(|&x| f32::from_bits(x).abs() < 1e38); // finite before and after
    let expected = |x: u32| {
        // The nearest multiple of 2^13 in the bits of the magnitude; a tie goes to the larger magnitude.
        let (sign, magnitude) = (x & 0x8000_0000, x & 0x7fff_ffff);
        let below = magnitude >> 13 << 13;
        Some(sign | if magnitude - below >= 1 << 12 { below + (1 << 13) } else { below })
    };
    check(rig, Conversion::Tf32FromF32, &inputs, nan_f32, expected);
}

/// The value of an fp8 E4M3 code (OCP 8-bit floating point): bias 7, no infinity, NaN where all bits are set.
fn decode_e4m3(code: u8) -> f32 {
    let sign = if code & 0x80 != 0 { -1.0 } else { 1.0 };
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * mantissa / 8.0 * 2f32.powi(-6),
        _ => sign * (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    }
}

/// The value of an fp8 E5M2 code: bias 15, infinities and NaN as in IEEE formats.
fn decode_e5m2(code: u8) -> f32 {
    let sign = if code & 0x80 != 0 { -1.0 } else { 1.0 };
    let (exponent, mantissa) = (i32::from(code >> 2 & 31), f32::from(code & 3));
    match (exponent, code & 3) {
        (31, 0) => sign * f32::INFINITY,
        (31, _) => f32::NAN,
        (0, _) => sign * mantissa / 4.0 * 2f32.powi(-14),
        _ => sign * (1.0 + mantissa / 4.0) * 2f32.powi(exponent - 15),
    }
}

/// Values of the codes 0, 1, … as long as they are finite.
fn fp8_table(decode: fn(u8) -> f32) -> Vec<f32> {
    (0..0x80).map(decode).take_while(|value| value.is_finite()).collect()
}

/// The code nearest to `x`, ties to the even code, saturating.
fn nearest_fp8(table: &[f32], x: f32) -> u8 {
    // Saturated first: beyond the largest value, distances to all codes may round to the same f64.
    let magnitude = f64::from(x.abs().min(table[table.len() - 1]));
    let distance = |code: usize| (f64::from(table[code]) - magnitude).abs();
    let mut best = 0;
    for code in 1..table.len() {
        if distance(code) < distance(best) || distance(code) == distance(best) && code % 2 == 0 {
            best = code;
        }
    }
    best as u8 | if x.is_sign_negative() { 0x80 } else { 0 }
}

fn fp8_widening_is_exact<R: Rig>(rig: &R) {
    let all: Vec<u32> = (0..=0xff).collect();
    check(rig, Conversion::F32FromE4m3, &all, nan_f32, |x| bits_of(decode_e4m3(x as u8)));
    check(rig, Conversion::F32FromE5m2, &all, nan_f32, |x| bits_of(decode_e5m2(x as u8)));
    type Decode = fn(u8) -> f32;
    let cases: [(Conversion, Decode); 2] =
        [(Conversion::SoftwareF16FromE4m3, decode_e4m3), (Conversion::SoftwareF16FromE5m2, decode_e5m2)];
    for (conversion, decode) in cases {
        let is_nan = |x: u32| f16::from_bits(x as u16).is_nan();
        check(rig, conversion, &all, is_nan, |x| {
            let value = decode(x as u8);
            (!value.is_nan()).then(|| u32::from(f16::from_f32(value).to_bits()))
        });
    }
}

/// Every pair of codes, with others in the word's other half: values, signs of zeros, subnormals and NaN.
fn fp8_pairs_of_words_are_exact<R: Rig>(rig: &R) {
    let pairs: Vec<u32> = (0..=0xffff).collect();
    // The other half holds anything, NaN among it.
    let low: Vec<u32> = pairs.iter().map(|pair| pair | (pair ^ 0x7f80) << 16).collect();
    let high: Vec<u32> = pairs.iter().map(|pair| pair << 16 | (pair ^ 0x00ff)).collect();
    type Widen = fn(u16) -> f32;
    let f16_value: Widen = |bits| f16::from_bits(bits).to_f32();
    let bf16_value: Widen = |bits| bf16::from_bits(bits).to_f32();
    for (conversion, words, widen) in [
        (Conversion::F16x2FromLowE4m3x4, &low, f16_value),
        (Conversion::F16x2FromHighE4m3x4, &high, f16_value),
        (Conversion::ArithmeticF16x2FromLowE4m3x4, &low, f16_value),
        (Conversion::ArithmeticF16x2FromHighE4m3x4, &high, f16_value),
        (Conversion::Bf16x2FromLowE4m3x4, &low, bf16_value),
        (Conversion::Bf16x2FromHighE4m3x4, &high, bf16_value),
    ] {
        let found = convert(rig, conversion, words, words);
        for (&pair, &found) in pairs.iter().zip(&found) {
            for (byte, half) in [(pair as u8, found as u16), ((pair >> 8) as u8, (found >> 16) as u16)] {
                let (value, half) = (decode_e4m3(byte), widen(half));
                let same = value.to_bits() == half.to_bits() || value.is_nan() && half.is_nan();
                assert!(same, "{conversion:?}, {}: {pair:#06x} gave {found:#010x}", rig.name());
            }
        }
    }
}

fn fp8_narrowing_saturates<R: Rig>(rig: &R) {
    type Decode = fn(u8) -> f32;
    let cases: [(Conversion, Decode); 4] = [
        (Conversion::E4m3FromF32, decode_e4m3),
        (Conversion::SoftwareE4m3FromF32, decode_e4m3),
        (Conversion::E5m2FromF32, decode_e5m2),
        (Conversion::SoftwareE5m2FromF32, decode_e5m2),
    ];
    for (conversion, decode) in cases {
        let table = fp8_table(decode);
        let inputs = narrowing_inputs(table.iter().copied());
        let expected = |x: u32| {
            let x = f32::from_bits(x);
            (!x.is_nan()).then(|| u32::from(nearest_fp8(&table, x)))
        };
        check(rig, conversion, &inputs, |x| decode(x as u8).is_nan(), expected);
    }
}

/// Flushed to zero before it is used.
const SUBNORMAL: f32 = f32::MIN_POSITIVE / 2.0;

fn approximations_keep_their_error<R: Rig>(rig: &R) {
    let kernel = MathApprox::prepare(rig.device()).expect("prepare");
    let seed = 34;
    let mut random = Random::new(seed);
    let run = |function: Approximation, inputs: &[f32]| {
        let mut out = rig.poisoned::<f32>(inputs.len());
        let input = rig.upload(inputs);
        let launched = kernel.launch(
            rig.queue(),
            function,
            inputs.len(),
            &rig.view(&input),
            &mut rig.view_mut(&mut out),
        );
        launched.expect("launch");
        rig.download(&out)
    };
    // One ulp of the correctly rounded result; results here are normal.
    let ulp =
        |exact: f64| f64::from(f32::from_bits((exact as f32).abs().to_bits() + 1) - (exact as f32).abs());

    let inputs: Vec<f32> = (0..20_000).map(|_| random.unit() * 125.0).collect();
    for (x, y) in inputs.iter().zip(run(Approximation::Exp2, &inputs)) {
        let exact = f64::from(*x).exp2();
        // 2 ulp from the correctly rounded value, which is half an ulp from the exact one.
        assert!((f64::from(y) - exact).abs() <= 2.5 * ulp(exact), "exp2({x}) = {y}, {}", rig.name());
    }
    let inputs: Vec<f32> = (0..20_000)
        .map(|i| if i % 2 == 0 { (random.unit() * 120.0).exp2() } else { 1.25 + random.unit() * 0.74 })
        .collect();
    for (x, y) in inputs.iter().zip(run(Approximation::Log2, &inputs)) {
        let exact = f64::from(*x).log2();
        let bound = if *x > 0.5 && *x < 2.0 { 1.0 } else { exact.abs() } * 2f64.powi(-22);
        assert!((f64::from(y) - exact).abs() <= bound + ulp(exact), "log2({x}) = {y}, {}", rig.name());
    }
    let inputs: Vec<f32> = (0..20_000)
        .map(|_| (random.unit() * 120.0).exp2() * if random.unit() < 0.0 { -1.0 } else { 1.0 })
        .collect();
    for (x, y) in inputs.iter().zip(run(Approximation::Reciprocal, &inputs)) {
        let exact = 1.0 / f64::from(*x);
        assert!((f64::from(y) - exact).abs() <= 1.5 * ulp(exact), "1 / {x} = {y}, {}", rig.name());
    }

    let infinity = f32::INFINITY;
    let specials: [(Approximation, &[f32], &[f32]); 3] = [
        (
            Approximation::Exp2,
            &[-infinity, infinity, 0.0, -0.0, -1000.0, 1000.0, SUBNORMAL, -130.0],
            &[0.0, infinity, 1.0, 1.0, 0.0, infinity, 1.0, 0.0],
        ),
        (
            Approximation::Log2,
            &[0.0, -0.0, infinity, SUBNORMAL, -SUBNORMAL],
            &[-infinity, -infinity, infinity, -infinity, -infinity],
        ),
        (
            Approximation::Reciprocal,
            &[0.0, -0.0, infinity, -infinity, SUBNORMAL, -SUBNORMAL, 1.5 * 2f32.powi(126), f32::MIN],
            &[infinity, -infinity, 0.0, -0.0, infinity, -infinity, 0.0, -0.0],
        ),
    ];
    for (function, inputs, expected) in specials {
        let found: Vec<u32> = run(function, inputs).iter().map(|x| x.to_bits()).collect();
        let expected: Vec<u32> = expected.iter().map(|x| x.to_bits()).collect();
        assert_eq!(found, expected, "{function:?} of {inputs:?}, {}", rig.name());
    }
    // Nothing promises that these are exact.
    for (y, exact) in run(Approximation::Log2, &[1.0, 2.0]).into_iter().zip([0.0, 1.0]) {
        assert!((y - exact).abs() <= 2f32.powi(-22), "a logarithm of {exact} is {y}, {}", rig.name());
    }
    for (function, input) in [
        (Approximation::Exp2, f32::NAN),
        (Approximation::Log2, f32::NAN),
        (Approximation::Log2, -1.0),
        (Approximation::Reciprocal, f32::NAN),
    ] {
        assert!(run(function, &[input])[0].is_nan(), "{function:?}({input}) is a number, {}", rig.name());
    }
}
