//! Calibration of one layer of Llama 3 8B (32 query heads over 8 KV heads of 128, hidden 4096) on the CPU: Gram matrices of 32K
//! tokens in chunks of 4096, W_O, and bases of all heads.

use criterion::{Criterion, criterion_group, criterion_main};
use kv_compress::calibrate::LayerCalibration;
use kv_compress::projection::{Projection, project};
use longkv_attention::HeadShape;
use longkv_attention::testing::Inputs;

const CHUNK: usize = 4096;
const CHUNKS: usize = 8;
const HIDDEN: usize = 4096;

fn calibration(criterion: &mut Criterion) {
    let shape = HeadShape::new(32, 8, 128, 128).expect("a shape");
    let values = |heads: usize, seed| Inputs::OutlierChannels.values(CHUNK * heads, 128, seed);
    let (q, k, v) = (values(32, 1), values(8, 2), values(8, 3));
    let w_o = Inputs::Normal.values(HIDDEN * 32, 128, 4);
    let grams = || {
        let mut layer = LayerCalibration::new(shape);
        for _ in 0..CHUNKS {
            layer.add(&q, &k, &v).expect("activations");
        }
        layer.set_w_o(&w_o, HIDDEN).expect("W_O");
        layer
    };
    let layer = grams();
    let mut group = criterion.benchmark_group("kv-compress/calibrate/cpu/f64");
    group.sample_size(10);
    group.bench_function("grams 32q/8kv/d128 32768 tokens", |bencher| bencher.iter(grams));
    for projection in Projection::ALL {
        group.bench_function(format!("bases 8 heads d128 {projection}"), |bencher| {
            bencher.iter(|| project(0, &layer, projection).expect("bases"));
        });
    }
    group.finish();
}

criterion_group!(benches, calibration);
criterion_main!(benches);
