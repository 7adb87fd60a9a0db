//! Matrices that a checkpoint has quantised: every code and zero point, scales of 0 and infinity, and NaN.

use cuda::storage::Storage;
use emulator::rig::Rig;
use half::{bf16, f16};
use hybrid_gemm::gpu::Plan;
use hybrid_gemm::{
    Codes, DType, Element, EpilogueSpec, Format, GemmConfig, MatrixView, PathChoice, Residency, Weights,
    reference,
};

use crate::common::quantised::QuantisedMatrix;
use crate::common::{device, random};
use crate::product::{Operands, call_each, fit};

emulator::device_test!(every_code, what_is_not_finite, a_zero_point_of_eight_is_symmetric);

/// Codes in turn, so that each occurs in each place of a fragment; `skipped` says which do not occur.
fn matrix(seed: u64, [n, k]: [usize; 2], format: Format, skipped: fn(u8) -> bool) -> QuantisedMatrix {
    let last = if matches!(format, Format::Int4ZeroPoints { .. }) { 15 } else { 255 };
    let known: Vec<u8> = (0..=last).filter(|code| !skipped(*code)).collect();
    let code = |_: &mut _, i| known[(i + i / k * 7) % known.len()];
    let mut rng = fastrand::Rng::with_seed(seed);
    QuantisedMatrix::new(&mut rng, [n, k], format, code, |_, i| (i % 16) as u8)
}

fn pack(matrix: &QuantisedMatrix) -> Weights {
    Weights::pack_codes(matrix.codes(), Residency::HbmFraction(0.5)).expect("packed weights")
}

/// Runs a product and gives O `[tokens, n]` beside the oracle's, with the sums of the absolute products.
fn outputs<R: Rig, X: Storage + Element>(
    rig: &R,
    case: &str,
    weights: Weights,
    x: Vec<X>,
    tokens: usize,
) -> (Vec<f32>, Vec<f64>, Vec<f64>) {
    let [n, k] = [weights.placement().tiling().n(), weights.placement().tiling().k()];
    let plain = EpilogueSpec::plain(DType::F32);
    let config = GemmConfig {
        epilogue: plain,
        path: PathChoice::Direct,
        ..GemmConfig::new(tokens, <X as Element>::DTYPE, device(5))
    };
    let plan = Plan::new(*weights.placement(), fit(rig, config)).unwrap_or_else(|e| panic!("{case}: {e}"));
    let operands = Operands::<X, f32> { x, ..Operands::new(1, tokens, weights, plain) };
    let schedules = plan.schedules(tokens).expect("schedules");
    let mut outcomes =
        call_each(rig, &plan, &operands, &[schedules], false).unwrap_or_else(|e| panic!("{case}: {e}"));
    let outcome = outcomes.remove(0);
    assert_eq!(outcome.fault, None, "{case}");
    assert_eq!(outcome.traffic, plan.predict(tokens).expect("a prediction").traffic, "{case}");
    let x = MatrixView::new(&operands.x, tokens, k).expect("x");
    let exact = reference::gemm::<X, f32>(x, &operands.weights, &plain, None, None).expect("the oracle");
    let w = operands.weights.dequantize();
    let terms = (0..tokens).flat_map(|token| {
        w.chunks(k)
            .map(move |w| x.row(token).iter().zip(w).map(|(x, w)| f64::from(x.to_f32() * w).abs()).sum())
    });
    let terms: Vec<f64> = terms.collect();
    assert_eq!((outcome.out.len(), exact.len()), (tokens * n, tokens * n), "{case}");
    (outcome.out, exact, terms)
}

/// Formats and tokens, one for each row of these formats.
fn kernels<R: Rig>(rig: &R, check: impl Fn(&R, Format, usize, bool)) {
    check(rig, Format::Int4ZeroPoints { group: 128 }, 11, true);
    check(rig, Format::Int4ZeroPoints { group: 32 }, 34, false);
    check(rig, Format::Fp8Rows, 5, false);
    check(rig, Format::Fp8Blocks, 9, true);
    check(rig, Format::Fp8Blocks, 40, true);
    check(rig, Format::Int4ZeroPoints { group: 64 }, 66, false);
    check(rig, Format::Int4ZeroPoints { group: 128 }, 70, true);
    check(rig, Format::Fp8Blocks, 70, true);
}

/// Every finite code in every place of a fragment, every zero point.
fn every_code<R: Rig>(rig: &R) {
    fn check<R: Rig, X: Storage + Element>(rig: &R, format: Format, tokens: usize) {
        let case = &format!("{tokens} tokens of {format} on {}, seeds 1 and 2", rig.name());
        let matrix = matrix(1, [136, 296], format, |code| code & 0x7f == 0x7f);
        let weights = pack(&matrix);
        let found = weights.dequantize();
        for (index, found) in found.iter().enumerate() {
            let exact = matrix.codes().weight(index / 296, index % 296);
            assert!((f64::from(*found) - exact).abs() <= 1e-7 * exact.abs(), "{case}: weight {index}");
        }
        let (found, exact, terms) = outputs::<R, X>(rig, case, weights, random(2, tokens * 296), tokens);
        for (index, ((found, exact), terms)) in found.iter().zip(&exact).zip(&terms).enumerate() {
            let error = (f64::from(*found) - exact).abs();
            assert!(error <= 3e-6 * terms, "{case}: output {index} is {found}, not {exact}");
        }
    }
    kernels(rig, |rig, format, tokens, as_bf16| match as_bf16 {
        true => check::<R, bf16>(rig, format, tokens),
        false => check::<R, f16>(rig, format, tokens),
    });
}

/// NaN codes and scales of infinity and 0 do what the oracle says, to the outputs that they reach and to no others. Infinite scales are
/// those of rows, or of groups and blocks that lie within K: on K's tail padding adds ∞ · 0, which is NaN where the oracle has ∞.
fn what_is_not_finite<R: Rig>(rig: &R) {
    fn check<R: Rig, X: Storage + Element>(rig: &R, format: Format, tokens: usize) {
        let case = &format!("{tokens} tokens of {format} on {}, seeds 3 and 4", rig.name());
        // Codes above every zero point, positive ones of fp8: products with an infinite scale have one sign.
        let [n, k] = [136, 296];
        let mut matrix = matrix(3, [n, k], format, |code| code == 0 || code & 0x7f == 0x7f || code >= 0x80);
        matrix.zeros.fill(0);
        let groups = matrix.groups.len() / n;
        match format {
            Format::Int4ZeroPoints { .. } => {
                matrix.groups[3 * groups] = f16::INFINITY;
                matrix.groups[64 * groups + 1] = f16::NEG_INFINITY;
                matrix.groups[70 * groups..71 * groups].fill(f16::ZERO);
                matrix.groups[135 * groups + groups - 1] = f16::NAN;
            }
            Format::Fp8Rows => {
                matrix.beside[3] = f32::INFINITY;
                matrix.beside[64] = f32::NEG_INFINITY;
                matrix.beside[70] = 0.0;
                matrix.beside[135] = f32::NAN;
                (matrix.codes[5 * k + 17], matrix.codes[100 * k + k - 1]) = (0x7f, 0xff);
            }
            _ => {
                // Rows 128 to 135 are infinite; those before have a block of zeros.
                matrix.beside[1] = 0.0;
                matrix.beside[3] = f32::INFINITY;
                (matrix.codes[5 * k + 17], matrix.codes[100 * k + k - 1]) = (0x7f, 0xff);
                // In a block of zeros too.
                matrix.codes[90 * k + 130] = 0x7f;
            }
        }
        let x: Vec<X> =
            random::<f32>(4, tokens * k).into_iter().map(|x| X::from_f32(x.abs() + 0.25)).collect();
        let (found, exact, terms) = outputs::<R, X>(rig, case, pack(&matrix), x, tokens);
        let mut seen = [0; 4];
        for (index, ((found, exact), terms)) in found.iter().zip(&exact).zip(&terms).enumerate() {
            let right = match exact {
                exact if exact.is_nan() => found.is_nan(),
                exact if exact.is_infinite() => f64::from(*found) == *exact,
                exact => (f64::from(*found) - exact).abs() <= 3e-6 * terms,
            };
            let kinds =
                [exact.is_nan(), *exact == f64::INFINITY, exact.is_finite(), *exact == f64::NEG_INFINITY];
            seen.iter_mut().zip(kinds).for_each(|(seen, is)| *seen += usize::from(is));
            assert!(right, "{case}: output [{}, {}] is {found}, not {exact}", index / n, index % n);
        }
        assert!(seen[0] > 0 && seen[1] > 0 && seen[2] > tokens * n / 2, "{case}: {seen:?}");
        assert_eq!(seen[3] > 0, format != Format::Fp8Blocks, "{case}: {seen:?}");
    }
    kernels(rig, |rig, format, tokens, as_bf16| match as_bf16 {
        true => check::<R, bf16>(rig, format, tokens),
        false => check::<R, f16>(rig, format, tokens),
    });
}

/// Symmetric int4 is int4 with zero points of 8, to the bit.
fn a_zero_point_of_eight_is_symmetric<R: Rig>(rig: &R) {
    let ([n, k], group, tokens) = ([72, 300], 128, 13);
    let w: Vec<bf16> = random(5, n * k);
    let matrix = hybrid_gemm::RowMajor::from_slice(&w, [n, k]).expect("a matrix");
    let symmetric =
        Weights::pack(matrix, Format::Int4 { group }, Residency::HbmFraction(0.5)).expect("weights");
    // The scale of a group is what quantisation finds, its codes are the weights over it.
    let groups = k.div_ceil(group);
    let (mut scales, mut codes) = (vec![f16::ZERO; n * groups], vec![0u8; n * k]);
    let dequantized = symmetric.dequantize();
    for row in 0..n {
        for index in 0..groups {
            let inputs = row * k + index * group..row * k + k.min((index + 1) * group);
            let values: Vec<f32> = w[inputs.clone()].iter().map(|value| value.to_f32()).collect();
            let scale =
                hybrid_gemm::quantized::quantize_int4(&values, &mut vec![0; values.len()]).expect("a scale");
            scales[row * groups + index] = scale;
            for (code, weight) in codes[inputs.clone()].iter_mut().zip(&dequantized[inputs]) {
                *code = (weight / scale.to_f32() + 8.0) as u8;
            }
        }
    }
    let zeros = vec![8; n * groups];
    let given = Codes::int4(&codes, &scales, &zeros, [n, k], group).expect("codes");
    let with_zero_points = Weights::pack_codes(given, Residency::HbmFraction(0.5)).expect("weights");
    assert_eq!(with_zero_points.dequantize(), dequantized, "seed 5");
    let x: Vec<bf16> = random(6, tokens * k);
    let case = &format!("on {}, seeds 5 and 6", rig.name());
    let (found, _, _) = outputs::<R, bf16>(rig, case, with_zero_points, x.clone(), tokens);
    let (expected, _, _) = outputs::<R, bf16>(rig, case, symmetric, x, tokens);
    assert!(found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()), "{case}: other bits");
}
