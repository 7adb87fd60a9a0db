//! Ranks: how many dimensions of keys and values each KV head keeps.

use std::ops::Range;

use attention::HeadShape;
use serde::{Deserialize, Serialize};

use crate::Error;

/// Ranks are multiples of this: the depth of a 16-bit tensor-core product, and two 16-byte chunks of a row.
pub const RANK_STEP: usize = 16;

/// Ranks of one KV head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct HeadRanks {
    /// r_k: dimensions of a cached key.
    pub k: usize,
    /// r_v: dimensions of a cached value.
    pub v: usize,
}

impl HeadRanks {
    /// r_k + r_v: elements that one token costs.
    pub const fn elements(self) -> usize {
        self.k + self.v
    }
}

/// Ranks of the KV heads of one layer, `[kv_heads]`. They may all differ.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
pub struct LayerRanks {
    heads: Vec<HeadRanks>,
}

impl LayerRanks {
    /// Ranks of the heads of `shape`.
    ///
    /// # Errors
    /// [`Error::Argument`] when there is not one pair per KV head, or a rank is 0, no multiple of [`RANK_STEP`], or above the
    /// head's own dimension.
    pub fn new(shape: &HeadShape, heads: Vec<HeadRanks>) -> Result<Self, Error> {
        if heads.len() != shape.kv_heads() {
            return Err(Error::argument("ranks", format!("{} KV heads", shape.kv_heads()), heads.len()));
        }
        for (head, ranks) in heads.iter().enumerate() {
            check("r_k", head, ranks.k, shape.qk_dim())?;
            check("r_v", head, ranks.v, shape.v_dim())?;
        }
        Ok(LayerRanks { heads })
    }

    /// The same ranks for every head.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn uniform(shape: &HeadShape, ranks: HeadRanks) -> Result<Self, Error> {
        LayerRanks::new(shape, vec![ranks; shape.kv_heads()])
    }

    /// Every dimension of every head: nothing is lost.
    ///
    /// # Errors
    /// As [`new`](Self::new): head dimensions that are no multiples of [`RANK_STEP`] have no such ranks.
    pub fn full(shape: &HeadShape) -> Result<Self, Error> {
        LayerRanks::uniform(shape, HeadRanks { k: shape.qk_dim(), v: shape.v_dim() })
    }

    /// Ranks by KV head.
    pub fn heads(&self) -> &[HeadRanks] {
        &self.heads
    }

    /// Number of KV heads.
    pub fn kv_heads(&self) -> usize {
        self.heads.len()
    }

    /// Σ (r_k + r_v): elements that one token costs in this layer.
    pub fn elements(&self) -> usize {
        self.heads.iter().map(|ranks| ranks.elements()).sum()
    }

    /// The ranks of some of the KV heads: what one rank of a tensor-parallel group holds.
    ///
    /// # Errors
    /// [`Error::Argument`] when the range is empty or out of bounds.
    pub fn slice(&self, heads: Range<usize>) -> Result<Self, Error> {
        match self.heads.get(heads.clone()) {
            Some(slice) if !slice.is_empty() => Ok(LayerRanks { heads: slice.to_vec() }),
            _ => {
                let expected = format!("a range of KV heads within 0..{}", self.kv_heads());
                Err(Error::argument("heads", expected, format!("{heads:?}")))
            }
        }
    }

    /// The same ranks in decreasing order. Layers that agree in this have page tables and work of the same sizes.
    pub fn multiset(&self) -> Vec<HeadRanks> {
        let mut heads = self.heads.clone();
        heads.sort_unstable_by(|a, b| b.cmp(a));
        heads
    }
}

fn check(argument: &'static str, head: usize, rank: usize, dim: usize) -> Result<(), Error> {
    if rank == 0 || rank > dim || !rank.is_multiple_of(RANK_STEP) {
        let expected = format!("a multiple of {RANK_STEP} from {RANK_STEP} to the head's {dim} dimensions");
        return Err(Error::argument(argument, expected, format!("{rank} for KV head {head}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranks(k: usize, v: usize) -> HeadRanks {
        HeadRanks { k, v }
    }

    #[test]
    fn refused_ranks_name_the_argument() {
        let shape = HeadShape::new(8, 2, 64, 96).unwrap();
        for (case, heads, named) in [
            ("one pair for two heads", vec![ranks(16, 16)], "ranks"),
            ("zero keys", vec![ranks(16, 16), ranks(0, 16)], "r_k"),
            ("between steps", vec![ranks(24, 16), ranks(16, 16)], "r_k"),
            ("keys above d", vec![ranks(80, 16), ranks(16, 16)], "r_k"),
            ("values above d", vec![ranks(64, 16), ranks(16, 112)], "r_v"),
        ] {
            match LayerRanks::new(&shape, heads) {
                Err(Error::Argument { argument, .. }) => assert_eq!(argument, named, "{case}"),
                other => panic!("{case}: {other:?}"),
            }
        }
        assert_eq!(LayerRanks::full(&shape).unwrap().elements(), 2 * (64 + 96));
        let odd = HeadShape::new(8, 2, 72, 72).unwrap();
        assert!(LayerRanks::full(&odd).is_err(), "72 dimensions are no whole number of steps");
    }

    #[test]
    fn slices_keep_their_heads() {
        let shape = HeadShape::new(4, 4, 64, 64).unwrap();
        let all = [ranks(16, 32), ranks(64, 16), ranks(48, 48), ranks(16, 16)];
        let layer = LayerRanks::new(&shape, all.to_vec()).unwrap();
        assert_eq!(layer.slice(1..3).unwrap().heads(), &all[1..3]);
        assert_eq!(layer.multiset(), [all[1], all[2], all[0], all[3]]);
        for range in [2..2, 3..5, 4..6] {
            assert!(layer.slice(range.clone()).is_err(), "{range:?}");
        }
    }
}
