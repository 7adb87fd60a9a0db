//! The three seams: what every method behind them must keep.

mod support;

use longkv_engine::{Error, kv, linear, ranks};
use ndarray::Array3;
use support::{bundled, golden, load, mode, session};

/// `append` leaves the cache as `forward` does: what ranks computed elsewhere can be decoded from.
#[test]
fn appended_tokens_are_seen_like_forwarded_ones() {
    let model = load(&golden("mistral")).unwrap();
    let geometry = kv::Geometry::new(model.config(), 16).unwrap();
    let shape = geometry.layers[0].shape;
    let weight = linear::Weight {
        matrix: ndarray::Array2::eye(shape.q_heads() * shape.v_dim()).into_shared(),
        bias: None,
        stored: attention::DType::F32,
    };
    let w_o = linear::Dense::new(weight);
    for name in kv::DEMO.iter().filter(|name| kv::unavailable(&mode(name), model.path()).is_none()) {
        let mut rng = fastrand::Rng::with_seed(5);
        let mut random =
            |tokens, heads| Array3::from_shape_simple_fn((tokens, heads, shape.qk_dim()), || rng.f32() - 0.5);
        let (q, k, v) =
            (random(7, shape.q_heads()), random(7, shape.kv_heads()), random(7, shape.kv_heads()));
        let next = (random(1, shape.q_heads()), random(1, shape.kv_heads()), random(1, shape.kv_heads()));
        let positions: Vec<u32> = (0..8).collect();
        let outputs = [false, true].map(|append| {
            let mut cache = kv::open(&mode(name), &model, 16).unwrap();
            assert!(cache.is_empty());
            for layer in 0..2 {
                let prompt = kv::Step {
                    layer,
                    positions: &positions[..7],
                    q: q.view(),
                    k: k.view(),
                    v: v.view(),
                    w_o: &w_o,
                };
                match append {
                    true => cache.append(&prompt).unwrap(),
                    false => assert_eq!(
                        cache.forward(&prompt).unwrap().dim(),
                        (7, shape.q_heads() * shape.v_dim())
                    ),
                }
            }
            assert_eq!(cache.len(), 7);
            let (q, k, v) = (next.0.view(), next.1.view(), next.2.view());
            let step = kv::Step { layer: 1, positions: &positions[7..], q, k, v, w_o: &w_o };
            cache.forward(&step).unwrap()
        });
        assert_eq!(outputs[0], outputs[1], "{name}");
        assert!(outputs[0].iter().any(|x| x.abs() > 1e-3), "{name}");
    }
}

#[test]
fn a_cleared_cache_is_a_new_one() {
    let model = load(&golden("qwen3")).unwrap();
    for name in kv::DEMO.iter().filter(|name| kv::unavailable(&mode(name), model.path()).is_none()) {
        let mut used = session(&model, name, 8);
        used.prefill(&[1, 2, 3]).unwrap();
        assert!(used.memory().device > 0);
        used.clear();
        assert!(used.is_empty());
        assert_eq!(used.memory(), kv::KvMemory::default(), "{name}");
        let mut fresh = session(&model, name, 8);
        assert_eq!(used.prefill(&[4, 5]).unwrap(), fresh.prefill(&[4, 5]).unwrap(), "{name}");
        assert_eq!(used.decode(6).unwrap(), fresh.decode(6).unwrap(), "{name}");
    }
}

#[test]
fn a_prompt_may_come_in_parts() {
    let model = load(&golden("qwen2")).unwrap();
    let tokens: Vec<u32> = (0..20).collect();
    let mut whole = session(&model, "dense", 20);
    let expected = whole.prefill(&tokens).unwrap();
    let mut parts = session(&model, "dense", 20);
    parts.prefill(&tokens[..3]).unwrap();
    parts.prefill(&tokens[3..4]).unwrap();
    let found = parts.prefill(&tokens[4..]).unwrap();
    for (token, (a, b)) in found.iter().zip(&expected).enumerate() {
        assert!((a - b).abs() < 1e-4, "token {token}: {a}, not {b}");
    }
}

#[test]
fn what_a_sequence_refuses() {
    let model = load(&bundled()).unwrap();
    let mut session = session(&model, "dense", 4);
    assert!(matches!(session.prefill(&[]), Err(Error::Argument { argument: "prompt", .. })));
    assert!(matches!(session.prefill(&[1, 256]), Err(Error::Token { token: 256, vocab_size: 256 })));
    assert!(session.is_empty(), "nothing was stored");
    session.prefill(&[1, 2, 3, 4]).unwrap();
    assert!(session.decode(5).is_err(), "over its capacity");
    let open = |capacity| kv::open(&mode("dense"), &model, capacity).map(drop);
    assert!(open(2048).is_ok());
    assert!(matches!(open(2049), Err(Error::Context { asked: 2049, maximum: 2048 })));
}

#[test]
fn unknown_modes_list_the_known_ones() {
    let model = load(&bundled()).unwrap();
    let unknown = mode("unknown");
    let linear = longkv_engine::Model::load(&bundled(), &unknown).map(drop);
    for (seam, result, known) in [
        ("KV", kv::open(&unknown, &model, 8).map(drop), kv::METHODS),
        ("linear", linear, linear::METHODS),
        ("ranks", ranks::open(&unknown).map(drop), ranks::METHODS),
    ] {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(seam), "{message}");
        for method in known {
            assert!(message.contains(method.name), "{message}");
        }
    }
    for method in kv::METHODS {
        let file = match method.name {
            "fdc" => format!(":{}", bundled().join("plans/fdc-0.5.safetensors").display()),
            name if method.file => panic!("give this test a file for {name}"),
            _ => String::new(),
        };
        let name = format!("{}{file}", method.name);
        kv::open(&mode(&name), &model, 8).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    assert_eq!(ranks::open(&mode("single")).unwrap().count(), 1);
}
