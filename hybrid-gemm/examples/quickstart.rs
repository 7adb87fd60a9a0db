//! A Llama-8B projection with most of its weights in host memory: where the time goes on five devices, then a small product of
//! the same kind computed and accounted for.
//!
//! `cargo run --release -p hybrid-gemm --example quickstart`

use std::error::Error;

use half::bf16;
use hybrid_gemm::cpu::{Gemm, GemmArgs};
use hybrid_gemm::{
    DType, DeviceProfile, Format, GemmConfig, GemmPlan, MatrixView, MatrixViewMut, Placement, Residency,
    RowMajor, Tiling, Weights,
};

fn main() -> Result<(), Box<dyn Error>> {
    // Planning needs no weights: 28672 outputs × 4096 inputs, three quarters in host memory.
    let format = Format::Float(DType::BF16);
    let placement = Placement::packed(Tiling::new(28672, 4096, format)?, Residency::HbmFraction(0.25))?;
    for device in DeviceProfile::all() {
        let plan = GemmPlan::new(placement, GemmConfig::new(2048, DType::BF16, device))?;
        print!("{}", plan.explain(2048));
    }

    // A small one, computed: 8 tokens, 256 inputs, 512 outputs.
    let (tokens, n, k) = (8, 512, 256);
    let signal = |i: usize, salt: usize| bf16::from_f32(((i * 7919 + salt * 104_729) as f32 * 0.001).sin());
    let values: Vec<bf16> = (0..n * k).map(|i| signal(i, 1)).collect();
    let x: Vec<bf16> = (0..tokens * k).map(|i| signal(i, 2)).collect();
    let matrix = RowMajor::from_slice(&values, [n, k])?;
    let mut outputs = Vec::new();
    for fraction in [1.0, 0.5, 0.0] {
        let weights = Weights::pack(matrix, format, Residency::HbmFraction(fraction))?;
        let plan =
            GemmPlan::new(*weights.placement(), GemmConfig::new(tokens, DType::BF16, DeviceProfile::h200()))?;
        let gemm = Gemm::prepare(&plan, weights)?;
        let mut out = vec![bf16::ZERO; tokens * n];
        let mut workspace = vec![0.0; plan.workspace_len(tokens)];
        let args = GemmArgs {
            x: MatrixView::new(&x, tokens, k)?,
            bias: None,
            residual: None,
            out: MatrixViewMut::new(&mut out, tokens, n)?,
        };
        let receipt = gemm.run(args, &mut workspace)?;
        println!("{:.0} % in HBM: {}", 100.0 * fraction, receipt.counted);
        assert_eq!(receipt.counted, receipt.predicted.traffic, "what was counted is what was predicted");
        outputs.push(out);
    }
    assert!(outputs.iter().all(|out| *out == outputs[0]), "where weights live changes no bit");
    Ok(())
}
