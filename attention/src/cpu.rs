//! Dense attention on the CPU in f32: the fast path of an engine that runs without a GPU.
//!
//! One function serves decoding (a few new tokens over a long cache) and prefill. Work is cut into blocks of queries and,
//! when queries are few, into splits of keys that are merged in order. The cuts depend on the shape alone, never on the
//! number of threads, so runs are bitwise equal whatever the thread pool. [`reference`](mod@crate::reference)
//! is what it is checked against.

use std::ops::Range;

use rayon::prelude::*;

use crate::element::{DType, Element};
use crate::error::check_len;
use crate::softmax_state::{Raw, Real, normalise_in_place};
use crate::{AttentionSpec, Error, HeadShape, HeadsView, KeyRanges, Score};

/// Tokens of a block of queries.
const QUERY_BLOCK: usize = 32;
/// Keys of a tile: with 128 channels the tile of keys and the tile of values take 16 KiB each.
const KEY_TILE: usize = 32;
/// Keys of a split. Splitting pays only while the query blocks alone cannot fill the threads.
const KEY_SPLIT: usize = 1024;
/// Queries up to which keys are split.
const SPLIT_QUERIES: usize = 8;

/// Attention of `q` over `k` and `v`, in f32.
///
/// - `q` `[tokens, q_heads, qk_dim]`: the last `tokens` positions of the sequence, so that one decoded token is
///   `tokens = 1` over a cache that already holds its key;
/// - `k` `[kv_len, kv_heads, qk_dim]`, `v` `[kv_len, kv_heads, v_dim]`, in any storage type and layout;
/// - `out` `[tokens, q_heads, v_dim]`, `lse` `[tokens, q_heads]` (natural log, scale applied), wholly overwritten.
///
/// A query that sees no key gets output 0 and LSE -inf. Runs on the current rayon thread pool.
///
/// # Errors
/// [`Error::Argument`] when a shape does not fit `spec`, or the mask is a window of 0 keys.
pub fn attend<T: Element>(
    spec: &AttentionSpec,
    q: HeadsView<'_, f32>,
    k: HeadsView<'_, T>,
    v: HeadsView<'_, T>,
    out: &mut [f32],
    lse: &mut [f32],
) -> Result<(), Error> {
    let shape = spec.shape;
    spec.mask.check()?;
    q.check("q", shape.q_heads(), shape.qk_dim())?;
    k.check("k", shape.kv_heads(), shape.qk_dim())?;
    v.check("v", shape.kv_heads(), shape.v_dim())?;
    if k.tokens() != v.tokens() {
        return Err(Error::argument("v", format!("{} tokens, as many as k", k.tokens()), v.tokens()));
    }
    check_len("out", out.len(), &[q.tokens(), shape.q_heads(), shape.v_dim()])?;
    check_len("lse", lse.len(), &[q.tokens(), shape.q_heads()])?;
    let seen = |query: usize| spec.mask.keys(query, q.tokens(), k.tokens());

    let splits = if q.tokens() <= SPLIT_QUERIES { k.tokens().div_ceil(KEY_SPLIT).max(1) } else { 1 };
    let split_len = if splits > 1 { KEY_SPLIT } else { k.tokens() };
    let blocks = blocks(&shape, q.tokens());
    let mut states: Vec<Vec<Raw<f32>>> = (0..blocks.len() * splits)
        .into_par_iter()
        .map(|task| {
            let (queries, kv_head) = blocks[task / splits].clone();
            let first = task % splits * split_len;
            let keys = first..(first + split_len).min(k.tokens());
            let mut states = vec![Raw::empty(shape.v_dim()); queries.len() * shape.group()];
            Block { spec, q, k, v, queries, kv_head }.attend(keys, &seen, &mut states);
            states
        })
        .collect();

    for ((queries, kv_head), splits) in blocks.into_iter().zip(states.chunks_exact_mut(splits)) {
        let [merged, others @ ..] = splits else { continue };
        for states in others {
            for (state, other) in merged.iter_mut().zip(states) {
                state.merge(other)?;
            }
        }
        let rows = queries.flat_map(|query| shape.q_heads_of(kv_head).map(move |head| (query, head)));
        for ((query, head), state) in rows.zip(merged) {
            let row = query * shape.q_heads() + head;
            lse[row] = normalise_in_place(state.m, state.l, &mut state.o);
            out[row * shape.v_dim()..(row + 1) * shape.v_dim()].copy_from_slice(&state.o);
        }
    }
    Ok(())
}

/// Carries the states of `q`'s rows over some more keys: one step of a ring, in f32.
///
/// - `q` `[tokens, q_heads, qk_dim]`, `k` `[keys, kv_heads, qk_dim]`, `v` `[keys, kv_heads, v_dim]`;
/// - `seen(token)`: which of these keys a query sees, by their index here. `spec.mask` is not asked: only the caller knows where
///   the keys of a shard stand in the sequence;
/// - `states` `[tokens, q_heads]`, each with `v_dim` outputs. Rows that see none of the keys keep theirs bit for bit.
///
/// Runs on the current rayon thread pool, bitwise the same on any.
///
/// # Errors
/// [`Error::Argument`] when a shape does not fit `spec`; the states are then unchanged.
///
/// # Panics
/// When `seen` names a key that is not there.
pub fn carry<T: Element>(
    spec: &AttentionSpec,
    q: HeadsView<'_, f32>,
    k: HeadsView<'_, T>,
    v: HeadsView<'_, T>,
    seen: impl Fn(usize) -> KeyRanges + Sync,
    states: &mut [Raw<f32>],
) -> Result<(), Error> {
    let shape = spec.shape;
    q.check("q", shape.q_heads(), shape.qk_dim())?;
    k.check("k", shape.kv_heads(), shape.qk_dim())?;
    v.check("v", shape.kv_heads(), shape.v_dim())?;
    if k.tokens() != v.tokens() {
        return Err(Error::argument("v", format!("{} tokens, as many as k", k.tokens()), v.tokens()));
    }
    check_len("states", states.len(), &[q.tokens(), shape.q_heads()])?;
    if let Some(state) = states.iter().find(|state| state.o.len() != shape.v_dim()) {
        return Err(Error::argument("states", format!("{} outputs each", shape.v_dim()), state.o.len()));
    }
    states.par_chunks_mut(QUERY_BLOCK * shape.q_heads()).enumerate().for_each(|(block, states)| {
        let first = block * QUERY_BLOCK;
        let queries = first..first + states.len() / shape.q_heads();
        for kv_head in 0..shape.kv_heads() {
            // Rows of a block are (query, head of the group); here those of the other KV heads lie between.
            let rows = (0..queries.len())
                .flat_map(|query| shape.q_heads_of(kv_head).map(move |head| query * shape.q_heads() + head));
            let mut own: Vec<Raw<f32>> =
                rows.clone().map(|row| std::mem::replace(&mut states[row], Raw::empty(0))).collect();
            let block = Block { spec, q, k, v, queries: queries.clone(), kv_head };
            block.attend(0..k.tokens(), &seen, &mut own);
            for (row, state) in rows.zip(own) {
                states[row] = state;
            }
        }
    });
    Ok(())
}

/// Every block of queries with every KV head.
fn blocks(shape: &HeadShape, queries: usize) -> Vec<(Range<usize>, usize)> {
    let starts = (0..queries).step_by(QUERY_BLOCK);
    let block = |start: usize| start..(start + QUERY_BLOCK).min(queries);
    starts.flat_map(|start| (0..shape.kv_heads()).map(move |kv_head| (block(start), kv_head))).collect()
}

/// A block of queries and the KV head that all their rows read.
struct Block<'a, T> {
    spec: &'a AttentionSpec,
    q: HeadsView<'a, f32>,
    k: HeadsView<'a, T>,
    v: HeadsView<'a, T>,
    queries: Range<usize>,
    kv_head: usize,
}

impl<T: Element> Block<'_, T> {
    /// Takes a range of keys, as far as they are seen, into one state per (query, query head of the group).
    fn attend(&self, keys: Range<usize>, seen: &impl Fn(usize) -> KeyRanges, states: &mut [Raw<f32>]) {
        let shape = self.spec.shape;
        let visible: Vec<KeyRanges> = self.queries.clone().map(seen).collect();
        let (mut k_tile, mut v_tile) = (Vec::new(), Vec::new());
        let mut weights = [0.0f32; KEY_TILE];

        for start in keys.clone().step_by(KEY_TILE) {
            let tile = start..(start + KEY_TILE).min(keys.end);
            if !visible.iter().any(|ranges| overlaps(ranges, &tile)) {
                continue;
            }
            load(&mut k_tile, &self.k, self.kv_head, tile.clone());
            load(&mut v_tile, &self.v, self.kv_head, tile.clone());
            for (query, ranges) in self.queries.clone().zip(&visible) {
                for range in ranges.iter() {
                    let seen = range.start.max(tile.start)..range.end.min(tile.end);
                    if seen.is_empty() {
                        continue;
                    }
                    let rows = seen.start - tile.start..seen.end - tile.start;
                    let k = &k_tile[rows.start * shape.qk_dim()..rows.end * shape.qk_dim()];
                    let v = &v_tile[rows.start * shape.v_dim()..rows.end * shape.v_dim()];
                    let weights = &mut weights[..rows.len()];
                    for (g, head) in shape.q_heads_of(self.kv_head).enumerate() {
                        scores(weights, self.q.vector(query, head), k, &self.spec.score);
                        accumulate(&mut states[(query - self.queries.start) * shape.group() + g], weights, v);
                    }
                }
            }
        }
    }
}

fn overlaps(ranges: &KeyRanges, tile: &Range<usize>) -> bool {
    ranges.iter().any(|range| range.start < tile.end && tile.start < range.end)
}

/// Copies a tile of one head's vectors to `tile` `[tokens, dim]`, as f32.
fn load<T: Element>(tile: &mut Vec<f32>, view: &HeadsView<'_, T>, head: usize, tokens: Range<usize>) {
    tile.clear();
    for token in tokens {
        let vector = view.vector(token, head);
        match T::DTYPE {
            DType::F32 => tile.extend_from_slice(bytemuck::cast_slice(vector)),
            _ => tile.extend(vector.iter().map(|x| x.to_f32())),
        }
    }
}

/// Scores of the keys `k` `[scores, dim]`.
fn scores(scores: &mut [f32], q: &[f32], k: &[f32], rule: &Score) {
    for (score, k) in scores.iter_mut().zip(k.chunks_exact(q.len())) {
        *score = rule.apply_f32(dot(q, k));
    }
}

/// Adds keys with these scores and values `[scores, dim]` to a state, with one rescaling for all of them; `scores` become
/// weights.
fn accumulate(state: &mut Raw<f32>, scores: &mut [f32], v: &[f32]) {
    state.raise(scores.iter().fold(f32::NEG_INFINITY, |m, &score| m.max_or_nan(score)));
    if state.m == f32::NEG_INFINITY {
        return;
    }
    for score in scores.iter_mut() {
        *score = (*score - state.m).exp();
        state.l += *score;
    }
    // Four values at a time, so that each output is loaded and stored once for four.
    let dim = state.o.len();
    let mut fours = v.chunks_exact(4 * dim);
    for (p, v) in scores.chunks_exact(4).zip(&mut fours) {
        let (front, back) = v.split_at(2 * dim);
        let ((v0, v1), (v2, v3)) = (front.split_at(dim), back.split_at(dim));
        for ((((o, v0), v1), v2), v3) in state.o.iter_mut().zip(v0).zip(v1).zip(v2).zip(v3) {
            *o += (p[0] * v0 + p[1] * v1) + (p[2] * v2 + p[3] * v3);
        }
    }
    for (p, v) in scores.chunks_exact(4).remainder().iter().zip(fours.remainder().chunks_exact(dim)) {
        for (o, v) in state.o.iter_mut().zip(v) {
            *o += p * v;
        }
    }
}

/// Dot product in 16 independent lanes, which the compiler turns into vector code without leave to reorder sums.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (a_chunks, b_chunks) = (a.chunks_exact(16), b.chunks_exact(16));
    let tail: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    for half in [8, 4, 2, 1] {
        let (low, high) = lanes.split_at_mut(half);
        for (low, high) in low.iter_mut().zip(high) {
            *low += *high;
        }
    }
    lanes[0] + tail
}
