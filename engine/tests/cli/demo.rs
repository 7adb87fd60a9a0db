//! `engine demo`.

use serde_json::json;

use crate::support::{bundled, copy, set_config};
use crate::{heldout, path, succeed};

#[test]
fn the_demo_prints_a_table() {
    // No command is the demo; a flag may come first.
    let stdout = succeed(&["--context", "48", "--prompt", "def f():\n"]);
    assert!(stdout.contains("def f():\n"), "{stdout}");
    for mode in longkv_engine::kv::DEMO {
        let row = stdout.lines().find(|line| line.split_whitespace().next() == Some(mode));
        let mut cells = row.unwrap_or_else(|| panic!("no {mode} in {stdout}")).split_whitespace();
        assert!(cells.clone().count() >= 9, "{stdout}");
        assert_eq!(cells.nth(6), Some("–"), "the model does not answer: {stdout}");
    }
    for word in ["f16", "CPU reference", "KV bytes/token", "perplexity"] {
        assert!(stdout.contains(word), "{word}: {stdout}");
    }
}

/// The demo asks for less where model and text have less.
#[test]
fn the_demo_of_a_small_model_and_a_short_text() {
    let model = copy(&bundled());
    set_config(model.path(), json!({"max_position_embeddings": 128}));
    let text = model.path().join("text");
    std::fs::write(&text, &std::fs::read(heldout()).unwrap()[..240]).unwrap();
    let stdout = succeed(&["demo", "--model", path(model.path()), "--text", path(&text)]);
    for word in ["contexts up to 128", "1 windows of 128 held-out tokens"] {
        assert!(stdout.contains(word), "{word}: {stdout}");
    }
    // No plans lie beside this model.
    for mode in ["dense", "dense,dtype=bf16", "hack2"] {
        assert!(stdout.lines().any(|line| line.split_whitespace().next() == Some(mode)), "{mode}: {stdout}");
    }
}
