//! Ranks that share a prompt give the logits of one rank, and decoding goes on from their keys and values.

mod support;

use attention::DType;
use longkv_engine::{Error, Model, Session, ranks};
use ndarray::Array1;
use seq_parallel::cost_model::Scheme;
use seq_parallel::hybrid::HybridPlan;
use seq_parallel::megatron;
use seq_parallel::placement::{Placement, Sequence, Shards};
use seq_parallel::transport::{Transport, local};
use support::{bundled, golden, load, mode};

fn session<'m>(model: &'m Model, kv: &str, sharing: &str, capacity: usize) -> Session<'m> {
    Session::new(model, &mode(kv), ranks::open(&mode(sharing)).unwrap(), capacity).unwrap()
}

fn close(case: &str, found: &Array1<f32>, expected: &Array1<f32>, tolerance: f32) {
    for (token, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance, "{case}, logit {token}: {a}, not {b}");
    }
    assert_eq!(found.len(), expected.len(), "{case}");
}

/// Every way of sharing, on lengths from a token to more than a few; then two steps of decoding. What sums in the order of one rank is
/// equal bit for bit; a ring is off by `tolerance` at most.
fn check(model: &Model, kv: &str, sharings: &[&str], lens: &[usize], tolerance: f32) {
    let text = std::fs::read(bundled().join("heldout.txt")).unwrap();
    for &len in lens {
        let vocabulary = model.config().vocab_size as u32;
        let tokens: Vec<u32> = text[..len].iter().map(|&byte| u32::from(byte) % vocabulary).collect();
        let run = |sharing| {
            let mut session = session(model, kv, sharing, len + 2);
            let logits =
                [session.prefill(&tokens).unwrap(), session.decode(1).unwrap(), session.decode(2).unwrap()];
            assert_eq!(session.len(), len + 2);
            logits
        };
        let expected = run("single");
        for sharing in sharings {
            let whole_heads = sharing.starts_with("ulysses") || sharing.starts_with("fast,ranks=4,region");
            // Few rows are multiplied in another order than many: one rank and several have to be on one side of 4.
            let one_order = whole_heads && (len <= 4 || len >= 40) || sharing.contains("ranks=1");
            let tolerance = if one_order { 0.0 } else { tolerance };
            for (step, (found, expected)) in run(sharing).iter().zip(&expected).enumerate() {
                close(&format!("{kv}, {sharing}, {len} tokens, step {step}"), found, expected, tolerance);
            }
        }
    }
}

const SHARINGS: [&str; 18] = [
    "auto,ranks=1",
    "auto,ranks=4",
    "auto,ranks=6,profile=a100",
    "ring,ranks=2",
    "ring,ranks=4",
    "ring,ranks=3,placement=striped",
    "ring,ranks=5,placement=contiguous",
    "ulysses,ranks=2",
    "ulysses,ranks=4",
    "hybrid,ranks=4,ulysses=2",
    "megatron,ranks=2",
    // 2 KV heads: pairs of ranks have the same.
    "megatron,ranks=4",
    "megatron,ranks=4,region=2,placement=striped",
    "auto,ranks=4,region=2",
    "auto,ranks=8,region=4,profile=a100",
    // Weights are gathered, which changes no product.
    "fast,ranks=4,region=2",
    "fast,ranks=4,node=2,region=2,attention=megatron,mlp=ulysses",
    "fast,ranks=8,node=4,region=2,mlp=megatron,placement=contiguous",
];

#[test]
fn ranks_give_the_logits_of_one() {
    let model = load(&bundled()).unwrap();
    // Only the order of sums differs; where keys are rounded to 16 bits, one on a border may round the other way.
    check(&model, "dense,dtype=f32", &SHARINGS, &[1, 3, 7, 13, 120], 2e-5);
    check(&model, "dense", &SHARINGS, &[97], 5e-4);
    check(&model, "dense,dtype=bf16", &["ring,ranks=4", "ulysses,ranks=4"], &[97], 2e-3);
}

/// Biases, norms of heads, sliding windows.
#[test]
fn every_architecture_can_be_shared() {
    for name in ["mistral", "qwen2", "qwen3"] {
        let model = load(&golden(name)).unwrap();
        check(
            &model,
            "dense,dtype=f32",
            &["ring,ranks=4", "ring,ranks=3,placement=striped", "auto,ranks=2", "megatron,ranks=2"],
            &[20],
            2e-5,
        );
    }
}

/// Compressed caches attend to exact keys in a shared prompt, and decode from what they keep of them: each is near its own single rank.
#[test]
fn compressed_caches_take_shared_prompts() {
    let model = load(&bundled()).unwrap();
    let text = std::fs::read(bundled().join("heldout.txt")).unwrap();
    let tokens: Vec<u32> = text[..160].iter().map(|&byte| u32::from(byte)).collect();
    let exact = session(&model, "dense,dtype=f32", "single", 161).prefill(&tokens).unwrap();
    for kv in ["hack8", "hack4", "fdc-0.5"] {
        let mut shared = session(&model, kv, "auto,ranks=4", 161);
        close(&format!("{kv}: a prompt"), &shared.prefill(&tokens).unwrap(), &exact, 1e-4);
        let mut single = session(&model, kv, "single", 161);
        single.prefill(&tokens).unwrap();
        assert_eq!(shared.memory(), single.memory(), "{kv}");
        let distance = |a: &Array1<f32>, b: &Array1<f32>| (a - b).mapv(|x| x * x).sum().sqrt();
        let (a, b) = (shared.decode(3).unwrap(), single.decode(3).unwrap());
        let size = b.mapv(|x| x * x).sum().sqrt();
        assert!(distance(&a, &b) < 0.15 * size, "{kv}: {} of {size}", distance(&a, &b));
    }
}

#[test]
fn a_shared_prompt_can_be_continued() {
    let model = load(&bundled()).unwrap();
    let tokens: Vec<u32> = (0..60).map(|i| 32 + i * 7 % 90).collect();
    let mut shared = session(&model, "dense,dtype=f32", "ring,ranks=4", 60);
    shared.prefill(&tokens[..40]).unwrap();
    let found = shared.prefill(&tokens[40..]).unwrap();
    close(
        "in parts",
        &found,
        &session(&model, "dense,dtype=f32", "single", 60).prefill(&tokens).unwrap(),
        1e-4,
    );
    shared.clear();
    assert!(matches!(shared.prefill(&[]), Err(Error::Argument { argument: "prompt", .. })));
    assert!(matches!(shared.prefill(&[1, 256]), Err(Error::Token { token: 256, .. })));
    assert!(shared.is_empty(), "nothing was stored");
}

/// Payload bytes of every scheme, to the byte, as the difference to one whose stages exchange what attention needs alone.
#[test]
fn bytes_of_stages_are_counted() {
    let model = load(&bundled()).unwrap();
    let config = model.config();
    let (heads, hidden, inner) = (config.heads, config.hidden_size, config.intermediate_size);
    let tokens: Vec<u32> = (0..37).map(|i| 32 + i * 7 % 90).collect();
    let (ranks, region) = (4, 2);
    let sent = |sharing_text: &str| -> Vec<u64> {
        let sharing = ranks::Sharing::new(&mode(sharing_text)).unwrap();
        let results = local::run(ranks, |mut end| {
            ranks::prefill_shared(&model, &sharing, &tokens, DType::F16, &mut end).unwrap();
            end.traffic().sent
        });
        results.unwrap()
    };
    let shards = Shards::new([Sequence::new(tokens.len())], Placement::Zigzag, ranks / region).unwrap();
    let plan = HybridPlan::new(config.attention(0).unwrap(), shards, region).unwrap();
    // A rank of a region passes on its own half of the rows to the one other.
    let weights = |shapes: &[[usize; 2]], place: usize| -> usize {
        let rows = |[rows, columns]: [usize; 2]| 4 * columns * ((place + 1) * rows / 2 - place * rows / 2);
        shapes.iter().copied().map(rows).sum()
    };
    let (q, kv) = (heads.q_heads() * heads.qk_dim(), heads.kv_heads() * heads.qk_dim());
    let attention = [[q, hidden], [kv, hidden], [kv, hidden], [hidden, q]];
    let mlp = [[inner, hidden], [inner, hidden], [hidden, inner]];
    let base = sent("fast,ranks=4,node=2");
    for (sharing, megatron_attention, megatron_mlp) in [
        ("fast,ranks=4,node=2,region=2", false, false),
        ("fast,ranks=4,node=2,region=2,mlp=megatron", false, true),
        ("fast,ranks=4,node=2,region=2,attention=megatron", true, false),
        ("megatron,ranks=4,region=2", true, true),
    ] {
        for (rank, (found, base)) in sent(sharing).into_iter().zip(&base).enumerate() {
            let (place, of) = (rank % region, plan.group_tokens(rank));
            let stage = megatron::group_bytes_sent(&of, place, hidden);
            let attention_bytes = match megatron_attention {
                false => plan.bytes_sent(rank, 4, 2).unwrap() + weights(&attention, place) as u64,
                true => {
                    // The other rank's tokens, in the heads that this one has first.
                    let first = megatron::first_kv_heads(&heads, region).unwrap()[place].len();
                    let kept = of[1 - place] * first * (heads.qk_dim() + heads.v_dim()) * 4;
                    stage + plan.ring_bytes_sent(rank, 4, 2).unwrap() + kept as u64
                }
            };
            let mlp_bytes = if megatron_mlp { stage } else { weights(&mlp, place) as u64 };
            let before = plan.bytes_sent(rank, 4, 2).unwrap();
            let expected = base + config.layers as u64 * (attention_bytes + mlp_bytes - before);
            assert_eq!(found, expected, "{sharing}, rank {rank}");
        }
    }
}

#[test]
fn sharings_that_make_no_sense() {
    for (text, named) in [
        ("ring,ranks=0", "ranks"),
        ("ring,ranks=two", "ranks"),
        ("single,ranks=2", "single is one rank"),
        ("hybrid,ranks=4,ulysses=3", "divisor of 4"),
        ("ring,ranks=4,placement=random", "zigzag"),
        ("ring,ranks=4,ulysses=2", "unknown option ulysses"),
        ("hybrid,ranks=4,ulysses=0", "ulysses: expected a whole number of at least 1, found 0"),
        ("megatron,ranks=4,region=3", "region: expected a divisor of 4 ranks, found 3"),
        ("auto,ranks=6,region=0", "region: expected a whole number of at least 1, found 0"),
        ("fast,ranks=6,node=4", "node: expected a divisor of 6 ranks, found 4"),
        ("fast,ranks=8,node=2,region=4", "region: expected a divisor of 2 ranks of a node, found 4"),
        ("fast,ranks=4,attention=ring", "attention: expected megatron or ulysses, found \"ring\""),
        ("fast,ranks=4,mlp=none", "mlp: expected megatron or ulysses"),
        ("megatron,ranks=4,kv=all", "kv: expected gathered or sharded"),
        ("ring,ranks=4,profile=h100", "unknown option profile"),
        ("auto,ranks=4,profile=fast", "one of host, h100, h100-100g, a100"),
    ] {
        let error = ranks::open(&mode(text)).map(drop).expect_err(text).to_string();
        assert!(error.contains(named), "{text}: {error}");
    }
    // Heads that cannot be dealt are only known with a model: 4 query heads and 2 KV heads.
    let model = load(&bundled()).unwrap();
    for (sharing, named) in [
        ("ulysses,ranks=3", "Ulysses: q_heads = 4 cannot be dealt to 3 ranks"),
        ("megatron,ranks=3", "Megatron: q_heads = 4 cannot be dealt to 3 ranks"),
        ("fast,ranks=6,node=3", "Ulysses: q_heads = 4 cannot be dealt to 3 ranks"),
        ("fast,ranks=5,region=5,attention=megatron", "Megatron: q_heads = 4 cannot be dealt to 5 ranks"),
        ("auto,ranks=7,region=7", "q_heads = 4 cannot be dealt to 7 ranks"),
    ] {
        let refused = Session::new(&model, &mode("dense"), ranks::open(&mode(sharing)).unwrap(), 8);
        let error = refused.map(drop).expect_err(sharing).to_string();
        assert!(error.contains(named), "{sharing}: {error}");
    }
    assert!(ranks::check_weights(&mode("megatron,ranks=2"), &mode("dense")).is_ok());
    assert!(ranks::check_weights(&mode("auto,ranks=2"), &mode("host:1")).is_ok());
    let error = ranks::check_weights(&mode("megatron,ranks=2"), &mode("host:1")).unwrap_err().to_string();
    assert!(error.contains("expected --weights dense, found host:1"), "{error}");
    assert_eq!(ranks::open(&mode("ring,ranks=7")).unwrap().count(), 7);
}

/// The choice is the cost model's: it depends on the machines, and says why.
#[test]
fn auto_asks_the_cost_model() {
    let model = load(&bundled()).unwrap();
    let config = model.config();
    let choice = |mode_text: &str, tokens| {
        let sharing = ranks::Sharing::new(&mode(mode_text)).unwrap();
        sharing.choose(config, tokens, DType::F32).unwrap()
    };
    assert!(choice("ring,ranks=4", 100).is_none(), "nothing to choose");
    // Where weights are split, every combination of schemes is asked about, and some of them need other heads.
    let split = choice("auto,ranks=8,region=4,profile=h100", 4096).unwrap();
    let text = split.to_string();
    for words in [
        "weights are split over regions of 4 ranks",
        "Megatron 4 × ring 2, MLP Megatron",
        "Megatron 4 × ring 2, MLP Ulysses",
        "Ulysses 4 × ring 2, MLP Megatron",
        "Ulysses 8 × ring 1, MLP Ulysses",
        "for weights",
        "q_heads = 4 cannot be dealt to 8 ranks",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    // A long prompt is worth the gathering of weights, a short one is not.
    let schemes = |tokens| choice("auto,ranks=8,region=4,profile=h100", tokens).unwrap().schemes();
    assert_eq!(schemes(64)[0], Scheme::Megatron);
    assert_eq!(schemes(1 << 20), [Scheme::Ulysses; 2]);
    // 4 query and 2 KV heads cannot be dealt to 3 or 6 ranks.
    let six = choice("auto,ranks=6", 100).unwrap();
    assert!([1, 2].contains(&six.group()), "{six}");
    let text = six.to_string();
    for words in [
        "Sharing 100 tokens among 6 ranks",
        "profile host",
        "chosen",
        "q_heads = 4 cannot be dealt to 3 ranks",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    // Each line is no faster than the one before it, and the first is what is done.
    let times: Vec<f64> = text
        .lines()
        .filter(|line| line.contains("of a layer:"))
        .map(|line| line[24..].split_whitespace().next().unwrap().parse().unwrap())
        .collect();
    assert!(times.len() == 2 && times[0] <= times[1], "{text}");
    // A session remembers the longest prompt's.
    let mut session = session(&model, "dense", "auto,ranks=4", 40);
    assert!(session.choice().is_none());
    session.prefill(&[1; 30]).unwrap();
    session.clear();
    session.prefill(&[1; 20]).unwrap();
    assert_eq!(session.choice().map(ranks::Choice::tokens), Some(30));
}
