//! Calibration of one layer of Llama 3 8B (32 query heads over 8 KV heads of 128, hidden 4096) on the CPU: Gram matrices of 32K
//! tokens in chunks of 4096, W_O, and bases of all heads.

use std::sync::LazyLock;

use criterion::{Criterion, criterion_group};
use kv_compress::calibrate::LayerCalibration;
use kv_compress::projection::{Projection, project};
use longkv_attention::HeadShape;
use longkv_attention::testing::Inputs;

const CHUNK: usize = 4096;
const CHUNKS: usize = 8;
const HIDDEN: usize = 4096;

/// q `[CHUNK, 32, 128]`, k and v `[CHUNK, 8, 128]`, and W_O `[HIDDEN, 32 · 128]`; made when a bench runs, not when it is listed.
static INPUTS: LazyLock<[Vec<f32>; 4]> = LazyLock::new(|| {
    let values = |heads: usize, seed| Inputs::OutlierChannels.values(CHUNK * heads, 128, seed);
    [values(32, 1), values(8, 2), values(8, 3), Inputs::Normal.values(HIDDEN * 32, 128, 4)]
});

static CALIBRATED: LazyLock<LayerCalibration> = LazyLock::new(grams);

fn grams() -> LayerCalibration {
    let [q, k, v, w_o] = &*INPUTS;
    let mut layer = LayerCalibration::new(HeadShape::new(32, 8, 128, 128).expect("a shape"));
    for _ in 0..CHUNKS {
        layer.add(q, k, v).expect("activations");
    }
    layer.set_w_o(w_o, HIDDEN).expect("W_O");
    layer
}

fn calibration(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("kv-compress/calibrate/cpu/f64");
    group.sample_size(10);
    group.bench_function("grams 32q/8kv/d128 32768 tokens", |bencher| {
        LazyLock::force(&INPUTS);
        bencher.iter(grams);
    });
    for projection in Projection::ALL {
        group.bench_function(format!("bases 8 heads d128 {projection}"), |bencher| {
            LazyLock::force(&CALIBRATED);
            bencher.iter(|| project(0, &CALIBRATED, projection).expect("bases"));
        });
    }
    group.finish();
}

criterion_group!(benches, calibration);
