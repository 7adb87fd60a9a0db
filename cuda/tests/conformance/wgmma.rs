//! TMA and wgmma: a whole product through tensor maps, swizzled tiles and warpgroup instructions.

use cuda::kernels::conformance::{TensorMap, WgmmaProduct};
use cuda::launch::Device;
use cuda::memory::View;
use cuda::table::{ArchClass, dtype};
use emulator::rig::{EmulatorRig, GpuRig, Rig};
use half::{bf16, f16};

use crate::data::Random;

emulator::device_test!(product_f16, product_bf16);

/// Encodes the map of a row-major tensor of 16-bit elements in boxes of 64 × 64 with the 128-byte swizzle.
trait TensorMaps: Rig {
    fn tensor_map(&self, tensor: &View<'_, u16>, rows: usize, columns: usize, data_type: i64) -> TensorMap;
}

impl TensorMaps for EmulatorRig {
    fn tensor_map(&self, tensor: &View<'_, u16>, rows: usize, columns: usize, _: i64) -> TensorMap {
        let shape = emulator::TensorShape {
            columns: columns as u64,
            rows: rows as u64,
            row_bytes: columns as u64 * 2,
            box_columns: 64,
            box_rows: 64,
            swizzle_128: true,
        };
        bytemuck::cast(emulator::TensorMap::new(tensor, &shape).expect("a valid tensor map"))
    }
}

impl TensorMaps for GpuRig {
    fn tensor_map(&self, tensor: &View<'_, u16>, rows: usize, columns: usize, data_type: i64) -> TensorMap {
        use cuda::cudarc::driver::sys::{self, CUtensorMapDataType as Type};
        let data_type = match data_type {
            dtype::F16 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            _ => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        };
        let mut map = TensorMap([0; 16]);
        let (extents, strides) = ([columns as u64, rows as u64], [columns as u64 * 2]);
        // SAFETY: a CUtensorMap is 128 bytes at a 64-byte boundary, as `TensorMap` is; all arrays live through the call and
        // have as many elements as two dimensions need.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut map).cast(),
                data_type,
                2,
                tensor.address() as *mut std::ffi::c_void,
                extents.as_ptr(),
                strides.as_ptr(),
                [64, 64].as_ptr(),
                [1, 1].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        assert_eq!(result, sys::CUresult::CUDA_SUCCESS, "cuTensorMapEncodeTiled");
        map
    }
}

const RS: u32 = WgmmaProduct::<<GpuRig as Rig>::Function>::RS;
const N64: u32 = WgmmaProduct::<<GpuRig as Rig>::Function>::N64;

/// Every form: operands in shared memory and A in registers, K-major and N-major, 64 and 128 columns, added to and overwritten.
fn product<R: TensorMaps>(rig: &R, dtype: i64, to_bits: fn(f32) -> u16, from_bits: fn(u16) -> f32) {
    if !ArchClass::Hopper.runs_on(rig.device().arch()) {
        println!("SKIPPED wgmma: {} is not sm_90a", rig.device().arch());
        return;
    }
    let kernel = WgmmaProduct::prepare(rig.device(), dtype).expect("prepare");
    let seed = 51;
    let mut random = Random::new(seed);
    // Depths of less than a slot, one slot, two, more than the ring, and with a zero-filled rest.
    let forms = [0, RS, N64, RS | N64].map(|form| ["integers", "random"].map(|case| (form, case)));
    for (m, n, k) in [(64, 128, 8), (64, 128, 64), (128, 128, 200), (64, 256, 320)] {
        for (form, case) in forms.into_iter().flatten() {
            let what = format!("{m}×{n}×{k}, form {form}, {case} (seed {seed}), {}", rig.name());
            let mut values = |count: usize| -> Vec<u16> {
                let mut value =
                    || if case == "integers" { random.integer(-8, 8) as f32 } else { random.unit() };
                (0..count).map(|_| to_bits(value())).collect()
            };
            let (a, b) = (values(m * k), values(n * k));
            let (a_tensor, b_tensor) = (rig.upload(&a), rig.upload(&b));
            let (a_view, b_view) = (rig.view(&a_tensor), rig.view(&b_tensor));
            let a_map = rig.tensor_map(&a_view, m, k, dtype);
            let by_columns = form & RS != 0;
            let b_map = if by_columns {
                rig.tensor_map(&b_view, k, n, dtype)
            } else {
                rig.tensor_map(&b_view, n, k, dtype)
            };
            let mut c = rig.poisoned::<f32>(m * n);
            // SAFETY: the maps are of these tensors, which outlive the download below.
            let launched = unsafe {
                kernel.launch(rig.queue(), (m, n, k), form, &a_map, &b_map, &mut rig.view_mut(&mut c))
            };
            launched.unwrap_or_else(|error| panic!("{what}: {error}"));
            let c = rig.download(&c);
            let widen = |bits: &[u16]| bits.iter().map(|&x| f64::from(from_bits(x))).collect::<Vec<f64>>();
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

fn product_f16<R: TensorMaps>(rig: &R) {
    product(rig, dtype::F16, |x| f16::from_f32(x).to_bits(), |bits| f16::from_bits(bits).to_f32());
}

fn product_bf16<R: TensorMaps>(rig: &R) {
    product(rig, dtype::BF16, |x| bf16::from_f32(x).to_bits(), |bits| bf16::from_bits(bits).to_f32());
}
