//! TMA, cp.async and wgmma: a whole product through tensor maps or copies, swizzled tiles and warpgroup instructions.

use cuda::kernels::conformance::WgmmaProduct;
use cuda::launch::Device;
use cuda::storage::Storage;
use cuda::table::ArchClass;
use emulator::rig::{GpuRig, Rig};
use half::{bf16, f16};

use crate::data::Random;

emulator::device_test!(product_f16, product_bf16);

const RS: u32 = WgmmaProduct::<<GpuRig as Rig>::Function>::RS;
const N64: u32 = WgmmaProduct::<<GpuRig as Rig>::Function>::N64;
const COPIES: u32 = WgmmaProduct::<<GpuRig as Rig>::Function>::COPIES;

/// Every form: operands in shared memory and A in registers, K-major and N-major, 64 and 128 columns, added to and overwritten; by boxes
/// and by copies.
fn product<R: Rig, E: Storage>(rig: &R, narrow: fn(f32) -> E, widen: fn(E) -> f32) {
    if !ArchClass::Hopper.runs_on(rig.device().arch()) {
        println!("SKIPPED wgmma: {} is not sm_90a", rig.device().arch());
        return;
    }
    let kernel = WgmmaProduct::prepare(rig.device(), E::DTYPE).expect("prepare");
    let seed = 51;
    let mut random = Random::new(seed);
    // Depths of less than a slot, one slot, two, more than the ring, and with a zero-filled rest.
    let forms = [0, RS, N64, RS | N64, COPIES, COPIES | RS]
        .map(|form| ["integers", "random"].map(|case| (form, case)));
    for (m, n, k) in [(64, 128, 8), (64, 128, 64), (128, 128, 200), (64, 256, 320)] {
        for (form, case) in forms.into_iter().flatten() {
            let what = format!("{m}×{n}×{k}, form {form}, {case} (seed {seed}), {}", rig.name());
            let mut values = |count: usize| -> Vec<E> {
                let mut value =
                    || if case == "integers" { random.integer(-8, 8) as f32 } else { random.unit() };
                (0..count).map(|_| narrow(value())).collect()
            };
            let (a, b) = (values(m * k), values(n * k));
            let (a_tensor, b_tensor) = (rig.upload(&a), rig.upload(&b));
            let by_columns = form & RS != 0;
            let mut c = rig.poisoned::<f32>(m * n);
            let (a_view, b_view) = (rig.view(&a_tensor), rig.view(&b_tensor));
            kernel
                .launch(rig.queue(), (m, n, k), form, &a_view, &b_view, &mut rig.view_mut(&mut c))
                .unwrap_or_else(|error| panic!("{what}: {error}"));
            let c = rig.download(&c);
            let widen = |values: &[E]| values.iter().map(|&x| f64::from(widen(x))).collect::<Vec<f64>>();
            let (a, b) = (widen(&a), widen(&b));
            for (row, column) in (0..m).flat_map(|row| (0..n).map(move |column| (row, column))) {
                let (mut sum, mut magnitude) = (0.0, 0.0);
                for i in 0..k {
                    let b = if by_columns { b[i * n + column] } else { b[column * k + i] };
                    let x = a[row * k + i] * b;
                    sum += x;
                    magnitude += x.abs();
                }
                // Each of the k additions may truncate at 2^-22 of the magnitudes.
                let tolerance =
                    if case == "integers" { 0.0 } else { k as f64 * magnitude / f64::from(1 << 22) };
                let found = f64::from(c[row * n + column]);
                assert!(
                    (found - sum).abs() <= tolerance,
                    "{what}: row {row} column {column}: found {found}, expected {sum} ± {tolerance}"
                );
            }
        }
    }
}

fn product_f16<R: Rig>(rig: &R) {
    product(rig, f16::from_f32, f16::to_f32);
}

fn product_bf16<R: Rig>(rig: &R) {
    product(rig, bf16::from_f32, bf16::to_f32);
}
