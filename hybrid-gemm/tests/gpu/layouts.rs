//! Operands as callers have them: rows with gaps, checkpoints in place.

use emulator::rig::Rig;
use half::{bf16, f16};
use hybrid_gemm::gpu::Strides;
use hybrid_gemm::{DType, EpilogueSpec, Format, GemmConfig, MappedFile, Residency, Tiling, Weights};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::common::{device, random};
use crate::product::{Operands, check, weights};

emulator::device_test!(rows_with_gaps, checkpoints_in_place);

/// Rows at multiples of 16 bytes, and rows that start anywhere.
fn rows_with_gaps<R: Rig>(rig: &R) {
    let (n, k, tokens) = (70, 72, 8);
    let epilogue = EpilogueSpec { residual: true, ..EpilogueSpec::plain(DType::BF16) };
    for (case, strides) in [
        ("aligned", Strides { x: 80, out: 72, residual: 128 }),
        ("anywhere", Strides { x: 73, out: 71, residual: 75 }),
    ] {
        let tiling = Tiling::new(n, k, Format::Float(DType::BF16)).expect("a tiling");
        let weights = weights::<bf16>(21, tiling, Residency::HbmFraction(0.5));
        let operands = Operands::<bf16, bf16> {
            x: random(22, tokens * strides.x),
            residual: Some(random(23, tokens * strides.residual)),
            strides: Some(strides),
            ..Operands::new(22, tokens, weights, epilogue)
        };
        let config = GemmConfig { epilogue, ..GemmConfig::new(tokens, DType::BF16, device(3)) };
        check(rig, case, config, &operands, tokens);
    }
}

/// The host part is the checkpoint's own row-major matrix, which ends where its last row does.
fn checkpoints_in_place<R: Rig>(rig: &R) {
    let folder = tempfile::tempdir().expect("a folder");
    for (n, k) in [(64, 64), (100, 200), (70, 77)] {
        let path = folder.path().join(format!("{n}x{k}.safetensors"));
        let values: Vec<f16> = random(31, n * k);
        let view = TensorView::new(Dtype::F16, vec![n, k], bytemuck::cast_slice(&values)).expect("a tensor");
        safetensors::serialize_to_file([("w", view)], None, &path).expect("a file");
        let tensor = MappedFile::open(&path).and_then(|file| file.tensor("w")).expect("the tensor");
        for residency in [Residency::Host, Residency::HbmFraction(0.5)] {
            let weights = Weights::in_place(&tensor, residency).expect("weights");
            let epilogue = EpilogueSpec::plain(DType::F32);
            let operands = Operands::<f16, f32>::new(32, 16, weights, epilogue);
            let config = GemmConfig { epilogue, ..GemmConfig::new(16, DType::F16, device(3)) };
            check(rig, &format!("[{n}, {k}] in place, {residency:?}"), config, &operands, 11);
        }
    }
}
