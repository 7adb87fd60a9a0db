//! The homomorphic product: a matrix product computed on the codes of both operands (paper, Eq. 4).
//!
//! With operands quantized along the inner axis in partitions `p`, `a ≈ s_a a' + m_a` and `b ≈ s_b b' + m_b`:
//!
//! ```text
//! Ĉ_ij = Σ_p [ s_a s_b Σ a'b' + m_b s_a Σ a' + m_a s_b Σ b' + n_p m_a m_b ]
//! ```
//!
//! `Ĉ` is the product of the dequantized operands, up to the rounding of f32: quantization is the only loss. The
//! first sum is an integer product; the other two are sums of codes, which do not depend on the other operand and are
//! kept beside them (summation elimination). Attention uses the same identity with its scales folded (see
//! [`reference`](mod@crate::reference)); this general form is a quantized GEMM.

use attention::DType;

use crate::error::check_len;
use crate::quantizer::{self, Group, Tensor};
use crate::{Bits, Error, Rounding};

/// Vectors whose elements are quantized in partitions: the rows of the left operand, or the columns of the right one.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized {
    len: usize,
    partition: usize,
    /// One per byte `[vectors, len]`.
    codes: Vec<u8>,
    /// `[vectors, partitions]`
    groups: Vec<Group>,
    /// Sums of codes `[vectors, partitions]`; empty when they are not kept.
    sums: Vec<u32>,
}

impl Quantized {
    /// Largest partition: sums of so many products of 8-bit codes are exact in f32.
    pub const MAX_PARTITION: usize = 256;

    /// Quantizes `values` `[vectors, len]` in partitions of `partition` elements, the last of which may be shorter.
    /// Scales and minima are stored as `metadata`; `sums` says whether sums of codes are kept. Stochastic rounding
    /// takes the noise of key (vector, element) of layer 0, KV head 0: see [`quantizer::noise`].
    ///
    /// # Errors
    /// [`Error::Argument`] when `values` is no whole number of vectors, or `partition` is not in
    /// `1..=`[`MAX_PARTITION`](Self::MAX_PARTITION); [`Error::NotFinite`].
    pub fn new(
        values: &[f32],
        len: usize,
        partition: usize,
        bits: Bits,
        metadata: DType,
        rounding: Rounding,
        sums: bool,
    ) -> Result<Self, Error> {
        if len == 0 || !values.len().is_multiple_of(len) {
            return Err(Error::argument(
                "values",
                format!("a whole number of vectors of {len}"),
                values.len(),
            ));
        }
        if !(1..=Self::MAX_PARTITION).contains(&partition) {
            return Err(Error::argument("partition", format!("1 to {}", Self::MAX_PARTITION), partition));
        }
        if let Some(index) = values.iter().position(|&x| !quantizer::store(x, metadata).is_finite()) {
            let value = quantizer::store(values[index], metadata).to_string();
            return Err(Error::NotFinite { argument: "values", index, value });
        }
        let levels = bits.levels();
        let mut quantized =
            Quantized { len, partition, codes: Vec::new(), groups: Vec::new(), sums: Vec::new() };
        for (vector, values) in values.chunks_exact(len).enumerate() {
            for (p, values) in values.chunks(partition).enumerate() {
                let group = Group::fit(values.iter().copied(), levels, metadata);
                let start = quantized.codes.len();
                for (i, &x) in values.iter().enumerate() {
                    quantized.codes.push(match rounding {
                        Rounding::Nearest => group.code(x, levels),
                        Rounding::Stochastic { seed } => {
                            let element = (p * partition + i) as u32;
                            let noise = quantizer::noise(seed, 0, Tensor::K, 0, vector as u32, element);
                            group.code_stochastic(x, levels, noise)
                        }
                    });
                }
                quantized.groups.push(group);
                if sums {
                    quantized.sums.push(sum(&quantized.codes[start..]));
                }
            }
        }
        Ok(quantized)
    }

    /// Vectors.
    pub fn vectors(&self) -> usize {
        self.codes.len() / self.len
    }

    /// Elements of a vector.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no vector.
    pub fn is_empty(&self) -> bool {
        self.codes.is_empty()
    }

    /// Codes, one per byte `[vectors, len]`.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// Scale and minimum of each partition `[vectors, partitions]`.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// What the codes stand for `[vectors, len]`.
    pub fn dequantize(&self) -> Vec<f64> {
        let partitions = self.len.div_ceil(self.partition);
        let group = |i: usize| self.groups[i / self.len * partitions + i % self.len / self.partition];
        self.codes.iter().enumerate().map(|(i, &code)| group(i).value(code)).collect()
    }

    /// Codes, group and code sum of one partition.
    fn part(&self, vector: usize, p: usize) -> (&[u8], Group, u32) {
        let partitions = self.len.div_ceil(self.partition);
        let start = p * self.partition;
        let end = (start + self.partition).min(self.len);
        let codes = &self.codes[vector * self.len..][start..end];
        let at = vector * partitions + p;
        (codes, self.groups[at], self.sums.get(at).copied().unwrap_or_else(|| sum(codes)))
    }
}

fn sum(codes: &[u8]) -> u32 {
    codes.iter().map(|&code| u32::from(code)).sum()
}

/// `out = A · Bᵀ` `[a.vectors, b.vectors]`, for rows of `a` and columns of `b` of the same length and partition.
///
/// # Errors
/// [`Error::Argument`] when lengths or partitions differ, or `out` has another length.
pub fn product(a: &Quantized, b: &Quantized, out: &mut [f32]) -> Result<(), Error> {
    for (argument, expected, found) in [("b.len", a.len, b.len), ("b.partition", a.partition, b.partition)] {
        if expected != found {
            return Err(Error::argument(argument, expected, found));
        }
    }
    check_len("out", out.len(), &[a.vectors(), b.vectors()])?;
    out.fill(0.0);
    let columns = b.vectors();
    for p in 0..a.len.div_ceil(a.partition) {
        for (i, row) in out.chunks_exact_mut(columns.max(1)).enumerate() {
            let (a_codes, a_group, a_sum) = a.part(i, p);
            for (j, out) in row.iter_mut().enumerate() {
                let (b_codes, b_group, b_sum) = b.part(j, p);
                let codes: u32 =
                    a_codes.iter().zip(b_codes).map(|(&a, &b)| u32::from(a) * u32::from(b)).sum();
                *out += a_group.scale * b_group.scale * codes as f32
                    + b_group.min * a_group.scale * a_sum as f32
                    + a_group.min * b_group.scale * b_sum as f32
                    + a_codes.len() as f32 * a_group.min * b_group.min;
            }
        }
    }
    Ok(())
}
