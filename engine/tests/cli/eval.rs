//! `engine eval`.

use serde_json::json;

use crate::{heldout, path, read_json, refuse, succeed};

#[test]
fn eval_writes_its_report() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("report.json");
    let heldout = heldout();
    let arguments = [
        "eval",
        "--text",
        &heldout,
        "--context",
        "64",
        "--windows",
        "2",
        "--kv",
        "dense",
        "--json",
        path(&file),
    ];
    let stdout = succeed(&arguments);
    let report = read_json(&file);
    let keys: Vec<_> = report.as_object().unwrap().keys().map(String::as_str).collect();
    let mut expected = [
        "model",
        "kv",
        "context",
        "prefill",
        "tokens",
        "nll_per_token",
        "perplexity",
        "kv_budget",
        "kv_bytes_per_token",
        "kv_hit_rate",
        "dense_kv_bytes_per_token",
        "device_kv_share",
        "host_kv_bytes_per_token",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
    ];
    expected.sort_unstable();
    assert_eq!(keys, expected);
    for (key, value) in
        [("kv", json!("dense")), ("context", json!(64)), ("prefill", json!(16)), ("tokens", json!(96))]
    {
        assert_eq!(report[key], value, "{key}");
    }
    let nll = report["nll_per_token"].as_f64().unwrap();
    assert!(stdout.contains(&format!("{nll:.4}")), "{stdout}");
    // Written a second time: the same numbers, and no other file.
    succeed(&arguments);
    assert_eq!(read_json(&file)["nll_per_token"].as_f64(), Some(nll));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn eval_of_a_short_text_is_one_short_window() {
    let folder = tempfile::tempdir().unwrap();
    let (file, json) = (folder.path().join("text"), folder.path().join("json"));
    std::fs::write(&file, "import sys\n\nsys.exit(0)\n").unwrap();
    succeed(&["eval", "--text", path(&file), "--json", path(&json)]);
    let report = read_json(&json);
    // 24 bytes, 6 of them prefilled, the last without a successor.
    assert_eq!((&report["context"], &report["tokens"]), (&json!(24), &json!(17)));
}

#[test]
fn texts_that_cannot_be_evaluated() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("text");
    for (case, content, named) in
        [("empty", "", "nothing in"), ("one byte", "x", "at least"), ("three", "xyz", "at least")]
    {
        std::fs::write(&file, content).unwrap();
        refuse(case, &["eval", "--text", path(&file)], &["text", named]);
    }
}
