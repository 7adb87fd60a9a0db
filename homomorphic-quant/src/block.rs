//! A closed block of one KV head, in the clear: what every page layout is read into and written from.

use crate::page::HeadGeometry;
use crate::quantizer::{self, Group, Tensor};
use crate::{Bits, Error, Rounding};

/// Codes, groups and sums of Π tokens of one KV head.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadBlock {
    /// Key codes, one per byte `[Π, qk_dim]`.
    pub k_codes: Vec<u8>,
    /// Scale and minimum of keys: `[qk_dim]`, or `[Π, k_partitions]` in `PerTokenKey`.
    pub k_groups: Vec<Group>,
    /// Sums of key codes over the channels of a partition `[Π, k_partitions]`.
    pub k_sums: Vec<u16>,
    /// Value codes, one per byte `[Π, v_dim]`.
    pub v_codes: Vec<u8>,
    /// Scale and minimum of values: `[Π, v_partitions]`, or `[v_dim]` in `PerTokenKey`.
    pub v_groups: Vec<Group>,
    /// Sums of value codes over the tokens `[v_dim]`.
    pub v_sums: Vec<u16>,
}

/// Where a block's noise comes from, when it is rounded stochastically.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockPlace {
    /// The layer.
    pub layer: u32,
    /// The KV head, of the model's numbers.
    pub kv_head: u32,
    /// Position of the block's first token in its sequence, sinks included.
    pub token: u32,
}

impl BlockPlace {
    /// The same block, `heads` heads further.
    pub(crate) fn of_head(self, heads: usize) -> Self {
        BlockPlace { kv_head: self.kv_head + heads as u32, ..self }
    }
}

impl HeadBlock {
    /// Quantizes a block: `k` `[Π, qk_dim]` and `v` `[Π, v_dim]`, finite values of the cache's storage type.
    ///
    /// # Errors
    /// [`Error::Argument`] when a length does not fit.
    pub fn quantize(
        head: &HeadGeometry,
        rounding: Rounding,
        place: BlockPlace,
        k: &[f32],
        v: &[f32],
    ) -> Result<Self, Error> {
        crate::error::check_len("k", k.len(), &[head.partition, head.qk_dim])?;
        crate::error::check_len("v", v.len(), &[head.partition, head.v_dim])?;
        let (k_codes, k_groups) = quantize(
            Matrix { values: k, dim: head.qk_dim, bits: head.bits.k, tensor: Tensor::K },
            (head.k_groups(), |token, channel| head.k_group(token, channel)),
            head,
            rounding,
            place,
        );
        let (v_codes, v_groups) = quantize(
            Matrix { values: v, dim: head.v_dim, bits: head.bits.v, tensor: Tensor::V },
            (head.v_groups(), |token, channel| head.v_group(token, channel)),
            head,
            rounding,
            place,
        );
        let mut block =
            HeadBlock { k_codes, k_groups, k_sums: Vec::new(), v_codes, v_groups, v_sums: Vec::new() };
        block.add_up_sums(head);
        Ok(block)
    }

    /// Replaces the sums by those of the codes.
    pub fn add_up_sums(&mut self, head: &HeadGeometry) {
        let sum = |codes: &[u8]| codes.iter().map(|&code| u16::from(code)).sum();
        self.k_sums = self.k_codes.chunks_exact(head.k_channels).map(sum).collect();
        self.v_sums = vec![0; head.v_dim];
        for token in self.v_codes.chunks_exact(head.v_dim) {
            self.v_sums.iter_mut().zip(token).for_each(|(sum, &code)| *sum += u16::from(code));
        }
    }

    /// The keys `[Π, qk_dim]` that the codes stand for, in f64.
    pub fn keys(&self, head: &HeadGeometry) -> Vec<f64> {
        let at = |i: usize| self.k_groups[head.k_group(i / head.qk_dim, i % head.qk_dim)];
        self.k_codes.iter().enumerate().map(|(i, &code)| at(i).value(code)).collect()
    }

    /// The values `[Π, v_dim]` that the codes stand for, in f64.
    pub fn values(&self, head: &HeadGeometry) -> Vec<f64> {
        let at = |i: usize| self.v_groups[head.v_group(i / head.v_dim, i % head.v_dim)];
        self.v_codes.iter().enumerate().map(|(i, &code)| at(i).value(code)).collect()
    }

    /// Checks lengths against a geometry.
    pub(crate) fn check(&self, head: &HeadGeometry) -> Result<(), Error> {
        for (name, found, expected) in [
            ("block.k_codes", self.k_codes.len(), head.partition * head.qk_dim),
            ("block.k_groups", self.k_groups.len(), head.k_groups()),
            ("block.k_sums", self.k_sums.len(), head.partition * head.k_partitions()),
            ("block.v_codes", self.v_codes.len(), head.partition * head.v_dim),
            ("block.v_groups", self.v_groups.len(), head.v_groups()),
            ("block.v_sums", self.v_sums.len(), head.v_dim),
        ] {
            crate::error::check_len(name, found, &[expected])?;
        }
        Ok(())
    }
}

/// Keys or values of a block.
struct Matrix<'a> {
    /// `[Π, dim]`
    values: &'a [f32],
    dim: usize,
    bits: Bits,
    tensor: Tensor,
}

fn quantize(
    matrix: Matrix<'_>,
    (groups, group_of): (usize, impl Fn(usize, usize) -> usize),
    head: &HeadGeometry,
    rounding: Rounding,
    place: BlockPlace,
) -> (Vec<u8>, Vec<Group>) {
    let Matrix { values, dim, bits, tensor } = matrix;
    let levels = bits.levels();
    let mut ranges = vec![(f32::INFINITY, f32::NEG_INFINITY); groups];
    for (token, values) in values.chunks_exact(dim).enumerate() {
        for (channel, &x) in values.iter().enumerate() {
            let range = &mut ranges[group_of(token, channel)];
            *range = (range.0.min(x), range.1.max(x));
        }
    }
    let groups: Vec<Group> =
        ranges.iter().map(|&(min, max)| Group::of_range(min, max, levels, head.dtype)).collect();
    let mut codes = Vec::with_capacity(values.len());
    for (token, values) in values.chunks_exact(dim).enumerate() {
        for (channel, &x) in values.iter().enumerate() {
            let group = groups[group_of(token, channel)];
            codes.push(match rounding {
                Rounding::Nearest => group.code(x, levels),
                Rounding::Stochastic { seed } => {
                    let token = place.token.wrapping_add(token as u32);
                    let noise =
                        quantizer::noise(seed, place.layer, tensor, place.kv_head, token, channel as u32);
                    group.code_stochastic(x, levels, noise)
                }
            });
        }
    }
    (codes, groups)
}

/// Quantizes and dequantizes fewer than Π tokens, `k` `[tokens, qk_dim]` and `v` `[tokens, v_dim]`, in place: what an
/// open block that is held in codes loses at every step. Results are rounded to the cache's 16-bit type.
pub(crate) fn requantize(
    head: &HeadGeometry,
    rounding: Rounding,
    place: BlockPlace,
    k: &mut [f32],
    v: &mut [f32],
) {
    let k_group = |token, channel| head.k_group(token, channel);
    let v_group = |token, channel| head.v_group(token, channel);
    let matrix = Matrix { values: k, dim: head.qk_dim, bits: head.bits.k, tensor: Tensor::K };
    let (codes, groups) = quantize(matrix, (head.k_groups(), k_group), head, rounding, place);
    for (i, (x, code)) in k.iter_mut().zip(codes).enumerate() {
        *x = quantizer::store(
            groups[k_group(i / head.qk_dim, i % head.qk_dim)].value(code) as f32,
            head.dtype,
        );
    }
    let matrix = Matrix { values: v, dim: head.v_dim, bits: head.bits.v, tensor: Tensor::V };
    let (codes, groups) = quantize(matrix, (head.v_groups(), v_group), head, rounding, place);
    for (i, (x, code)) in v.iter_mut().zip(codes).enumerate() {
        *x = quantizer::store(groups[v_group(i / head.v_dim, i % head.v_dim)].value(code) as f32, head.dtype);
    }
}
