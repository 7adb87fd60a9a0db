//! Weights that lie in host memory and in HBM, a share in each, by `hybrid-gemm`.
//!
//! The CPU has one memory, so here the split is one of bookkeeping: products run through the plan, the schedule and the receipts of
//! the method, in the bits that every placement gives, and the predictions are for devices that have both memories.

use std::sync::Arc;

use hybrid_gemm::cpu::{Gemm, GemmArgs};
use hybrid_gemm::{
    Alpha, DType, DeviceProfile, EpilogueSpec, Format, GemmConfig, GemmPlan, MatrixView, MatrixViewMut,
    Prediction, Residency, RowMajor, Weights,
};
use ndarray::{Array2, ArrayView2, CowArray, Ix2};

use super::{Ledger, Linear, Weight};
use crate::Error;
use crate::mode::Mode;

/// Tokens of the largest product that is planned for.
const MAX_TOKENS: usize = 1 << 20;
const SHARE: &str = "host:SHARE with the share in host memory, 0 to 1, such as host:0.75";

/// How a mode `host:SHARE[,format=…][,alpha=…][,ceilings=…]` places weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HostOptions {
    /// Share of the output features in host memory.
    share: f64,
    /// Another format than the checkpoint's.
    format: Option<Format>,
    alpha: Alpha,
}

impl HostOptions {
    /// Reads a mode's options.
    ///
    /// # Errors
    /// [`Error::Mode`] for a share or alpha outside 0..=1, or an unknown format.
    pub fn new(mode: &Mode) -> Result<Self, Error> {
        let unit = |text: &str| text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
        let share = mode.file().and_then(|share| share.to_str());
        let share = share.ok_or_else(|| mode.refuse(format!("expected {SHARE}")))?;
        let share = unit(share).ok_or_else(|| mode.refuse(format!("expected {SHARE}, found {share:?}")))?;
        let format = match mode.option("format", "stored".to_string(), "a format")?.as_str() {
            "stored" => None,
            "int8" => Some(Format::Int8),
            "int4" => Some(Format::Int4 { group: 64 }),
            "int4-zero-points" => Some(Format::Int4ZeroPoints { group: 64 }),
            "fp8-rows" => Some(Format::Fp8Rows),
            "fp8-blocks" => Some(Format::Fp8Blocks),
            other => {
                let known = "stored, int8, int4, int4-zero-points, fp8-rows or fp8-blocks";
                return Err(mode.refuse(format!("format: expected {known}, found {other:?}")));
            }
        };
        let alpha = match mode.option("alpha", "auto".to_string(), "a number")?.as_str() {
            "auto" => Alpha::Auto,
            text => Alpha::Fixed(
                unit(text)
                    .ok_or_else(|| mode.refuse(format!("alpha: expected auto or 0 to 1, found {text:?}")))?,
            ),
        };
        Ok(HostOptions { share, format, alpha })
    }
}

/// A matrix whose first output features lie in host memory and whose last ones in HBM.
pub struct Host {
    gemm: Gemm,
    /// The same product on each device of the ledger.
    plans: Vec<GemmPlan>,
    bias: Option<Vec<f32>>,
    ledger: Arc<Ledger>,
}

impl Host {
    /// Packs a weight. Its checkpoint's type is the format, unless the options say otherwise, so nothing is lost.
    ///
    /// # Errors
    /// [`Error::HybridGemm`] for values that the format cannot hold.
    pub fn new(weight: Weight, options: HostOptions, ledger: Arc<Ledger>) -> Result<Self, Error> {
        let (n, k) = weight.matrix.dim();
        let matrix = weight.matrix.as_standard_layout();
        let values = matrix.as_slice().expect("standard layout");
        let stored = match weight.stored {
            attention::DType::F32 => DType::F32,
            attention::DType::F16 => DType::F16,
            attention::DType::BF16 => DType::BF16,
        };
        let format = options.format.unwrap_or(Format::Float(stored));
        let residency = Residency::HbmFraction(1.0 - options.share);
        let weights = Weights::pack(RowMajor::from_slice(values, [n, k])?, format, residency)?;
        let epilogue = EpilogueSpec { bias: weight.bias.is_some(), ..EpilogueSpec::plain(DType::F32) };
        let plan = |device: &DeviceProfile| {
            let config = GemmConfig {
                epilogue,
                alpha: options.alpha,
                ..GemmConfig::new(MAX_TOKENS, DType::F32, device.clone())
            };
            GemmPlan::new(*weights.placement(), config)
        };
        let plans = ledger.devices().iter().map(plan).collect::<Result<Vec<_>, _>>()?;
        let gemm = Gemm::prepare(&plan(&DeviceProfile::h200())?, weights)?;
        Ok(Host { gemm, plans, bias: weight.bias, ledger })
    }
}

impl Linear for Host {
    fn forward(&self, x: ArrayView2<'_, f32>) -> Result<Array2<f32>, Error> {
        let tiling = self.gemm.plan().placement().tiling();
        let (tokens, k) = x.dim();
        if k != tiling.k() {
            return Err(Error::argument("x", format!("{} columns", tiling.k()), k));
        }
        let x = x.as_standard_layout();
        let mut y = Array2::zeros((tokens, tiling.n()));
        let mut workspace = vec![0.0; self.gemm.plan().workspace_len(tokens)];
        let args = GemmArgs {
            x: MatrixView::new(x.as_slice().expect("standard layout"), tokens, k)?,
            bias: self.bias.as_deref(),
            residual: None,
            out: MatrixViewMut::<f32>::new(y.as_slice_mut().expect("a new array"), tokens, tiling.n())?,
        };
        let receipt = self.gemm.run(args, &mut workspace)?;
        self.ledger.record(&receipt);
        Ok(y)
    }

    fn matrix(&self) -> CowArray<'_, f32, Ix2> {
        let tiling = self.gemm.plan().placement().tiling();
        let values = self.gemm.weights().dequantize();
        Array2::from_shape_vec((tiling.n(), tiling.k()), values).expect("the matrix's own shape").into()
    }

    fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    fn predict(&self, device: usize, tokens: usize) -> Option<Prediction> {
        self.plans.get(device)?.predict(tokens).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::Dense;

    #[test]
    fn every_share_is_the_matrix() {
        for (case, tokens, inputs, outputs, bias) in
            [("decoding", 1, 100, 130, false), ("prefill", 300, 64, 200, true), ("no rows", 0, 7, 3, true)]
        {
            let mut rng = fastrand::Rng::with_seed(17);
            let mut random = |rows, columns| {
                Array2::from_shape_simple_fn((rows, columns), || {
                    half::f16::from_f32(rng.f32() - 0.5).to_f32()
                })
            };
            let (x, w, b) = (random(tokens, inputs), random(outputs, inputs), random(1, outputs));
            let weight = || Weight {
                matrix: w.to_shared(),
                bias: bias.then(|| b.row(0).to_vec()),
                stored: attention::DType::F16,
            };
            let dense = Dense::new(weight()).forward(x.view()).unwrap();
            let mut first: Option<Array2<f32>> = None;
            for mode in ["host:0", "host:0.5", "host:0.75", "host:1", "host:1,alpha=0", "host:1,alpha=0.5"] {
                let ledger = Arc::new(Ledger::default());
                let options = HostOptions::new(&mode.parse().unwrap()).unwrap();
                let linear = Host::new(weight(), options, ledger.clone()).unwrap();
                assert_eq!(linear.matrix(), w, "{case}, {mode}: f16 loses nothing");
                let y = linear.forward(x.view()).unwrap();
                for (index, found) in y.indexed_iter() {
                    let expected = dense[index];
                    assert!(
                        (found - expected).abs() < 1e-5,
                        "{case}, {mode}: {index:?} is {found}, not {expected}"
                    );
                }
                assert!(*first.get_or_insert(y.clone()) == y, "{case}, {mode}: other bits");
                assert!(ledger.steps().iter().all(|step| step.as_predicted), "{case}, {mode}");
                let wide = Array2::zeros((tokens, inputs + 1));
                assert!(matches!(linear.forward(wide.view()), Err(Error::Argument { argument: "x", .. })));
            }
        }
    }

    #[test]
    fn quantised_weights_are_close() {
        let mut rng = fastrand::Rng::with_seed(19);
        let w = Array2::from_shape_simple_fn((64, 96), || rng.f32() - 0.5);
        let weight = || Weight { matrix: w.to_shared(), bias: None, stored: attention::DType::F32 };
        for (mode, bound) in [
            ("host:1", 0.0),
            ("host:1,format=int8", 0.003),
            ("host:1,format=int4", 0.04),
            ("host:1,format=int4-zero-points", 0.035),
            ("host:1,format=fp8-rows", 0.032),
            ("host:1,format=fp8-blocks", 0.032),
        ] {
            let options = HostOptions::new(&mode.parse().unwrap()).unwrap();
            let found = Host::new(weight(), options, Arc::default()).unwrap();
            let worst = (&found.matrix() - &w).iter().fold(0.0f32, |worst, error| worst.max(error.abs()));
            assert!(worst <= bound && (bound == 0.0) == (worst == 0.0), "{mode}: {worst}");
        }
    }

    #[test]
    fn what_the_mode_refuses() {
        for (mode, named) in [
            ("host", "host:SHARE"),
            ("host:1.5", "1.5"),
            ("host:-0.1", "-0.1"),
            ("host:NaN", "NaN"),
            ("host:most", "most"),
            ("host:0.5,format=int3", "int3"),
            ("host:0.5,alpha=2", "alpha"),
        ] {
            let error = HostOptions::new(&mode.parse().unwrap()).expect_err(mode).to_string();
            assert!(error.contains(named), "{mode}: {error}");
        }
    }
}
