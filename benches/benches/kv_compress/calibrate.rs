//! Calibration of one layer of Llama 3 8B on the CPU: Gram matrices of activations and of W_O, and the bases of all heads.

use std::sync::LazyLock;

use criterion::{BenchmarkId, Criterion};
use kv_compress::calibrate::LayerCalibration;
use kv_compress::projection::{Projection, project};
use longkv_attention::testing::Inputs;
use longkv_benches::{host, throughput};

use super::{DIM, KV_HEADS, Q_HEADS, shape};

/// Tokens of one addition.
const CHUNK: usize = 4096;
/// Tokens that a layer is calibrated on.
const TOKENS: usize = 32 * 1024;
const HIDDEN: usize = 4096;

/// Activations of a chunk and the layer's weight.
struct Layer {
    /// `[CHUNK, Q_HEADS, DIM]`
    q: Vec<f32>,
    /// `[CHUNK, KV_HEADS, DIM]`
    k: Vec<f32>,
    /// `[CHUNK, KV_HEADS, DIM]`
    v: Vec<f32>,
    /// `[HIDDEN, Q_HEADS · DIM]`
    w_o: Vec<f32>,
}

/// Made when a bench runs, not when it is listed.
static INPUTS: LazyLock<Layer> = LazyLock::new(|| {
    let values = |heads: usize, seed| Inputs::OutlierChannels.values(CHUNK * heads, DIM, seed);
    let w_o = Inputs::Normal.values(HIDDEN * Q_HEADS, DIM, 4);
    Layer { q: values(Q_HEADS, 1), k: values(KV_HEADS, 2), v: values(KV_HEADS, 3), w_o }
});

fn add(layer: &mut LayerCalibration) {
    layer.add(&INPUTS.q, &INPUTS.k, &INPUTS.v).expect("finite activations");
}

/// All that a calibration sums up of the layer.
fn grams() -> LayerCalibration {
    let mut layer = LayerCalibration::new(shape());
    (0..TOKENS / CHUNK).for_each(|_| add(&mut layer));
    layer.set_w_o(&INPUTS.w_o, HIDDEN).expect("finite weights");
    layer
}

pub(super) fn cpu(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("kv-compress/calibrate/cpu/f64");
    group.sample_size(10);
    let name = format!("kv-compress/calibrate/f64/{TOKENS}");
    host::time(&mut group, BenchmarkId::new("whole layer", TOKENS), &name, || {
        LazyLock::force(&INPUTS);
        project(0, &grams(), Projection::Optimal).expect("bases")
    });
    for projection in Projection::ALL {
        group.bench_function(BenchmarkId::new("project", projection), |bencher| {
            let layer = grams();
            bencher.iter(|| project(0, &layer, projection).expect("bases"));
        });
    }
    // The operations of the decompositions depend on how they converge: only the additions have a throughput.
    let elements = CHUNK * (Q_HEADS + 2 * KV_HEADS) * DIM;
    // A Gram matrix is symmetric: half of it is computed.
    group.throughput(throughput((elements * size_of::<f32>()) as u64, (elements * (DIM + 1)) as u64));
    group.bench_function(BenchmarkId::new("add", CHUNK), |bencher| {
        let mut layer = LayerCalibration::new(shape());
        LazyLock::force(&INPUTS);
        bencher.iter(|| add(&mut layer));
    });
}
