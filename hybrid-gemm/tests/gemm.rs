//! The product on the CPU against the oracle: shapes, formats, paths, epilogues; and its traffic against the prediction.

mod common;

use common::{compare, device, prepare, random, run};
use half::{bf16, f16};
use hybrid_gemm::cpu::{Gemm, GemmArgs};
use hybrid_gemm::epilogue::Activation;
use hybrid_gemm::{
    Alpha, DType, DeviceProfile, Element, EpilogueSpec, Format, GemmConfig, GemmPlan, MatrixView,
    MatrixViewMut, Path, PathChoice, Residency, RowMajor, Summation, Tiling, Weights, reference,
};

/// The paths of a product of several panels; those that need more are left to the plan.
const PATHS: [Path; 6] = [
    Path::Direct { alpha: 1.0 },
    Path::Direct { alpha: 0.0 },
    Path::Direct { alpha: 0.5 },
    Path::Multicast { cluster: 2 },
    Path::Staged { slab_columns: 1 },
    Path::Staged { slab_columns: 3 },
];

fn config(tokens: usize, dtype: DType) -> GemmConfig {
    GemmConfig::new(tokens.max(1), dtype, device(8))
}

/// Size of an output's terms: what its rounding errors are measured by.
fn scale(x: &[f32], w: &[f32], k: usize) -> f64 {
    let norm = |values: &[f32]| {
        let square = |row: &[f32]| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        values.chunks(k).map(square).fold(0.0, f64::max)
    };
    norm(x) * norm(w)
}

fn widened<E: Element>(values: &[E]) -> Vec<f32> {
    values.iter().map(|value| value.to_f32()).collect()
}

/// Any M from 0, any N and K, every format and placement.
#[test]
fn every_shape_and_format() {
    for (case, tokens, n, k) in [
        ("nothing", 0, 8, 16),
        ("one by one", 1, 1, 1),
        ("smaller than a tile", 2, 8, 16),
        ("one tile", 7, 64, 64),
        ("tails", 9, 72, 80),
        ("odd", 3, 129, 257),
        ("several K tiles", 33, 200, 1000),
        ("a panel", 64, 130, 96),
        ("two panels", 257, 70, 72),
    ] {
        for format in Format::ALL {
            let (x, w): (Vec<f32>, Vec<bf16>) = (random(1, tokens * k), random(2, n * k));
            for residency in [Residency::Host, Residency::Hbm, Residency::HbmFraction(0.5)] {
                let case = format!("{case}: {tokens} × [{n}, {k}], {format}, {residency:?}, seeds 1 and 2");
                let matrix = RowMajor::from_slice(&w, [n, k]).unwrap();
                let tiling = Tiling::new(n, k, format).unwrap();
                let gemm = prepare(matrix, tiling, residency, config(tokens, DType::F32)).unwrap();
                let (out, receipt) = run::<f32, f32>(&gemm, &x, None, None).unwrap();
                let view = MatrixView::new(&x, tokens, k).unwrap();
                let plain = EpilogueSpec::plain(DType::F32);
                let exact = reference::gemm::<f32, f32>(view, gemm.weights(), &plain, None, None).unwrap();
                compare(&case, &out, &exact, scale(&x, &widened(&w), k));
                assert_eq!(receipt.counted, receipt.predicted.traffic, "{case}");
                let everything = gemm.weights().placement().host_bytes();
                assert!(
                    tokens == 0 || receipt.counted.link_bytes >= everything,
                    "{case}: not all weights were fetched"
                );
            }
        }
    }
}

/// Every path gives the same bits, on every placement and budget of SMs, and moves what was predicted.
#[test]
fn every_path_alpha_and_budget() {
    let (tokens, n, k) = (520, 264, 150);
    let (x, w): (Vec<bf16>, Vec<bf16>) = (random(3, tokens * k), random(4, n * k));
    let matrix = RowMajor::from_slice(&w, [n, k]).unwrap();
    let tiling = Tiling::with_tile_k(n, k, Format::Float(DType::BF16), 64).unwrap();
    let view = MatrixView::new(&x, tokens, k).unwrap();
    let mut bits: Option<Vec<f32>> = None;
    let mut seen = 0;
    for residency in [Residency::Host, Residency::HbmFraction(0.5), Residency::HbmFraction(0.75)] {
        for sm_budget in [1, 2, 4, 8] {
            let alphas = (0..=16).map(|i| Path::Direct { alpha: f64::from(i) / 16.0 });
            for path in PATHS.into_iter().chain(alphas.filter(|_| sm_budget == 8)) {
                let case = format!("{path}, {residency:?}, {sm_budget} SMs, seeds 3 and 4");
                let config = GemmConfig {
                    path: PathChoice::Only(path),
                    sm_budget: Some(sm_budget),
                    epilogue: EpilogueSpec::plain(DType::F32),
                    ..config(tokens, DType::BF16)
                };
                let gemm = match prepare(matrix, tiling, residency, config) {
                    Ok(gemm) => gemm,
                    // Roles that do not fit the budget are refused by name.
                    Err(error) => {
                        assert!(sm_budget < 4 && error.to_string().contains("needs"), "{case}: {error}");
                        continue;
                    }
                };
                let (out, receipt) = run::<bf16, f32>(&gemm, &x, None, None).unwrap();
                assert_eq!(receipt.counted, receipt.predicted.traffic, "{case}");
                let once = gemm.weights().placement().host_bytes();
                let panels = match path {
                    Path::Direct { alpha: 1.0 } => Some(3),
                    Path::Direct { alpha: 0.0 } | Path::Staged { .. } => Some(1),
                    Path::Multicast { cluster } => Some(3u64.div_ceil(cluster as u64)),
                    Path::Direct { .. } => None,
                };
                if let Some(panels) = panels {
                    assert_eq!(receipt.counted.link_bytes, panels * once, "{case}");
                }
                match &bits {
                    Some(bits) => assert!(out == *bits, "{case}: other bits"),
                    None => {
                        let plain = EpilogueSpec::plain(DType::F32);
                        let exact =
                            reference::gemm::<bf16, f32>(view, gemm.weights(), &plain, None, None).unwrap();
                        compare(&case, &out, &exact, scale(&widened(&x), &widened(&w), k));
                        bits = Some(out);
                    }
                }
                seen += 1;
            }
        }
    }
    assert!(seen > 90, "{seen} products");
}

/// A row of O depends on its own row of X alone: on no other token, not on their number, not on threads.
#[test]
fn bitwise_results_do_not_depend_on_the_batch() {
    let (n, k) = (150, 700);
    let (x, w): (Vec<f16>, Vec<f16>) = (random(5, 300 * k), random(6, n * k));
    let matrix = RowMajor::from_slice(&w, [n, k]).unwrap();
    for format in [
        Format::Float(DType::F16),
        Format::Int8,
        Format::Int4 { group: 64 },
        Format::Int4ZeroPoints { group: 64 },
        Format::Fp8Blocks,
    ] {
        let tiling = Tiling::new(n, k, format).unwrap();
        let gemm = prepare(matrix, tiling, Residency::HbmFraction(0.3), config(300, DType::F16)).unwrap();
        let (all, _) = run::<f16, f16>(&gemm, &x, None, None).unwrap();
        for (first, tokens) in [(0, 1), (17, 1), (250, 50), (299, 1), (3, 65)] {
            let (some, _) = run::<f16, f16>(&gemm, &x[first * k..(first + tokens) * k], None, None).unwrap();
            assert!(
                some == all[first * n..(first + tokens) * n],
                "{format}: tokens {first} to {}",
                first + tokens
            );
        }
        let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let (again, _) = one_thread.install(|| run::<f16, f16>(&gemm, &x, None, None)).unwrap();
        assert!(again == all, "{format}: one thread");
    }
}

/// Fast sums are right too, and need not have the same bits.
#[test]
fn fast_summation_is_close() {
    let (tokens, n, k) = (300, 200, 520);
    let (x, w): (Vec<f32>, Vec<bf16>) = (random(7, tokens * k), random(8, n * k));
    let matrix = RowMajor::from_slice(&w, [n, k]).unwrap();
    let view = MatrixView::new(&x, tokens, k).unwrap();
    for path in PATHS {
        let config = GemmConfig {
            summation: Summation::Fast,
            path: PathChoice::Only(path),
            ..config(tokens, DType::F32)
        };
        let tiling = Tiling::new(n, k, Format::Float(DType::BF16)).unwrap();
        let gemm = prepare(matrix, tiling, Residency::HbmFraction(0.25), config).unwrap();
        let (out, receipt) = run::<f32, f32>(&gemm, &x, None, None).unwrap();
        let exact =
            reference::gemm::<f32, f32>(view, gemm.weights(), &EpilogueSpec::plain(DType::F32), None, None);
        compare(&format!("{path}, seeds 7 and 8"), &out, &exact.unwrap(), scale(&x, &widened(&w), k));
        assert_eq!(receipt.counted, receipt.predicted.traffic, "{path}");
    }
}

#[test]
fn every_epilogue() {
    let (tokens, n, k) = (70, 144, 96);
    let x: Vec<bf16> = random(9, tokens * k);
    let w: Vec<f32> = random::<f32>(10, n * k).iter().map(|w| w / 8.0).collect();
    let bias: Vec<f32> = random(11, n);
    let matrix = RowMajor::from_slice(&w, [n, k]).unwrap();
    let view = MatrixView::new(&x, tokens, k).unwrap();
    for activation in [Activation::Identity, Activation::Silu, Activation::GeluTanh, Activation::SwiGlu] {
        for (has_bias, has_residual) in [(false, false), (true, false), (false, true), (true, true)] {
            for format in [Format::Float(DType::BF16), Format::Int8] {
                for out in [DType::F32, DType::BF16] {
                    let epilogue = EpilogueSpec { bias: has_bias, activation, residual: has_residual, out };
                    let case = format!("{epilogue:?}, {format}, seeds 9 to 12");
                    let tiling = Tiling::new(n, k, format).unwrap();
                    let config = GemmConfig { epilogue, ..config(tokens, DType::BF16) };
                    let gemm = prepare(matrix, tiling, Residency::HbmFraction(0.5), config).unwrap();
                    let bias = has_bias.then_some(bias.as_slice());
                    let columns = epilogue.out_columns(n);
                    let bound = 5.0 * scale(&widened(&x), &w, k);
                    match out {
                        DType::F32 => {
                            let residual: Vec<f32> = random(12, tokens * columns);
                            let residual = has_residual.then_some(residual.as_slice());
                            let (out, receipt) = run(&gemm, &x, bias, residual).unwrap();
                            let residual = residual.map(|r| MatrixView::new(r, tokens, columns).unwrap());
                            let exact =
                                reference::gemm(view, gemm.weights(), &epilogue, bias, residual).unwrap();
                            compare(&case, &out, &exact, bound);
                            assert_eq!(receipt.counted, receipt.predicted.traffic, "{case}");
                        }
                        _ => {
                            let residual: Vec<bf16> = random(12, tokens * columns);
                            let residual = has_residual.then_some(residual.as_slice());
                            let (out, receipt) = run(&gemm, &x, bias, residual).unwrap();
                            let residual = residual.map(|r| MatrixView::new(r, tokens, columns).unwrap());
                            let exact =
                                reference::gemm(view, gemm.weights(), &epilogue, bias, residual).unwrap();
                            compare(&case, &out, &exact, bound);
                            assert_eq!(receipt.counted, receipt.predicted.traffic, "{case}");
                        }
                    }
                }
            }
        }
    }
}

/// Sums that pass through large values: the running sum is 10⁴ times the result. Partial sums in bf16 would leave nothing of it.
#[test]
fn partial_sums_are_f32() {
    let (tokens, n, k) = (257, 64, 16384);
    // ±1 in runs of 4096 inputs, over a small signal: after a quarter the sum is 4096 above the signal's.
    let mut rng = fastrand::Rng::with_seed(13);
    let signal: Vec<f32> = (0..n * k).map(|_| if rng.bool() { 1.0 / 64.0 } else { -1.0 / 64.0 }).collect();
    let sign = |i: usize| if (i / 4096).is_multiple_of(2) { 1.0 } else { -1.0 };
    let w: Vec<bf16> = (0..n * k).map(|i| bf16::from_f32(sign(i % k) + signal[i])).collect();
    let x = vec![bf16::ONE; tokens * k];
    let matrix = RowMajor::from_slice(&w, [n, k]).unwrap();
    let view = MatrixView::new(&x[..k], 1, k).unwrap();
    for alpha in [0.0, 1.0] {
        let config = GemmConfig {
            path: PathChoice::Only(Path::Direct { alpha }),
            epilogue: EpilogueSpec::plain(DType::F32),
            ..config(tokens, DType::BF16)
        };
        let tiling = Tiling::new(n, k, Format::Float(DType::BF16)).unwrap();
        let gemm = prepare(matrix, tiling, Residency::Host, config).unwrap();
        let (out, receipt) = run::<bf16, f32>(&gemm, &x, None, None).unwrap();
        let plain = EpilogueSpec::plain(DType::F32);
        let exact = reference::gemm::<bf16, f32>(view, gemm.weights(), &plain, None, None).unwrap();
        // The terms are multiples of 1/128 below 2^13, so f32 sums are exact.
        for (row, (found, exact)) in out.iter().zip(&exact).enumerate() {
            assert!(f64::from(*found) == *exact, "alpha {alpha}, seed 13: row {row} is {found}, not {exact}");
        }
        assert_eq!(receipt.counted.partial_bytes > 0, alpha == 0.0, "alpha {alpha}");
    }
}

/// Rows apart in memory, and nothing touched between or behind them.
#[test]
fn strided_operands() {
    let (tokens, n, k) = (5, 70, 40);
    let (x_stride, out_stride) = (k + 3, n + 9);
    let x: Vec<f32> = random(14, tokens * x_stride);
    let w: Vec<f16> = random(15, n * k);
    let matrix = RowMajor::from_slice(&w, [n, k]).unwrap();
    let weights = Weights::pack(matrix, Format::Float(DType::F16), Residency::Host).unwrap();
    let gemm =
        Gemm::prepare(&GemmPlan::new(*weights.placement(), config(5, DType::F32)).unwrap(), weights).unwrap();
    let canary = -12345.0f32;
    let mut out = vec![canary; tokens * out_stride];
    let view = MatrixView::strided(&x, tokens, k, x_stride).unwrap();
    let args = GemmArgs {
        x: view,
        bias: None,
        residual: None,
        out: MatrixViewMut::strided(&mut out, tokens, n, out_stride).unwrap(),
    };
    gemm.run(args, &mut []).unwrap();
    let exact =
        reference::gemm::<f32, f32>(view, gemm.weights(), &EpilogueSpec::plain(DType::F32), None, None)
            .unwrap();
    for (token, row) in out.chunks(out_stride).enumerate() {
        compare(
            &format!("token {token}"),
            &row[..n],
            &exact[token * n..(token + 1) * n],
            scale(&x, &widened(&w), k),
        );
        assert!(row[n..].iter().all(|value| *value == canary), "token {token}: written past the row");
    }
}

#[test]
fn refusals_name_the_argument() {
    let w = vec![0.5f32; 64 * 64];
    let weights = |residency| {
        Weights::pack(RowMajor::from_slice(&w, [64, 64]).unwrap(), Format::Float(DType::BF16), residency)
    };
    let good = weights(Residency::Host).unwrap();
    let placement = *good.placement();
    let base = config(4, DType::F32);
    for (case, result, named) in [
        ("fraction", weights(Residency::HbmFraction(1.5)).map(drop), "hbm_fraction"),
        ("fraction is NaN", weights(Residency::HbmFraction(f64::NAN)).map(drop), "hbm_fraction"),
        (
            "alpha",
            GemmPlan::new(placement, GemmConfig { alpha: Alpha::Fixed(-0.1), ..base.clone() }).map(drop),
            "alpha",
        ),
        (
            "no SMs",
            GemmPlan::new(placement, GemmConfig { sm_budget: Some(0), ..base.clone() }).map(drop),
            "sm_budget",
        ),
        (
            "more SMs than there are",
            GemmPlan::new(placement, GemmConfig { sm_budget: Some(9), ..base.clone() }).map(drop),
            "sm_budget",
        ),
        (
            "no tokens",
            GemmPlan::new(placement, GemmConfig { max_tokens: 0, ..base.clone() }).map(drop),
            "max_tokens",
        ),
        (
            "a rate of 0",
            GemmPlan::new(
                placement,
                GemmConfig { device: DeviceProfile::gh200().with_link(0.0), ..base.clone() },
            )
            .map(drop),
            "link_reads_per_s",
        ),
    ] {
        let error = result.expect_err(case).to_string();
        assert!(error.contains(named), "{case}: {error}");
    }

    let plan = GemmPlan::new(placement, base.clone()).unwrap();
    let other = weights(Residency::Hbm).unwrap();
    assert!(Gemm::prepare(&plan, other).unwrap_err().to_string().contains("weights"));
    let gemm = Gemm::prepare(&plan, good.clone()).unwrap();
    let x = vec![1.0f32; 5 * 64];
    let bias = vec![0.0; 64];
    for (case, result, named) in [
        ("too many tokens", run::<f32, f32>(&gemm, &x, None, None).map(drop), "at most 4 rows"),
        ("type of X", run::<f16, f32>(&gemm, &[f16::ONE; 64], None, None).map(drop), "`x`: expected f32"),
        ("type of O", run::<f32, f16>(&gemm, &x[..64], None, None).map(drop), "`out`: expected f32"),
        (
            "a bias that is not planned",
            run::<f32, f32>(&gemm, &x[..64], Some(&bias), None).map(drop),
            "`bias`",
        ),
        (
            "a residual that is not planned",
            run(&gemm, &x[..64], None, Some(&bias[..])).map(drop),
            "`residual`",
        ),
    ] {
        let error = result.expect_err(case).to_string();
        assert!(error.contains(named), "{case}: {error}");
    }
    let epilogue = EpilogueSpec { bias: true, ..EpilogueSpec::plain(DType::F32) };
    let plan = GemmPlan::new(placement, GemmConfig { epilogue, ..base }).unwrap();
    let gemm = Gemm::prepare(&plan, good).unwrap();
    for (case, bias, named) in [("no bias", None, "`bias`"), ("a short bias", Some(&bias[1..]), "63")] {
        let error = run::<f32, f32>(&gemm, &x[..64], bias, None).unwrap_err().to_string();
        assert!(error.contains(named), "{case}: {error}");
    }
    let mut out = [0.0f32; 64];
    let wide = GemmArgs {
        x: MatrixView::new(&x[..32], 1, 32).unwrap(),
        bias: None,
        residual: None,
        out: MatrixViewMut::new(&mut out, 1, 64).unwrap(),
    };
    assert!(gemm.run(wide, &mut []).unwrap_err().to_string().contains("`x`"));
}

/// Two panels need a workspace, whose length is checked.
#[test]
fn a_short_workspace_is_refused() {
    let w = vec![0.5f32; 64 * 64];
    let weights = Weights::pack(
        RowMajor::from_slice(&w, [64, 64]).unwrap(),
        Format::Float(DType::F32),
        Residency::Host,
    )
    .unwrap();
    let gemm = Gemm::prepare(&GemmPlan::new(*weights.placement(), config(300, DType::F32)).unwrap(), weights)
        .unwrap();
    let x = vec![1.0f32; 300 * 64];
    let mut out = vec![0.0f32; 300 * 64];
    let args = GemmArgs {
        x: MatrixView::new(&x, 300, 64).unwrap(),
        bias: None,
        residual: None,
        out: MatrixViewMut::new(&mut out, 300, 64).unwrap(),
    };
    let mut workspace = vec![0.0; gemm.plan().workspace_len(300) - 1];
    assert!(gemm.run(args, &mut workspace).unwrap_err().to_string().contains("workspace"));
}
