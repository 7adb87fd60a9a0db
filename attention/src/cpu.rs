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
use crate::softmax_state::Raw;
use crate::{AttentionSpec, Error, HeadsView, KeyRanges};

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
/// [`Error::Argument`] when a shape does not fit `spec`.
pub fn attend<T: Element>(
    spec: &AttentionSpec,
    q: HeadsView<'_, f32>,
    k: HeadsView<'_, T>,
    v: HeadsView<'_, T>,
    out: &mut [f32],
    lse: &mut [f32],
) -> Result<(), Error> {
    let shape = spec.shape;
    q.check("q", shape.q_heads(), shape.qk_dim())?;
    k.check("k", shape.kv_heads(), shape.qk_dim())?;
    v.check("v", shape.kv_heads(), shape.v_dim())?;
    if k.tokens() != v.tokens() {
        return Err(Error::argument("v", format!("{} tokens, as many as k", k.tokens()), v.tokens()));
    }
    check_len("out", out.len(), &[q.tokens(), shape.q_heads(), shape.v_dim()])?;
    check_len("lse", lse.len(), &[q.tokens(), shape.q_heads()])?;

    let splits = if q.tokens() <= SPLIT_QUERIES { k.tokens().div_ceil(KEY_SPLIT).max(1) } else { 1 };
    let split_len = if splits > 1 { KEY_SPLIT } else { k.tokens() };
    let mut blocks = Vec::new();
    for start in (0..q.tokens()).step_by(QUERY_BLOCK) {
        for kv_head in 0..shape.kv_heads() {
            blocks.push((start..(start + QUERY_BLOCK).min(q.tokens()), kv_head));
        }
    }
    let mut states: Vec<Vec<Raw<f32>>> = (0..blocks.len() * splits)
        .into_par_iter()
        .map(|task| {
            let (queries, kv_head) = blocks[task / splits].clone();
            let first = task % splits * split_len;
            let keys = first..(first + split_len).min(k.tokens());
            Block { spec, q, k, v, queries, kv_head }.attend(keys)
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
            lse[row] = crate::softmax_state::normalise_in_place(state.m, state.l, &mut state.o);
            out[row * shape.v_dim()..(row + 1) * shape.v_dim()].copy_from_slice(&state.o);
        }
    }
    Ok(())
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
    /// One state per (query, query head of the group), over a range of keys.
    fn attend(&self, keys: Range<usize>) -> Vec<Raw<f32>> {
        let shape = self.spec.shape;
        let visible: Vec<KeyRanges> = self
            .queries
            .clone()
            .map(|query| self.spec.mask.keys(query, self.q.tokens(), self.k.tokens()))
            .collect();
        let mut states = vec![Raw::empty(shape.v_dim()); visible.len() * shape.group()];
        let mut k_tile = Tile::new(shape.qk_dim());
        let mut v_tile = Tile::new(shape.v_dim());
        let mut scores = [0.0f32; KEY_TILE];

        for start in keys.clone().step_by(KEY_TILE) {
            let tile = start..(start + KEY_TILE).min(keys.end);
            if !visible.iter().any(|ranges| overlaps(ranges, &tile)) {
                continue;
            }
            k_tile.load(&self.k, self.kv_head, tile.clone());
            v_tile.load(&self.v, self.kv_head, tile.clone());
            for (query, ranges) in self.queries.clone().zip(&visible) {
                for range in ranges.iter() {
                    let seen = range.start.max(tile.start)..range.end.min(tile.end);
                    if seen.is_empty() {
                        continue;
                    }
                    let rows = seen.start - tile.start..seen.end - tile.start;
                    for (g, head) in shape.q_heads_of(self.kv_head).enumerate() {
                        let q = self.q.vector(query, head);
                        let state = &mut states[(query - self.queries.start) * shape.group() + g];
                        let scores = &mut scores[..rows.len()];
                        for (score, row) in scores.iter_mut().zip(rows.clone()) {
                            let k = k_tile.row(&self.k, self.kv_head, tile.start, row);
                            *score = self.spec.score.apply_f32(dot(q, k));
                        }
                        accumulate(state, scores, |i| {
                            v_tile.row(&self.v, self.kv_head, tile.start, rows.start + i)
                        });
                    }
                }
            }
        }
        states
    }
}

fn overlaps(ranges: &KeyRanges, tile: &Range<usize>) -> bool {
    ranges.iter().any(|range| range.start < tile.end && tile.start < range.end)
}

/// Adds keys with these scores to a state: one rescaling for all of them.
fn accumulate<'v>(state: &mut Raw<f32>, scores: &[f32], value: impl Fn(usize) -> &'v [f32]) {
    let m =
        scores.iter().fold(f32::NEG_INFINITY, |m, &score| crate::softmax_state::Real::max_or_nan(m, score));
    state.raise(m);
    if state.m == f32::NEG_INFINITY {
        return;
    }
    for (i, &score) in scores.iter().enumerate() {
        let p = (score - state.m).exp();
        state.l += p;
        for (o, &v) in state.o.iter_mut().zip(value(i)) {
            *o += p * v;
        }
    }
}

/// Vectors of a tile as f32. f32 storage is read where it is; other types are converted once for all rows.
struct Tile {
    dim: usize,
    converted: Vec<f32>,
}

impl Tile {
    fn new(dim: usize) -> Self {
        Tile { dim, converted: Vec::new() }
    }

    fn load<T: Element>(&mut self, view: &HeadsView<'_, T>, head: usize, tokens: Range<usize>) {
        if T::DTYPE != DType::F32 {
            self.converted.clear();
            for token in tokens {
                self.converted.extend(view.vector(token, head).iter().map(|x| x.to_f32()));
            }
        }
    }

    #[inline]
    fn row<'a, T: Element>(
        &'a self,
        view: &HeadsView<'a, T>,
        head: usize,
        start: usize,
        row: usize,
    ) -> &'a [f32] {
        match T::DTYPE {
            DType::F32 => bytemuck::cast_slice(view.vector(start + row, head)),
            _ => &self.converted[row * self.dim..(row + 1) * self.dim],
        }
    }
}

/// Dot product in 16 independent lanes, which the compiler turns into vector code without leave to reorder sums.
#[inline]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [0.0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0] + tail
}
