//! One row of attention over one closed block, on its codes.
//!
//! Integers are exact (sums of at most 128 products of 8-bit numbers, below 2²⁴, so that f32 holds them too); what
//! surrounds them is f32, in the order written here.

use std::ops::Range;

use attention::softmax_state::Raw;
use attention::{KeyRanges, Score};

use crate::page::HeadGeometry;
use crate::quantizer::{Group, eight_bit};
use crate::{HeadBlock, Layout};

/// A query row, and in `PerTokenKey` its codes, which do not depend on the block.
pub(super) struct Query<'a> {
    /// `[qk_dim]`
    q: &'a [f32],
    quantized: Option<Quantized>,
}

/// 8-bit codes of a vector in channel partitions.
struct Quantized {
    codes: Vec<u8>,
    groups: Vec<Group>,
}

impl Quantized {
    fn new(values: &[f32], partition: usize) -> Self {
        let mut codes = vec![0; values.len()];
        let chunks = values.chunks_exact(partition).zip(codes.chunks_exact_mut(partition));
        let groups = chunks.map(|(values, codes)| eight_bit(values, codes)).collect();
        Quantized { codes, groups }
    }
}

impl<'a> Query<'a> {
    pub(super) fn new(head: &HeadGeometry, q: &'a [f32]) -> Self {
        let quantized = match head.layout {
            Layout::PerChannelKey => None,
            Layout::PerTokenKey => Some(Quantized::new(q, head.k_channels)),
        };
        Query { q, quantized }
    }

    /// Scores of the block's tokens `[Π]`: -inf where `visible` (positions in the sequence) has no token.
    fn scores(
        &self,
        head: &HeadGeometry,
        block: &HeadBlock,
        rule: &Score,
        tokens: &Range<usize>,
        visible: &KeyRanges,
    ) -> Vec<f32> {
        let mut scores = vec![f32::NEG_INFINITY; head.partition];
        let folded;
        // Eq. 4 with s_b = 1 and m_b = 0 once the scales are folded into the query; its minima come in through q·m.
        let (quantized, q_min) = match &self.quantized {
            Some(quantized) => (quantized, 0.0),
            None => {
                let scaled: Vec<f32> =
                    self.q.iter().zip(&block.k_groups).map(|(q, group)| q * group.scale).collect();
                folded = Quantized::new(&scaled, head.k_channels);
                let minima: f32 = self.q.iter().zip(&block.k_groups).map(|(q, group)| q * group.min).sum();
                (&folded, minima)
            }
        };
        let partitions = head.k_partitions();
        let code_sums: Vec<f32> = match head.layout {
            Layout::PerChannelKey => Vec::new(),
            Layout::PerTokenKey => quantized.codes.chunks_exact(head.k_channels).map(sum).collect(),
        };
        for range in visible.iter() {
            for position in range.start.max(tokens.start)..range.end.min(tokens.end) {
                let token = position - tokens.start;
                let codes = &block.k_codes[token * head.qk_dim..][..head.qk_dim];
                let mut dot = q_min;
                for (p, &Group { scale: alpha, min: beta }) in quantized.groups.iter().enumerate() {
                    let channels = p * head.k_channels..(p + 1) * head.k_channels;
                    let product = product(&quantized.codes[channels.clone()], &codes[channels]) as f32;
                    let k_sum = f32::from(block.k_sums[token * partitions + p]);
                    dot += match head.layout {
                        Layout::PerChannelKey => alpha * product + beta * k_sum,
                        Layout::PerTokenKey => {
                            let Group { scale, min } = block.k_groups[token * partitions + p];
                            let channels = head.k_channels as f32;
                            scale * (alpha * product + beta * k_sum)
                                + min * (alpha * code_sums[p] + beta * channels)
                        }
                    };
                }
                scores[token] = rule.apply_f32(dot);
            }
        }
        scores
    }

    /// The row's state over the block's visible tokens `visible` (positions in the sequence); the block holds positions
    /// `tokens`.
    pub(super) fn attend(
        &self,
        head: &HeadGeometry,
        block: &HeadBlock,
        rule: &Score,
        tokens: &Range<usize>,
        visible: &KeyRanges,
    ) -> Raw<f32> {
        let scores = self.scores(head, block, rule, tokens, visible);
        let mut state = Raw::empty(head.v_dim);
        let max = scores.iter().fold(f32::NEG_INFINITY, |max, &x| if max > x { max } else { x });
        if max == f32::NEG_INFINITY {
            return state;
        }
        let p: Vec<f32> = scores.iter().map(|score| (score - max).exp()).collect();
        state.m = max;
        state.l = p.iter().sum();
        weighted_values(head, block, &p, &mut state.o);
        state
    }
}

/// `out = P · V` of a block: `p` `[Π]`, 0 where a token is not visible; `out` `[v_dim]`.
fn weighted_values(head: &HeadGeometry, block: &HeadBlock, p: &[f32], out: &mut [f32]) {
    let mut codes = vec![0u8; head.partition];
    match head.layout {
        Layout::PerChannelKey => {
            let partitions = head.v_partitions();
            for (g, out) in out.chunks_exact_mut(head.v_channels).enumerate() {
                let groups = block.v_groups[g..].iter().step_by(partitions);
                let scaled: Vec<f32> =
                    p.iter().zip(groups.clone()).map(|(p, group)| p * group.scale).collect();
                let minima: f32 = p.iter().zip(groups).map(|(p, group)| p * group.min).sum();
                let Group { scale: a, min: c } = eight_bit(&scaled, &mut codes);
                let first = g * head.v_channels;
                let products = columns(&codes, block, head, first..first + head.v_channels);
                for ((out, product), &v_sum) in out.iter_mut().zip(products).zip(&block.v_sums[first..]) {
                    *out = a * product as f32 + c * f32::from(v_sum) + minima;
                }
            }
        }
        Layout::PerTokenKey => {
            let Group { scale: a, min: c } = eight_bit(p, &mut codes);
            let weights = a * sum(&codes) + c * head.partition as f32;
            let products = columns(&codes, block, head, 0..head.v_dim);
            let channels = block.v_groups.iter().zip(&block.v_sums);
            for ((out, product), (group, &v_sum)) in out.iter_mut().zip(products).zip(channels) {
                *out = group.scale * (a * product as f32 + c * f32::from(v_sum)) + group.min * weights;
            }
        }
    }
}

/// `Σ_t w'_t v'_tc` for some channels.
fn columns(weights: &[u8], block: &HeadBlock, head: &HeadGeometry, channels: Range<usize>) -> Vec<u32> {
    let mut sums = vec![0u32; channels.len()];
    for (token, &weight) in weights.iter().enumerate() {
        if weight == 0 {
            continue;
        }
        let codes = &block.v_codes[token * head.v_dim..][channels.clone()];
        for (sum, &code) in sums.iter_mut().zip(codes) {
            // A product of two bytes fits 16 bits, which vector units multiply eight at a time.
            *sum += u32::from(u16::from(weight) * u16::from(code));
        }
    }
    sums
}

/// `Σ a'b'`
fn product(a: &[u8], b: &[u8]) -> i32 {
    a.iter().zip(b).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum()
}

fn sum(codes: &[u8]) -> f32 {
    codes.iter().map(|&code| u32::from(code)).sum::<u32>() as f32
}
