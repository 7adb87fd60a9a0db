//! Maps on tokens, maps folded into weights, and plan files.

mod common;

use attention::reference::Probabilities;
use attention::rope::{Rope, RopeConfig};
use attention::testing::Rng;
use attention::{AttentionSpec, HeadShape, HeadsView, Mask, RaggedKv, Score};
use common::{Layer, Matrix, normal};
use kv_compress::calibrate::{Calibration, LayerCalibration};
use kv_compress::merge::{
    QkPath, fold_hadamard, fold_keys, fold_output, fold_queries, fold_values, value_group,
};
use kv_compress::projection::{Projection, project};
use kv_compress::rank_plan::{Planner, Profile, RankPlan, Weights};
use kv_compress::reference::{Attend, decode_in_parts};
use kv_compress::{CompressionPlan, Error, HeadRanks, LayerProjection, LayerRanks};

fn shape(q_heads: usize, kv_heads: usize, qk_dim: usize, v_dim: usize) -> HeadShape {
    HeadShape::new(q_heads, kv_heads, qk_dim, v_dim).unwrap()
}

fn projection_of(layer: &Layer, projection: Projection, ranks: &[(usize, usize)]) -> LayerProjection {
    let bases = project(0, &layer.calibration(), projection).unwrap();
    let ranks = ranks.iter().map(|&(k, v)| HeadRanks { k, v }).collect();
    LayerProjection::new(layer.shape, LayerRanks::new(&layer.shape, ranks).unwrap(), &bases).unwrap()
}

fn close(case: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{case}");
    let scale = expected.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance * scale, "{case}: element {i} is {a}, not {b}");
    }
}

/// `y = x·Wᵀ + b` for rows `x` `[rows, columns]`.
fn linear(x: &[f32], w: &[f32], bias: Option<&[f32]>, columns: usize) -> Vec<f32> {
    let mut y = Vec::new();
    for x in x.chunks_exact(columns) {
        for (i, w) in w.chunks_exact(columns).enumerate() {
            let dot: f64 = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
            y.push((dot + bias.map_or(0.0, |bias| f64::from(bias[i]))) as f32);
        }
    }
    y
}

fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed);
    (0..len).map(|_| rng.normal() as f32).collect()
}

/// The dense layer's output after W_O for its last token, and the same through a projection.
fn outputs(layer: &Layer, projection: &LayerProjection) -> (Vec<f32>, Vec<f32>) {
    let (shape, tokens) = (layer.shape, layer.tokens());
    let (q, k, v) = (layer.q_flat(), layer.k_flat(), layer.v_flat());
    let q = &q[(tokens - 1) * shape.q_heads() * shape.qk_dim()..];
    let score = Score::new((shape.qk_dim() as f32).sqrt().recip()).unwrap();
    let kv = RaggedKv::single(
        HeadsView::nhd(&k, tokens, shape.kv_heads(), shape.qk_dim()).unwrap(),
        HeadsView::nhd(&v, tokens, shape.kv_heads(), shape.v_dim()).unwrap(),
    )
    .unwrap();
    let spec = AttentionSpec { shape, score, mask: Mask::Causal };
    let q_view = HeadsView::nhd(q, 1, shape.q_heads(), shape.qk_dim()).unwrap();
    let dense = attention::reference::decode(&spec, q_view, &kv, Probabilities::Exact).unwrap();
    let w_o = layer.w_o_flat();
    let dense = linear(&dense.out_as::<f32>(), &w_o, None, shape.q_heads() * shape.v_dim());

    let ranks = projection.ranks();
    let split = |rows: Vec<f32>, of: fn(&HeadRanks) -> usize| -> Vec<Vec<f32>> {
        let row: usize = ranks.heads().iter().map(of).sum();
        let mut start = 0;
        let heads = ranks.heads().iter().map(|head| {
            let columns = start..start + of(head);
            start = columns.end;
            rows.chunks_exact(row).flat_map(|row| row[columns.clone()].to_vec()).collect()
        });
        heads.collect()
    };
    let keys = split(projection.keys(&k).unwrap(), |r| r.k);
    let values = split(projection.values(&v).unwrap(), |r| r.v);
    let of = Attend { group: shape.group(), score, mask: Mask::Causal };
    let q = projection.queries(q).unwrap();
    let reduced = decode_in_parts(&of, ranks, &q, &keys, &values, 32).unwrap().out_as::<f32>();
    let folded = fold_output(projection, &w_o, layer.hidden).unwrap();
    let through = linear(&reduced, &folded, None, reduced.len());
    // Lifting first and multiplying by W_O as it is gives the same.
    let lifted = projection.lift(&reduced).unwrap();
    close("lift", &linear(&lifted, &w_o, None, lifted.len()), &through, 1e-5);
    (dense, through)
}

#[test]
fn attention_in_the_reduced_basis_is_the_models_own() {
    for (case, shape, group_seed) in [
        ("MHA", shape(2, 2, 32, 32), 1),
        ("GQA of 3", shape(6, 2, 32, 48), 2),
        ("MQA", shape(4, 1, 64, 32), 3),
    ] {
        let layer = Layer::new(shape, 80, 40, 0.95, group_seed);
        let full: Vec<_> = (0..shape.kv_heads()).map(|_| (shape.qk_dim(), shape.v_dim())).collect();
        for projection in Projection::ALL {
            let (dense, through) = outputs(&layer, &projection_of(&layer, projection, &full));
            close(&format!("{case}, {projection}, full ranks"), &through, &dense, 1e-5);
        }
        // Where the data has rank 16, rank 16 is enough.
        let mut low = Layer::new(shape, 80, 40, 0.95, group_seed);
        let mut rng = Rng::new(9);
        for rows in low.k.iter_mut().chain(&mut low.v) {
            let dim = rows.ncols();
            *rows = normal(80, 16, &mut rng) * normal(16, dim, &mut rng) * 0.25;
        }
        let few: Vec<_> = (0..shape.kv_heads()).map(|_| (16, 16)).collect();
        let (dense, through) = outputs(&low, &projection_of(&low, Projection::Optimal, &few));
        close(&format!("{case}, data of rank 16"), &through, &dense, 1e-4);
        let (_, lossy) = outputs(&layer, &projection_of(&layer, Projection::Optimal, &few));
        let (dense, _) = outputs(&layer, &projection_of(&layer, Projection::Optimal, &full));
        let lost: f32 = lossy.iter().zip(&dense).map(|(a, b)| (a - b).abs()).sum();
        assert!(lost > 1e-4, "{case}: data of full rank does lose something, {lost}");
    }
}

#[test]
fn folded_weights_are_the_maps_on_tokens() {
    let hidden = 24;
    for (case, shape, biased) in [
        ("MHA", shape(2, 2, 32, 32), false),
        ("GQA with biases (Qwen2)", shape(6, 2, 32, 48), true),
        ("MQA with biases", shape(4, 1, 48, 32), true),
    ] {
        let layer = Layer::new(shape, 60, hidden, 0.95, 4);
        let ranks: Vec<_> = (0..shape.kv_heads()).map(|head| (16 + 16 * (head % 2), 16)).collect();
        let projection = projection_of(&layer, Projection::Optimal, &ranks);
        let x = random(5 * hidden, 1);
        let path = QkPath { rope: false, qk_norm: false };
        let weight = |heads: usize, dim: usize, seed| {
            let bias = biased.then(|| random(heads * dim, seed + 1));
            (random(heads * dim * hidden, seed), bias)
        };
        let (w_v, b_v) = weight(shape.kv_heads(), shape.v_dim(), 10);
        let folded = fold_values(&projection, &w_v, b_v.as_deref(), hidden).unwrap();
        let direct = projection.values(&linear(&x, &w_v, b_v.as_deref(), hidden)).unwrap();
        assert_eq!(folded.bias.is_some(), biased, "{case}");
        close(
            &format!("{case}: values"),
            &linear(&x, &folded.weight, folded.bias.as_deref(), hidden),
            &direct,
            1e-5,
        );
        if let Some(bias) = &b_v {
            let without = linear(&x, &folded.weight, None, hidden);
            let lost = without.iter().zip(&direct).any(|(a, b)| (a - b).abs() > 1e-2);
            assert!(lost, "{case}: leaving out {} biases must show", bias.len());
        }

        let (w_q, b_q) = weight(shape.q_heads(), shape.qk_dim(), 20);
        let folded = fold_queries(&projection, path, &w_q, b_q.as_deref(), hidden).unwrap();
        let direct = projection.queries(&linear(&x, &w_q, b_q.as_deref(), hidden)).unwrap();
        close(
            &format!("{case}: queries"),
            &linear(&x, &folded.weight, folded.bias.as_deref(), hidden),
            &direct,
            1e-5,
        );

        let (w_k, b_k) = weight(shape.kv_heads(), shape.qk_dim(), 30);
        let folded = fold_keys(&projection, path, &w_k, b_k.as_deref(), hidden).unwrap();
        let direct = projection.keys(&linear(&x, &w_k, b_k.as_deref(), hidden)).unwrap();
        close(
            &format!("{case}: keys"),
            &linear(&x, &folded.weight, folded.bias.as_deref(), hidden),
            &direct,
            1e-5,
        );

        for (path, named) in
            [(QkPath { rope: true, qk_norm: false }, "RoPE"), (QkPath { rope: false, qk_norm: true }, "norm")]
        {
            let keys = fold_keys(&projection, path, &w_k, b_k.as_deref(), hidden).unwrap_err().to_string();
            let queries =
                fold_queries(&projection, path, &w_q, b_q.as_deref(), hidden).unwrap_err().to_string();
            assert!(keys.contains(named) && queries.contains(named), "{case}: {keys}; {queries}");
        }
        assert!(fold_values(&projection, &w_v[1..], b_v.as_deref(), hidden).is_err(), "{case}");
        assert!(matches!(
            fold_output(&projection, &vec![f32::NAN; layer.w_o_flat().len()], hidden),
            Err(Error::NotFinite { .. })
        ));
    }
}

/// Why keys of RoPE models are projected after RoPE: the same maps before it give other scores, at any rank.
#[test]
fn maps_do_not_commute_with_rope() {
    let dim = 32;
    let shape = shape(1, 1, dim, dim);
    let rope = Rope::new(RopeConfig::new(dim, 10_000.0), 64).unwrap();
    let layer = Layer::new(shape, 60, 16, 0.97, 6);
    let positions: Vec<u32> = (0..60).collect();
    let rotated = |mut x: Vec<f32>| {
        rope.apply(&mut x, 1, &positions).unwrap();
        x
    };
    let (q, k) = (layer.q_flat(), layer.k_flat());
    let mut calibration = LayerCalibration::new(shape);
    calibration.add(&rotated(q.clone()), &rotated(k.clone()), &layer.v_flat()).unwrap();
    calibration.set_w_o(&layer.w_o_flat(), layer.hidden).unwrap();
    let basis = &project(0, &calibration, Projection::JointSvd).unwrap()[0].scores;
    let map: Vec<f32> = basis.left(dim).unwrap().iter().map(|&x| x as f32).collect();
    let project = |x: &[f32]| linear(x, &map, None, dim);
    let scores = |q: &[f32], k: &[f32]| {
        let (q, k) =
            (Matrix::from_row_slice(60, dim, &to_f64(q)), Matrix::from_row_slice(60, dim, &to_f64(k)));
        q * k.transpose()
    };
    let own = scores(&rotated(q.clone()), &rotated(k.clone()));
    let after = scores(&project(&rotated(q.clone())), &project(&rotated(k.clone())));
    let before = scores(&rotated(project(&q)), &rotated(project(&k)));
    let error = |found: &Matrix| (found - &own).norm() / own.norm();
    assert!(error(&after) < 1e-5, "after RoPE, full rank is exact: {}", error(&after));
    assert!(error(&before) > 0.1, "before RoPE it is not even close: {}", error(&before));
}

fn to_f64(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

#[test]
fn hadamard_evens_out_groups_and_changes_nothing_else() {
    for (rank, group, expected) in
        [(64, 64, 64), (48, 64, 48), (48, 32, 16), (128, 64, 64), (96, 64, 48), (80, 32, 16), (16, 128, 16)]
    {
        assert_eq!(value_group(rank, group), expected, "rank {rank}, groups of {group}");
    }
    let shape = shape(4, 2, 64, 64);
    let layer = Layer::new(shape, 90, 32, 0.9, 7);
    let plain = projection_of(&layer, Projection::Optimal, &[(32, 32), (32, 48)]);
    let mut turned = plain.clone();
    fold_hadamard(&mut turned, 64).unwrap();
    let ((dense, a), (_, b)) = (outputs(&layer, &plain), outputs(&layer, &turned));
    let scale = dense.iter().fold(0f32, |m, x| m.max(x.abs()));
    assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 1e-5 * scale), "attention is unchanged");
    // Spread of the channels of the first head's group: largest over smallest mean square.
    let spread = |projection: &LayerProjection| {
        let values = projection.values(&layer.v_flat()).unwrap();
        let energy = |channel: usize| -> f32 { values.iter().skip(channel).step_by(80).map(|x| x * x).sum() };
        let energies: Vec<f32> = (0..32).map(energy).collect();
        energies.iter().fold(0f32, |m, &x| m.max(x)) / energies.iter().fold(f32::INFINITY, |m, &x| m.min(x))
    };
    assert!(spread(&plain) > 50.0 && spread(&turned) < 1.01, "{} and {}", spread(&plain), spread(&turned));
    assert!(fold_hadamard(&mut turned, 24).is_err());
}

/// Two layers with their calibration, planned within half the bytes.
fn planned() -> (Vec<Layer>, Calibration, CompressionPlan) {
    let shapes = [shape(4, 2, 32, 48), shape(6, 2, 64, 32)];
    let layers: Vec<Layer> = (0..2).map(|l| Layer::new(shapes[l], 100, 40, 0.9, 20 + l as u64)).collect();
    let mut calibration = Calibration::new(shapes);
    for (l, layer) in layers.iter().enumerate() {
        *calibration.layer_mut(l).unwrap() = layer.calibration();
    }
    let bases: Vec<_> =
        (0..2).map(|l| project(l, &calibration.layers()[l], Projection::Optimal).unwrap()).collect();
    let profile = Profile::new(&calibration, &bases, &[0.17, 0.125]).unwrap();
    let budget = shapes.iter().map(|s| s.kv_heads() * (s.qk_dim() + s.v_dim())).sum();
    let ranks = Planner::new(&profile, &Weights::equal(&profile)).unwrap().within(budget).unwrap();
    let plan = CompressionPlan::new(&calibration, Projection::Optimal, &bases, &ranks).unwrap();
    assert_eq!((plan.bytes_per_token(), plan.dense_bytes_per_token()), (ranks.bytes_per_token(), 2 * budget));
    assert!(plan.bytes_per_token() <= budget);
    (layers, calibration, plan)
}

#[test]
fn plan_files_come_back_and_refuse_other_models() {
    let (layers, _, plan) = planned();
    let bytes = plan.to_bytes().unwrap();
    assert_eq!(bytes, plan.to_bytes().unwrap(), "the same plan is the same file");
    assert!(CompressionPlan::from_bytes(&bytes).unwrap() == plan, "the plan that was written");

    let own = [layers[0].shape, layers[1].shape];
    plan.check(&own).unwrap();
    for (case, shapes, named) in [
        ("a layer less", vec![own[0]], "number of layers"),
        ("swapped layers", vec![own[1], own[0]], "shape of layer 0"),
        ("another ratio of heads", vec![own[0], shape(4, 2, 64, 32)], "shape of layer 1"),
    ] {
        let error = plan.check(&shapes).unwrap_err();
        assert!(
            matches!(error, Error::Mismatch { .. }) && error.to_string().contains(named),
            "{case}: {error}"
        );
    }
    plan.check_w_o(0, &layers[0].w_o_flat(), 40).unwrap();
    let other: Vec<f32> = layers[0].w_o_flat().iter().map(|x| 1.01 * x).collect();
    let error = plan.check_w_o(0, &other, 40).unwrap_err();
    assert!(matches!(error, Error::Mismatch { .. }), "{error}");
    assert!(plan.check_w_o(2, &other, 40).is_err() && plan.check_w_o(0, &other, 39).is_err());
}

#[test]
fn damaged_files_are_refused() {
    let (_, calibration, plan) = planned();
    let (bytes, calibrated) = (plan.to_bytes().unwrap(), calibration.to_bytes().unwrap());
    let edited = |from: &str, to: &str| {
        let text = String::from_utf8_lossy(&bytes[8..]).find(from).expect("the text to edit") + 8;
        let mut bytes = bytes.clone();
        bytes[text..text + to.len()].copy_from_slice(to.as_bytes());
        bytes
    };
    for (case, bytes, named) in [
        ("empty", vec![], "truncated"),
        ("cut", bytes[..bytes.len() - 1].to_vec(), "truncated"),
        ("half", bytes[..bytes.len() / 2].to_vec(), "truncated"),
        ("another version", edited("version\\\":1", "version\\\":9"), "expected version 1, found 9"),
        ("another kind", calibrated.clone(), "expected a plan, found a calibration"),
        ("a missing map", edited("layers.1.heads.0.key", "layers.1.heads.0.yek"), "layers.1.heads.0.key"),
    ] {
        let error = CompressionPlan::from_bytes(&bytes).expect_err(case).to_string();
        assert!(error.contains(named), "{case}: {error}");
    }
    assert!(Calibration::from_bytes(&calibrated).unwrap() == calibration);
    assert!(Calibration::from_bytes(&bytes).unwrap_err().to_string().contains("found a plan"));
    assert!(Calibration::from_bytes(&calibrated[..90]).is_err());
}

/// A tensor-parallel rank holds some KV heads with their query heads; the ranks' outputs after W_O add up.
#[test]
fn slices_by_kv_head_add_up() {
    let (layers, _, plan) = planned();
    let whole = &plan.layers()[1];
    let layer = &layers[1];
    let out = random(3 * whole.ranks().heads().iter().map(|r| 3 * r.v).sum::<usize>(), 3);
    let all = linear(&out, &fold_output(whole, &layer.w_o_flat(), 40).unwrap(), None, out.len() / 3);
    let mut sum = vec![0.0; all.len()];
    let mut start = 0;
    for head in 0..2 {
        let plan = plan.slice(head..head + 1).unwrap();
        let part = &plan.layers()[1];
        assert_eq!(*part.shape(), shape(3, 1, 64, 32));
        assert!(plan.reasons().iter().all(|reason| reason.head == 0));
        let heads: Vec<Matrix> = layer.w_o[head * 3..head * 3 + 3].iter().map(Matrix::transpose).collect();
        let w_o = common::interleave(&heads);
        plan.check_w_o(1, &w_o, 40).unwrap();
        let width = 3 * part.ranks().heads()[0].v;
        let mine: Vec<f32> =
            out.chunks_exact(out.len() / 3).flat_map(|row| row[start..start + width].to_vec()).collect();
        start += width;
        for (sum, x) in sum.iter_mut().zip(linear(&mine, &fold_output(part, &w_o, 40).unwrap(), None, width))
        {
            *sum += x;
        }
    }
    close("slices", &sum, &all, 1e-5);
    assert!(plan.slice(1..3).is_err() && plan.slice(1..1).is_err());
}

#[test]
fn ranks_that_do_not_fit_are_refused() {
    let layer = Layer::new(shape(2, 1, 32, 32), 40, 16, 0.9, 1);
    let bases = project(0, &layer.calibration(), Projection::Optimal).unwrap();
    let wide = shape(2, 1, 64, 64);
    let ranks = LayerRanks::uniform(&wide, HeadRanks { k: 64, v: 64 }).unwrap();
    for shape in [layer.shape, wide] {
        let error = LayerProjection::new(shape, ranks.clone(), &bases).unwrap_err();
        assert!(matches!(error, Error::Argument { .. }), "{error}");
    }
    let mut calibration = Calibration::new([layer.shape]);
    *calibration.layer_mut(0).unwrap() = layer.calibration();
    let two = RankPlan::full(&[layer.shape, layer.shape]).unwrap();
    assert!(CompressionPlan::new(&calibration, Projection::Optimal, &[bases], &two).is_err());
    assert!(calibration.layer_mut(1).is_err());
}
