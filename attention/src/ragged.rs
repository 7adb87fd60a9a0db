//! Batches of sequences of different lengths, packed one after the other.

use std::borrow::Cow;
use std::ops::Range;

use crate::{Error, Fault, HeadShape, HeadsView, KeyValue, KeyValues};

/// Packed tokens of a batch: sequence `b` is the tokens `cu_seqlens[b]..cu_seqlens[b + 1]`. Sequences may be empty.
#[derive(Debug, Clone)]
pub struct RaggedView<'a, T> {
    view: HeadsView<'a, T>,
    cu_seqlens: Cow<'a, [u32]>,
}

impl<'a, T> RaggedView<'a, T> {
    /// All tokens of a batch and their prefix sums `cu_seqlens` `[batch + 1]`, from 0 to the number of tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] when `cu_seqlens` is empty, starts above 0, decreases, or does not end at the tokens.
    pub fn new(view: HeadsView<'a, T>, cu_seqlens: &'a [u32]) -> Result<Self, Error> {
        check_cu_seqlens(cu_seqlens, view.tokens())?;
        Ok(RaggedView { view, cu_seqlens: Cow::Borrowed(cu_seqlens) })
    }

    /// One sequence of all tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] when there are more than `u32::MAX` tokens.
    pub fn single(view: HeadsView<'a, T>) -> Result<Self, Error> {
        let tokens = count(view.tokens())?;
        Ok(RaggedView { view, cu_seqlens: Cow::Owned(vec![0, tokens]) })
    }

    /// As many sequences as tokens, one token each: the queries of a decoding step.
    ///
    /// # Errors
    /// [`Error::Argument`] when there are more than `u32::MAX` tokens.
    pub fn one_each(view: HeadsView<'a, T>) -> Result<Self, Error> {
        let tokens = count(view.tokens())?;
        Ok(RaggedView { view, cu_seqlens: Cow::Owned((0..=tokens).collect()) })
    }

    /// Sequences.
    pub fn sequences(&self) -> usize {
        self.cu_seqlens.len() - 1
    }

    /// The tokens of all sequences.
    pub fn view(&self) -> HeadsView<'a, T>
    where
        T: Copy,
    {
        self.view
    }

    /// The packed tokens that belong to a sequence.
    ///
    /// # Panics
    /// When there is no such sequence.
    pub fn tokens_of(&self, sequence: usize) -> Range<usize> {
        self.cu_seqlens[sequence] as usize..self.cu_seqlens[sequence + 1] as usize
    }
}

fn count(tokens: usize) -> Result<u32, Error> {
    u32::try_from(tokens).map_err(|_| Error::argument("tokens", format!("at most {}", u32::MAX), tokens))
}

fn check_cu_seqlens(cu_seqlens: &[u32], tokens: usize) -> Result<(), Error> {
    let refuse = |expected: String, found: String| Err(Error::argument("cu_seqlens", expected, found));
    let (Some(&first), Some(&last)) = (cu_seqlens.first(), cu_seqlens.last()) else {
        return refuse("at least one element".into(), "none".into());
    };
    if first != 0 {
        return refuse("a first element of 0".into(), first.to_string());
    }
    if let Some(i) = cu_seqlens.windows(2).position(|pair| pair[0] > pair[1]) {
        return refuse(
            "elements that never decrease".into(),
            format!("{} after {} at {}", cu_seqlens[i + 1], cu_seqlens[i], i + 1),
        );
    }
    if last as usize != tokens {
        return refuse(format!("a last element of {tokens}, the number of tokens"), last.to_string());
    }
    Ok(())
}

/// Keys and values of a batch, packed without pages.
#[derive(Debug, Clone)]
pub struct RaggedKv<'a, T> {
    k: RaggedView<'a, T>,
    v: HeadsView<'a, T>,
}

impl<'a, T> RaggedKv<'a, T> {
    /// Keys `[tokens, kv_heads, qk_dim]` and values `[tokens, kv_heads, v_dim]` of the same sequences.
    ///
    /// # Errors
    /// [`Error::Argument`] when tokens or heads differ, or `cu_seqlens` does not fit (see [`RaggedView::new`]).
    pub fn new(k: HeadsView<'a, T>, v: HeadsView<'a, T>, cu_seqlens: &'a [u32]) -> Result<Self, Error> {
        Self::pair(RaggedView::new(k, cu_seqlens)?, v)
    }

    /// One sequence of all tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] when tokens or heads differ.
    pub fn single(k: HeadsView<'a, T>, v: HeadsView<'a, T>) -> Result<Self, Error> {
        Self::pair(RaggedView::single(k)?, v)
    }

    fn pair(k: RaggedView<'a, T>, v: HeadsView<'a, T>) -> Result<Self, Error> {
        if (k.view.tokens(), k.view.heads()) != (v.tokens(), v.heads()) {
            return Err(Error::argument(
                "v",
                format!("[{} tokens, {} heads, ..] as k", k.view.tokens(), k.view.heads()),
                format!("[{} tokens, {} heads, ..]", v.tokens(), v.heads()),
            ));
        }
        Ok(RaggedKv { k, v })
    }
}

impl<T: Sync> KeyValues<T> for RaggedKv<'_, T> {
    fn sequences(&self) -> usize {
        self.k.sequences()
    }

    fn check(&self, shape: &HeadShape) -> Result<(), Error> {
        self.k.view.check("k", shape.kv_heads(), shape.qk_dim())?;
        self.v.check("v", shape.kv_heads(), shape.v_dim())
    }

    fn tokens(&self, sequence: usize, kv_head: usize) -> Result<Vec<KeyValue<'_, T>>, Fault> {
        let tokens = self.k.tokens_of(sequence);
        let at = |t| KeyValue { key: self.k.view.vector(t, kv_head), value: self.v.vector(t, kv_head) };
        Ok(tokens.map(at).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_may_be_empty() {
        let data: Vec<f32> = (0..5 * 2).map(|x| x as f32).collect();
        let view = HeadsView::nhd(&data, 5, 2, 1).unwrap();
        let ragged = RaggedView::new(view, &[0, 0, 3, 3, 5]).unwrap();
        assert_eq!(ragged.sequences(), 4);
        let tokens: Vec<_> = (0..4).map(|b| ragged.tokens_of(b)).collect();
        assert_eq!(tokens, [0..0, 0..3, 3..3, 3..5]);
        let kv = RaggedKv::new(view, view, &[0, 0, 3, 3, 5]).unwrap();
        let pair = |x: &'static [f32]| KeyValue { key: x, value: x };
        assert_eq!(kv.tokens(3, 1).unwrap(), [pair(&[7.0]), pair(&[9.0])]);
        assert_eq!(kv.tokens(2, 1).unwrap(), []);
        assert_eq!(RaggedView::one_each(view).unwrap().sequences(), 5);
        assert_eq!(RaggedView::single(view).unwrap().tokens_of(0), 0..5);
    }

    #[test]
    fn refuses_bad_prefix_sums() {
        let data = [0f32; 5];
        let view = HeadsView::nhd(&data, 5, 1, 1).unwrap();
        for (case, cu_seqlens) in [
            ("none", &[][..]),
            ("starts late", &[1, 5]),
            ("decreases", &[0, 4, 3, 5]),
            ("ends early", &[0, 4]),
            ("ends late", &[0, 6]),
        ] {
            let refused = RaggedView::new(view, cu_seqlens);
            assert!(
                matches!(refused, Err(Error::Argument { argument: "cu_seqlens", .. })),
                "{case}: {refused:?}"
            );
        }
        let four = HeadsView::nhd(&data[..4], 4, 1, 1).unwrap();
        assert!(matches!(RaggedKv::single(view, four), Err(Error::Argument { argument: "v", .. })));
    }
}
