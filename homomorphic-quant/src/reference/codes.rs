//! One row of attention over one closed block, on its codes.
//!
//! Integers are exact (sums of at most 128 products of 8-bit numbers, below 2²⁴, so that f32 holds them too); what
//! surrounds them is f32, in the order written here. Integer loops add with `wrapping_add`, although nothing wraps: checks
//! for overflow would keep them from vector units in the profiles that have such checks.

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
#[derive(Default)]
struct Quantized {
    codes: Vec<u8>,
    groups: Vec<Group>,
}

impl Quantized {
    fn set(&mut self, values: &[f32], partition: usize) {
        self.codes.resize(values.len(), 0);
        self.groups.clear();
        let chunks = values.chunks_exact(partition).zip(self.codes.chunks_exact_mut(partition));
        self.groups.extend(chunks.map(|(values, codes)| eight_bit(values, codes)));
    }
}

/// What a task reuses from row to row and from block to block.
#[derive(Default)]
pub(super) struct Scratch {
    /// The query, or P, with the scales folded in.
    scaled: Vec<f32>,
    folded: Quantized,
    /// Scores of the block's tokens, then P.
    p: Vec<f32>,
    /// Codes of P.
    weights: Vec<u8>,
    /// Sums of products by channel, and those of a run of tokens that 16 bits hold.
    products: Vec<u32>,
    of_run: Vec<u16>,
}

impl<'a> Query<'a> {
    pub(super) fn new(head: &HeadGeometry, q: &'a [f32]) -> Self {
        let quantized = match head.layout {
            Layout::PerChannelKey => None,
            Layout::PerTokenKey => {
                let mut quantized = Quantized::default();
                quantized.set(q, head.k_channels);
                Some(quantized)
            }
        };
        Query { q, quantized }
    }

    /// Leaves scores of the block's tokens `[Π]` in `scratch.p`: -inf where `visible` (positions in the sequence) has no token.
    fn scores(
        &self,
        head: &HeadGeometry,
        block: &HeadBlock,
        rule: &Score,
        (tokens, visible): (&Range<usize>, &KeyRanges),
        scratch: &mut Scratch,
    ) {
        let Scratch { scaled, folded, p: scores, .. } = scratch;
        scores.clear();
        scores.resize(head.partition, f32::NEG_INFINITY);
        // Eq. 4 with s_b = 1 and m_b = 0 once the scales are folded into the query; its minima come in through q·m.
        let (quantized, q_min) = match &self.quantized {
            Some(quantized) => (quantized, 0.0),
            None => {
                scaled.clear();
                scaled.extend(self.q.iter().zip(&block.k_groups).map(|(q, group)| q * group.scale));
                folded.set(scaled, head.k_channels);
                let minima = sum_of(self.q.iter().zip(&block.k_groups), |(q, group)| q * group.min);
                (&*folded, minima)
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
    }

    /// The row's state over the block's visible tokens `visible` (positions in the sequence); the block holds positions
    /// `tokens`.
    pub(super) fn attend(
        &self,
        head: &HeadGeometry,
        block: &HeadBlock,
        rule: &Score,
        (tokens, visible): (&Range<usize>, &KeyRanges),
        scratch: &mut Scratch,
    ) -> Raw<f32> {
        self.scores(head, block, rule, (tokens, visible), scratch);
        let mut state = Raw::empty(head.v_dim);
        let max = scratch.p.iter().fold(f32::NEG_INFINITY, |max, &x| if max > x { max } else { x });
        if max == f32::NEG_INFINITY {
            return state;
        }
        scratch.p.iter_mut().for_each(|score| *score = (*score - max).exp());
        state.m = max;
        state.l = scratch.p.iter().sum();
        weighted_values(head, block, scratch, &mut state.o);
        state
    }
}

/// `out = P · V` of a block: `scratch.p` `[Π]`, 0 where a token is not visible; `out` `[v_dim]`.
fn weighted_values(head: &HeadGeometry, block: &HeadBlock, scratch: &mut Scratch, out: &mut [f32]) {
    scratch.weights.resize(head.partition, 0);
    match head.layout {
        Layout::PerChannelKey => {
            let partitions = head.v_partitions();
            for (g, out) in out.chunks_exact_mut(head.v_channels).enumerate() {
                let groups = block.v_groups[g..].iter().step_by(partitions);
                scratch.scaled.clear();
                scratch.scaled.extend(scratch.p.iter().zip(groups.clone()).map(|(p, group)| p * group.scale));
                let minima = sum_of(scratch.p.iter().zip(groups), |(p, group)| p * group.min);
                let Group { scale: a, min: c } = eight_bit(&scratch.scaled, &mut scratch.weights);
                let first = g * head.v_channels;
                columns(block, head, first..first + head.v_channels, scratch);
                let sums = &block.v_sums[first..first + head.v_channels];
                for ((out, &product), &v_sum) in out.iter_mut().zip(&scratch.products).zip(sums) {
                    *out = a * product as f32 + c * f32::from(v_sum) + minima;
                }
            }
        }
        Layout::PerTokenKey => {
            let Group { scale: a, min: c } = eight_bit(&scratch.p, &mut scratch.weights);
            let weights = a * sum(&scratch.weights) + c * head.partition as f32;
            columns(block, head, 0..head.v_dim, scratch);
            let channels = block.v_groups.iter().zip(&block.v_sums);
            for ((out, &product), (group, &v_sum)) in out.iter_mut().zip(&scratch.products).zip(channels) {
                *out = group.scale * (a * product as f32 + c * f32::from(v_sum)) + group.min * weights;
            }
        }
    }
}

/// Leaves `Σ_t w'_t v'_tc` for some channels in `scratch.products`.
fn columns(block: &HeadBlock, head: &HeadGeometry, channels: Range<usize>, scratch: &mut Scratch) {
    let Scratch { weights, products, of_run, .. } = scratch;
    products.clear();
    products.resize(channels.len(), 0);
    let codes_of = |token: usize| &block.v_codes[token * head.v_dim..][channels.clone()];
    // A product of two bytes fits 16 bits, and so do sums of as many as this, which vector units add eight at a time.
    let run = (u32::from(u16::MAX) / (255 * head.bits.v.levels())) as usize;
    if run == 1 {
        for (token, &weight) in weights.iter().enumerate() {
            for (product, &code) in products.iter_mut().zip(codes_of(token)) {
                *product = product.wrapping_add(u32::from(u16::from(weight).wrapping_mul(u16::from(code))));
            }
        }
        return;
    }
    of_run.resize(channels.len(), 0);
    for (first, weights) in (0..).step_by(run).zip(weights.chunks(run)) {
        of_run.fill(0);
        for (token, &weight) in (first..).zip(weights) {
            for (sum, &code) in of_run.iter_mut().zip(codes_of(token)) {
                *sum = sum.wrapping_add(u16::from(weight).wrapping_mul(u16::from(code)));
            }
        }
        for (product, &sum) in products.iter_mut().zip(&*of_run) {
            *product = product.wrapping_add(u32::from(sum));
        }
    }
}

/// `Σ a'b'`
fn product(a: &[u8], b: &[u8]) -> i32 {
    // Bytes as 16-bit numbers: vector units multiply and add pairs of these in one instruction.
    let product = |(&a, &b): (&u8, &u8)| i32::from(i16::from(a)).wrapping_mul(i32::from(i16::from(b)));
    a.iter().zip(b).map(product).fold(0, i32::wrapping_add)
}

fn sum(codes: &[u8]) -> f32 {
    codes.iter().map(|&code| u32::from(code)).fold(0, u32::wrapping_add) as f32
}

/// A sum in independent lanes, which the compiler turns into vector code without leave to reorder it.
fn sum_of<T>(items: impl ExactSizeIterator<Item = T>, term: impl Fn(T) -> f32) -> f32 {
    const LANES: usize = 8;
    let mut lanes = [0.0f32; LANES];
    for (i, item) in items.enumerate() {
        lanes[i % LANES] += term(item);
    }
    lanes.iter().sum()
}
