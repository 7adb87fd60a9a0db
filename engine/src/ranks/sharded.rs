//! Sequences whose keys and values stay with the ranks that computed them.
//!
//! A first prompt is shared as ever, and each rank keeps its own tokens' keys and values: nothing is gathered. What follows, a token or a
//! further prompt, is computed by rank 0: of each layer it sends the queries to all ranks, which attend to what they hold, and merges what
//! comes back. New tokens are dealt out so that shards stay balanced. At the end every rank gets the last token's hidden state, so that
//! processes that run the same command know the same logits.
//!
//! Ranks say first what they hold and what the tokens are. Last, rank 0 decides that a step is kept, when it has heard that all have done it
//! ([`commit`]): wherever another rank fails, all that have not failed keep it, or none. Where rank 0 itself fails or is late by a deadline
//! while it says so, or another rank gives up while it waits for that ([`seq_parallel::commit`] has the cases), some may keep what others
//! do not; their next step, over a transport made anew, names that and fails on all.

use ndarray::{Array1, Array2};
use seq_parallel::commit::commit;
use seq_parallel::fingerprint::{self, Fingerprint};
use seq_parallel::transport::{Operation, Tag, Transport, local};

use super::Sharing;
use super::prefill::{check, check_model, compute, of_all, tell_of};
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
    check(model, tokens, start)?;
    if start == 0 {
        check_model(model.config(), sharing, tokens.len(), shared.stored)?;
    }
    Fingerprint::new()
        .with("the tokens held by ranks (digest)", fingerprint::digest(shared.held.iter().map(|&n| n as u64)))
        .with("the new tokens (digest)", fingerprint::digest(tokens.iter().map(|&token| u64::from(token))))
        .agree(transport)?;
    let grown = if start == 0 {
        let (layout, last) = compute(model, sharing, tokens, shared.stored, transport, |layer, own| {
            shard.append(layer, own.segments, own.rotated, own.v)
        })?;
        (layout.tokens(), last)
    } else {
        let result = follow(model, tokens, shared, shard, transport);
        tell_of(&result, Tag::new(Operation::DecodeQuery, 0), transport);
        result?
    };
    commit(transport, HOME)?;
    Ok(grown)
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
/// After an error the cache is as it was. Where another rank than 0 dies, is silent or sends garbage, all ranks that have not failed return
/// an error, or none does; one that fails after rank 0 has decided to keep the step is named by the next call, on every rank, over this
/// transport. Where rank 0 itself fails or is late by a deadline while it says what it has decided, or another rank gives up while it waits
/// for that ([`seq_parallel::commit`]), those who have heard it keep the tokens and the others do not: over this transport the next call
/// names that rank on every rank, over one made anew it names the ranks that differ, and changes nothing.
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
    let first = of_all(results).map(|results| results.into_iter().next());
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use attention::AttentionSpec;
    use seq_parallel::Output;
    use seq_parallel::decode::DecodeStep;
    use seq_parallel::placement::Segment;

    use super::*;

    /// A shard that has no memory for its second layer.
    struct Full(Option<Box<dyn RankShard>>);

    impl Full {
        fn whole(&self) -> &dyn RankShard {
            &**self.0.as_ref().expect("a shard")
        }

        fn whole_mut(&mut self) -> &mut dyn RankShard {
            &mut **self.0.as_mut().expect("a shard")
        }
    }

    fn room(layer: usize) -> Result<(), Error> {
        match layer {
            1 => Err(Error::argument("tokens", "keys and values that fit memory", "too many")),
            _ => Ok(()),
        }
    }

    impl RankShard for Full {
        fn append(&mut self, layer: usize, segments: &[Segment], k: &[f32], v: &[f32]) -> Result<(), Error> {
            room(layer)?;
            self.whole_mut().append(layer, segments, k, v)
        }

        fn attend(
            &self,
            layer: usize,
            spec: &AttentionSpec,
            queries: &[Segment],
            q: &[f32],
        ) -> Result<Output, Error> {
            self.whole().attend(layer, spec, queries, q)
        }

        fn ask(
            &mut self,
            layer: usize,
            step: &DecodeStep,
            inputs: [&[f32]; 3],
            transport: &mut dyn Transport,
        ) -> Result<Output, Error> {
            self.whole_mut().ask(layer, step, inputs, transport)
        }

        /// Fails as `Shard::append` does, in the middle of an answer.
        fn answer(
            &mut self,
            layer: usize,
            step: &DecodeStep,
            transport: &mut dyn Transport,
        ) -> Result<(), Error> {
            if let Err(Error::Argument { argument, expected, found }) = room(layer) {
                return Err(seq_parallel::Error::argument(argument, expected, found).into());
            }
            self.whole_mut().answer(layer, step, transport)
        }

        fn tokens(&self, layer: usize) -> usize {
            self.whole().tokens(layer)
        }

        fn bytes(&self) -> usize {
            self.whole().bytes()
        }

        fn truncate(&mut self, tokens: usize) {
            self.whole_mut().truncate(tokens);
        }

        fn scramble(&mut self, rng: &mut fastrand::Rng) {
            self.whole_mut().scramble(rng);
        }
    }

    /// The others do not wait until the deadline for a rank that has failed by itself, and what is reported is how it failed.
    #[test]
    fn a_rank_that_fails_by_itself_says_so() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("model");
        let model = Model::load(&path, &"dense".parse().unwrap()).unwrap();
        let sharing = Sharing::new(&"ring,ranks=3,kv=sharded".parse().unwrap()).unwrap();
        let tokens: Vec<u32> = (40..52).collect();
        let reason = "expected keys and values that fit memory";
        for held in [0, 11] {
            let mut kv = ShardedKv::new(&"dense".parse().unwrap(), &model, 20, 3, 0..3).unwrap();
            if held > 0 {
                extend_on_threads(&model, &sharing, &tokens[..held], &mut kv).unwrap();
            }
            let bytes = [0, 1, 2].map(|rank| kv.bytes(rank));
            let (shared, shards) = kv.parts();
            let nobody: Box<dyn RankShard> = Box::new(Full(None));
            let whole = std::mem::replace(&mut shards[2].1, nobody);
            shards[2].1 = Box::new(Full(Some(whole)));
            let ends = local::World::new(3).unwrap().1;
            let ends: Vec<_> = ends.into_iter().zip(&mut *shards).collect();
            let heard = local::run_on(ends, |(mut end, (_, shard))| {
                part(&model, &sharing, &tokens[held..], shared, &mut **shard, &mut end)
                    .unwrap_err()
                    .to_string()
            });
            for (rank, error) in heard.iter().enumerate().take(2) {
                let start = format!("rank {rank}: rank 2 gave up (");
                assert!(error.starts_with(&start) && error.contains(reason), "{held} held: {error}");
            }
            kv.restore();
            let error =
                extend_on_threads(&model, &sharing, &tokens[held..], &mut kv).unwrap_err().to_string();
            assert!(error.contains(reason) && !error.contains("gave up"), "{held} held: {error}");
            assert_eq!([0, 1, 2].map(|rank| kv.bytes(rank)), bytes, "{held} held: as before");
        }
    }
}
