//! The quantizer, as operations.
//!
//! Codes are bit-exact on every backend, so this module is the specification of the kernels too. All arithmetic is f32,
//! each operation rounded to nearest (`__fsub_rn` and so on), never contracted, subnormals kept.
//!
//! # Keys and values
//!
//! A group of elements `x` (f32 values of 16-bit storage) shares a minimum and a scale, both stored in 16 bits:
//!
//! ```text
//! L = 2^b - 1
//! m = store(min(x)) + 0                              the +0 turns -0 into 0; exact when x is of the storage type
//! s = store(div(sub(max(x) · 0.5, m · 0.5), L · 0.5))  halves, so that no difference of finite numbers overflows
//! s = 1 unless s >= 2^-126                           constant groups, and scales whose reciprocal would be infinite
//! t = mul(sub(x, m), rcp(s))                         with m and s as stored
//! code = clamp(rint(t), 0, L)                        to nearest, ties to even
//! code = clamp(floor(add(t, u)), 0, L)               stochastic, u from [`noise`]
//! x ≈ s · code + m
//! ```
//!
//! `store` rounds to the storage type, ties to even. The multiplications by 0.5 are exact except among subnormals.
//!
//! # Queries and probabilities
//!
//! The same with `L = 255`, rounding to nearest, and f32 for `store`: [`Group::fit`] with [`DType::F32`], or
//! [`eight_bit`] for both steps. What is quantized is `mul(q, s^K)` and `mul(P, s^V)` (paper, scale folding), `P =
//! exp(S - max S)` with the maximum over the visible tokens of the block alone; `P` of a token that is not visible is
//! 0 and takes part in the minimum.

use attention::DType;
use half::{bf16, f16};

use crate::Bits;

/// Scale and minimum that a group of elements shares, as stored: exact values of the storage type.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Group {
    /// Distance between neighbouring codes; above 0.
    pub scale: f32,
    /// Value of code 0.
    pub min: f32,
}

/// Rounds to a storage type and back.
#[inline]
pub fn store(value: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F32 => value,
        DType::F16 => f16::from_f32(value).to_f32(),
        DType::BF16 => bf16::from_f32(value).to_f32(),
    }
}

/// Smallest scale: below it the reciprocal is past f32's range.
const SMALLEST_SCALE: f32 = f32::MIN_POSITIVE;

impl Group {
    /// Scale and minimum of finite values, for codes up to `levels`, stored as `dtype`. No values give scale 1,
    /// minimum 0.
    #[inline]
    pub fn fit(values: impl IntoIterator<Item = f32>, levels: u32, dtype: DType) -> Self {
        let mut range = (f32::INFINITY, f32::NEG_INFINITY);
        for x in values {
            range = (range.0.min(x), range.1.max(x));
        }
        if range.0 > range.1 {
            return Group { scale: 1.0, min: 0.0 };
        }
        Group::of_range(range.0, range.1, levels, dtype)
    }

    /// [`fit`](Self::fit) of values whose smallest and largest are known.
    #[inline]
    pub fn of_range(min: f32, max: f32, levels: u32, dtype: DType) -> Self {
        let min = store(min, dtype) + 0.0;
        let scale = store((max * 0.5 - min * 0.5) / (levels as f32 * 0.5), dtype);
        Group { scale: if scale >= SMALLEST_SCALE { scale } else { 1.0 }, min }
    }

    /// `t = mul(sub(x, m), rcp(s))`: where a value falls between the codes.
    #[inline]
    fn position(&self, x: f32, reciprocal: f32) -> f32 {
        (x - self.min) * reciprocal
    }

    /// The code of a value, rounded to nearest, ties to even.
    #[inline]
    pub fn code(&self, x: f32, levels: u32) -> u8 {
        // Clamped first, which changes nothing because 0 and L are whole. From 1.5 · 2^23 up neighbouring floats are
        // 1 apart, so the addition rounds as rint does and leaves the code in the lowest bits: vector units without
        // rint do it too.
        let position = self.position(x, 1.0 / self.scale).clamp(0.0, levels as f32);
        (position + 12_582_912.0).to_bits() as u8
    }

    /// The code of a value, rounded up when `noise`, uniform in `[0, 1)`, exceeds what is missing to the next code.
    #[inline]
    pub fn code_stochastic(&self, x: f32, levels: u32, noise: f32) -> u8 {
        (self.position(x, 1.0 / self.scale) + noise).floor().clamp(0.0, levels as f32) as u8
    }

    /// The value of a code, `s · code + m`, in f64: exact for 16-bit groups whose exponents lie within 40 of each
    /// other.
    #[inline]
    pub fn value(&self, code: u8) -> f64 {
        f64::from(self.scale) * f64::from(code) + f64::from(self.min)
    }
}

/// Quantizes queries or probabilities to 8 bits: f32 group, nearest. Writes `codes` `[values.len()]`.
///
/// # Panics
/// When the lengths differ.
#[inline]
pub fn eight_bit(values: &[f32], codes: &mut [u8]) -> Group {
    assert_eq!(values.len(), codes.len(), "a code for every value");
    let levels = Bits::Eight.levels();
    if values.is_empty() {
        return Group { scale: 1.0, min: 0.0 };
    }
    let (min, max) = range(values);
    let group = Group::of_range(min, max, levels, DType::F32);
    for (code, &x) in codes.iter_mut().zip(values) {
        *code = group.code(x, levels);
    }
    group
}

/// Smallest and largest of finite values, in independent lanes, which the compiler turns into vector code.
#[inline]
fn range(values: &[f32]) -> (f32, f32) {
    const LANES: usize = 8;
    let (mut low, mut high) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            low[i] = if chunk[i] < low[i] { chunk[i] } else { low[i] };
            high[i] = if chunk[i] > high[i] { chunk[i] } else { high[i] };
        }
    }
    let rest = rest.iter().copied();
    (
        low.into_iter().chain(rest.clone()).fold(f32::INFINITY, f32::min),
        high.into_iter().chain(rest).fold(f32::NEG_INFINITY, f32::max),
    )
}

/// Which matrix an element belongs to, as the noise of stochastic rounding counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tensor {
    /// Keys.
    K,
    /// Values.
    V,
}

/// Noise of stochastic rounding for one element, uniform in `[0, 1)` in steps of 2⁻²⁴.
///
/// Philox4x32-10 with key `[seed, seed >> 32]` and counter `[token, channel / 4, 2 · kv_head + tensor, layer]` (K is
/// 0, V is 1); the element takes word `channel % 4` of the four, and its upper 24 bits. `token` counts from the start
/// of the sequence, sinks included.
#[inline]
pub fn noise(seed: u64, layer: u32, tensor: Tensor, kv_head: u32, token: u32, channel: u32) -> f32 {
    let tensor = match tensor {
        Tensor::K => 0,
        Tensor::V => 1,
    };
    let counter = [token, channel / 4, 2 * kv_head + tensor, layer];
    let word = philox(counter, [seed as u32, (seed >> 32) as u32])[channel as usize % 4];
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// Philox4x32-10: ten rounds of a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2,
/// 3", SC '11). The same bits as cuRAND's `curand_Philox4x32_10`.
pub const fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    let mut round = 0;
    while round < 10 {
        let p0 = 0xD251_1F53u64 * c0 as u64;
        let p1 = 0xCD9E_8D57u64 * c2 as u64;
        (c0, c1, c2, c3) = ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
        round += 1;
    }
    [c0, c1, c2, c3]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_known_answers() {
        // The known-answer vectors of Random123 for philox4x32, 10 rounds.
        for (counter, key, expected) in [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ] {
            assert_eq!(philox(counter, key), expected, "{counter:x?}");
        }
    }

    #[test]
    fn groups_by_hand() {
        let group = Group::fit([-1.0, 0.5, 2.0], 3, DType::BF16);
        assert_eq!(group, Group { scale: 1.0, min: -1.0 });
        // 0.5 lies at 1.5, -0.5 at 0.5: ties go to even.
        assert_eq!([-1.0, -0.5, 0.5, 1.5, 2.0].map(|x| group.code(x, 3)), [0, 0, 2, 2, 3]);
        assert_eq!([0.0, 0.49, 0.5, 0.99].map(|u| group.code_stochastic(0.5, 3, u)), [1, 1, 2, 2]);
        assert_eq!([-9.0, 9.0].map(|x| group.code(x, 3)), [0, 3], "outside is clamped");
        // As the operations say, at every quarter step.
        for levels in Bits::ALL.map(Bits::levels) {
            for quarter in -8..4 * levels as i32 + 8 {
                let t = quarter as f32 * 0.25;
                let expected = t.round_ties_even().clamp(0.0, levels as f32) as u8;
                assert_eq!(Group { scale: 1.0, min: 0.0 }.code(t, levels), expected, "{t} of {levels}");
            }
        }
        assert_eq!(group.value(3), 2.0);
    }

    #[test]
    fn extreme_groups_are_finite() {
        let huge = f32::from_bits(0x7f7f_0000); // the largest bf16
        for (case, values, dtype) in [
            ("constant", [3.0f32, 3.0], DType::F16),
            ("zeros of both signs", [-0.0, 0.0], DType::BF16),
            ("huge constant", [huge, huge], DType::BF16),
            ("huge spread", [-huge, huge], DType::BF16),
            ("f16's spread", [-65504.0, 65504.0], DType::F16),
            ("subnormal spread", [0.0, f32::from_bits(0x0001_0000)], DType::BF16),
            ("f16 subnormal", [0.0, 6e-8], DType::F16),
            ("subnormal scale", [1e-39, 3e-38], DType::BF16),
        ] {
            for bits in Bits::ALL {
                let levels = bits.levels();
                let group = Group::fit(values, levels, dtype);
                assert!(
                    group.scale.is_finite() && group.scale >= SMALLEST_SCALE,
                    "{case}, {bits}: {group:?}"
                );
                assert!(
                    group.min.is_finite() && group.min.to_bits() != (-0.0f32).to_bits(),
                    "{case}: {group:?}"
                );
                for x in values {
                    let error = (group.value(group.code(x, levels)) - f64::from(x)).abs();
                    let spread = f64::from(values[1]) - f64::from(values[0]);
                    // Spreads whose scale would be 0 as stored collapse into the minimum.
                    let smallest =
                        if dtype == DType::F16 { 2f64.powi(-24) } else { f64::from(SMALLEST_SCALE) };
                    let collapsed = f64::from(levels) * smallest;
                    assert!(
                        error <= spread.max(0.0) * 0.51 || error <= collapsed.min(spread),
                        "{case}, {bits}: {x} is off by {error}"
                    );
                }
            }
        }
        assert_eq!(Group::fit([-0.0, 0.0], 3, DType::F16).min.to_bits(), 0);
        assert_eq!(Group::fit([], 3, DType::F16), Group { scale: 1.0, min: 0.0 });
    }
}
