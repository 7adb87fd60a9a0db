//! `engine logits`.

use serde_json::json;

use crate::support::golden;
use crate::{path, read_json, succeed};

#[test]
fn logits_are_written_for_all_positions() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("logits.json");
    let model = golden("qwen2");
    let stdout = succeed(&["logits", "--model", path(&model), "--tokens", "3, 1,39", "--json", path(&file)]);
    assert_eq!(stdout.lines().count(), 4, "{stdout}");
    let report = read_json(&file);
    assert_eq!(report.as_object().unwrap().len(), 3);
    assert_eq!((&report["tokens"], &report["vocab_size"]), (&json!([3, 1, 39]), &json!(40)));
    let logits = report["logits"].as_array().unwrap();
    assert_eq!(logits.len(), 3);
    assert!(logits.iter().all(|row| row.as_array().is_some_and(|row| row.len() == 40)));
    // The library's own.
    let model = crate::support::load(&model).unwrap();
    let mut session = crate::support::session(&model, "dense,dtype=f32", 3);
    let last = session.prefill(&[3, 1, 39]).unwrap();
    for (token, (found, expected)) in logits[2].as_array().unwrap().iter().zip(last).enumerate() {
        let found = found.as_f64().unwrap() as f32;
        assert!((found - expected).abs() < 1e-5, "token {token}: {found}, not {expected}");
    }
}
