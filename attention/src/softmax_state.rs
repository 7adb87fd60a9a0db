//! Partial softmax states and their merge.
//!
//! Attention over a set of keys with scores `x` and values `v` is kept in one of two forms:
//!
//! - **raw** `(m, l, o)`: `m = max x`, `l = Σ exp(x - m)`, `o = Σ exp(x - m) · v`;
//! - **normalised** `(out, lse)`: `out = o / l`, `lse = m + ln l`, natural log with the scale applied. It is the raw state
//!   `(m = lse, l = 1, o = out)`.
//!
//! States of disjoint sets merge into the state of their union, in any order up to rounding (online softmax: Milakov and
//! Gimelshein, arXiv 1805.02867). The state of no key is `lse = -inf`, `out = 0`. An empty state contributes nothing,
//! whatever its `out` holds, and empty states never make a NaN. A NaN that comes in through a score or an LSE comes out
//! again: it is never hidden.

use std::fmt::Debug;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Sub};

use crate::error::check_len;
use crate::{Error, Score};

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// The arithmetic that a state is kept in: `f32` as on a GPU, `f64` for the oracle.
pub trait Real:
    sealed::Sealed
    + Copy
    + Debug
    + Send
    + Sync
    + PartialEq
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + AddAssign
    + MulAssign
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// Minus infinity: the LSE of no key.
    const NEGATIVE_INFINITY: Self;
    /// Natural exponential.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// The larger of two numbers; NaN if either is.
    fn max_or_nan(self, other: Self) -> Self;
    /// This dot product as a score: scaled, then soft-capped.
    fn scored(self, score: &Score) -> Self;
    /// Rounds an f64.
    fn from_f64(value: f64) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
}

macro_rules! real {
    ($type:ty, $apply:ident) => {
        impl Real for $type {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const NEGATIVE_INFINITY: Self = <$type>::NEG_INFINITY;
            #[inline]
            fn exp(self) -> Self {
                <$type>::exp(self)
            }
            #[inline]
            fn ln(self) -> Self {
                <$type>::ln(self)
            }
            #[inline]
            fn max_or_nan(self, other: Self) -> Self {
                if self.is_nan() || self > other { self } else { other }
            }
            #[inline]
            fn scored(self, score: &Score) -> Self {
                score.$apply(self)
            }
            #[inline]
            fn from_f64(value: f64) -> Self {
                value as $type
            }
            #[inline]
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
        }
    };
}
real!(f32, apply_f32);
real!(f64, apply_f64);

/// A normalised partial state of one row.
#[derive(Debug, Clone, PartialEq)]
pub struct Normalised<R> {
    /// Weighted mean of the values `[v_dim]`; 0 if there was no key.
    pub out: Vec<R>,
    /// Natural log of the summed exponentials of the scores; -inf if there was no key.
    pub lse: R,
}

impl<R: Real> Normalised<R> {
    /// The state of no key.
    pub fn empty(v_dim: usize) -> Self {
        Normalised { out: vec![R::ZERO; v_dim], lse: R::NEGATIVE_INFINITY }
    }

    /// Merges the state of other keys into this one.
    ///
    /// # Errors
    /// [`Error::Argument`] when the value sizes differ.
    pub fn merge(&mut self, other: &Normalised<R>) -> Result<(), Error> {
        merge_normalised(&mut self.out, &mut self.lse, &other.out, other.lse)
    }
}

/// Merges the normalised state `(other_out, other_lse)` into `(out, lse)`; both outputs `[v_dim]`.
///
/// # Errors
/// [`Error::Argument`] when the value sizes differ; nothing is merged then.
pub fn merge_normalised<R: Real>(
    out: &mut [R],
    lse: &mut R,
    other_out: &[R],
    other_lse: R,
) -> Result<(), Error> {
    check_len("other_out", other_out.len(), &[out.len()])?;
    if other_lse == R::NEGATIVE_INFINITY {
        return Ok(());
    }
    if *lse == R::NEGATIVE_INFINITY {
        out.copy_from_slice(other_out);
        *lse = other_lse;
        return Ok(());
    }
    let m = lse.max_or_nan(other_lse);
    let (mine, others) = ((*lse - m).exp(), (other_lse - m).exp());
    let l = mine + others;
    // Weights first, so that the outputs, which are means, cannot overflow.
    let (mine, others) = (mine / l, others / l);
    for (a, &b) in out.iter_mut().zip(other_out) {
        *a = *a * mine + b * others;
    }
    *lse = m + l.ln();
    Ok(())
}

/// A raw partial state of one row: what an online softmax carries from block to block.
#[derive(Debug, Clone, PartialEq)]
pub struct Raw<R> {
    /// Largest score so far; -inf if there was no key.
    pub m: R,
    /// Sum of `exp(score - m)`.
    pub l: R,
    /// Sum of `exp(score - m) · value` `[v_dim]`.
    pub o: Vec<R>,
}

impl<R: Real> Raw<R> {
    /// The state of no key.
    pub fn empty(v_dim: usize) -> Self {
        Raw { m: R::NEGATIVE_INFINITY, l: R::ZERO, o: vec![R::ZERO; v_dim] }
    }

    /// Adds one key. A score of -inf is a masked key: nothing is added and `value` is not read.
    pub fn push(&mut self, score: R, value: impl IntoIterator<Item = R>) {
        if score == R::NEGATIVE_INFINITY {
            return;
        }
        self.raise(score);
        let p = (score - self.m).exp();
        self.l += p;
        for (o, v) in self.o.iter_mut().zip(value) {
            *o += p * v;
        }
    }

    /// Raises the reference score to at least `m`, scaling what was summed so far.
    pub fn raise(&mut self, m: R) {
        let m = self.m.max_or_nan(m);
        if m == self.m || m == R::NEGATIVE_INFINITY {
            return;
        }
        if self.m == R::NEGATIVE_INFINITY {
            self.m = m;
            return;
        }
        let scale = (self.m - m).exp();
        self.m = m;
        self.l *= scale;
        for o in &mut self.o {
            *o *= scale;
        }
    }

    /// Merges the state of other keys into this one.
    ///
    /// # Errors
    /// [`Error::Argument`] when the value sizes differ; nothing is merged then.
    pub fn merge(&mut self, other: &Raw<R>) -> Result<(), Error> {
        check_len("other", other.o.len(), &[self.o.len()])?;
        if other.m == R::NEGATIVE_INFINITY {
            return Ok(());
        }
        self.raise(other.m);
        let scale = (other.m - self.m).exp();
        self.l += other.l * scale;
        for (a, &b) in self.o.iter_mut().zip(&other.o) {
            *a += b * scale;
        }
        Ok(())
    }

    /// The normalised form; out 0 and LSE -inf if there was no key.
    pub fn normalise(&self) -> Normalised<R> {
        let mut state = Normalised { out: self.o.clone(), lse: R::NEGATIVE_INFINITY };
        state.lse = normalise_in_place(self.m, self.l, &mut state.out);
        state
    }
}

impl<R: Real> From<&Normalised<R>> for Raw<R> {
    fn from(state: &Normalised<R>) -> Self {
        if state.lse == R::NEGATIVE_INFINITY {
            return Raw::empty(state.out.len());
        }
        Raw { m: state.lse, l: R::ONE, o: state.out.clone() }
    }
}

/// Turns `o` of a raw state into the output and returns the LSE.
pub(crate) fn normalise_in_place<R: Real>(m: R, l: R, o: &mut [R]) -> R {
    if m == R::NEGATIVE_INFINITY {
        o.fill(R::ZERO);
        return R::NEGATIVE_INFINITY;
    }
    for o in o.iter_mut() {
        *o = *o / l;
    }
    m + l.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(score: f64, value: &[f64]) -> Raw<f64> {
        let mut state = Raw::empty(value.len());
        state.push(score, value.iter().copied());
        state
    }

    #[test]
    fn two_keys_by_hand() {
        let mut both = state(0.0, &[1.0, 0.0]);
        both.merge(&state(3f64.ln(), &[0.0, 1.0])).unwrap();
        let both = both.normalise();
        assert!((both.lse - 4f64.ln()).abs() < 1e-15);
        assert!((both.out[0] - 0.25).abs() < 1e-15 && (both.out[1] - 0.75).abs() < 1e-15);
    }

    #[test]
    fn empty_states_are_neutral_and_never_nan() {
        let mut nothing = Normalised::<f32>::empty(3);
        nothing.merge(&Normalised::empty(3)).unwrap();
        assert_eq!(nothing, Normalised { out: vec![0.0; 3], lse: f32::NEG_INFINITY });

        // An empty partial may hold anything: it was never written.
        let poison = Normalised { out: vec![f32::NAN; 3], lse: f32::NEG_INFINITY };
        let full = Normalised { out: vec![1.0, -2.0, 3.0], lse: 0.5 };
        let mut merged = full.clone();
        merged.merge(&poison).unwrap();
        assert_eq!(merged, full);
        let mut merged = poison.clone();
        merged.merge(&full).unwrap();
        assert_eq!(merged, full);
        assert_eq!(Raw::from(&poison), Raw::empty(3));

        let mut raw = Raw::<f32>::empty(2);
        raw.push(f32::NEG_INFINITY, [f32::NAN; 2]);
        raw.merge(&Raw::empty(2)).unwrap();
        assert_eq!(raw.normalise(), Normalised::empty(2));
    }

    #[test]
    fn states_of_different_sizes_do_not_merge() {
        let mut raw = state(0.0, &[1.0]);
        assert!(matches!(
            raw.merge(&state(0.0, &[1.0, 2.0])),
            Err(Error::Argument { argument: "other", .. })
        ));
        assert_eq!(raw, state(0.0, &[1.0]));
        let mut normalised = raw.normalise();
        assert!(normalised.merge(&Normalised::empty(2)).is_err());
        assert_eq!(normalised, raw.normalise());
    }

    #[test]
    fn a_nan_is_never_hidden() {
        let nan = Normalised { out: vec![1.0f32], lse: f32::NAN };
        for (mut a, b) in [
            (Normalised { out: vec![1.0], lse: 0.0 }, nan.clone()),
            (nan.clone(), { Normalised { out: vec![1.0], lse: 0.0 } }),
        ] {
            a.merge(&b).unwrap();
            assert!(a.lse.is_nan() && a.out[0].is_nan());
            let mut raw = Raw::from(&a);
            raw.merge(&Raw::from(&b)).unwrap();
            assert!(raw.normalise().lse.is_nan());
        }
    }

    #[test]
    fn far_apart_scores_do_not_overflow() {
        for gap in [80.0f32, 1e4, 1e30] {
            let mut a = Normalised { out: vec![1.0f32], lse: -gap };
            a.merge(&Normalised { out: vec![2.0], lse: gap }).unwrap();
            assert_eq!((a.out[0], a.lse), (2.0, gap), "gap {gap}");
            let mut raw = Raw::<f32>::empty(1);
            for score in [-gap, gap, -gap] {
                raw.push(score, [score.signum()]);
            }
            let done = raw.normalise();
            assert!((done.out[0] - 1.0).abs() < 1e-6 && done.lse == gap, "gap {gap}: {done:?}");
        }
    }
}
