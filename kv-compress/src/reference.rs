//! Attention in the reduced basis: the f64 oracle of the kernels.
//!
//! Nothing is decompressed: KV head h attends with keys of r_k(h) and values of r_v(h) elements, as an attention of its own
//! sizes, by the oracle of [`attention::reference`]. The scale is the model's, never derived from a rank.
//!
//! Queries and outputs are ragged, query head after query head: `q` `[tokens, Σ r_k]` and `out` `[tokens, Σ r_v]`, where each
//! query head counts with the ranks of its KV head ([`query_starts`], [`output_starts`]).

use attention::reference::{self, Output, Probabilities};
use attention::softmax_state::Normalised;
use attention::{
    AttentionSpec, Element, Fault, HeadShape, HeadsView, Mask, PageStore, PagedKv, PagedLengths, RaggedKv,
    RaggedView, Score,
};

use crate::cache::PagedView;
use crate::error::check_len;
use crate::{Error, LayerRanks};

/// What attention computes, beside the ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attend {
    /// Query heads per KV head.
    pub group: usize,
    /// Scale (of the model's own head size) and soft-cap.
    pub score: Score,
    /// Visible keys.
    pub mask: Mask,
}

/// Where each query head's projected query starts in a row of `q`, `[q_heads + 1]`, the row's length last.
pub fn query_starts(ranks: &LayerRanks, group: usize) -> Vec<usize> {
    starts(ranks, group, |head| head.k)
}

/// Where each query head's output starts in a row of `out`, `[q_heads + 1]`, the row's length last.
pub fn output_starts(ranks: &LayerRanks, group: usize) -> Vec<usize> {
    starts(ranks, group, |head| head.v)
}

fn starts(ranks: &LayerRanks, group: usize, rank: impl Fn(&crate::HeadRanks) -> usize) -> Vec<usize> {
    let mut starts = vec![0];
    for head in ranks.heads().iter().flat_map(|head| std::iter::repeat_n(head, group)) {
        starts.push(starts[starts.len() - 1] + rank(head));
    }
    starts
}

/// Attention of packed queries over their sequences' pages.
///
/// - `q` `[tokens, Σ r_k]`, projected; `cu_seqlens` `[batch + 1]`: sequence b has the queries
///   `cu_seqlens[b]..cu_seqlens[b + 1]`, aligned to the end of its keys. A decoding step has one each.
/// - The output has `out` `[tokens, Σ r_v]`, `lse` `[tokens, q_heads]` (natural log, scale applied) and a fault per sequence
///   whose length or page ids make no sense; such a sequence, and a query that sees no key, gives 0 and -inf.
///
/// # Errors
/// [`Error::Argument`] and [`Error::Attention`] for shapes that do not fit.
pub fn attend<Q: Element, T: Element>(
    attend: &Attend,
    q: &[Q],
    cu_seqlens: &[u32],
    kv: &PagedView<'_, T>,
    probabilities: Probabilities,
) -> Result<Output, Error> {
    let (layout, ranks) = (kv.layout, kv.layout.ranks());
    let page_elements = layout.page_elements();
    let pages = kv.pages.len() / page_elements;
    check_len("pages", kv.pages.len(), &[pages, page_elements])?;
    let rows = Rows::new(ranks, attend.group, q.len())?;
    let mut output = rows.empty();
    let zero = T::from_f64(0.0);
    for kv_head in 0..ranks.kv_heads() {
        let head = ranks.heads()[kv_head];
        // Rows in order, whatever their swizzle.
        let plain = |region: crate::cache::layout::Region| {
            let mut plain = vec![zero; pages * layout.page_size() * region.rank()];
            let rows = plain.chunks_exact_mut(region.rank());
            for (i, row) in rows.enumerate() {
                let page = &kv.pages[i / layout.page_size() * page_elements..][..page_elements];
                region.read(page, i % layout.page_size(), row);
            }
            plain
        };
        let (keys, values) = (plain(layout.keys(kv_head)), plain(layout.values(kv_head)));
        let store = |data, dim| {
            let layout_of = attention::PageLayout::nhd(layout.page_size(), 1, dim);
            PageStore::new(data, pages, layout.page_size(), 1, dim, layout_of)
        };
        let cache = PagedKv::new(
            store(&keys, head.k)?,
            store(&values, head.v)?,
            kv.block_table,
            PagedLengths::Tokens(kv.lengths),
        )?;
        let shape = HeadShape::new(attend.group, 1, head.k, head.v)?;
        let spec = AttentionSpec { shape, score: attend.score, mask: attend.mask };
        let q = rows.gather(q, kv_head);
        let q = RaggedView::new(HeadsView::nhd(&q, rows.tokens, attend.group, head.k)?, cu_seqlens)?;
        let part = reference::prefill_parallel(&spec, &q, &cache, probabilities)?;
        rows.scatter(&part, kv_head, &mut output);
    }
    output.faults.sort_unstable_by_key(|fault: &Fault| (fault.index, fault.code));
    output.faults.dedup();
    Ok(output)
}

/// One decoding step of one sequence whose keys are cut into parts of `part` tokens, each attended alone and merged in order:
/// what split-KV kernels compute.
///
/// - `q` `[1, Σ r_k]`; `keys` and `values` by KV head: `[tokens, r_k]` and `[tokens, r_v]`, rows in order.
///
/// # Errors
/// [`Error::Argument`] and [`Error::Attention`] for shapes that do not fit, or `part` 0.
pub fn decode_in_parts<Q: Element, T: Element>(
    attend: &Attend,
    ranks: &LayerRanks,
    q: &[Q],
    keys: &[Vec<T>],
    values: &[Vec<T>],
    part: usize,
) -> Result<Output, Error> {
    if part == 0 {
        return Err(Error::argument("part", "at least 1 token", 0));
    }
    if (keys.len(), values.len()) != (ranks.kv_heads(), ranks.kv_heads()) {
        let found = format!("{} and {}", keys.len(), values.len());
        return Err(Error::argument("keys", format!("{} KV heads", ranks.kv_heads()), found));
    }
    if attend.mask != Mask::Full && attend.mask != Mask::Causal {
        return Err(Error::argument(
            "mask",
            "one that shows a decoded token every key",
            format!("{:?}", attend.mask),
        ));
    }
    let rows = Rows::new(ranks, attend.group, q.len())?;
    check_len("q", q.len(), &[1, rows.query[rows.query.len() - 1]])?;
    let mut output = rows.empty();
    for (kv_head, (keys, values)) in keys.iter().zip(values).enumerate() {
        let head = ranks.heads()[kv_head];
        let shape = HeadShape::new(attend.group, 1, head.k, head.v)?;
        let spec = AttentionSpec { shape, score: attend.score, mask: Mask::Full };
        let q = rows.gather(q, kv_head);
        let q = HeadsView::nhd(&q, 1, attend.group, head.k)?;
        let mut merged = vec![Normalised::<f64>::empty(head.v); attend.group];
        for (keys, values) in keys.chunks(part * head.k).zip(values.chunks(part * head.v)) {
            let tokens = keys.len() / head.k;
            let kv = RaggedKv::single(
                HeadsView::nhd(keys, tokens, 1, head.k)?,
                HeadsView::nhd(values, tokens, 1, head.v)?,
            )?;
            let states = reference::decode(&spec, q, &kv, Probabilities::Exact)?;
            for (g, merged) in merged.iter_mut().enumerate() {
                let out = states.out[g * head.v..(g + 1) * head.v].to_vec();
                merged.merge(&Normalised { out, lse: states.lse[g] })?;
            }
        }
        let part = Output {
            out: merged.iter().flat_map(|state| state.out.iter().copied()).collect(),
            lse: merged.iter().map(|state| state.lse).collect(),
            faults: Vec::new(),
        };
        rows.scatter(&part, kv_head, &mut output);
    }
    Ok(output)
}

/// Ragged rows of queries and outputs.
struct Rows {
    group: usize,
    tokens: usize,
    query: Vec<usize>,
    output: Vec<usize>,
}

impl Rows {
    fn new(ranks: &LayerRanks, group: usize, q_len: usize) -> Result<Self, Error> {
        // The ratio of heads is checked here once, by any sizes.
        HeadShape::new(group * ranks.kv_heads(), ranks.kv_heads(), 1, 1)?;
        let (query, output) = (query_starts(ranks, group), output_starts(ranks, group));
        let row = query[query.len() - 1];
        let tokens = q_len / row;
        check_len("q", q_len, &[tokens, row])?;
        Ok(Rows { group, tokens, query, output })
    }

    fn q_heads(&self) -> usize {
        self.query.len() - 1
    }

    fn empty(&self) -> Output {
        Output {
            out: vec![0.0; self.tokens * self.output[self.q_heads()]],
            lse: vec![f64::NEG_INFINITY; self.tokens * self.q_heads()],
            faults: Vec::new(),
        }
    }

    /// Queries of a KV head's group, `[tokens, group, r_k]`: a contiguous part of every row.
    fn gather<Q: Copy>(&self, q: &[Q], kv_head: usize) -> Vec<Q> {
        let columns = self.query[kv_head * self.group]..self.query[(kv_head + 1) * self.group];
        q.chunks_exact(self.query[self.q_heads()])
            .flat_map(|row| row[columns.clone()].iter().copied())
            .collect()
    }

    /// Puts outputs `[tokens, group, r_v]` of a KV head's group into their rows.
    fn scatter(&self, part: &Output, kv_head: usize, output: &mut Output) {
        let heads = kv_head * self.group..(kv_head + 1) * self.group;
        let columns = self.output[heads.start]..self.output[heads.end];
        for token in 0..self.tokens {
            let (row, width) = (token * self.output[self.q_heads()], columns.len());
            output.out[row + columns.start..row + columns.end]
                .copy_from_slice(&part.out[token * width..(token + 1) * width]);
            let row = token * self.q_heads();
            output.lse[row + heads.start..row + heads.end]
                .copy_from_slice(&part.lse[token * self.group..(token + 1) * self.group]);
        }
        output.faults.extend(part.faults.iter().copied());
    }
}
