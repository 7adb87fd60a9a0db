//! Head shapes.

use crate::Error;

/// Heads of one attention layer and the sizes of their vectors.
///
/// Query head `h` reads KV head `h / (q_heads / kv_heads)`, for any ratio from 1 (MHA) to 16, powers of two or not.
/// Keys and values may differ in size: a low-rank cache holds keys `[qk_dim]` and values `[v_dim]` of other sizes than
/// the model's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HeadShape {
    q_heads: usize,
    kv_heads: usize,
    qk_dim: usize,
    v_dim: usize,
}

impl HeadShape {
    /// Largest supported number of query heads per KV head.
    pub const MAX_GROUP: usize = 16;

    /// `q_heads` query heads over `kv_heads` KV heads; queries and keys `[qk_dim]`, values and outputs `[v_dim]`.
    ///
    /// # Errors
    /// [`Error::Argument`] when a size is 0, `q_heads` is no multiple of `kv_heads`, or the ratio is past
    /// [`MAX_GROUP`](Self::MAX_GROUP).
    pub fn new(q_heads: usize, kv_heads: usize, qk_dim: usize, v_dim: usize) -> Result<Self, Error> {
        for (argument, value) in
            [("q_heads", q_heads), ("kv_heads", kv_heads), ("qk_dim", qk_dim), ("v_dim", v_dim)]
        {
            if value == 0 {
                return Err(Error::argument(argument, "at least 1", 0));
            }
        }
        if !q_heads.is_multiple_of(kv_heads) {
            return Err(Error::argument(
                "q_heads",
                format!("a multiple of the {kv_heads} KV heads"),
                q_heads,
            ));
        }
        if q_heads / kv_heads > Self::MAX_GROUP {
            return Err(Error::argument(
                "q_heads",
                format!("at most {} per KV head", Self::MAX_GROUP),
                format!("{q_heads} over {kv_heads} KV heads"),
            ));
        }
        Ok(HeadShape { q_heads, kv_heads, qk_dim, v_dim })
    }

    /// Query heads.
    pub const fn q_heads(&self) -> usize {
        self.q_heads
    }

    /// KV heads.
    pub const fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Size of a query or key vector.
    pub const fn qk_dim(&self) -> usize {
        self.qk_dim
    }

    /// Size of a value or output vector.
    pub const fn v_dim(&self) -> usize {
        self.v_dim
    }

    /// Query heads per KV head.
    pub const fn group(&self) -> usize {
        self.q_heads / self.kv_heads
    }

    /// The KV head that a query head reads.
    pub const fn kv_head_of(&self, q_head: usize) -> usize {
        q_head / self.group()
    }

    /// The query heads that read a KV head.
    pub const fn q_heads_of(&self, kv_head: usize) -> std::ops::Range<usize> {
        kv_head * self.group()..(kv_head + 1) * self.group()
    }
}

impl std::fmt::Display for HeadShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}q/{}kv", self.q_heads, self.kv_heads)?;
        if self.qk_dim == self.v_dim {
            write!(f, "/d{}", self.qk_dim)
        } else {
            write!(f, "/qk{}/v{}", self.qk_dim, self.v_dim)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ratio_up_to_sixteen_maps_heads() {
        for group in 1..=HeadShape::MAX_GROUP {
            let shape = HeadShape::new(3 * group, 3, 128, 64).unwrap();
            assert_eq!(shape.group(), group);
            for kv_head in 0..3 {
                for q_head in shape.q_heads_of(kv_head) {
                    assert_eq!(shape.kv_head_of(q_head), kv_head, "ratio {group}, query head {q_head}");
                }
            }
            assert_eq!(shape.q_heads_of(2).end, shape.q_heads());
        }
    }

    #[test]
    fn refused_shapes_name_the_argument() {
        for (case, q, kv, qk, v, named) in [
            ("no query heads", 0, 1, 64, 64, "q_heads"),
            ("no KV heads", 4, 0, 64, 64, "kv_heads"),
            ("no key dim", 4, 1, 0, 64, "qk_dim"),
            ("no value dim", 4, 1, 64, 0, "v_dim"),
            ("ratio not whole", 7, 2, 64, 64, "q_heads"),
            ("ratio 17", 17, 1, 64, 64, "q_heads"),
        ] {
            match HeadShape::new(q, kv, qk, v) {
                Err(Error::Argument { argument, .. }) => assert_eq!(argument, named, "{case}"),
                other => panic!("{case}: {other:?}"),
            }
        }
    }
}
