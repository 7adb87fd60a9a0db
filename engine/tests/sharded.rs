//! Keys and values that stay with the ranks that computed them: the logits of one rank, balanced shards, and bytes to the byte.

mod support;

use longkv_engine::eval::{self, Windows};
use longkv_engine::kv::{KvCache, ShardedKv};
use longkv_engine::ranks::{Holding, Ranks};
use longkv_engine::{Config, Error, Model, Session, ranks};
use ndarray::{Array1, Axis};
use seq_parallel::transport::local::{self, World};
use seq_parallel::transport::{Failure, Faulty, Transport};
use support::{bundled, golden, load, mode};

fn session<'m>(model: &'m Model, kv: &str, sharing: &str, capacity: usize) -> Session<'m> {
    Session::new(model, &mode(kv), ranks::open(&mode(sharing)).unwrap(), capacity).unwrap()
}

fn tokens(model: &Model, len: usize) -> Vec<u32> {
    let text = std::fs::read(bundled().join("heldout.txt")).unwrap();
    text[..len].iter().map(|&byte| u32::from(byte) % model.config().vocab_size as u32).collect()
}

fn close(case: &str, found: &Array1<f32>, expected: &Array1<f32>, tolerance: f32) {
    for (token, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance, "{case}, logit {token}: {a}, not {b}");
    }
    assert_eq!(found.len(), expected.len(), "{case}");
}

/// Bytes of a token's keys and values in all layers.
fn bytes_per_token(config: &Config, element: usize) -> usize {
    config.kv_elements_per_token() * element
}

/// A prompt, tokens after it, a further prompt and more tokens: the logits of one rank at every step, and shards that end up balanced.
fn check(model: &Model, kv: &str, element: usize, sharings: &[&str], len: usize, tolerance: f32) {
    let tokens = tokens(model, len + 20);
    let run = |sharing: &str| {
        let mut session = session(model, kv, sharing, len + 20);
        let mut logits = vec![session.prefill(&tokens[..len]).unwrap()];
        logits.extend(tokens[len..len + 6].iter().map(|&token| session.decode(token).unwrap()));
        logits.push(session.prefill(&tokens[len + 6..len + 17]).unwrap());
        logits.extend(tokens[len + 17..].iter().map(|&token| session.decode(token).unwrap()));
        assert_eq!(session.len(), len + 20);
        (logits, session.memory(), session.holdings())
    };
    let (expected, memory, none) = run("single");
    assert!(none.is_none(), "one rank has nobody to share with");
    for sharing in sharings {
        let case = format!("{kv}, {sharing}, {len} tokens");
        let (found, sharded, holdings) = run(&format!("{sharing},kv=sharded"));
        for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
            close(&format!("{case}, step {step}"), found, expected, tolerance);
        }
        assert_eq!(sharded, memory, "{case}: all shards are what one rank has");
        let holdings = holdings.unwrap();
        assert!(
            holdings.sharded && holdings.decoded == 20 && holdings.each.len() == holdings.ranks,
            "{case}"
        );
        let held: Vec<usize> = holdings.each.iter().map(|holding| holding.tokens).collect();
        assert_eq!(held.iter().sum::<usize>(), len + 20, "{case}");
        assert!(held.iter().max().unwrap() - held.iter().min().unwrap() <= 1, "{case}: {held:?}");
        for Holding { rank, tokens, bytes, .. } in holdings.each {
            assert_eq!(bytes, tokens * bytes_per_token(model.config(), element), "{case}, rank {rank}");
        }
    }
}

#[test]
fn shards_give_the_logits_of_one_rank() {
    let model = load(&bundled()).unwrap();
    let all = [
        "auto,ranks=1",
        "auto,ranks=4",
        "ring,ranks=2",
        "ring,ranks=5,placement=contiguous",
        "ring,ranks=3,placement=striped",
        "ulysses,ranks=4",
        "hybrid,ranks=4,ulysses=2",
        "megatron,ranks=4,region=2",
        "fast,ranks=4,region=2,mlp=megatron",
    ];
    check(&model, "dense,dtype=f32", 4, &all, 61, 2e-5);
    check(&model, "dense,dtype=f32", 4, &["ring,ranks=4", "ulysses,ranks=2"], 2, 2e-5);
    // Where keys are rounded to 16 bits, one on a border may round the other way.
    check(&model, "dense", 2, &["auto,ranks=4", "ring,ranks=3"], 61, 5e-4);
    check(&model, "dense,dtype=bf16", 2, &["ring,ranks=4"], 40, 4e-3);
}

/// Biases, norms of heads, sliding windows.
#[test]
fn every_architecture_can_be_sharded() {
    for name in ["mistral", "qwen2", "qwen3"] {
        check(
            &load(&golden(name)).unwrap(),
            "dense,dtype=f32",
            4,
            &["ring,ranks=4", "megatron,ranks=2"],
            12,
            2e-5,
        );
    }
}

/// A token's query goes to every other rank and an output comes back, per layer; its keys and values go to one rank; at the end its hidden
/// state goes round, as do three words at the beginning.
#[test]
fn bytes_are_counted_to_the_byte() {
    let model = load(&bundled()).unwrap();
    let (config, heads) = (model.config(), &model.config().heads);
    let tokens = tokens(&model, 50);
    for (kv, element) in [("dense", 2), ("dense,dtype=f32", 4)] {
        for ranks in [1, 2, 4] {
            let mut session = session(&model, kv, &format!("ring,ranks={ranks},kv=sharded"), 50);
            session.prefill(&tokens[..41]).unwrap();
            let prefilled: Vec<usize> =
                session.holdings().unwrap().each.iter().map(|holding| holding.tokens).collect();
            tokens[41..].iter().for_each(|&token| drop(session.decode(token).unwrap()));
            let each = session.holdings().unwrap().each;
            let new = |rank: usize| each[rank].tokens - prefilled[rank];
            let query = 4 * heads.q_heads() * heads.qk_dim();
            let partial = 4 * heads.q_heads() * (heads.v_dim() + 1);
            assert_eq!(each.len(), ranks);
            for (rank, holding) in each.iter().enumerate() {
                // The hidden state of rank 0 goes round to all but rank 0.
                let round = if (rank + 1) % ranks == 0 { 0 } else { 9 * 4 * config.hidden_size };
                let words = 9 * 8 * 3 * (ranks - 1);
                let layers = match rank {
                    0 => {
                        let elsewhere: usize = (1..ranks).map(new).sum();
                        9 * config.layers * (ranks - 1) * query + elsewhere * bytes_per_token(config, element)
                    }
                    _ => 9 * config.layers * partial,
                };
                assert_eq!(
                    holding.sent,
                    Some((round + words + layers) as u64),
                    "{kv}, rank {rank} of {ranks}"
                );
            }
        }
    }
}

/// The cache used by itself, with all shards in one process, is what ranks compute.
#[test]
fn a_cache_with_all_shards_is_a_cache() {
    let model = load(&bundled()).unwrap();
    let tokens = tokens(&model, 40);
    let mut alone = ShardedKv::new(&mode("dense"), &model, 40, 3, 0..3).unwrap();
    let mut by_ranks = ranks::Threads::new(ranks::Sharing::new(&mode("ring,ranks=3,kv=sharded")).unwrap());
    let mut dealt = by_ranks.cache(&mode("dense"), &model, 40).unwrap();
    // The first token on rank 0, so that what follows is dealt alike.
    model.forward(&tokens[..1], 0, &mut alone).unwrap();
    by_ranks.prefill(&model, &tokens[..1], &mut *dealt).unwrap();
    assert_eq!(alone.held().iter().sum::<usize>(), 1);
    if alone.held() != dealt.sharded().unwrap().held() {
        panic!("{:?} and {:?}", alone.held(), dealt.sharded().unwrap().held());
    }
    for (i, &token) in tokens[1..].iter().enumerate() {
        let one = model.forward(&[token], i + 1, &mut alone).unwrap().index_axis_move(Axis(0), 0);
        let other = by_ranks.decode(&model, token, &mut *dealt).unwrap();
        assert_eq!(one, other, "token {i}: bit for bit");
    }
    // Some shards are no cache.
    let mut part = ShardedKv::new(&mode("dense"), &model, 40, 3, [1]).unwrap();
    let error = model.forward(&tokens[..1], 0, &mut part).unwrap_err().to_string();
    assert!(error.contains("those of all 3 ranks"), "{error}");
    assert_eq!((part.bytes(1), part.bytes(0), part.sent(1), part.sent(2)), (Some(0), None, Some(0), None));
}

/// Ranks with a cache each, as processes have them: where one fails under way, the others name it, and every cache is as it was before.
#[test]
fn a_step_that_fails_leaves_nothing_behind() {
    let model = load(&bundled()).unwrap();
    let (tokens, ranks) = (tokens(&model, 30), 3);
    let sharing = ranks::Sharing::new(&mode("ring,ranks=3,kv=sharded")).unwrap();
    let mut single = session(&model, "dense", "single", 30);
    single.prefill(&tokens[..25]).unwrap();
    let expected = single.decode(tokens[25]).unwrap();
    let cache = |rank| ShardedKv::new(&mode("dense"), &model, 30, ranks, [rank]).unwrap();
    let mut caches: Vec<ShardedKv> = (0..ranks).map(cache).collect();
    // Rank 1 dies at some exchange of the token after the prompt; the last of these never comes.
    for dies_at in [0, 1, 5, usize::MAX] {
        let steps = |tokens: &[u32], caches: &mut Vec<ShardedKv>, dies_at: usize| {
            let (_, ends) = World::new(ranks).unwrap();
            let ends: Vec<_> = ends.into_iter().zip(caches).collect();
            local::run_on(ends, |(end, kv)| {
                let exchange = if end.rank() == 1 { dies_at } else { usize::MAX };
                let mut end = Faulty::new(end, Failure::Dies, exchange);
                ranks::extend_sharded(&model, &sharing, tokens, kv, &mut end)
            })
        };
        if caches[0].is_empty() {
            steps(&tokens[..25], &mut caches, usize::MAX)
                .into_iter()
                .for_each(|result| drop(result.unwrap()));
        }
        let before: Vec<_> =
            (0..ranks).map(|rank| (caches[rank].held().to_vec(), caches[rank].bytes(rank))).collect();
        let results = steps(&tokens[25..26], &mut caches, dies_at);
        for (rank, result) in results.into_iter().enumerate() {
            if dies_at == usize::MAX {
                let logits =
                    model.logits(result.unwrap().view().insert_axis(Axis(0))).unwrap().row(0).to_owned();
                close(&format!("rank {rank}"), &logits, &expected, 5e-4);
                continue;
            }
            let error = result.unwrap_err().to_string();
            assert!(error.contains("rank 1"), "rank {rank}: {error}");
            let after = (caches[rank].held().to_vec(), caches[rank].bytes(rank));
            assert_eq!(after, before[rank], "rank {rank}");
        }
    }
    // A cache of another rank, or of other ranks.
    let (_, mut ends) = World::new(1).unwrap();
    let one = ranks::Sharing::new(&mode("ring,ranks=1,kv=sharded")).unwrap();
    for (sharing, named) in [(&sharing, "the shard of rank 0"), (&one, "shards of 1 ranks")] {
        let error = ranks::extend_sharded(&model, sharing, &[1], &mut caches[1], &mut ends[0]).unwrap_err();
        assert!(error.to_string().contains(named), "{error}");
    }
}

/// Four ranks of which one dies at any exchange of a step. Unless it is rank 0, which decides, the others all keep the token or none does.
/// Where rank 0 dies while it says what it has decided, those keep it that have heard so. Ranks that differ notice at their next step,
/// which changes nothing.
#[test]
fn ranks_keep_a_step_together() {
    let model = load(&bundled()).unwrap();
    let (tokens, ranks) = (tokens(&model, 30), 4);
    let sharing = ranks::Sharing::new(&mode("ring,ranks=4,kv=sharded")).unwrap();
    let steps = |tokens: &[u32], caches: &mut Vec<ShardedKv>, (culprit, dies_at): (usize, usize)| {
        let ends: Vec<_> = World::new(ranks).unwrap().1.into_iter().zip(caches).collect();
        let results = local::run_on(ends, |(end, kv)| {
            let exchange = if end.rank() == culprit { dies_at } else { usize::MAX };
            let mut end = Faulty::new(end, Failure::Dies, exchange);
            let result = ranks::extend_sharded(&model, &sharing, tokens, kv, &mut end).map(drop);
            (result, end.traffic().messages as usize)
        });
        results.into_iter().unzip::<_, _, Vec<_>, Vec<_>>()
    };
    let state = |caches: &[ShardedKv]| -> Vec<_> {
        caches.iter().enumerate().map(|(rank, kv)| (kv.held().to_vec(), kv.bytes(rank))).collect()
    };
    let never = (ranks, usize::MAX);
    let prefilled = || {
        let cache = |rank| ShardedKv::new(&mode("dense"), &model, 30, ranks, [rank]).unwrap();
        let mut caches: Vec<ShardedKv> = (0..ranks).map(cache).collect();
        assert!(steps(&tokens[..25], &mut caches, never).0.iter().all(Result::is_ok));
        caches
    };
    // Every exchange sends one message.
    let (results, exchanges) = steps(&tokens[25..26], &mut prefilled(), never);
    assert!(results.iter().all(Result::is_ok));
    let mut kept_by = Vec::new();
    for culprit in [0, 1, 3] {
        for dies_at in 0..exchanges[culprit] {
            let mut caches = prefilled();
            let before = state(&caches);
            let (results, _) = steps(&tokens[25..26], &mut caches, (culprit, dies_at));
            let case = format!("rank {culprit} dies at exchange {dies_at} of {}", exchanges[culprit]);
            let after = state(&caches);
            for (rank, result) in results.iter().enumerate() {
                let grown: usize = after[rank].0.iter().sum();
                match result {
                    Ok(()) => assert_eq!(grown, 26, "{case}, rank {rank}"),
                    Err(error) => {
                        assert_eq!(after[rank], before[rank], "{case}, rank {rank}");
                        let named = error.to_string().contains(&format!("rank {culprit} "));
                        assert!(named, "{case}, rank {rank}: {error}");
                    }
                }
            }
            let others = (0..ranks).filter(|rank| *rank != culprit);
            let kept = others.filter(|&rank| results[rank].is_ok()).count();
            kept_by.push((culprit, kept));
            assert!(culprit == 0 || [0, ranks - 1].contains(&kept), "{case}: kept by {kept}");
            let (next, _) = steps(&tokens[25..26], &mut caches, never);
            if kept == 0 && results[culprit].is_err() {
                assert!(next.iter().all(Result::is_ok), "{case}: {next:?}");
                continue;
            }
            let all_kept = results.iter().all(Result::is_ok);
            for (rank, result) in next.into_iter().enumerate() {
                match result {
                    Ok(()) => assert!(all_kept, "{case}, rank {rank}"),
                    Err(error) => {
                        assert_eq!(state(&caches)[rank], after[rank], "{case}, rank {rank}");
                        let error = error.to_string();
                        assert!(
                            error.contains("differ in the tokens held by ranks"),
                            "{case}, rank {rank}: {error}"
                        );
                    }
                }
            }
        }
    }
    // A rank that dies before it was heard of, and after; and rank 0 before it has told anybody.
    for (culprit, kept) in [(1, 0), (1, ranks - 1), (3, 0), (3, ranks - 1), (0, 0)] {
        assert!(kept_by.contains(&(culprit, kept)), "rank {culprit} dies, kept by {kept}: {kept_by:?}");
    }
}

/// Garbage in the shards worsens what is decoded through them; after a new start nothing of it is left.
#[test]
fn what_is_decoded_reads_the_shards() {
    let model = load(&bundled()).unwrap();
    let tokens = tokens(&model, 120);
    let windows = Windows::new(60, 30, 2).unwrap();
    let mut session = session(&model, "dense", "ring,ranks=3,kv=sharded", 60);
    let clean = eval::evaluate(&mut session, "dense", &tokens, windows, |_, _| {}).unwrap();
    let mut rng = fastrand::Rng::with_seed(3);
    let damage = |kv: &mut dyn KvCache| kv.scramble(&mut rng);
    let damaged = eval::evaluate_with(&mut session, "dense", &tokens, windows, |_, _| {}, damage).unwrap();
    let again = eval::evaluate(&mut session, "dense", &tokens, windows, |_, _| {}).unwrap();
    assert!(
        damaged.nll_per_token > clean.nll_per_token + 0.2,
        "{} {}",
        damaged.nll_per_token,
        clean.nll_per_token
    );
    assert_eq!(clean.nlls, again.nlls);
    assert_eq!(clean.kv_bytes_per_token, bytes_per_token(model.config(), 2) as f64);
}

#[test]
fn what_shards_refuse() {
    let model = load(&bundled()).unwrap();
    for (sharing, kv, named) in [
        ("ring,ranks=2,kv=sharded", "hack4", "hack4 cannot be sharded over ranks"),
        ("auto,ranks=2,kv=sharded", "sparse-quest", "sparse-quest cannot be sharded"),
        ("ring,ranks=2,kv=spread", "dense", "kv: expected gathered or sharded, found \"spread\""),
        ("single,kv=sharded", "dense", "unknown option kv"),
    ] {
        let opened = ranks::open(&mode(sharing)).and_then(|ranks| Session::new(&model, &mode(kv), ranks, 8));
        let error = opened.map(drop).expect_err(sharing).to_string();
        assert!(error.contains(named), "{sharing}, {kv}: {error}");
    }
    let mut session = session(&model, "dense", "ring,ranks=2,kv=sharded", 8);
    assert!(matches!(session.prefill(&[]), Err(Error::Argument { argument: "prompt", .. })));
    session.prefill(&[1, 2, 3]).unwrap();
    assert!(matches!(session.decode(9999), Err(Error::Token { token: 9999, .. })));
    assert!(matches!(session.prefill(&[]), Err(Error::Argument { argument: "prompt", .. })));
    assert_eq!(session.len(), 3, "nothing was stored");
    session.decode(4).unwrap();
    session.clear();
    assert!(session.is_empty() && session.memory().device == 0);
}
