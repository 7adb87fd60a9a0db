//! Sequences whose keys and values stay with the ranks that computed them.
//!
//! A first prompt is shared as ever, and each rank keeps its own tokens' keys and values: nothing is gathered. What follows, a token or a
//! further prompt, is computed by rank 0: of each layer it sends the queries to all ranks, which attend to what they hold, and merges what
//! comes back. New tokens are dealt out so that shards stay balanced. At the end every rank gets the last token's hidden state, so that
//! processes that run the same command know the same logits.

use ndarray::{Array1, Array2};
use seq_parallel::transport::{Operation, Tag, Transport, local};

use super::Sharing;
use super::prefill::{check, compute};
use crate::kv::{HOME, RankShard, ShardedKv, Shared};
use crate::{Error, Model};

/// One rank's part of the tokens that a sequence grows by. Gives how many each rank keeps, and the last token's hidden state after the
/// final norm `[hidden]`.
fn part(
    model: &Model,
    sharing: &Sharing,
    tokens: &[u32],
    shared: &Shared,
    shard: &mut dyn RankShard,
    transport: &mut dyn Transport,
) -> Result<(Vec<usize>, Array1<f32>), Error> {
    let start: usize = shared.held.iter().sum();
    if start == 0 {
        let (layout, last) = compute(model, sharing, tokens, shared.stored, transport, |layer, own| {
            shard.append(layer, own.segments, own.rotated, own.v)
        })?;
        return Ok((layout.tokens(), last));
    }
    check(model, tokens, start)?;
    let result = follow(model, tokens, shared, shard, transport);
    match &result {
        // The others wait for this rank.
        Err(error) if !matches!(error, Error::SeqParallel(_)) => {
            transport.abort(Tag::new(Operation::DecodeQuery, 0), &error.to_string());
        }
        _ => {}
    }
    result
}

/// One rank's part of tokens that follow others.
fn follow(
    model: &Model,
    tokens: &[u32],
    shared: &Shared,
    shard: &mut dyn RankShard,
    transport: &mut dyn Transport,
) -> Result<(Vec<usize>, Array1<f32>), Error> {
    let (config, layers) = (model.config(), model.layers());
    let dealt = shared.step(0, tokens.len())?.dealt().collect();
    let mut last = Vec::new();
    if transport.rank() == HOME {
        let start: usize = shared.held.iter().sum();
        let positions: Vec<u32> = (start as u32..).take(tokens.len()).collect();
        let heads = &config.heads;
        model.begin_step(tokens.len());
        let mut x = model.embed(tokens);
        for (index, layer) in layers.iter().enumerate() {
            let [w_q, w_k, w_v, w_o] = layer.attention_matrices();
            let projected = layer.project([w_q, w_k, w_v], layer.attention_normed(x.view()).view())?;
            let [q, k, v] = projected.map(|x| x.iter().copied().collect::<Vec<f32>>());
            let q = shared.rotated(q, heads.q_heads(), &positions)?;
            let k = shared.rotated(k, heads.kv_heads(), &positions)?;
            let step = shared.step(index, tokens.len())?;
            let output = shard.ask(index, &step, [&q, &k, &v], transport)?;
            let shape = (tokens.len(), heads.q_heads() * heads.v_dim());
            let out = Array2::from_shape_vec(shape, output.out).expect("outputs of these tokens");
            x += &w_o.forward(out.view())?;
            x += &layer.mlp(layer.mlp_matrices(), layer.mlp_normed(x.view()).view())?;
        }
        let hidden = model.final_norm(x.view());
        last = hidden.row(tokens.len() - 1).to_vec();
    } else {
        for index in 0..layers.len() {
            shard.answer(index, &shared.step(index, tokens.len())?, transport)?;
        }
    }
    let mut lens = vec![0; transport.ranks()];
    lens[HOME] = 4 * config.hidden_size;
    let last = bytemuck::pod_collect_to_vec(&transport.all_gather_v(bytemuck::cast_slice(&last), &lens)?);
    Ok((dealt, Array1::from_vec(last)))
}

/// Runs this process's part of the tokens that a sequence grows by: a prompt, its continuation or one token. Every rank calls it with the
/// same arguments, and with a cache that has its own shard. Gives the last token's hidden state after the final norm `[hidden]`.
///
/// After an error the cache is as it was.
///
/// # Errors
/// An empty prompt, tokens out of range or too many; heads that cannot be dealt; ranks that are set up differently or have failed; a cache
/// of other ranks.
pub fn extend_sharded<X: Transport>(
    model: &Model,
    sharing: &Sharing,
    tokens: &[u32],
    kv: &mut ShardedKv,
    transport: &mut X,
) -> Result<Array1<f32>, Error> {
    check_ranks(sharing, kv)?;
    let before = transport.traffic().sent;
    let (shared, shards) = kv.parts();
    let result = match shards {
        [(rank, shard)] if *rank == transport.rank() => {
            part(model, sharing, tokens, shared, &mut **shard, transport)
        }
        shards => {
            let found: Vec<usize> = shards.iter().map(|(rank, _)| *rank).collect();
            let expected = format!("the shard of rank {}", transport.rank());
            Err(Error::argument("kv", expected, format!("those of {found:?}")))
        }
    };
    let sent = transport.traffic().sent - before;
    let (dealt, last) = result.inspect_err(|_| kv.restore())?;
    kv.grown(&dealt, &[sent]);
    Ok(last)
}

/// As [`extend_sharded`], for all ranks as threads of this process, whose cache has all shards.
///
/// # Errors
/// As [`extend_sharded`].
pub(super) fn extend_on_threads(
    model: &Model,
    sharing: &Sharing,
    tokens: &[u32],
    kv: &mut ShardedKv,
) -> Result<Array1<f32>, Error> {
    check_ranks(sharing, kv)?;
    let (shared, shards) = kv.parts();
    let (_, ends) = local::World::new(shards.len())?;
    let ends: Vec<_> = ends.into_iter().zip(shards).collect();
    let results = local::run_on(ends, |(mut end, (_, shard))| {
        let result = part(model, sharing, tokens, shared, &mut **shard, &mut end);
        (result, end.traffic().sent)
    });
    let (results, sent): (Vec<_>, Vec<u64>) = results.into_iter().unzip();
    // What one rank refused, every rank did; each has the same result.
    let results: Result<Vec<_>, Error> = results.into_iter().collect();
    let first = results.map(|results| results.into_iter().next());
    match first.inspect_err(|_| kv.restore())? {
        Some((dealt, last)) => {
            kv.grown(&dealt, &sent);
            Ok(last)
        }
        None => Err(Error::argument("ranks", "at least 1", 0)),
    }
}

fn check_ranks(sharing: &Sharing, kv: &ShardedKv) -> Result<(), Error> {
    let (expected, found) = (sharing.ranks(), kv.held().len());
    match expected == found {
        true => Ok(()),
        false => Err(Error::argument("kv", format!("shards of {expected} ranks"), format!("of {found}"))),
    }
}
