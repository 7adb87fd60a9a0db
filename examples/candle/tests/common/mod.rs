//! Inputs, layouts and comparisons that the tests share.
#![allow(dead_code)] // each test binary uses its part

use candle_core::{DType, Device, Result, Tensor};
use longkv_candle::{AttentionSpec, HeadShape, Mask, Score};

pub(crate) const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Causal attention of `heads` query and KV heads of `dim` channels.
pub(crate) fn spec(heads: (usize, usize), dim: usize) -> AttentionSpec {
    let shape = HeadShape::new(heads.0, heads.1, dim, dim).expect("a valid shape");
    let score = Score::new((dim as f32).powf(-0.5)).expect("a finite scale");
    AttentionSpec { shape, score, mask: Mask::Causal }
}

/// Uniform values in -2..2.
pub(crate) fn random(shape: &[usize], dtype: DType, seed: u64) -> Result<Tensor> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| 4.0 * rng.f32() - 2.0).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)
}

/// Rounding of weights and outputs of values up to 2.
pub(crate) fn tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 1e-5,
        DType::F16 => 2f32.powi(-9),
        _ => 2f32.powi(-6),
    }
}

pub(crate) fn flat(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

/// Fails with the worst element; equal infinities are equal, NaN never is.
pub(crate) fn assert_close(case: &str, found: &Tensor, expected: &Tensor, tolerance: f32) -> Result<()> {
    assert_eq!(found.dims(), expected.dims(), "{case}: shape");
    let (found, expected) = (flat(found)?, flat(expected)?);
    let difference =
        |i: &usize| if found[*i] == expected[*i] { 0.0 } else { (found[*i] - expected[*i]).abs() };
    let worst = (0..found.len()).max_by(|a, b| difference(a).total_cmp(&difference(b)));
    if let Some(worst) = worst {
        let off = difference(&worst);
        assert!(
            off <= tolerance,
            "{case}: element {worst} is {}, expected {} to {tolerance:.1e}",
            found[worst],
            expected[worst]
        );
    }
    Ok(())
}

/// Fails unless the error's text has every part.
pub(crate) fn assert_error<T>(case: &str, result: Result<T>, parts: &[&str]) {
    let Err(error) = result else { panic!("{case}: no error") };
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{case}: no `{part}` in `{text}`");
    }
}
