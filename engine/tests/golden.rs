//! Logits of tiny random checkpoints against transformers in f32 (see `golden/make.py`), and of each path against the
//! others.

mod support;

use ndarray::{Array2, ArrayView2};
use serde_json::{Value, json};
use support::{copy, golden, load, mode, session, set_config};

use longkv_engine::{Model, kv};

/// Checkpoints, and changes to `config.json` that each take away something the logits depend on.
fn cases() -> Vec<(&'static str, Vec<(&'static str, Value)>)> {
    vec![
        (
            "llama",
            vec![
                ("llama3 scaling", json!({"rope_scaling": null})),
                ("rope_theta", json!({"rope_theta": 600.0})),
                ("ε", json!({"rms_norm_eps": 0.5})),
            ],
        ),
        (
            "llama-bias",
            vec![
                ("linear scaling", json!({"rope_scaling": null})),
                ("attention bias", json!({"attention_bias": false})),
                ("feed-forward bias", json!({"mlp_bias": false})),
            ],
        ),
        (
            "mistral",
            vec![
                ("window", json!({"sliding_window": null})),
                ("a wider window", json!({"sliding_window": 8})),
            ],
        ),
        (
            "qwen2",
            vec![
                ("window", json!({"use_sliding_window": false})),
                ("the layer that has it", json!({"max_window_layers": 0})),
                ("window by layer type", json!({"layer_types": ["sliding_attention", "full_attention"]})),
            ],
        ),
        (
            "qwen3",
            vec![(
                "theta in rope_parameters",
                json!({"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}}),
            )],
        ),
        (
            "yarn",
            vec![(
                "scaling in rope_parameters",
                json!({"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
            )],
        ),
    ]
}

struct Golden {
    tokens: Vec<u32>,
    logits: Array2<f32>,
}

fn read(name: &str) -> Golden {
    let bytes = std::fs::read(golden(&format!("{name}.safetensors"))).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: &str| {
        let tensor = file.tensor(name).unwrap();
        let words = tensor.data().as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect();
        (tensor.shape().to_vec(), words)
    };
    let (_, tokens): (_, Vec<u32>) = words("tokens");
    let (shape, logits): (_, Vec<u32>) = words("logits");
    let logits = logits.into_iter().map(f32::from_bits).collect();
    Golden { tokens, logits: Array2::from_shape_vec((shape[0], shape[1]), logits).unwrap() }
}

fn one_shot(model: &Model, kv: &str, tokens: &[u32]) -> Array2<f32> {
    let mut cache = kv::open(&mode(kv), model, tokens.len()).unwrap();
    let hidden = model.forward(tokens, 0, &mut *cache).unwrap();
    model.logits(hidden.view()).unwrap()
}

/// Largest distance, and where: (distance, [position, token]).
fn distance(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>) -> (f32, (usize, usize)) {
    assert_eq!(a.dim(), b.dim());
    a.indexed_iter().map(|(at, a)| ((a - b[at]).abs(), at)).fold((0.0, (0, 0)), |worst, next| {
        // A NaN is the worst of all.
        if next.0 <= worst.0 { worst } else { next }
    })
}

#[test]
fn logits_are_those_of_transformers() {
    for (name, _) in cases() {
        let expected = read(name);
        assert!(
            expected.logits.iter().any(|logit| logit.abs() > 1.0),
            "{name}: the golden logits say nothing"
        );
        let model = load(&golden(name)).unwrap();
        let found = one_shot(&model, "dense,dtype=f32", &expected.tokens);
        let (worst, at) = distance(found.view(), expected.logits.view());
        println!("{name}: {worst:e}");
        assert!(worst <= 1e-3, "{name}: logit {at:?} is {}, not {}", found[at], expected.logits[at]);
    }
}

#[test]
fn every_key_of_the_configuration_counts() {
    for (name, changes) in cases() {
        let expected = read(name);
        for (what, change) in changes {
            let copy = copy(&golden(name));
            set_config(copy.path(), change);
            let found = one_shot(&load(copy.path()).unwrap(), "dense,dtype=f32", &expected.tokens);
            let (worst, _) = distance(found.view(), expected.logits.view());
            assert!(worst > 1e-2, "{name}: the logits do not depend on {what} ({worst:e})");
        }
    }
}

#[test]
fn other_spellings_of_a_configuration_mean_the_same() {
    let default = json!({"rope_type": "default", "rope_theta": 1000000.0});
    for (name, what, change) in [
        ("qwen2", "old keys", json!({"rope_parameters": null, "rope_theta": 1e6})),
        (
            "qwen2",
            "old keys, null scaling",
            json!({"rope_parameters": null, "rope_theta": 1e6, "rope_scaling": null}),
        ),
        (
            "qwen2",
            "layer types",
            json!({"layer_types": ["full_attention", "sliding_attention"], "max_window_layers": 9}),
        ),
        ("qwen2", "explicit head_dim", json!({"head_dim": 8})),
        ("qwen3", "a window not in use", json!({"sliding_window": 3, "use_sliding_window": false})),
        ("qwen3", "a stray old theta", json!({"rope_theta": 10.0, "rope_parameters": default})),
        ("llama", "several ends of text", json!({"eos_token_id": [1, 2]})),
    ] {
        let expected = read(name);
        let copy = copy(&golden(name));
        set_config(copy.path(), change);
        let found = one_shot(&load(copy.path()).unwrap(), "dense,dtype=f32", &expected.tokens);
        let (worst, at) = distance(found.view(), expected.logits.view());
        assert!(worst <= 1e-3, "{name}, {what}: logit {at:?} is off by {worst:e}");
    }
}

#[test]
fn prefill_then_decode_is_one_shot() {
    for (name, _) in cases() {
        let tokens = read(name).tokens;
        let model = load(&golden(name)).unwrap();
        // Products of one row and of many sum in another order; in 16 bits, a last digit that differs may round a key to
        // its neighbour, an ε away.
        for (kv, epsilon) in
            [("dense,dtype=f32", 0.0), ("dense", 2f32.powi(-10)), ("dense,dtype=bf16", 2f32.powi(-7))]
        {
            let whole = one_shot(&model, kv, &tokens);
            for prefill in [1, 2, 5, 33, tokens.len() - 1] {
                let mut session = session(&model, kv, tokens.len());
                let (prompt, rest) = tokens.split_at(prefill);
                let mut rows = vec![session.prefill(prompt).unwrap()];
                rows.extend(rest.iter().map(|&token| session.decode(token).unwrap()));
                for (i, row) in rows.iter().enumerate() {
                    let position = prefill - 1 + i;
                    let expected = whole.row(position).insert_axis(ndarray::Axis(0));
                    let (worst, _) = distance(row.view().insert_axis(ndarray::Axis(0)), expected);
                    assert!(
                        worst <= 1e-4 + epsilon,
                        "{name}, {kv}, prefill {prefill}, position {position}: {worst:e}"
                    );
                }
            }
        }
    }
}

#[test]
fn golden_files_stay_small() {
    fn size(path: &std::path::Path) -> u64 {
        match path.is_dir() {
            true => std::fs::read_dir(path).unwrap().map(|entry| size(&entry.unwrap().path())).sum(),
            false => path.metadata().unwrap().len(),
        }
    }
    let bytes = size(&golden(""));
    assert!(bytes <= 200_000, "{bytes} bytes");
}
