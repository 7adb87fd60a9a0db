//! What the integration tests share. Each test binary uses some of it.
#![allow(dead_code)]

pub(crate) mod quantised;

use half::{bf16, f16};
use hybrid_gemm::cpu::{Gemm, GemmArgs};
use hybrid_gemm::{
    DType, DeviceProfile, Element, Error, GemmConfig, MatrixView, MatrixViewMut, Receipt, RowMajor, Tiling,
};

/// A device of few SMs, so that small products use several roles and several blocks of each.
pub(crate) fn device(sm_count: usize) -> DeviceProfile {
    DeviceProfile { sm_count, ..DeviceProfile::gh200() }
}

/// Random values in ±0.5, with a few a hundred times larger.
pub(crate) fn random<E: Element>(seed: u64, len: usize) -> Vec<E> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut value = || match rng.u32(..200) {
        0 => 100.0 * (rng.f32() - 0.5),
        _ => rng.f32() - 0.5,
    };
    (0..len).map(|_| E::from_f32(value())).collect()
}

/// Runs one product on poisoned memory.
pub(crate) fn run<X: Element, O: Element>(
    gemm: &Gemm,
    x: &[X],
    bias: Option<&[f32]>,
    residual: Option<&[O]>,
) -> Result<(Vec<O>, Receipt), Error> {
    let (plan, tiling) = (gemm.plan(), *gemm.plan().placement().tiling());
    let tokens = x.len() / tiling.k();
    let columns = plan.config().epilogue.out_columns(tiling.n());
    let mut out = vec![O::from_f32(f32::NAN); tokens * columns];
    let mut workspace = vec![f32::NAN; plan.workspace_len(tokens)];
    let args = GemmArgs {
        x: MatrixView::new(x, tokens, tiling.k())?,
        bias,
        residual: residual.map(|residual| MatrixView::new(residual, tokens, columns)).transpose()?,
        out: MatrixViewMut::new(&mut out, tokens, columns)?,
    };
    let receipt = gemm.run(args, &mut workspace)?;
    Ok((out, receipt))
}

/// Checks outputs against the oracle: |error| within `relative` of the sum of absolute products, and of the result's own
/// rounding.
#[track_caller]
pub(crate) fn compare<O: Element>(case: &str, found: &[O], exact: &[f64], scale: f64) {
    assert_eq!(found.len(), exact.len(), "{case}");
    let epsilon = match O::DTYPE {
        DType::F32 => 1e-6,
        DType::F16 => 0.5 * f16::EPSILON.to_f64(),
        DType::BF16 => 0.5 * bf16::EPSILON.to_f64(),
    };
    let excess = |(found, exact): (&O, &f64)| {
        let (found, bound) = (f64::from(found.to_f32()), 2e-6 * scale + 1.001 * epsilon * exact.abs() + 1e-7);
        let excess = (found - exact).abs() / bound;
        if excess.is_nan() { f64::INFINITY } else { excess }
    };
    let worst = found.iter().zip(exact).map(excess).enumerate().max_by(|a, b| a.1.total_cmp(&b.1));
    if let Some((index, excess)) = worst {
        assert!(excess <= 1.0, "{case}: worst at {index}: {:?} instead of {}", found[index], exact[index]);
    }
}

/// Plans and prepares.
pub(crate) fn prepare(
    matrix: RowMajor<'_>,
    tiling: Tiling,
    residency: hybrid_gemm::Residency,
    config: GemmConfig,
) -> Result<Gemm, Error> {
    let weights = hybrid_gemm::Weights::pack_tiled(matrix, tiling, residency)?;
    Gemm::prepare(&hybrid_gemm::GemmPlan::new(*weights.placement(), config)?, weights)
}
