//! Products of few tokens: `hybrid_small_m`.

use cuda::storage::Storage;
use emulator::rig::Rig;
use half::{bf16, f16};
use hybrid_gemm::epilogue::Activation;
use hybrid_gemm::{DType, Element, EpilogueSpec, Format, GemmConfig, Residency, Summation, Tiling};

use crate::common::device;
use crate::product::{Operands, check, weights};

emulator::device_test!(shapes_and_formats, epilogues,);

fn config(max_tokens: usize, x: DType, epilogue: EpilogueSpec) -> GemmConfig {
    GemmConfig { epilogue, ..GemmConfig::new(max_tokens, x, device(5)) }
}

fn shape<R: Rig, X: Storage + Element>(
    rig: &R,
    format: Format,
    (max_tokens, tokens): (usize, usize),
    (n, k): (usize, usize),
    residency: Residency,
    summation: Summation,
) {
    let epilogue = EpilogueSpec::plain(DType::F32);
    let tiling = Tiling::new(n, k, format).expect("a tiling");
    let weights = weights::<X>(1, tiling, residency);
    let operands = Operands::<X, f32>::new(2, max_tokens, weights, epilogue);
    let config = GemmConfig { summation, ..config(max_tokens, <X as Element>::DTYPE, epilogue) };
    let case = format!("[{n}, {k}] of {format}, {residency:?}, {summation:?}, seeds 1 to 4");
    check(rig, &case, config, &operands, tokens);
}

fn shapes_and_formats<R: Rig>(rig: &R) {
    use Summation::{Bitwise, Fast};
    let [host, hbm, half] = [Residency::Host, Residency::Hbm, Residency::HbmFraction(0.5)];
    let float = [DType::F16, DType::BF16].map(Format::Float);
    let int4 = [32, 128].map(|group| Format::Int4 { group });
    let zero_points = [32, 128].map(|group| Format::Int4ZeroPoints { group });
    // Tokens at and beside the tiles of eight, N and K with tails.
    shape::<R, bf16>(rig, float[1], (8, 1), (64, 64), hbm, Bitwise);
    shape::<R, bf16>(rig, float[1], (8, 7), (72, 80), host, Bitwise);
    shape::<R, bf16>(rig, float[1], (8, 8), (200, 648), half, Fast);
    shape::<R, f16>(rig, float[0], (16, 9), (8, 16), host, Bitwise);
    shape::<R, f16>(rig, float[0], (16, 16), (130, 1030), half, Fast);
    shape::<R, bf16>(rig, float[1], (64, 64), (129, 257), half, Bitwise);
    shape::<R, bf16>(rig, float[1], (64, 0), (129, 257), half, Bitwise);
    shape::<R, bf16>(rig, float[1], (65, 65), (70, 90), half, Bitwise);
    shape::<R, bf16>(rig, Format::Int8, (16, 13), (136, 1100), half, Fast);
    shape::<R, f16>(rig, Format::Int8, (8, 3), (65, 200), host, Bitwise);
    shape::<R, bf16>(rig, int4[1], (16, 16), (72, 1288), half, Bitwise);
    shape::<R, bf16>(rig, int4[1], (16, 5), (130, 4100), half, Fast);
    shape::<R, f16>(rig, int4[0], (64, 33), (72, 300), half, Bitwise);
    shape::<R, bf16>(rig, zero_points[1], (16, 9), (72, 1288), half, Bitwise);
    shape::<R, bf16>(rig, zero_points[1], (16, 5), (130, 4100), half, Fast);
    shape::<R, f16>(rig, zero_points[0], (64, 33), (72, 300), half, Bitwise);
    // Rows and inputs at and beside the edges of blocks.
    shape::<R, f16>(rig, Format::Fp8Rows, (8, 3), (65, 200), half, Bitwise);
    shape::<R, bf16>(rig, Format::Fp8Blocks, (16, 13), (136, 2056), half, Fast);
    shape::<R, bf16>(rig, Format::Fp8Blocks, (16, 16), (128, 256), host, Bitwise);
    shape::<R, bf16>(rig, Format::Fp8Blocks, (64, 40), (200, 300), half, Bitwise);
}

fn epilogues<R: Rig>(rig: &R) {
    let plain = EpilogueSpec::plain(DType::BF16);
    let all = EpilogueSpec { bias: true, residual: true, ..plain };
    for (case, spec) in [
        ("bias and residual", all),
        ("SiLU", EpilogueSpec { activation: Activation::Silu, ..all }),
        ("GELU", EpilogueSpec { activation: Activation::GeluTanh, bias: true, ..plain }),
        ("SwiGLU", EpilogueSpec { activation: Activation::SwiGlu, ..all }),
    ] {
        let tiling = Tiling::new(80, 72, Format::Float(DType::BF16)).expect("a tiling");
        let weights = weights::<bf16>(11, tiling, Residency::HbmFraction(0.5));
        let operands = Operands::<bf16, bf16>::new(12, 8, weights, spec);
        check(rig, case, config(8, DType::BF16, spec), &operands, 8);
    }
}
