//! `--weights`, whatever the command.

use serde_json::{Value, json};

use crate::support::{bundled, copy, set_config};
use crate::{heldout, path, read_json, succeed};

/// Where weights live changes no bit of a result, and what they moved is told.
#[test]
fn weights_in_host_memory() {
    let folder = tempfile::tempdir().unwrap();
    let logits = |weights: &str| {
        let file = folder.path().join("logits.json");
        let arguments =
            ["logits", "--tokens", "100,101,102,32,40", "--weights", weights, "--json", path(&file)];
        succeed(&arguments);
        read_json(&file)["logits"].clone()
    };
    let none = logits("host:0");
    for weights in ["host:0.5", "host:0.75", "host:1", "host:1,alpha=0"] {
        assert!(logits(weights) == none, "{weights}: other logits than with all weights in HBM");
    }
    let dense = logits("dense");
    let values = |logits: &Value| -> Vec<f64> {
        let rows = logits.as_array().unwrap().iter();
        rows.flat_map(|row| row.as_array().unwrap()).map(|logit| logit.as_f64().unwrap()).collect()
    };
    for (index, (found, expected)) in values(&none).iter().zip(values(&dense)).enumerate() {
        assert!((found - expected).abs() < 1e-3, "logit {index}: {found}, dense {expected}");
    }

    let generate = |weights: &str| {
        succeed(&["generate", "--prompt", "import ", "--max-tokens", "8", "--weights", weights])
    };
    let (plain, host) = (generate("dense"), generate("host:0.75"));
    let report = host.strip_prefix(&plain).unwrap_or_else(|| panic!("other text: {host}"));
    // 7 tokens of the prompt, then 7 steps of one. 12 of each 16 columns in host memory, each byte once.
    for word in ["7 tokens × 1 ", "1 tokens × 7 ", "H200 (PCIe)", "GH200 1g", "none was measured"] {
        assert!(report.contains(word), "{word}: {report}");
    }
    assert!(!report.contains("not as predicted"), "{report}");
    let step = report.lines().find(|line| line.contains("1 tokens × 7 ")).unwrap();
    assert!(step.contains("MB in") || step.contains("kB in"), "{step}");
    assert!(!plain.contains("Weights per step"), "{plain}");
}

/// Evaluation and demo say the same with weights in host memory as with all in HBM, to the last digit, and tell what each step
/// moved and what it would take on every device.
#[test]
fn evaluation_and_demo_with_weights_in_host_memory() {
    let folder = tempfile::tempdir().unwrap();
    let (file, json) = (folder.path().join("text"), folder.path().join("report.json"));
    std::fs::write(&file, "import sys\n\nsys.exit(0)\n").unwrap();
    let moved = |stdout: &str, steps: &[&str]| {
        let devices = ["H200 (PCIe)", "GH200 ", "GH200 3g", "GH200 2g", "GH200 1g"];
        let words = ["Weights per step, counted", "link ", "Predicted time", "none was measured"];
        for word in devices.iter().chain(&words).chain(steps) {
            assert!(stdout.contains(word), "{word}: {stdout}");
        }
        assert!(!stdout.contains("not as predicted"), "{stdout}");
    };
    let eval = |weights: &str| {
        let stdout = succeed(&["eval", "--text", path(&file), "--weights", weights, "--json", path(&json)]);
        let report = read_json(&json);
        (stdout, report["nll_per_token"].as_f64().unwrap().to_bits())
    };
    let (none, exact) = eval("host:0");
    let (host, found) = eval("host:0.75");
    assert_eq!(found, exact, "other bits than with all weights in HBM");
    moved(&host, &["1 tokens × "]);
    assert!(host.contains("link ") && none.contains("link 0 B in 0 tiles"), "{none}");

    // A model of a short context, so that the demo's windows are short.
    let model = copy(&bundled());
    set_config(model.path(), json!({"max_position_embeddings": 128}));
    let text = model.path().join("text");
    std::fs::write(&text, &std::fs::read(heldout()).unwrap()[..240]).unwrap();
    let demo = |weights: &str| {
        let arguments = ["demo", "--model", path(model.path()), "--text", path(&text), "--weights", weights];
        let stdout = succeed(&arguments);
        // The text that is generated, and of the table everything but speeds.
        let generated = stdout.split("\nmode ").next().unwrap_or_default().to_string();
        let row = stdout.lines().find(|line| line.split_whitespace().next() == Some("dense")).unwrap();
        let cells: Vec<String> = row.split_whitespace().take(6).map(str::to_string).collect();
        (stdout, generated, cells)
    };
    let (all, host) = (demo("host:0"), demo("host:0.75"));
    assert!(!all.1.is_empty() && all.1 == host.1, "{} instead of {}", host.1, all.1);
    assert_eq!(all.2, host.2);
    moved(&host.0, &["1 tokens × "]);
}
