//! What the projections promise, checked against products formed in full.

mod common;

use attention::HeadShape;
use attention::testing::Rng;
use common::{Layer, Matrix, map, normal, rounded, rows_with, stack};
use kv_compress::calibrate::LayerCalibration;
use kv_compress::projection::{Basis, HeadBasis, Projection, project};
use kv_compress::{Error, RANK_STEP};
use proptest::prelude::*;

/// The approximation of x·yᵀ at a rank, from the rows themselves.
fn approximate(basis: &Basis, rank: usize, x: &Matrix, y: &Matrix) -> Matrix {
    let (left, right) = (basis.left(rank).unwrap(), basis.right(rank).unwrap());
    if rank == 0 {
        return Matrix::zeros(x.nrows(), y.nrows());
    }
    (x * map(basis.dim(), &left)) * (y * map(basis.dim(), &right)).transpose()
}

fn loss(basis: &Basis, rank: usize, x: &Matrix, y: &Matrix) -> f64 {
    (x * y.transpose() - approximate(basis, rank, x, y)).norm()
}

/// Both products of every KV head of a layer, with a name.
fn products(layer: &Layer, bases: &[HeadBasis]) -> Vec<(String, Basis, Matrix, Matrix)> {
    let mut products = Vec::new();
    for (head, basis) in bases.iter().enumerate() {
        let scores = (basis.scores.clone(), layer.q_group(head), layer.k[head].clone());
        let values = (basis.values.clone(), layer.v[head].clone(), layer.w_o_group(head));
        for (name, (basis, x, y)) in [("QKᵀ", scores), ("VW_O", values)] {
            products.push((format!("{name} of KV head {head}"), basis, x, y));
        }
    }
    products
}

fn shapes() -> Vec<(&'static str, Layer)> {
    let shape = |q, kv, qk, v| HeadShape::new(q, kv, qk, v).unwrap();
    vec![
        ("MHA", Layer::new(shape(2, 2, 32, 32), 90, 48, 0.9, 1)),
        ("GQA of 3", Layer::new(shape(6, 2, 32, 48), 70, 40, 0.93, 2)),
        ("MQA, fewer tokens than dimensions", Layer::new(shape(4, 1, 48, 32), 20, 64, 0.95, 3)),
        ("slow decay", Layer::new(shape(4, 2, 64, 64), 150, 96, 0.995, 4)),
    ]
}

#[test]
fn exact_at_full_rank() {
    for (case, layer) in shapes() {
        for projection in Projection::ALL {
            let bases = project(0, &layer.calibration(), projection).unwrap();
            for (name, basis, x, y) in products(&layer, &bases) {
                let error = loss(&basis, basis.dim(), &x, &y) / (&x * y.transpose()).norm();
                assert!(error <= 1e-12, "{case}, {projection}, {name}: {error:e}");
            }
        }
    }
}

#[test]
fn reported_losses_are_those_of_the_rows() {
    for (case, layer) in shapes() {
        for projection in Projection::ALL {
            let bases = project(0, &layer.calibration(), projection).unwrap();
            for (name, basis, x, y) in products(&layer, &bases) {
                let whole = (&x * y.transpose()).norm();
                for (i, lost) in basis.lost_energy().iter().enumerate() {
                    let found = loss(&basis, i * RANK_STEP, &x, &y);
                    let error = (lost.sqrt() - found).abs() / whole;
                    assert!(
                        error < 1e-6,
                        "{case}, {projection}, {name}, step {i}: {} vs {found}",
                        lost.sqrt()
                    );
                }
            }
        }
    }
}

#[test]
fn optimal_reaches_the_bound_of_eckart_and_young() {
    for (case, layer) in shapes() {
        let all = Projection::ALL.map(|projection| project(0, &layer.calibration(), projection).unwrap());
        let others = [products(&layer, &all[1]), products(&layer, &all[2])];
        for (at, (name, basis, x, y)) in products(&layer, &all[0]).into_iter().enumerate() {
            let product = &x * y.transpose();
            let mut sigma: Vec<f64> = product.clone().singular_values().iter().copied().collect();
            sigma.sort_by(|a, b| b.total_cmp(a));
            for rank in (0..=basis.dim()).step_by(8) {
                let bound = sigma.iter().skip(rank).map(|s| s * s).sum::<f64>().sqrt();
                let found = loss(&basis, rank, &x, &y);
                let whole = product.norm();
                assert!(
                    (found - bound).abs() <= 1e-6 * bound + 1e-9 * whole,
                    "{case}, {name}, rank {rank}: {found} vs {bound}"
                );
                for other in &others {
                    let other = loss(&other[at].1, rank, &x, &y);
                    assert!(
                        found <= other * (1.0 + 1e-9) + 1e-9 * whole,
                        "{case}, {name}, rank {rank}: {found} vs {other}"
                    );
                }
            }
        }
    }
}

#[test]
fn joint_svd_keeps_its_bounds() {
    for (case, layer) in shapes() {
        let bases = project(0, &layer.calibration(), Projection::JointSvd).unwrap();
        for (name, basis, x, y) in products(&layer, &bases) {
            let d = basis.dim();
            let all = map(d, &basis.left(d).unwrap());
            let drift = (all.transpose() * &all - Matrix::identity(d, d)).abs().max();
            assert!(drift < 1e-12, "{case}, {name}: RᵀR is off by {drift:e}");
            assert_eq!(
                basis.left(d).unwrap(),
                basis.right(d).unwrap(),
                "{case}, {name}: one basis for both sides"
            );
            let sigma = stack(&[x.clone(), y.clone()]).singular_values();
            for rank in (0..=d).step_by(RANK_STEP) {
                let rest = all.columns(rank, d - rank);
                let middle = (&x * rest).norm() * (&y * rest).norm();
                let mut squares: Vec<f64> = sigma.iter().map(|s| s * s).collect();
                squares.sort_by(|a, b| b.total_cmp(a));
                let bound = 0.5 * squares.iter().skip(rank).sum::<f64>();
                let found = loss(&basis, rank, &x, &y);
                let slack = 1e-9 * (x.norm() * y.norm());
                assert!(found <= middle + slack, "{case}, {name}, rank {rank}: {found} vs {middle}");
                assert!(middle <= bound + slack, "{case}, {name}, rank {rank}: {middle} vs {bound}");
            }
        }
    }
}

#[test]
fn ranks_are_nested() {
    let layer = &shapes()[1].1;
    for projection in Projection::ALL {
        let bases = project(0, &layer.calibration(), projection).unwrap();
        for (name, basis, ..) in products(layer, &bases) {
            let d = basis.dim();
            for map_of in [Basis::left, Basis::right] {
                let all = map(d, &map_of(&basis, d).unwrap());
                for rank in 1..=d {
                    let few = map(d, &map_of(&basis, rank).unwrap());
                    assert!(few == all.columns(0, rank), "{projection}, {name}, rank {rank}");
                }
            }
        }
    }
}

#[test]
fn lost_energy_falls_with_rank() {
    let layer = &shapes()[3].1;
    let bases = project(0, &layer.calibration(), Projection::Optimal).unwrap();
    for (name, basis, ..) in products(layer, &bases) {
        let lost = basis.lost_energy();
        assert_eq!(lost.len(), basis.dim() / RANK_STEP + 1);
        assert!(lost.windows(2).all(|pair| pair[1] <= pair[0]), "{name}: {lost:?}");
        // Eckart and Young: each step saves at most what the one before saved.
        let saved: Vec<f64> = lost.windows(2).map(|pair| pair[0] - pair[1]).collect();
        assert!(saved.windows(2).all(|pair| pair[1] <= pair[0] * (1.0 + 1e-9)), "{name}: {saved:?}");
    }
}

/// The order of the methods on spectra that tell them apart: queries much larger than keys, in other directions.
#[test]
fn methods_are_ordered_on_synthetic_spectra() {
    let shape = HeadShape::new(4, 1, 64, 64).unwrap();
    let mut layer = Layer::new(shape, 300, 128, 0.93, 9);
    for q in &mut layer.q {
        *q *= 8.0;
    }
    for w in &mut layer.w_o {
        *w *= 8.0;
    }
    let of = |projection| project(0, &layer.calibration(), projection).unwrap();
    let (optimal, joint, key) = (of(Projection::Optimal), of(Projection::JointSvd), of(Projection::KeyOnly));
    for rank in [16, 32, 48] {
        for side in [|basis: &HeadBasis| basis.scores.clone(), |basis: &HeadBasis| basis.values.clone()] {
            let lost = |bases: &[HeadBasis]| side(&bases[0]).lost_energy()[rank / RANK_STEP];
            let (optimal, joint, key) = (lost(&optimal), lost(&joint), lost(&key));
            assert!(optimal < 0.9 * joint, "rank {rank}: optimal {optimal:e}, joint {joint:e}");
            assert!(optimal < 0.9 * key, "rank {rank}: optimal {optimal:e}, key-only {key:e}");
        }
    }
}

#[test]
fn optimal_does_not_see_a_rescaling_and_joint_svd_does() {
    let shape = HeadShape::new(2, 1, 32, 32).unwrap();
    let layer = Layer::new(shape, 100, 64, 0.9, 5);
    let scaled = |factor: f64| Layer {
        shape,
        hidden: layer.hidden,
        q: layer.q.iter().map(|q| q * factor).collect(),
        k: layer.k.iter().map(|k| k / factor).collect(),
        v: layer.v.iter().map(|v| v * factor).collect(),
        w_o: layer.w_o.iter().map(|w| w / factor).collect(),
    };
    let losses = |layer: &Layer, projection| {
        let bases = project(0, &layer.calibration(), projection).unwrap();
        [bases[0].scores.lost_energy().to_vec(), bases[0].values.lost_energy().to_vec()].concat()
    };
    let (optimal, joint) = (losses(&layer, Projection::Optimal), losses(&layer, Projection::JointSvd));
    for factor in [4.0, 1.0 / 16.0, 1024.0] {
        let found = losses(&scaled(factor), Projection::Optimal);
        for (step, (a, b)) in optimal.iter().zip(&found).enumerate() {
            assert!(
                (a - b).abs() <= 1e-6 * a + 1e-12 * optimal[0],
                "factor {factor}, step {step}: {a} vs {b}"
            );
        }
    }
    let worse = losses(&scaled(1024.0), Projection::JointSvd);
    assert!(worse[1] > 1.05 * joint[1], "joint SVD follows the larger side: {} vs {}", worse[1], joint[1]);
}

/// Data of rank ρ: nothing is lost from ρ on, whichever side is degenerate, and rank d is exact for any other rows.
#[test]
fn low_rank_data_and_singular_gram_matrices() {
    let shape = HeadShape::new(2, 1, 64, 64).unwrap();
    let low = |rank: usize| move |i: usize| if i < rank { 1.0 } else { 0.0 };
    let full = |_: usize| 1.0;
    type Spread<'a> = &'a dyn Fn(usize) -> f64;
    let cases: [(&str, Spread<'_>, Spread<'_>, usize); 5] = [
        ("keys of rank 16", &full, &low(16), 16),
        ("queries of rank 16", &low(16), &full, 16),
        ("both of rank 32, different", &low(32), &low(32), 32),
        ("keys that are all zero", &full, &low(0), 0),
        ("all zero", &low(0), &low(0), 0),
    ];
    for (case, q_spread, k_spread, rank) in cases {
        let mut rng = Rng::new(11);
        let mut layer = Layer::new(shape, 200, 64, 0.99, 12);
        let directions = normal(64, 64, &mut rng).qr().q();
        let mut rows = |spread: &dyn Fn(usize) -> f64| {
            let mut rows = normal(200, 64, &mut rng);
            for (i, mut column) in rows.column_iter_mut().enumerate() {
                column *= spread(i);
            }
            // Not rounded: rounding would fill the empty directions.
            rows * &directions
        };
        layer.q = vec![rows(q_spread), rows(q_spread)];
        layer.k = vec![rows(k_spread)];
        for projection in [Projection::Optimal, Projection::JointSvd] {
            let bases = project(0, &layer.calibration(), projection).unwrap();
            let (x, y) = (layer.q_group(0), layer.k[0].clone());
            let basis = &bases[0].scores;
            let whole = x.norm() * y.norm() + 1.0;
            if projection == Projection::Optimal || q_spread(40) == k_spread(40) {
                let found = loss(basis, rank, &x, &y) / whole;
                assert!(found < 1e-6, "{case}, {projection}: loses {found:e} at rank {rank}");
            }
            let (x, y) = (normal(50, 64, &mut Rng::new(13)), normal(50, 64, &mut Rng::new(14)));
            let found = loss(basis, 64, &x, &y) / (x.norm() * y.norm());
            assert!(found < 1e-6, "{case}, {projection}: other rows lose {found:e} at full rank");
        }
    }
}

#[test]
fn refused_input_names_its_fault() {
    let shape = HeadShape::new(2, 1, 16, 16).unwrap();
    let (q, k, v) = (vec![1.0; 32], vec![1.0; 16], vec![1.0; 16]);
    let with = |values: &[f32], at: usize, x: f32| {
        let mut values = values.to_vec();
        values[at] = x;
        values
    };
    let mut calibration = LayerCalibration::new(shape);
    type Case<'a> = (&'a str, Vec<f32>, Vec<f32>, Vec<f32>, &'a str);
    let cases: [Case<'_>; 6] = [
        ("NaN queries", with(&q, 30, f32::NAN), k.clone(), v.clone(), "`q`: element 30"),
        ("NaN keys", q.clone(), with(&k, 3, f32::NAN), v.clone(), "`k`: element 3"),
        ("infinite values", q.clone(), k.clone(), with(&v, 0, f32::INFINITY), "`v`: element 0 is inf"),
        ("a query too many", vec![0.0; 64], k.clone(), v.clone(), "`q`"),
        ("half a key", q.clone(), vec![0.0; 24], v.clone(), "`k`"),
        ("no value", q.clone(), k.clone(), vec![], "`v`"),
    ];
    for (case, q, k, v, named) in cases {
        let error = calibration.add(&q, &k, &v).expect_err(case).to_string();
        assert!(error.contains(named), "{case}: {error}");
        assert!(calibration == LayerCalibration::new(shape), "{case}: nothing was added");
    }
    let empty = project(3, &calibration, Projection::Optimal).unwrap_err();
    assert!(matches!(empty, Error::EmptyCalibration { layer: 3, what: "tokens" }), "{empty}");
    calibration.add(&q, &k, &v).unwrap();
    let no_w_o = project(0, &calibration, Projection::Optimal).unwrap_err();
    assert!(matches!(no_w_o, Error::EmptyCalibration { what: "W_O", .. }), "{no_w_o}");
    assert!(calibration.set_w_o(&[f32::NAN; 32], 1).is_err());
    assert!(calibration.set_w_o(&[1.0; 33], 1).is_err());
    calibration.set_w_o(&[1.0; 64], 2).unwrap();
    let basis = &project(0, &calibration, Projection::Optimal).unwrap()[0];
    assert!(matches!(basis.scores.left(17), Err(Error::Argument { argument: "rank", .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Optimal is never beaten at any rank, on rows of any size and spectrum.
    #[test]
    fn optimal_is_never_beaten(
        seed in 0u64..1 << 32,
        decays in (0.7f64..1.0, 0.7f64..1.0),
        tokens in 1usize..80,
        scale in -6f64..6.0,
    ) {
        let shape = HeadShape::new(2, 1, 32, 32).unwrap();
        let mut rng = Rng::new(seed);
        let mut layer = Layer::new(shape, tokens, 48, 0.9, seed);
        layer.q = (0..2).map(|_| rounded(rows_with(tokens, 32, |i| decays.0.powi(i as i32), &mut rng) * scale.exp2())).collect();
        layer.k = vec![rounded(rows_with(tokens, 32, |i| decays.1.powi(i as i32), &mut rng))];
        let of = |projection| project(0, &layer.calibration(), projection).unwrap()[0].scores.lost_energy().to_vec();
        let optimal = of(Projection::Optimal);
        for other in [of(Projection::JointSvd), of(Projection::KeyOnly)] {
            for (a, b) in optimal.iter().zip(other) {
                prop_assert!(*a <= b * (1.0 + 1e-6) + 1e-12 * optimal[0], "{} above {}", a, b);
            }
        }
    }
}
