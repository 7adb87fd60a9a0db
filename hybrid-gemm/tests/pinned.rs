//! Pinned weights as the device sees them. Needs a GPU: there is nothing to pin for elsewhere.
#![cfg(feature = "cuda")]

mod common;

use common::random;
use cuda::driver::Gpu;
use half::bf16;
use hybrid_gemm::weights::gpu::{pin, pin_file};
use hybrid_gemm::{DType, Error, Format, MappedFile, Residency, RowMajor, Weights};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// The first GPU, or a printed reason why there is none; with `REQUIRE_GPU=1` that is a failure.
fn gpu_or_skip(test: &str) -> Option<Gpu> {
    match Gpu::open(0) {
        Ok(gpu) => Some(gpu),
        Err(reason) if std::env::var_os("REQUIRE_GPU").is_some_and(|v| v == "1") => {
            panic!("{test}: REQUIRE_GPU=1, but {reason}")
        }
        Err(reason) => {
            println!("SKIPPED {test}: {reason}");
            None
        }
    }
}

/// The host part of weights, read at the address that the device has for it.
fn read(gpu: &Gpu, weights: &Weights) -> Result<Vec<u8>, Error> {
    let (memory, start) = weights.host_memory();
    let address = memory.device_address(gpu.device().ordinal)? + start as u64;
    let mut bytes = vec![0u8; weights.placement().host_bytes() as usize];
    gpu.context().bind_to_thread().expect("the context is alive");
    // SAFETY: the weights hold this many pinned bytes at the address, and are borrowed until the copy is done.
    let copied = unsafe { cuda::cudarc::driver::result::memcpy_dtoh_sync(&mut bytes, address) };
    copied.expect("the device reaches the memory");
    Ok(bytes)
}

#[test]
fn packed_weights_are_seen_by_the_gpu() {
    let Some(gpu) = gpu_or_skip("packed_weights_are_seen_by_the_gpu") else { return };
    let values: Vec<bf16> = random(71, 300 * 200);
    let matrix = RowMajor::from_slice(&values, [300, 200]).unwrap();
    for residency in [Residency::Host, Residency::HbmFraction(0.5)] {
        let weights = Weights::pack(matrix, Format::Float(DType::BF16), residency).unwrap();
        assert!(
            matches!(read(&gpu, &weights), Err(Error::NotMapped { .. })),
            "{residency:?}: not pinned yet"
        );
        let pinned = pin(&gpu, &weights).unwrap();
        assert_eq!(pinned.placement(), weights.placement());
        assert_eq!(pinned.dequantize(), weights.dequantize(), "{residency:?}");
        let (memory, start) = weights.host_memory();
        assert!(read(&gpu, &pinned).unwrap() == memory.bytes()[start..], "{residency:?}");
    }
    let weights = Weights::pack(matrix, Format::Float(DType::BF16), Residency::Hbm).unwrap();
    assert_eq!(pin(&gpu, &weights).unwrap().host_memory().0.bytes().len(), 0, "nothing to pin");
}

/// A read-only mapping, pinned without a copy, outlives the file's handle.
#[test]
fn a_mapped_file_is_seen_by_the_gpu() {
    let Some(gpu) = gpu_or_skip("a_mapped_file_is_seen_by_the_gpu") else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let values: Vec<bf16> = random(72, 128 * 64);
    let bytes: Vec<u8> = bytemuck::cast_slice(&values).to_vec();
    let view = TensorView::new(Dtype::BF16, vec![128, 64], &bytes).unwrap();
    safetensors::serialize_to_file([("w", view)], None, &path).unwrap();
    let pinned = pin_file(&gpu, &MappedFile::open(&path).unwrap()).unwrap();
    let weights = Weights::in_place(&pinned.tensor("w").unwrap(), Residency::Host).unwrap();
    drop(pinned);
    weights.check_in_place().unwrap();
    assert!(read(&gpu, &weights).unwrap() == bytes);
}
