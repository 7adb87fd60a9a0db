//! Contiguous vectors of tokens × heads, in either order.

use std::ops::Range;

use crate::Error;

/// A borrowed set of vectors, one for each token and head, each contiguous; tokens and heads at any stride.
#[derive(Debug, Clone, Copy)]
pub struct HeadsView<'a, T> {
    data: &'a [T],
    tokens: usize,
    heads: usize,
    dim: usize,
    token_stride: usize,
    head_stride: usize,
}

impl<'a, T> HeadsView<'a, T> {
    /// `data` `[tokens, heads, dim]` ("NHD"), with exactly that many elements.
    ///
    /// # Errors
    /// [`Error::Argument`] when the length differs, or `heads` or `dim` is 0.
    pub fn nhd(data: &'a [T], tokens: usize, heads: usize, dim: usize) -> Result<Self, Error> {
        crate::error::check_len("data", data.len(), &[tokens, heads, dim])?;
        HeadsView::strided(data, tokens, heads, dim, heads * dim, dim)
    }

    /// `data` `[heads, tokens, dim]` ("HND"), with exactly that many elements.
    ///
    /// # Errors
    /// [`Error::Argument`] when the length differs, or `heads` or `dim` is 0.
    pub fn hnd(data: &'a [T], tokens: usize, heads: usize, dim: usize) -> Result<Self, Error> {
        crate::error::check_len("data", data.len(), &[heads, tokens, dim])?;
        HeadsView::strided(data, tokens, heads, dim, dim, tokens * dim)
    }

    /// Vector `(token, head)` at element `token · token_stride + head · head_stride`: for caches with room to grow
    /// (`hnd` with a head stride of `capacity · dim`) and for slices of fused projections. Strides are in elements.
    ///
    /// # Errors
    /// [`Error::Argument`] when `heads` or `dim` is 0, or a vector would end past `data`.
    pub fn strided(
        data: &'a [T],
        tokens: usize,
        heads: usize,
        dim: usize,
        token_stride: usize,
        head_stride: usize,
    ) -> Result<Self, Error> {
        for (argument, value) in [("heads", heads), ("dim", dim)] {
            if value == 0 {
                return Err(Error::argument(argument, "at least 1", 0));
            }
        }
        if tokens > 0 {
            let last_token = (tokens - 1).checked_mul(token_stride);
            let last_head = (heads - 1).checked_mul(head_stride);
            let end = last_token.zip(last_head).and_then(|(t, h)| t.checked_add(h)?.checked_add(dim));
            if end.is_none_or(|end| end > data.len()) {
                let needed = end.map_or("more than fit memory".to_string(), |end| end.to_string());
                return Err(Error::argument(
                    "data",
                    format!("at least {needed} elements for {tokens} tokens of {heads} heads of {dim}"),
                    data.len(),
                ));
            }
        }
        Ok(HeadsView { data, tokens, heads, dim, token_stride, head_stride })
    }

    /// Tokens.
    pub const fn tokens(&self) -> usize {
        self.tokens
    }

    /// Heads.
    pub const fn heads(&self) -> usize {
        self.heads
    }

    /// Elements of a vector.
    pub const fn dim(&self) -> usize {
        self.dim
    }

    /// The vector of one token and head `[dim]`.
    ///
    /// # Panics
    /// When either is out of range.
    #[inline]
    pub fn vector(&self, token: usize, head: usize) -> &'a [T] {
        assert!(token < self.tokens && head < self.heads, "vector ({token}, {head}) is out of range");
        let start = token * self.token_stride + head * self.head_stride;
        &self.data[start..start + self.dim]
    }

    /// The tokens of a range.
    ///
    /// # Panics
    /// When the range is out of bounds.
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.tokens, "tokens {range:?} of {}", self.tokens);
        let start = if range.is_empty() { 0 } else { range.start * self.token_stride };
        HeadsView { data: &self.data[start..], tokens: range.len(), ..*self }
    }

    /// Checks heads and dim against what an attention expects.
    pub(crate) fn check(&self, argument: &'static str, heads: usize, dim: usize) -> Result<(), Error> {
        if (self.heads, self.dim) != (heads, dim) {
            return Err(Error::argument(
                argument,
                format!("[tokens, {heads} heads, {dim}]"),
                format!("[{} tokens, {} heads, {}]", self.tokens, self.heads, self.dim),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_name_the_same_vectors() {
        let nhd: Vec<u32> = (0..2 * 3 * 4).collect();
        let at = |token: u32, head: u32| (0..4).map(|i| (token * 3 + head) * 4 + i).collect::<Vec<u32>>();
        let hnd: Vec<u32> = (0..3).flat_map(|head| (0..2).flat_map(move |token| at(token, head))).collect();
        let a = HeadsView::nhd(&nhd, 2, 3, 4).unwrap();
        let b = HeadsView::hnd(&hnd, 2, 3, 4).unwrap();
        // A cache of capacity 5 tokens a head, two of them in use.
        let mut roomy = vec![u32::MAX; 3 * 5 * 4];
        for head in 0..3 {
            roomy[head * 20..][..8].copy_from_slice(&hnd[head * 8..][..8]);
        }
        let c = HeadsView::strided(&roomy, 2, 3, 4, 4, 20).unwrap();
        for token in 0..2 {
            for head in 0..3 {
                let expected = at(token as u32, head as u32);
                for (name, view) in [("nhd", a), ("hnd", b), ("strided", c)] {
                    assert_eq!(view.vector(token, head), expected, "{name} ({token}, {head})");
                    assert_eq!(view.slice(token..2).vector(0, head), expected, "{name} sliced");
                }
            }
        }
        assert_eq!(a.slice(2..2).tokens(), 0);
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let data = [0u8; 24];
        assert!(HeadsView::nhd(&data, 2, 3, 4).is_ok());
        for (case, result) in [
            ("short", HeadsView::nhd(&data, 3, 3, 4)),
            ("long", HeadsView::hnd(&data, 1, 3, 4)),
            ("no heads", HeadsView::nhd(&data[..0], 2, 0, 4)),
            ("no dim", HeadsView::hnd(&data[..0], 2, 3, 0)),
            ("past the end", HeadsView::strided(&data, 2, 3, 4, 13, 4)),
            ("overflow", HeadsView::strided(&data, 2, 3, 4, usize::MAX, 4)),
            ("shape overflow", HeadsView::nhd(&data, usize::MAX, 2, 2)),
        ] {
            assert!(matches!(result, Err(Error::Argument { .. })), "{case}: {result:?}");
        }
        assert!(HeadsView::strided(&data, 0, 3, 4, usize::MAX, usize::MAX).is_ok(), "no token, no extent");
    }
}
