//! Masks, as ranges of keys.
//!
//! A mask is never a matrix: for one query it is at most two ranges of keys. Causal masks are aligned to the **end** of
//! the keys: query `i` of `n` sits at position `kv_len - n + i` and sees the keys up to and including it, so that
//! decoding, chunked prefill and prefill from nothing are the same rule. A position may be negative (more queries than
//! keys); such a query sees nothing.

use std::ops::Range;

use crate::Error;

/// Which keys a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Mask {
    /// Every key.
    Full,
    /// The keys up to the query's own position.
    Causal,
    /// The last `window` keys up to the query's own position (its own key counts), and the first `sinks` keys of the
    /// sequence (attention sinks, StreamingLLM) as far as they are not in the future. `sinks = 0` is the plain sliding
    /// window of Mistral.
    SlidingWindow {
        /// Keys seen, the query's own included.
        window: usize,
        /// First keys of the sequence that stay visible.
        sinks: usize,
    },
    /// The first `prefix` keys, whatever the query's position, and the keys up to its own position (prefix LM).
    Prefix {
        /// Keys that every query sees.
        prefix: usize,
    },
}

impl Mask {
    /// A sliding window of `window` keys, the query's own included, after `sinks` always visible keys.
    ///
    /// # Errors
    /// [`Error::Argument`] when `window` is 0.
    pub fn sliding_window(window: usize, sinks: usize) -> Result<Self, Error> {
        if window == 0 {
            return Err(Error::argument("window", "at least 1 key (the query's own)", 0));
        }
        Ok(Mask::SlidingWindow { window, sinks })
    }

    /// Refuses what [`sliding_window`](Self::sliding_window) would: the variant's fields are public.
    ///
    /// # Errors
    /// [`Error::Argument`] for a sliding window of 0 keys.
    pub fn check(&self) -> Result<(), Error> {
        match *self {
            Mask::SlidingWindow { window, sinks } => Mask::sliding_window(window, sinks).map(|_| ()),
            Mask::Full | Mask::Causal | Mask::Prefix { .. } => Ok(()),
        }
    }

    /// Keys seen by query `query` of `queries`, the last of which is aligned with the last of `kv_len` keys.
    pub fn keys(&self, query: usize, queries: usize, kv_len: usize) -> KeyRanges {
        self.keys_at(query_position(query, queries, kv_len), kv_len)
    }

    /// Keys seen by a query at `position`, counted in keys from the start of the sequence; `position` may be negative or
    /// past the keys.
    pub fn keys_at(&self, position: i64, kv_len: usize) -> KeyRanges {
        // Keys up to the query's own position.
        let end = usize::try_from(position.saturating_add(1)).unwrap_or(0).min(kv_len);
        match *self {
            Mask::Full => KeyRanges::one(0..kv_len),
            Mask::Causal => KeyRanges::one(0..end),
            Mask::SlidingWindow { window, sinks } => {
                let window = i64::try_from(window).unwrap_or(i64::MAX);
                let start = position.saturating_add(1).saturating_sub(window);
                let start = usize::try_from(start).unwrap_or(0).min(end);
                let sinks = sinks.min(end);
                if sinks >= start { KeyRanges::one(0..end) } else { KeyRanges::two(0..sinks, start..end) }
            }
            Mask::Prefix { prefix } => KeyRanges::one(0..end.max(prefix.min(kv_len))),
        }
    }

    /// Whether a query at `position` sees the key at `key`, both counted from the start of the sequence. The rule of
    /// [`keys_at`](Self::keys_at), one pair at a time: for shards whose tokens are not contiguous.
    pub fn sees(&self, position: i64, key: u64) -> bool {
        let causal = i64::try_from(key).is_ok_and(|key| key <= position);
        match *self {
            Mask::Full => true,
            Mask::Causal => causal,
            Mask::SlidingWindow { window, sinks } => {
                causal && (key < sinks as u64 || (position as u64) - key < window as u64)
            }
            Mask::Prefix { prefix } => causal || key < prefix as u64,
        }
    }
}

/// Position of query `query` of `queries` over `kv_len` keys: `kv_len - queries + query`, negative when the query comes
/// before the first key.
pub fn query_position(query: usize, queries: usize, kv_len: usize) -> i64 {
    // Lengths are at most isize::MAX (they count elements of a slice), so neither cast nor difference wraps.
    kv_len as i64 - queries as i64 + query as i64
}

/// The keys that one query sees: at most two disjoint, increasing, non-empty ranges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRanges {
    ranges: [Range<usize>; 2],
}

impl KeyRanges {
    /// Two ranges of keys, disjoint and in increasing order; either may be empty.
    ///
    /// # Errors
    /// [`Error::Argument`] when they overlap, or the second comes first.
    pub fn new(first: Range<usize>, second: Range<usize>) -> Result<Self, Error> {
        if !first.is_empty() && !second.is_empty() && first.end > second.start {
            return Err(Error::argument(
                "second",
                format!("keys from {} on", first.end),
                format!("{second:?}"),
            ));
        }
        Ok(KeyRanges { ranges: [first, second] })
    }

    fn one(range: Range<usize>) -> Self {
        KeyRanges { ranges: [range, 0..0] }
    }

    fn two(first: Range<usize>, second: Range<usize>) -> Self {
        if first.is_empty() { KeyRanges::one(second) } else { KeyRanges { ranges: [first, second] } }
    }

    /// The non-empty ranges, in increasing order.
    pub fn iter(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.ranges.iter().filter(|range| !range.is_empty()).cloned()
    }

    /// Every key, in increasing order.
    pub fn keys(&self) -> impl Iterator<Item = usize> + '_ {
        self.iter().flatten()
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.ranges.iter().map(|range| range.len()).sum()
    }

    /// Whether the query sees no key: its output is 0 and its LSE -inf.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the query sees this key.
    pub fn contains(&self, key: usize) -> bool {
        self.ranges.iter().any(|range| range.contains(&key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(mask: Mask, query: usize, queries: usize, kv_len: usize) -> Vec<usize> {
        mask.keys(query, queries, kv_len).keys().collect()
    }

    #[test]
    fn named_rows() {
        let window = |window, sinks| Mask::SlidingWindow { window, sinks };
        for (case, mask, query, queries, kv_len, expected) in [
            ("decode sees all", Mask::Causal, 0, 1, 4, vec![0, 1, 2, 3]),
            ("prefill, first row", Mask::Causal, 0, 3, 3, vec![0]),
            ("chunked prefill", Mask::Causal, 1, 2, 5, vec![0, 1, 2, 3, 4]),
            ("more queries than keys", Mask::Causal, 0, 4, 2, vec![]),
            ("more queries than keys, last", Mask::Causal, 3, 4, 2, vec![0, 1]),
            ("no keys", Mask::Full, 0, 1, 0, vec![]),
            ("full", Mask::Full, 0, 3, 3, vec![0, 1, 2]),
            ("window of one", window(1, 0), 1, 3, 3, vec![1]),
            ("window", window(2, 0), 0, 1, 5, vec![3, 4]),
            ("window before the start", window(4, 0), 1, 3, 3, vec![0, 1]),
            ("window and sinks", window(2, 1), 0, 1, 6, vec![0, 4, 5]),
            ("sinks touch the window", window(2, 4), 0, 1, 6, vec![0, 1, 2, 3, 4, 5]),
            ("sinks in the future", window(2, 4), 0, 3, 3, vec![0]),
            ("query before every key", window(2, 4), 0, 5, 3, vec![]),
            ("prefix past the query", Mask::Prefix { prefix: 3 }, 0, 4, 4, vec![0, 1, 2]),
            ("prefix longer than the keys", Mask::Prefix { prefix: 9 }, 0, 4, 4, vec![0, 1, 2, 3]),
            ("prefix behind the query", Mask::Prefix { prefix: 1 }, 2, 4, 4, vec![0, 1, 2]),
        ] {
            assert_eq!(listed(mask, query, queries, kv_len), expected, "{case}");
        }
    }

    #[test]
    fn ranges_pairs_and_definition_agree() {
        let masks = [
            Mask::Full,
            Mask::Causal,
            Mask::SlidingWindow { window: 1, sinks: 0 },
            Mask::SlidingWindow { window: 3, sinks: 0 },
            Mask::SlidingWindow { window: 3, sinks: 2 },
            Mask::SlidingWindow { window: usize::MAX, sinks: usize::MAX },
            Mask::Prefix { prefix: 0 },
            Mask::Prefix { prefix: 4 },
        ];
        for mask in masks {
            for kv_len in 0..9usize {
                for position in -3..12i64 {
                    let ranges = mask.keys_at(position, kv_len);
                    let mut count = 0;
                    for key in 0..kv_len {
                        let (p, k) = (i128::from(position), key as i128);
                        let defined = match mask {
                            Mask::Full => true,
                            Mask::Causal => k <= p,
                            Mask::SlidingWindow { window, sinks } => {
                                k <= p && (k > p - window as i128 || k < sinks as i128)
                            }
                            Mask::Prefix { prefix } => k <= p || k < prefix as i128,
                        };
                        let at = format!("{mask:?}, position {position}, key {key} of {kv_len}");
                        assert_eq!(ranges.contains(key), defined, "range: {at}");
                        assert_eq!(mask.sees(position, key as u64), defined, "pair: {at}");
                        count += usize::from(defined);
                    }
                    assert_eq!(ranges.len(), count, "{mask:?}, position {position}, {kv_len} keys");
                    assert_eq!(ranges.is_empty(), count == 0);
                    assert_eq!(ranges.keys().count(), count);
                    assert!(ranges.iter().all(|range| !range.is_empty()));
                }
            }
        }
    }

    #[test]
    fn extreme_positions_do_not_wrap() {
        for mask in [Mask::Full, Mask::Causal, Mask::SlidingWindow { window: usize::MAX, sinks: 1 }] {
            assert_eq!(mask.keys_at(i64::MAX, 5).len(), 5, "{mask:?}");
        }
        assert!(Mask::Causal.keys_at(i64::MIN, 5).is_empty());
        assert!(Mask::SlidingWindow { window: 7, sinks: 7 }.keys_at(i64::MIN, 5).is_empty());
        assert!(Mask::sliding_window(0, 3).is_err());
        assert!(Mask::SlidingWindow { window: 0, sinks: 3 }.check().is_err());
        assert_eq!(Mask::Prefix { prefix: 0 }.check(), Ok(()));
        assert_eq!(Mask::sliding_window(3, 0), Ok(Mask::SlidingWindow { window: 3, sinks: 0 }));
    }
}
