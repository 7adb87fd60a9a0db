//! Pages: the unit that is stored, moved over the link and evicted.
//!
//! A page holds the keys and values of a few tokens of one KV head, `[K|V][tokens][dim]`: one contiguous run, so that a
//! miss is one read over the link and not one per token. A host page holds the same tokens' place of every KV head of a
//! layer, `[kv_head][K|V][tokens][dim]`; a device slot holds one head's run, because heads select on their own.

use std::ops::Range;

use attention::DType;

use crate::Error;

/// Tokens that a page may hold.
pub const PAGE_TOKENS: [usize; 4] = [8, 16, 32, 64];

/// What a page looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageSpec {
    tokens: usize,
    qk_dim: usize,
    v_dim: usize,
    dtype: DType,
}

impl PageSpec {
    /// Pages of `tokens` tokens with keys `[qk_dim]` and values `[v_dim]` in `dtype`.
    ///
    /// # Errors
    /// [`Error::Argument`] when `tokens` is none of [`PAGE_TOKENS`], or a size is 0 or makes a vector of keys or values that
    /// does not fill whole 16 bytes.
    pub fn new(tokens: usize, qk_dim: usize, v_dim: usize, dtype: DType) -> Result<Self, Error> {
        if !PAGE_TOKENS.contains(&tokens) {
            return Err(Error::argument("page tokens", format!("one of {PAGE_TOKENS:?}"), tokens));
        }
        for (argument, dim) in [("qk_dim", qk_dim), ("v_dim", v_dim)] {
            if dim == 0 || !(dim * dtype.size()).is_multiple_of(16) {
                let expected = format!("a multiple of {} above 0", 16 / dtype.size());
                return Err(Error::argument(argument, expected, dim));
            }
        }
        Ok(PageSpec { tokens, qk_dim, v_dim, dtype })
    }

    /// Tokens of a page.
    pub const fn tokens(&self) -> usize {
        self.tokens
    }

    /// Elements of a key.
    pub const fn qk_dim(&self) -> usize {
        self.qk_dim
    }

    /// Elements of a value.
    pub const fn v_dim(&self) -> usize {
        self.v_dim
    }

    /// Storage type of keys and values.
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// Elements of one head's run: keys, then values.
    pub const fn elements(&self) -> usize {
        self.tokens * (self.qk_dim + self.v_dim)
    }

    /// Bytes of one head's run: what a miss moves.
    pub const fn bytes(&self) -> usize {
        self.elements() * self.dtype.size()
    }

    /// Bytes of a token's key and value in one head.
    pub const fn token_bytes(&self) -> usize {
        (self.qk_dim + self.v_dim) * self.dtype.size()
    }

    /// Elements of a run that are the keys of the first `tokens` tokens.
    pub const fn keys(&self, tokens: usize) -> Range<usize> {
        0..tokens * self.qk_dim
    }

    /// Elements of a run that are the values of the first `tokens` tokens.
    pub const fn values(&self, tokens: usize) -> Range<usize> {
        let start = self.tokens * self.qk_dim;
        start..start + tokens * self.v_dim
    }

    /// Pages that `tokens` tokens fill, the last perhaps in part.
    pub const fn pages_of(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_keys_then_values() {
        let spec = PageSpec::new(8, 128, 64, DType::BF16).unwrap();
        assert_eq!((spec.elements(), spec.bytes(), spec.token_bytes()), (8 * 192, 8 * 384, 384));
        assert_eq!((spec.keys(8), spec.values(8)), (0..1024, 1024..1536));
        assert_eq!((spec.keys(3), spec.values(1)), (0..384, 1024..1088));
        assert_eq!([0, 1, 8, 9].map(|tokens| spec.pages_of(tokens)), [0, 1, 1, 2]);
    }

    #[test]
    fn refused_sizes_name_the_argument() {
        for (tokens, qk, v, dtype, named) in [
            (0, 64, 64, DType::F16, "page tokens"),
            (12, 64, 64, DType::F16, "page tokens"),
            (8, 0, 64, DType::F16, "qk_dim"),
            (8, 64, 12, DType::BF16, "v_dim"),
            (8, 6, 64, DType::F32, "qk_dim"),
        ] {
            match PageSpec::new(tokens, qk, v, dtype) {
                Err(Error::Argument { argument, .. }) => assert_eq!(argument, named),
                other => panic!("{tokens} {qk} {v} {dtype}: {other:?}"),
            }
        }
    }
}
