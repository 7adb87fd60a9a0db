//! From dot product to score: scale, then soft-cap, then mask.

use crate::{Error, HeadShape, Mask};

/// How a dot product q·k becomes a score.
///
/// `score = scale · (q·k)`, then, with a soft-cap, `score = cap · tanh(score / cap)` (Gemma 2). The mask comes after
/// both. The scale is given, never derived from a dimension: a low-rank key is shorter than the head it stands for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    scale: f32,
    soft_cap: Option<f32>,
}

impl Score {
    /// Scores `scale · (q·k)`; usually `1 / sqrt(head_dim)` of the model's head.
    ///
    /// # Errors
    /// [`Error::Argument`] when `scale` is not finite and positive.
    pub fn new(scale: f32) -> Result<Self, Error> {
        if !(scale.is_finite() && scale > 0.0) {
            return Err(Error::argument("scale", "a finite number above 0", scale));
        }
        Ok(Score { scale, soft_cap: None })
    }

    /// The same scores, capped smoothly to ±`cap`.
    ///
    /// # Errors
    /// [`Error::Argument`] when `cap` is not finite and positive.
    pub fn with_soft_cap(self, cap: f32) -> Result<Self, Error> {
        if !(cap.is_finite() && cap > 0.0) {
            return Err(Error::argument("soft_cap", "a finite number above 0", cap));
        }
        Ok(Score { soft_cap: Some(cap), ..self })
    }

    /// The factor on the dot product.
    pub const fn scale(&self) -> f32 {
        self.scale
    }

    /// The bound of the scores, if there is one.
    pub const fn soft_cap(&self) -> Option<f32> {
        self.soft_cap
    }

    /// The score of a dot product, in f64.
    pub fn apply_f64(&self, dot: f64) -> f64 {
        let score = dot * f64::from(self.scale);
        match self.soft_cap.map(f64::from) {
            None => score,
            Some(cap) => cap * (score / cap).tanh(),
        }
    }

    /// The score of a dot product, in f32.
    pub fn apply_f32(&self, dot: f32) -> f32 {
        let score = dot * self.scale;
        match self.soft_cap {
            None => score,
            Some(cap) => cap * (score / cap).tanh(),
        }
    }
}

/// What one attention layer computes: head shape, scores and mask. Every backend takes the same.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionSpec {
    /// Heads and vector sizes.
    pub shape: HeadShape,
    /// Scale and soft-cap.
    pub score: Score,
    /// Which keys a query sees.
    pub mask: Mask,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scale_comes_before_the_cap() {
        let score = Score::new(0.5).unwrap().with_soft_cap(30.0).unwrap();
        let expected = 30.0 * (100.0f64 * 0.5 / 30.0).tanh();
        assert!((score.apply_f64(100.0) - expected).abs() < 1e-12);
        assert!((f64::from(score.apply_f32(100.0)) - expected).abs() < 1e-5);
        assert!((score.apply_f64(1e30) - 30.0).abs() < 1e-12, "saturates at the cap");
        assert_eq!(Score::new(0.25).unwrap().apply_f64(3.0), 0.75);
    }

    #[test]
    fn refuses_what_makes_no_score() {
        for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            assert!(Score::new(scale).is_err(), "scale {scale}");
        }
        let score = Score::new(1.0).unwrap();
        for cap in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            assert!(score.with_soft_cap(cap).is_err(), "cap {cap}");
        }
    }
}
