//! What a step works on.

use cuda::memory::{View, ViewMut};

/// The tables of one layer on the device, as [`Tables`](super::Tables) describes them, and its summaries. Whoever changes them between steps
/// keeps to what [`Tables::check`](super::Tables::check) asks for.
#[derive(Debug)]
pub struct State<'a, E> {
    /// Page of each slot `[rows, slots]`.
    pub owners: ViewMut<'a, u32>,
    /// Age of each slot `[rows, slots]`.
    pub ages: ViewMut<'a, u8>,
    /// Pages in flight `[rows, slots]`.
    pub dirty: ViewMut<'a, u8>,
    /// Run of each slot `[rows, slots]`.
    pub slot_table: ViewMut<'a, u32>,
    /// Run of each open page `[rows, max_open]`.
    pub open_table: ViewMut<'a, u32>,
    /// Tokens in closed pages `[rows]`.
    pub closed: ViewMut<'a, u32>,
    /// Closed partitions `[rows]`.
    pub partitions: ViewMut<'a, u32>,
    /// How often the row's index has changed `[rows]`.
    pub epoch: ViewMut<'a, u32>,
    /// Counts `[rows, 8]`; copy them whenever you like, [`Counters::of_device`](crate::Counters::of_device) reads them.
    pub counts: ViewMut<'a, u64>,
    /// Summaries `[rows, max_partitions, vectors, qk_dim]`, 16-byte aligned.
    pub summaries: ViewMut<'a, E>,
    /// A [`SparseRow`](cuda::params::SparseRow) each `[rows]`: written by a step for its kernels, and for prefetches after it.
    pub rows: ViewMut<'a, u32>,
}

/// The two memories of one layer.
#[derive(Debug)]
pub struct Memories<'a, E> {
    /// Device memory `[runs, K|V, tokens, dim]`, 16-byte aligned.
    pub runs: ViewMut<'a, E>,
    /// Host memory `[host_pages, kv_heads, K|V, tokens, dim]` as bytes, mapped, 16-byte aligned; memory of the device is
    /// refused.
    pub host: ViewMut<'a, u8>,
    /// Host page of each page of a request `[requests, max_pages]`.
    pub host_table: &'a View<'a, u32>,
}

/// Tokens that join the open pages.
#[derive(Debug, Clone, Copy)]
pub struct NewTokens<'a, E> {
    /// Keys after RoPE `[requests, tokens, kv_heads, qk_dim]`, with one token in a step and the plan's `prompt_tokens` in a prompt.
    pub k: &'a View<'a, E>,
    /// Values `[requests, tokens, kv_heads, v_dim]`.
    pub v: &'a View<'a, E>,
    /// Tokens of each request, the new ones included `[requests]`; 0 where there is no request.
    pub kv_len: &'a View<'a, u32>,
    /// How many of the new tokens of each request exist, the last ones `[requests]`: 0 for one that goes on decoding beside
    /// another's prompt. All, or as many as `kv_len` has, if absent.
    pub new_len: Option<&'a View<'a, u32>>,
}

/// Arguments of [`Step::prompt`](super::Step::prompt).
#[derive(Debug)]
pub struct PromptArgs<'a, E> {
    /// New tokens.
    pub new: NewTokens<'a, E>,
    /// Tables.
    pub state: State<'a, E>,
    /// Keys and values.
    pub memories: Memories<'a, E>,
    /// Status word.
    pub status: ViewMut<'a, u64>,
}

/// Arguments of [`Step::run`](super::Step::run).
#[derive(Debug)]
pub struct StepArgs<'a, E> {
    /// Queries after RoPE `[requests, q_heads, qk_dim]`.
    pub q: &'a View<'a, E>,
    /// The token.
    pub new: NewTokens<'a, E>,
    /// Pages that each row may read `[rows]`, kept ones included, at most the plan's.
    pub budget: &'a View<'a, u32>,
    /// Tables.
    pub state: State<'a, E>,
    /// Keys and values.
    pub memories: Memories<'a, E>,
    /// Outputs `[requests, q_heads, v_dim]`.
    pub out: ViewMut<'a, E>,
    /// Log-sum-exps `[requests, q_heads]`, natural log.
    pub lse: ViewMut<'a, f32>,
    /// Status word: the first fault of any of the step's kernels, with the row (of new tokens: the request). A row at fault reads
    /// nothing and gets 0 and −inf; the others are right.
    pub status: ViewMut<'a, u64>,
}

/// Arguments of [`Step::prefetch`](super::Step::prefetch).
#[derive(Debug)]
pub struct PrefetchArgs<'a, E> {
    /// Queries that say what will be needed `[requests, q_heads, qk_dim]`.
    pub q: &'a View<'a, E>,
    /// Pages that each row may fetch `[rows]`.
    pub budget: &'a View<'a, u32>,
    /// Tables of the layer to fetch for.
    pub state: State<'a, E>,
    /// Its keys and values.
    pub memories: Memories<'a, E>,
    /// Status word.
    pub status: ViewMut<'a, u64>,
}
