//! Attention over the cache on the CPU: the method itself, in plain Rust.
//!
//! Every query row is a sum over the parts of the sequence: closed blocks on their codes, sinks and open block in
//! f32, one softmax state each, merged in order. The probabilities of a block are quantized against the block's own
//! maximum, so a block's state does not depend on how the parts are split; only the rounding of the merge does.
//!
//! This is what the kernels are held against (rung 1), and what an engine without a GPU runs. [`oracle`] is attention
//! in f64 on what the codes stand for: the difference between the two is what 8-bit queries and probabilities cost.

mod codes;
mod dense;

use attention::reference::{self as dense_reference, Output, Probabilities};
use attention::softmax_state::Raw;
use attention::{AttentionSpec, HeadsView, KeyRanges, RaggedKv, RaggedView};
use rayon::prelude::*;

use crate::cache::{Dense, Segment};
use crate::error::check_len;
use crate::quantizer::store;
use crate::{Cache, Error, Sequence};
use codes::{Query, Scratch};

/// Queries that share the unpacking of a block.
const QUERY_BLOCK: usize = 32;
/// Queries up to which the sequence is split over threads.
const SPLIT_QUERIES: usize = 8;
/// Blocks of a split.
const SPLIT_BLOCKS: usize = 16;

/// How a prompt, or a part of one, is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prefill {
    /// The new tokens see each other in 16 bits and what was cached before as codes (the ATC '26 default).
    Exact,
    /// The new tokens are cached first and seen as the cache holds them (arXiv v1).
    Codes,
}

/// Attention of the last tokens of a sequence, which the cache already holds.
///
/// - `q` `[tokens, q_heads, qk_dim]`, after RoPE: query `i` of `n` sits at position `sequence.tokens() - n + i`;
/// - `splits`: how many parts of the sequence are computed on their own and merged, or what suits the shape;
/// - `out` `[tokens, q_heads, v_dim]`, `lse` `[tokens, q_heads]` (natural log, scale applied), wholly overwritten. A row that
///   sees no key gives 0 and -inf.
///
/// Runs on the current rayon thread pool; the result depends on `splits`, never on the number of threads.
///
/// # Errors
/// [`Error::Argument`] when a shape does not fit, [`Error::NotFinite`] for a query that is not finite,
/// [`Error::Attention`] when the sequence is not the cache's.
pub fn attend(
    spec: &AttentionSpec,
    cache: &Cache,
    sequence: &Sequence,
    q: HeadsView<'_, f32>,
    splits: Option<usize>,
    out: &mut [f32],
    lse: &mut [f32],
) -> Result<(), Error> {
    let keys = Keys { cache, sequence, new: Vec::new() };
    keys.attend(spec, q, splits, out, lse)
}

/// One decoding step of a batch: [`attend`] with one query `q` `[batch, q_heads, qk_dim]` for each sequence, whose
/// token is cached already. `out` `[batch, q_heads, v_dim]`, `lse` `[batch, q_heads]`.
///
/// # Errors
/// As [`attend`].
pub fn decode(
    spec: &AttentionSpec,
    cache: &Cache,
    sequences: &[&Sequence],
    q: HeadsView<'_, f32>,
    splits: Option<usize>,
    out: &mut [f32],
    lse: &mut [f32],
) -> Result<(), Error> {
    let shape = spec.shape;
    if q.tokens() != sequences.len() {
        return Err(Error::argument("q", format!("one query for {} sequences", sequences.len()), q.tokens()));
    }
    check_len("out", out.len(), &[sequences.len(), shape.q_heads(), shape.v_dim()])?;
    check_len("lse", lse.len(), &[sequences.len(), shape.q_heads()])?;
    let rows =
        out.chunks_exact_mut(shape.q_heads() * shape.v_dim()).zip(lse.chunks_exact_mut(shape.q_heads()));
    for (i, (sequence, (out, lse))) in sequences.iter().zip(rows).enumerate() {
        attend(spec, cache, sequence, q.slice(i..i + 1), splits, out, lse)?;
    }
    Ok(())
}

/// Appends a prompt, or its continuation, and computes its attention: [`Cache::append`] and [`attend`].
///
/// `q` `[tokens, q_heads, qk_dim]`, `k` `[tokens, kv_heads, qk_dim]` (both after RoPE), `v` `[tokens, kv_heads,
/// v_dim]`; `out` and `lse` as for [`attend`].
///
/// # Errors
/// As [`Cache::append`] and [`attend`]. Nothing was cached then.
#[allow(clippy::too_many_arguments)]
pub fn prefill(
    spec: &AttentionSpec,
    cache: &mut Cache,
    sequence: &mut Sequence,
    q: HeadsView<'_, f32>,
    k: HeadsView<'_, f32>,
    v: HeadsView<'_, f32>,
    mode: Prefill,
    out: &mut [f32],
    lse: &mut [f32],
) -> Result<(), Error> {
    check(spec, cache, q, out, lse)?;
    if q.tokens() != k.tokens() {
        return Err(Error::argument("q", format!("{} tokens, as many as k", k.tokens()), q.tokens()));
    }
    match mode {
        Prefill::Codes => {
            cache.append(sequence, k, v)?;
            attend(spec, cache, sequence, q, None, out, lse)
        }
        Prefill::Exact => {
            // Attention reads the past before it changes; that the cache takes the new tokens is known first.
            cache.check_append(sequence, k, v)?;
            let dtype = cache.config().dtype();
            let head = |view: HeadsView<'_, f32>, kv_head| {
                let vectors = (0..view.tokens()).flat_map(|token| view.vector(token, kv_head));
                vectors.map(|&x| store(x, dtype)).collect()
            };
            let new = (0..cache.shape().kv_heads).map(|h| Dense { k: head(k, h), v: head(v, h) }).collect();
            Keys { cache, sequence, new }.attend(spec, q, None, out, lse)?;
            cache.append(sequence, k, v)
        }
    }
}

/// Attention in f64 over what the codes of a sequence stand for: exact queries and probabilities. What is left
/// between this and attention over the original keys and values is the quantization of the cache. Arguments as
/// [`attend`].
///
/// # Errors
/// As [`attend`].
pub fn oracle(
    spec: &AttentionSpec,
    cache: &Cache,
    sequence: &Sequence,
    q: HeadsView<'_, f32>,
) -> Result<Output, Error> {
    let shape = cache.shape();
    let tokens = sequence.tokens();
    let all = cache.dequantize(sequence)?;
    let kv = RaggedKv::single(
        HeadsView::nhd(&all.k, tokens, shape.kv_heads, shape.qk_dim)?,
        HeadsView::nhd(&all.v, tokens, shape.kv_heads, shape.v_dim)?,
    )?;
    Ok(dense_reference::prefill_parallel(spec, &RaggedView::single(q)?, &kv, Probabilities::Exact)?)
}

fn check(
    spec: &AttentionSpec,
    cache: &Cache,
    q: HeadsView<'_, f32>,
    out: &[f32],
    lse: &[f32],
) -> Result<(), Error> {
    let (shape, held) = (spec.shape, cache.shape());
    if (shape.kv_heads(), shape.qk_dim(), shape.v_dim()) != (held.kv_heads, held.qk_dim, held.v_dim) {
        let expected = format!("{} KV heads of {}/{}", held.kv_heads, held.qk_dim, held.v_dim);
        return Err(Error::argument("spec", expected, shape));
    }
    if (q.heads(), q.dim()) != (shape.q_heads(), shape.qk_dim()) {
        let expected = format!("[tokens, {} heads, {}]", shape.q_heads(), shape.qk_dim());
        return Err(Error::argument("q", expected, format!("[.., {}, {}]", q.heads(), q.dim())));
    }
    check_len("out", out.len(), &[q.tokens(), shape.q_heads(), shape.v_dim()])?;
    check_len("lse", lse.len(), &[q.tokens(), shape.q_heads()])?;
    for token in 0..q.tokens() {
        for head in 0..q.heads() {
            if let Some(i) = q.vector(token, head).iter().position(|x| !x.is_finite()) {
                let index = (token * q.heads() + head) * q.dim() + i;
                let value = q.vector(token, head)[i].to_string();
                return Err(Error::NotFinite { argument: "q", index, value });
            }
        }
    }
    Ok(())
}

/// What queries attend to: a sequence, and after it tokens that it does not hold yet.
struct Keys<'a> {
    cache: &'a Cache,
    sequence: &'a Sequence,
    /// Per KV head; empty when there are none.
    new: Vec<Dense>,
}

/// A run of tokens and where they are.
enum Part {
    Cached(Segment),
    New(std::ops::Range<usize>),
}

impl Part {
    fn tokens(&self) -> std::ops::Range<usize> {
        match self {
            Part::Cached(segment) => segment.tokens(),
            Part::New(tokens) => tokens.clone(),
        }
    }
}

impl Keys<'_> {
    fn attend(
        &self,
        spec: &AttentionSpec,
        q: HeadsView<'_, f32>,
        splits: Option<usize>,
        out: &mut [f32],
        lse: &mut [f32],
    ) -> Result<(), Error> {
        check(spec, self.cache, q, out, lse)?;
        self.cache.check_parts(self.sequence)?;
        let shape = spec.shape;
        let held = self.sequence.tokens();
        let mut parts: Vec<Part> = self.cache.segments(self.sequence).into_iter().map(Part::Cached).collect();
        let mut tokens = held;
        if let Some(new) = self.new.first() {
            tokens += new.k.len() / shape.qk_dim();
            parts.push(Part::New(held..tokens));
        }
        let splits = splits.unwrap_or(match q.tokens() {
            ..=SPLIT_QUERIES => parts.len().div_ceil(SPLIT_BLOCKS),
            _ => 1,
        });
        let splits = splits.clamp(1, parts.len().max(1));
        let visible: Vec<KeyRanges> =
            (0..q.tokens()).map(|query| spec.mask.keys(query, q.tokens(), tokens)).collect();
        let mut tasks = Vec::new();
        for start in (0..q.tokens()).step_by(QUERY_BLOCK) {
            for kv_head in 0..shape.kv_heads() {
                tasks.push((start..(start + QUERY_BLOCK).min(q.tokens()), kv_head));
            }
        }
        let states = (0..tasks.len() * splits)
            .into_par_iter()
            .map(|task| {
                let (queries, kv_head) = tasks[task / splits].clone();
                let split = task % splits;
                let range = split * parts.len() / splits..(split + 1) * parts.len() / splits;
                self.rows(spec, q, queries, kv_head, &parts[range], &visible)
            })
            .collect::<Result<Vec<_>, Error>>()?;
        for ((queries, kv_head), mut states) in
            tasks.into_iter().zip(states.chunks_exact(splits).map(|s| s.iter()))
        {
            let mut merged = states.next().cloned().unwrap_or_default();
            for others in states {
                for (state, other) in merged.iter_mut().zip(others) {
                    state.merge(other)?;
                }
            }
            let rows = queries
                .flat_map(|query| shape.q_heads_of(kv_head).map(move |head| query * shape.q_heads() + head));
            for (row, state) in rows.zip(merged) {
                let state = state.normalise();
                lse[row] = state.lse;
                out[row * shape.v_dim()..(row + 1) * shape.v_dim()].copy_from_slice(&state.out);
            }
        }
        Ok(())
    }

    /// States of some queries of the heads that read a KV head, over some parts: `[queries, group]`.
    fn rows(
        &self,
        spec: &AttentionSpec,
        q: HeadsView<'_, f32>,
        queries: std::ops::Range<usize>,
        kv_head: usize,
        parts: &[Part],
        visible: &[KeyRanges],
    ) -> Result<Vec<Raw<f32>>, Error> {
        let shape = spec.shape;
        let head = self.cache.geometry().head(kv_head);
        let rows: Vec<(usize, Query<'_>, &[f32])> = queries
            .flat_map(|query| shape.q_heads_of(kv_head).map(move |q_head| (query, q_head)))
            .map(|(query, q_head)| {
                let vector = q.vector(query, q_head);
                (query, Query::new(head, vector), vector)
            })
            .collect();
        let mut states = vec![Raw::empty(shape.v_dim()); rows.len()];
        let mut scratch = Scratch::default();
        for part in parts {
            let tokens = part.tokens();
            let seen = |query: usize| {
                visible[query].iter().any(|range| range.start < tokens.end && tokens.start < range.end)
            };
            if !rows.iter().any(|&(query, ..)| seen(query)) {
                continue;
            }
            let (cache, sequence, rule) = (self.cache, self.sequence, &spec.score);
            let loaded;
            let dense = match part {
                Part::New(_) => &self.new[kv_head],
                Part::Cached(Segment::Dense { sinks: true, .. }) => {
                    loaded = cache.sinks(sequence, kv_head)?;
                    &loaded
                }
                Part::Cached(Segment::Dense { sinks: false, .. }) => {
                    loaded = cache.open_block(sequence, kv_head)?;
                    &loaded
                }
                Part::Cached(Segment::Codes { block, .. }) => {
                    let block = cache.block(sequence, *block, kv_head)?;
                    for (state, (query, row, _)) in states.iter_mut().zip(&rows) {
                        if seen(*query) {
                            let seen = (&tokens, &visible[*query]);
                            state.merge(&row.attend(head, &block, rule, seen, &mut scratch))?;
                        }
                    }
                    continue;
                }
            };
            for (state, (query, _, vector)) in states.iter_mut().zip(&rows) {
                if seen(*query) {
                    let part = dense::attend(vector, dense, shape.v_dim(), rule, &tokens, &visible[*query]);
                    state.merge(&part)?;
                }
            }
        }
        Ok(states)
    }
}
