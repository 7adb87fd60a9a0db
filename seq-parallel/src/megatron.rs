//! Megatron: every rank computes a part of the weights on all tokens.
//!
//! A stage (attention, or the MLP) is split by its weights: rank r has the columns of its heads, or of its part of the inner dimension,
//! and the rows of the output projection that belong to them. Tokens are gathered before the stage, and the partial outputs are summed
//! and scattered back after it.
//!
//! Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198); PecSched uses it
//! within a tensor-parallel region (§5.3).

use std::ops::Range;

use crate::placement::Shards;
use crate::transport::Transport;
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
    let (rank, ranks) = (transport.rank(), shards.ranks());
    if transport.ranks() != ranks {
        return Err(Error::argument("transport", format!("{ranks} ranks"), transport.ranks()).into());
    }
    crate::error::check_len("rows", rows.len(), &[shards.query_tokens(rank), width])?;
    let lens: Vec<usize> = (0..ranks).map(|rank| shards.query_tokens(rank) * width).collect();
    let byte_lens: Vec<usize> = lens.iter().map(|len| 4 * len).collect();
    let gathered = transport.all_gather_v(bytemuck::cast_slice(rows), &byte_lens)?;
    let gathered: Vec<f32> = bytemuck::pod_collect_to_vec(&gathered);
    let mut all = vec![0.0; gathered.len()];
    let mut first = 0;
    for (rank, len) in lens.iter().enumerate() {
        shards.put(rank, &gathered[first..first + len], width, &mut all)?;
        first += len;
    }
    let partial = compute(&all)?;
    crate::error::check_len("compute", partial.len(), &[shards.new_tokens(), width])?;
    // Back into the order of ranks.
    let mut by_rank = Vec::with_capacity(partial.len());
    for rank in 0..ranks {
        by_rank.extend(shards.take(rank, &partial, width)?);
    }
    Ok(transport.reduce_scatter(&by_rank, &lens)?)
}

/// Payload bytes that a rank sends in one stage: to gather f32 tokens round a ring, and to scatter sums.
pub fn bytes_sent(shards: &Shards, rank: usize, width: usize) -> u64 {
    let ranks = shards.ranks();
    // In the gather a rank passes on every part but its right neighbour's; in the scatter it sends every part but its own.
    let right = shards.query_tokens((rank + 1) % ranks);
    let gather = if ranks > 1 { shards.new_tokens() - right } else { 0 };
    let scatter = shards.new_tokens() - shards.query_tokens(rank);
    4 * ((gather + scatter) * width) as u64
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
