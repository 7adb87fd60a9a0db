//! Calibration of one layer on the CPU: Gram matrices from activations, then the projections of all its heads.

use criterion::{BenchmarkId, Criterion};
use kv_compress::calibrate::LayerCalibration;
use longkv_attention::testing::Inputs;
use longkv_benches::throughput;

use super::{DIM, KV_HEADS, Q_HEADS, shape};

/// Tokens of one addition; 32K tokens take eight times as long.
const TOKENS: usize = 4096;

pub(super) fn cpu(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("kv-compress/calibrate/cpu/f64");
    group.sample_size(10);
    let q = Inputs::OutlierChannels.values(TOKENS * Q_HEADS, DIM, 1);
    let k = Inputs::OutlierChannels.values(TOKENS * KV_HEADS, DIM, 2);
    let v = Inputs::OutlierChannels.values(TOKENS * KV_HEADS, DIM, 3);
    let bytes = (q.len() + k.len() + v.len()) * size_of::<f32>();
    // A Gram matrix is symmetric: half of it is computed.
    let flops = TOKENS * (Q_HEADS + 2 * KV_HEADS) * DIM * (DIM + 1);
    group.throughput(throughput(bytes as u64, flops as u64));
    group.bench_function(BenchmarkId::from_parameter(TOKENS), |bencher| {
        let mut layer = LayerCalibration::new(shape());
        bencher.iter(|| layer.add(&q, &k, &v).expect("finite activations"));
    });
}
