//! Checkpoints that cannot be run.

use std::path::Path;

use serde_json::json;

use crate::support::{copy, golden, set_config};
use crate::{path, refuse};

/// Weights in range whose products are not: no result, rather than one that is NaN.
#[test]
fn a_model_that_overflows_is_refused() {
    let model = copy(&golden("yarn"));
    let file = model.path().join("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let huge: Vec<(String, safetensors::Dtype, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, view)| {
            let elements: usize = view.shape().iter().product();
            let (dtype, data) = match name.contains("norm") {
                true => (safetensors::Dtype::F32, 1e30f32.to_le_bytes().repeat(elements)),
                false => (view.dtype(), view.data().to_vec()),
            };
            (name.to_string(), dtype, view.shape().to_vec(), data)
        })
        .collect();
    let views = huge.iter().map(|(name, dtype, shape, data)| {
        (name, safetensors::tensor::TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    safetensors::serialize_to_file(views, None, &file).unwrap();
    let json = model.path().join("logits.json");
    let arguments = ["logits", "--tokens", "1,2", "--model", path(model.path()), "--json", path(&json)];
    refuse("logits", &arguments, &["position 0", "not finite"]);
    assert!(!json.exists());

    let loaded = crate::support::load(model.path()).unwrap();
    let mut session = crate::support::session(&loaded, "dense,dtype=f32", 8);
    let tokens: Vec<u32> = (0..8).collect();
    let windows = longkv_engine::eval::Windows::new(8, 3, 1).unwrap();
    let error =
        longkv_engine::eval::evaluate(&mut session, "dense", &tokens, windows, |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("position 2"), "{error}");
}

#[test]
fn damaged_checkpoints() {
    type Damage = fn(&Path);
    fn weights(folder: &Path) -> std::path::PathBuf {
        folder.join("model.safetensors")
    }
    fn shorten(file: &Path, bytes: u64) {
        std::fs::OpenOptions::new().write(true).open(file).unwrap().set_len(bytes).unwrap();
    }
    let cases: &[(&str, &str, Damage, &[&str])] = &[
        (
            "no config.json",
            "yarn",
            |f| std::fs::remove_file(f.join("config.json")).unwrap(),
            &["config.json"],
        ),
        (
            "config.json is no JSON",
            "yarn",
            |f| std::fs::write(f.join("config.json"), "{\n\"a\":").unwrap(),
            &["config.json"],
        ),
        ("no weights", "yarn", |f| std::fs::remove_file(weights(f)).unwrap(), &["safetensors"]),
        ("truncated weights", "yarn", |f| shorten(&weights(f), 9000), &["model.safetensors", "truncated"]),
        ("truncated header", "yarn", |f| shorten(&weights(f), 100), &["model.safetensors", "truncated"]),
        ("empty weights", "yarn", |f| shorten(&weights(f), 0), &["model.safetensors", "truncated"]),
        (
            "a weight is NaN",
            "yarn",
            |f| {
                let mut bytes = std::fs::read(weights(f)).unwrap();
                let last = bytes.len() - 2;
                bytes[last..].copy_from_slice(&0x7e00u16.to_le_bytes());
                std::fs::write(weights(f), bytes).unwrap();
            },
            &["tensor model.", "is NaN"],
        ),
        (
            "an absurd size",
            "yarn",
            |f| set_config(f, json!({"num_hidden_layers": 1u64 << 60})),
            &["num_hidden_layers"],
        ),
        (
            "a shard is missing",
            "llama",
            |f| std::fs::remove_file(f.join("model-00002-of-00002.safetensors")).unwrap(),
            &["model-00002"],
        ),
        (
            "an index that leaves its folder",
            "llama",
            |f| {
                std::fs::write(
                    f.join("model.safetensors.index.json"),
                    r#"{"weight_map":{"a":"../x.safetensors"}}"#,
                )
                .unwrap();
            },
            &["../x.safetensors"],
        ),
        (
            "fewer layers than weights",
            "yarn",
            |f| set_config(f, json!({"num_hidden_layers": 1})),
            &["num_hidden_layers", "expected 2", "found 1"],
        ),
        (
            "a tensor is missing",
            "yarn",
            |f| set_config(f, json!({"num_hidden_layers": 3})),
            &["model.layers.2"],
        ),
        (
            "no output projection",
            "qwen3",
            |f| set_config(f, json!({"tie_word_embeddings": false})),
            &["lm_head.weight"],
        ),
        ("no bias", "yarn", |f| set_config(f, json!({"attention_bias": true})), &["q_proj.bias"]),
        (
            "vocabulary of another size",
            "yarn",
            |f| set_config(f, json!({"vocab_size": 41})),
            &["embed_tokens", "[41, 16]", "[40, 16]"],
        ),
        (
            "heads of another size",
            "yarn",
            |f| set_config(f, json!({"head_dim": 16})),
            &["q_proj", "[64, 16]", "[32, 16]"],
        ),
        (
            "unknown architecture",
            "yarn",
            |f| set_config(f, json!({"architectures": ["GPT2LMHeadModel"]})),
            &["GPT2LMHeadModel", "LlamaForCausalLM"],
        ),
        (
            "no architecture",
            "yarn",
            |f| set_config(f, json!({"architectures": null})),
            &["architecture", "llama"],
        ),
        (
            "unknown RoPE type",
            "llama",
            |f| set_config(f, json!({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}})),
            &["spiral", "yarn"],
        ),
        (
            "unknown RoPE type, new keys",
            "qwen3",
            |f| set_config(f, json!({"rope_parameters": {"rope_type": "longrope"}})),
            &["longrope"],
        ),
        (
            "RoPE key is missing",
            "llama",
            |f| set_config(f, json!({"rope_scaling": {"type": "linear"}})),
            &["rope_scaling.factor"],
        ),
        (
            "RoPE key is no number",
            "llama",
            |f| set_config(f, json!({"rope_scaling": {"type": "linear", "factor": "2"}})),
            &["rope_scaling.factor"],
        ),
        ("RoPE out of range", "llama", |f| set_config(f, json!({"rope_theta": -1.0})), &["rope", "-1"]),
        ("a size is missing", "yarn", |f| set_config(f, json!({"hidden_size": null})), &["hidden_size"]),
        ("a size is 0", "yarn", |f| set_config(f, json!({"num_hidden_layers": 0})), &["num_hidden_layers"]),
        ("a size is text", "yarn", |f| set_config(f, json!({"hidden_size": "big"})), &["config.json", "big"]),
        (
            "heads that do not divide",
            "yarn",
            |f| set_config(f, json!({"num_key_value_heads": 3})),
            &["num_attention_heads"],
        ),
        ("activation", "yarn", |f| set_config(f, json!({"hidden_act": "gelu"})), &["hidden_act", "gelu"]),
        ("quantized", "yarn", |f| set_config(f, json!({"quantization_config": {"bits": 4}})), &["quantiz"]),
        (
            "partial rotary",
            "yarn",
            |f| set_config(f, json!({"partial_rotary_factor": 0.5})),
            &["partial_rotary_factor"],
        ),
        ("window of 0", "mistral", |f| set_config(f, json!({"sliding_window": 0})), &["sliding_window"]),
        (
            "unknown layer type",
            "qwen2",
            |f| set_config(f, json!({"layer_types": ["full_attention", "linear_attention"]})),
            &["linear_attention"],
        ),
    ];
    for (case, checkpoint, damage, named) in cases {
        let copy = copy(&golden(checkpoint));
        damage(copy.path());
        refuse(case, &["logits", "--tokens", "1,2", "--model", path(copy.path())], named);
    }
    let model = golden("yarn");
    refuse("no tokenizer", &["generate", "--prompt", "x", "--model", path(&model)], &["tokenizer.json"]);
}

#[test]
fn unsupported_weight_types_are_named() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(golden("qwen3").join("config.json"), folder.path().join("config.json")).unwrap();
    let data = vec![0u8; 40 * 16];
    let view =
        safetensors::tensor::TensorView::new(safetensors::Dtype::F8_E4M3, vec![40, 16], &data).unwrap();
    let file = folder.path().join("model.safetensors");
    safetensors::serialize_to_file([("model.embed_tokens.weight", view)], None, &file).unwrap();
    refuse(
        "f8",
        &["logits", "--tokens", "1", "--model", path(folder.path())],
        &["embed_tokens", "F8_E4M3", "f16"],
    );
}
