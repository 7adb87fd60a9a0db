//! Calibration streams, merges and copes with the shapes of real models.

mod common;

use attention::HeadShape;
use attention::testing::Inputs;
use common::Layer;
use kv_compress::Error;
use kv_compress::calibrate::{Calibration, LayerCalibration};
use kv_compress::projection::{Projection, project};

/// Sums in another order differ by rounding; what is made of them must agree as far.
fn same(case: &str, a: &LayerCalibration, b: &LayerCalibration) {
    assert_eq!(a.tokens(), b.tokens(), "{case}");
    let of = |calibration| project(0, calibration, Projection::JointSvd).unwrap();
    for (a, b) in of(a).iter().zip(of(b)) {
        for (a, b) in [(&a.scores, &b.scores), (&a.values, &b.values)] {
            let (a, b) = (a.lost_energy(), b.lost_energy());
            assert!(a.iter().zip(b).all(|(x, y)| (x - y).abs() <= 1e-9 * a[0]), "{case}: {a:?} and {b:?}");
        }
    }
}

#[test]
fn chunks_and_shards_add_up() {
    let shape = HeadShape::new(6, 2, 32, 48).unwrap();
    let layer = Layer::new(shape, 600, 40, 0.95, 1);
    let whole = layer.calibration();
    let (q, k, v) = (layer.q_flat(), layer.k_flat(), layer.v_flat());
    let part = |calibration: &mut LayerCalibration, from: usize, to: usize| {
        let cut = |x: &[f32], row: usize| x[from * row..to * row].to_vec();
        calibration.add(&cut(&q, 6 * 32), &cut(&k, 2 * 32), &cut(&v, 2 * 48)).unwrap();
    };
    for cuts in [&[0usize, 600][..], &[0, 1, 256, 257, 600], &[0, 0, 299, 600]] {
        let mut streamed = LayerCalibration::new(shape);
        let mut merged = LayerCalibration::new(shape);
        for pair in cuts.windows(2) {
            part(&mut streamed, pair[0], pair[1]);
            let mut shard = LayerCalibration::new(shape);
            part(&mut shard, pair[0], pair[1]);
            merged.merge(&shard).unwrap();
        }
        streamed.set_w_o(&layer.w_o_flat(), layer.hidden).unwrap();
        let mut weights = LayerCalibration::new(shape);
        weights.set_w_o(&layer.w_o_flat(), layer.hidden).unwrap();
        merged.merge(&weights).unwrap();
        same(&format!("streamed at {cuts:?}"), &streamed, &whole);
        same(&format!("merged at {cuts:?}"), &merged, &whole);
    }
}

#[test]
fn shards_of_other_models_are_refused() {
    let shape = HeadShape::new(2, 1, 32, 32).unwrap();
    let layer = Layer::new(shape, 50, 16, 0.9, 1);
    let mut mine = Calibration::new([shape]);
    *mine.layer_mut(0).unwrap() = layer.calibration();
    let before = mine.clone();
    let mut other_weights = Calibration::new([shape]);
    *other_weights.layer_mut(0).unwrap() = Layer::new(shape, 50, 24, 0.9, 2).calibration();
    for (case, other, named) in [
        ("more layers", Calibration::new([shape, shape]), "number of layers"),
        ("other heads", Calibration::new([HeadShape::new(1, 1, 32, 32).unwrap()]), "shape"),
        ("other weights", other_weights, "W_O"),
    ] {
        let error = mine.merge(&other).unwrap_err();
        assert!(
            matches!(error, Error::Mismatch { .. }) && error.to_string().contains(named),
            "{case}: {error}"
        );
        assert!(mine == before, "{case}: nothing is merged");
    }
    mine.merge(&before).unwrap();
    assert_eq!(mine.layers()[0].tokens(), 100);
}

/// Halves of one text agree on the subspace that they keep: ‖R₁ᵀR₂‖²_F / r.
#[test]
fn halves_of_the_data_agree_on_the_subspace() {
    let shape = HeadShape::new(2, 1, 64, 64).unwrap();
    let layer = Layer::new(shape, 4000, 32, 0.93, 8);
    let (q, k, v) = (layer.q_flat(), layer.k_flat(), layer.v_flat());
    let half = |from: usize| {
        let mut calibration = LayerCalibration::new(shape);
        let cut = |x: &[f32], row: usize| x[from * row..(from + 2000) * row].to_vec();
        calibration.add(&cut(&q, 128), &cut(&k, 64), &cut(&v, 64)).unwrap();
        calibration.set_w_o(&layer.w_o_flat(), layer.hidden).unwrap();
        project(0, &calibration, Projection::JointSvd).unwrap().remove(0).scores
    };
    let (first, second) = (half(0), half(2000));
    for rank in [16, 32, 48] {
        let (a, b) =
            (common::map(64, &first.left(rank).unwrap()), common::map(64, &second.left(rank).unwrap()));
        let overlap = (a.transpose() * b).norm_squared() / rank as f64;
        assert!(overlap >= 0.95, "rank {rank}: {overlap}");
    }
}

/// One layer of Llama 3 8B: 32 query heads over 8 KV heads of 128, hidden 4096. How fast it is the benches say.
#[test]
fn a_layer_of_llama_3_8b_has_bases_that_lose_ever_less() {
    let shape = HeadShape::new(32, 8, 128, 128).unwrap();
    let values = |heads: usize, seed| Inputs::OutlierChannels.values(1024 * heads, 128, seed);
    let mut layer = LayerCalibration::new(shape);
    layer.add(&values(32, 1), &values(8, 2), &values(8, 3)).unwrap();
    layer.set_w_o(&Inputs::Normal.values(4096 * 32, 128, 4), 4096).unwrap();
    let bases = project(0, &layer, Projection::Optimal).unwrap();
    assert_eq!(bases.len(), 8);
    for (head, basis) in bases.iter().enumerate() {
        for (what, basis) in [("scores", &basis.scores), ("values", &basis.values)] {
            let (lost, rounding) = (basis.lost_energy(), 1e-9 * basis.lost_energy()[0]);
            assert!(lost[0] > 0.0 && lost.len() == 9, "{what} of head {head}: {lost:?}");
            assert!(
                lost.windows(2).all(|pair| pair[1] <= pair[0] + rounding),
                "{what} of head {head}: {lost:?}"
            );
            assert!(lost[8].abs() <= rounding, "all of rank 128 is kept, {what} of head {head}: {lost:?}");
        }
    }
}
