//! Megatron: every rank computes a part of the weights on all tokens.
//!
//! A stage (attention, or the MLP) is split by its weights: rank r has the columns of its heads, or of its part of the inner dimension,
//! and the rows of the output projection that belong to them. Tokens are gathered before the stage, and the partial outputs are summed
//! and scattered back after it.
//!
//! Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198); PecSched uses it
//! within a tensor-parallel region (§5.3).

use std::ops::Range;

use attention::HeadShape;

use crate::placement::Shards;
use crate::transport::{Buffer, Transport};
use crate::ulysses::{LocalHeads, deal_heads};
use crate::{Error, Output};

/// Runs one stage of one rank: `compute` gets all tokens of the batch `[tokens, width]`, packed, and gives this rank's part of the sum
/// that is the stage's output `[tokens, width]`. Gives the output of this rank's tokens.
///
/// - `rows` `[query tokens, width]`: this rank's.
///
/// # Errors
/// [`Error::Argument`] when a tensor has another length or the transport other ranks; [`Error::Peer`] when a rank has failed; whatever
/// `compute` returns.
pub fn stage<X: Transport + ?Sized, E: From<Error>>(
    shards: &Shards,
    rows: &[f32],
    width: usize,
    transport: &mut X,
    compute: impl FnOnce(&[f32]) -> Result<Vec<f32>, E>,
) -> Result<Vec<f32>, E> {
    let ranks = shards.ranks();
    let tokens: Vec<usize> = (0..ranks).map(|rank| shards.query_tokens(rank)).collect();
    group_stage(&tokens, rows, width, transport, |gathered| {
        let mut all = vec![0.0; gathered.len()];
        let mut first = 0;
        for (rank, tokens) in tokens.iter().enumerate() {
            shards.put(rank, &gathered[first..first + tokens * width], width, &mut all)?;
            first += tokens * width;
        }
        let partial = compute(&all)?;
        crate::error::check_len("compute", partial.len(), &[shards.new_tokens(), width])?;
        // Back into the order of ranks.
        let mut by_rank = Vec::with_capacity(partial.len());
        for rank in 0..ranks {
            by_rank.extend(shards.take(rank, &partial, width)?);
        }
        Ok(by_rank)
    })
}

/// As [`stage`], among ranks of `tokens[r]` tokens whose rows follow each other, rank after rank.
///
/// # Errors
/// As [`stage`].
pub fn group_stage<X: Transport + ?Sized, E: From<Error>>(
    tokens: &[usize],
    rows: &[f32],
    width: usize,
    transport: &mut X,
    compute: impl FnOnce(&[f32]) -> Result<Vec<f32>, E>,
) -> Result<Vec<f32>, E> {
    let (rank, ranks) = (transport.rank(), tokens.len());
    if transport.ranks() != ranks {
        return Err(Error::argument("transport", format!("{ranks} ranks"), transport.ranks()).into());
    }
    crate::error::check_len("rows", rows.len(), &[tokens[rank], width])?;
    let lens: Vec<usize> = tokens.iter().map(|tokens| tokens * width).collect();
    let byte_lens: Vec<usize> = lens.iter().map(|len| 4 * len).collect();
    let gathered = transport.all_gather_v(bytemuck::cast_slice(rows), &byte_lens)?;
    let partial = compute(&bytemuck::pod_collect_to_vec::<u8, f32>(&gathered))?;
    crate::error::check_len("compute", partial.len(), &[tokens.iter().sum(), width])?;
    Ok(transport.reduce_scatter(&partial, &lens)?)
}

/// From some heads of all tokens to all heads of the own tokens: what a rank has to keep of the keys and values of a stage.
///
/// - `tokens[r]`: tokens of rank r, whose rows follow each other, rank after rank;
/// - `heads[r]`: heads that come from rank r; all ranks' together are each head once, in order;
/// - `own` `[all tokens, heads of this rank, dim]`.
///
/// Gives `[tokens of this rank, all heads, dim]`.
///
/// # Errors
/// [`Error::Argument`] when the tensor has another length or the transport other ranks; [`Error::Peer`] when a rank has failed.
pub fn heads_to_tokens<X: Transport + ?Sized>(
    tokens: &[usize],
    heads: &[Range<usize>],
    dim: usize,
    own: &[f32],
    transport: &mut X,
) -> Result<Vec<f32>, Error> {
    let (rank, ranks) = (transport.rank(), tokens.len());
    if transport.ranks() != ranks || heads.len() != ranks {
        return Err(Error::argument("transport", format!("{ranks} ranks"), transport.ranks()));
    }
    let (all, width) = (heads.iter().map(Range::len).sum::<usize>(), heads[rank].len() * dim);
    crate::error::check_len("own", own.len(), &[tokens.iter().sum(), width])?;
    let mut rest = own;
    let mut send = Vec::with_capacity(ranks);
    for tokens in tokens {
        let (part, behind) = rest.split_at(tokens * width);
        send.push(Buffer::of(part));
        rest = behind;
    }
    let lens: Vec<usize> = heads.iter().map(|heads| 4 * tokens[rank] * heads.len() * dim).collect();
    let received = transport.all_to_all_v(send, &lens)?;
    let mut rows = vec![0.0; tokens[rank] * all * dim];
    for (heads, message) in heads.iter().zip(&received).filter(|(heads, _)| !heads.is_empty()) {
        let parts = message.values::<f32>().chunks_exact(heads.len() * dim);
        for (row, part) in rows.chunks_exact_mut(all * dim).zip(parts) {
            row[heads.start * dim..heads.end * dim].copy_from_slice(part);
        }
    }
    Ok(rows)
}

/// The heads of one rank of several: the r-th part of the query heads and the KV heads that these read.
///
/// # Errors
/// [`Error::Divisibility`] that says which: query heads must divide by the ranks, and of KV heads and ranks one must divide the other.
pub fn local_heads(shape: &HeadShape, ranks: usize, rank: usize) -> Result<LocalHeads, Error> {
    deal_heads("Megatron", shape, ranks, rank)
}

/// The KV heads that each rank hands on where several have the same: those that no rank before it has.
///
/// # Errors
/// As [`local_heads`].
pub fn first_kv_heads(shape: &HeadShape, ranks: usize) -> Result<Vec<Range<usize>>, Error> {
    let mut next = 0;
    let mut first = |rank| -> Result<Range<usize>, Error> {
        let kv = local_heads(shape, ranks, rank)?.kv;
        let start = kv.start.max(next);
        next = kv.end;
        Ok(start..kv.end)
    };
    (0..ranks).map(&mut first).collect()
}

/// Payload bytes that a rank sends in one stage: to gather f32 tokens round a ring, and to scatter sums.
pub fn bytes_sent(shards: &Shards, rank: usize, width: usize) -> u64 {
    let tokens: Vec<usize> = (0..shards.ranks()).map(|rank| shards.query_tokens(rank)).collect();
    group_bytes_sent(&tokens, rank, width)
}

/// As [`bytes_sent`], of a [`group_stage`].
pub fn group_bytes_sent(tokens: &[usize], rank: usize, width: usize) -> u64 {
    let (ranks, all) = (tokens.len(), tokens.iter().sum::<usize>());
    // In the gather a rank passes on every part but its right neighbour's; in the scatter it sends every part but its own.
    let gather = if ranks > 1 { all - tokens[(rank + 1) % ranks] } else { 0 };
    4 * ((gather + all - tokens[rank]) * width) as u64
}

/// Rank r's part of `count` heads or inner channels.
///
/// # Errors
/// [`Error::Divisibility`] unless the ranks divide them.
pub fn part(what: &'static str, count: usize, ranks: usize, rank: usize) -> Result<Range<usize>, Error> {
    if ranks == 0 || !count.is_multiple_of(ranks) {
        let rule = "they must be a multiple of the ranks";
        return Err(Error::Divisibility { scheme: "Megatron", what, count, ranks, rule });
    }
    Ok(rank * (count / ranks)..(rank + 1) * (count / ranks))
}

/// The outputs of some heads of all tokens, placed among zeros of the others, `[tokens, q_heads, v_dim]`: what a rank that has no slice of
/// the output projection multiplies by the whole.
pub fn among_zeros(output: &Output, part: &Range<usize>, q_heads: usize, v_dim: usize) -> Vec<f32> {
    let width = part.len() * v_dim;
    let tokens = output.out.len().checked_div(width).unwrap_or(0);
    let mut all = vec![0.0; tokens * q_heads * v_dim];
    for token in 0..tokens {
        let to = (token * q_heads + part.start) * v_dim;
        all[to..to + width].copy_from_slice(&output.out[token * width..][..width]);
    }
    all
}
