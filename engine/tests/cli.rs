//! The real binary: what it prints and writes, and how it refuses bad input.

mod support;

use std::path::Path;
use std::process::{Command, Output};

use longkv_engine::{kv, linear, ranks};
use serde_json::{Value, json};
use support::{bundled, copy, golden, set_config};

fn engine(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_engine")).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs a command that must succeed.
fn succeed(arguments: &[&str]) -> String {
    let output = engine(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// Runs a command that must fail with exit code 2 and one line on stderr that has all of `named`.
fn refuse(case: &str, arguments: &[&str], named: &[&str]) {
    let output = engine(arguments);
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(2), "{case}: {stderr}");
    assert_eq!(stdout, "", "{case}: something was printed");
    assert_eq!(stderr.lines().count(), 1, "{case}: {stderr}");
    assert!(stderr.starts_with("error: "), "{case}: {stderr}");
    for name in named {
        assert!(stderr.contains(name), "{case}: no {name:?} in {stderr}");
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn heldout() -> String {
    path(&bundled().join("heldout.txt")).to_string()
}

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
    let model = support::load(&model).unwrap();
    let mut session = support::session(&model, "dense,dtype=f32", 3);
    let last = session.prefill(&[3, 1, 39]).unwrap();
    for (token, (found, expected)) in logits[2].as_array().unwrap().iter().zip(last).enumerate() {
        let found = found.as_f64().unwrap() as f32;
        assert!((found - expected).abs() < 1e-5, "token {token}: {found}, not {expected}");
    }
}

#[test]
fn ranks_share_a_prompt() {
    let generate = |more: &[&str]| {
        let prompt = [
            "generate",
            "--prompt",
            "import os\n\ndef main():\n",
            "--max-tokens",
            "8",
            "--kv",
            "dense,dtype=f32",
        ];
        succeed(&[&prompt, more].concat())
    };
    let alone = generate(&[]);
    for more in [
        &["--ranks", "4"][..],
        &["--ranks", "3", "--sp", "ring"],
        &["--sp", "hybrid,ulysses=2", "--ranks", "4"],
    ] {
        let text = generate(more);
        let why = text.strip_prefix(&alone).unwrap_or_else(|| panic!("{more:?}: {text}"));
        match more.len() {
            2 => assert!(why.contains("Sharing 23 tokens among 4 ranks") && why.contains("chosen"), "{why}"),
            _ => assert_eq!(why, "", "nothing to choose: {more:?}"),
        }
    }
}

#[test]
fn generate_continues_the_prompt() {
    let greedy = |kv: &str| succeed(&["generate", "--prompt", "import ", "--max-tokens", "24", "--kv", kv]);
    let text = greedy("dense");
    assert!(text.starts_with("import "), "{text}");
    assert_eq!(text.len(), "import ".len() + 24 + 1, "24 bytes and a line break: {text:?}");
    assert_eq!(greedy("dense"), text, "greedy is deterministic");
    let sampled = |seed: &str| {
        succeed(&[
            "generate",
            "--prompt",
            "import ",
            "--max-tokens",
            "24",
            "--temperature",
            "1",
            "--seed",
            seed,
        ])
    };
    assert_eq!(sampled("1"), sampled("1"), "the seed decides");
    assert_ne!(sampled("1"), sampled("2"), "the seed decides");
}

#[test]
fn retrieval_reports_its_share() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("retrieval.json");
    let stdout = succeed(&["retrieval", "--context", "90", "--documents", "2", "--json", path(&file)]);
    let report = read_json(&file);
    let (right, asked) = (report["right"].as_u64().unwrap(), report["questions"].as_u64().unwrap());
    assert_eq!(asked, 4);
    assert!(stdout.contains(&format!("{right} of 4")), "{stdout}");
}

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

/// Nobody has to read stderr.
#[test]
fn a_closed_stderr_stops_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (file, text) = (folder.path().join("text"), folder.path().join("report.json"));
    std::fs::write(&file, "import sys\n\nsys.exit(0)\n").unwrap();
    let run = |arguments: &[&str]| {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(env!("CARGO_BIN_EXE_engine"));
        command.args(arguments).stderr(writer).stdout(std::process::Stdio::null()).status().unwrap().code()
    };
    assert_eq!(run(&["eval", "--text", path(&file), "--json", path(&text)]), Some(0));
    assert!(read_json(&text)["nll_per_token"].is_f64());
    assert_eq!(run(&["evaluate"]), Some(2), "a usage error");
}

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

    let loaded = support::load(model.path()).unwrap();
    let mut session = support::session(&loaded, "dense,dtype=f32", 8);
    let tokens: Vec<u32> = (0..8).collect();
    let windows = longkv_engine::eval::Windows::new(8, 3, 1).unwrap();
    let error =
        longkv_engine::eval::evaluate(&mut session, "dense", &tokens, windows, |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("position 2"), "{error}");
}

/// What the command line has wrong is found before a minute of calibration: here, before the text is read.
#[test]
fn compress_checks_its_target_first() {
    for (flag, value) in
        [("ratio", "0"), ("ratio", "nan"), ("ratio", "1.5"), ("keep-accuracy", "1"), ("keep-accuracy", "-1")]
    {
        let arguments =
            ["compress", &format!("--{flag}"), value, "--text", "/nonexistent", "--out", "/nonexistent/plan"];
        refuse(value, &arguments, &[flag, "expected a number above 0"]);
    }
}

#[test]
fn help_names_every_mode() {
    let help = succeed(&["--help"]);
    assert_eq!(succeed(&["help"]), help);
    assert_eq!(succeed(&["eval", "-h"]), help);
    for word in
        ["demo", "eval", "generate", "retrieval", "logits", "compress", "inspect", "--prefill N", "--ranks P"]
    {
        assert!(help.contains(word), "{word}: {help}");
    }
    for (seam, methods) in [("kv", kv::METHODS), ("weights", linear::METHODS), ("sp", ranks::METHODS)] {
        for method in methods {
            let line = format!("--{seam} {}", method.name);
            let found = help.lines().any(|found| {
                found.trim_start().strip_prefix(&line).is_some_and(|rest| rest.trim() == method.summary)
            });
            assert!(found, "{line}: {help}");
        }
    }
    assert!(succeed(&["--version"]).starts_with("engine "));
}

#[test]
fn bad_arguments() {
    let text = heldout();
    let cases: &[(&str, &[&str], &[&str])] = &[
        ("unknown command", &["evaluate"], &["evaluate", "demo, eval, generate, retrieval, logits"]),
        ("unknown flag", &["eval", "--texts", "x"], &["eval", "--texts"]),
        ("a flag of another command", &["logits", "--prompt", "x"], &["logits", "--prompt"]),
        ("short flag", &["eval", "-t", "x"], &["-t"]),
        ("stray word", &["eval", "--text", &text, "more"], &["more"]),
        ("no value", &["eval", "--text"], &["--text"]),
        ("given twice", &["eval", "--text", &text, "--text", &text], &["--text", "twice"]),
        ("no text", &["eval"], &["eval", "--text"]),
        ("no prompt", &["generate"], &["--prompt"]),
        ("no tokens", &["logits"], &["--tokens"]),
        ("empty prompt", &["generate", "--prompt", ""], &["prompt"]),
        ("context is no number", &["eval", "--text", &text, "--context", "many"], &["--context", "many"]),
        ("context is negative", &["eval", "--text", &text, "--context", "-1"], &["--context", "-1"]),
        ("context is 0", &["eval", "--text", &text, "--context", "0"], &["--context", "0"]),
        (
            "context overflows",
            &["eval", "--text", &text, "--context", "99999999999999999999"],
            &["--context"],
        ),
        ("windows is 0", &["eval", "--text", &text, "--windows", "0"], &["--windows"]),
        ("windows overflow", &["eval", "--text", &text, "--windows", "18446744073709551615"], &["text"]),
        (
            "max-tokens is a fraction",
            &["generate", "--prompt", "x", "--max-tokens", "1.5"],
            &["--max-tokens", "1.5"],
        ),
        (
            "max-tokens overflow",
            &["generate", "--prompt", "xx", "--max-tokens", "18446744073709551615"],
            &["2048"],
        ),
        (
            "temperature is no number",
            &["generate", "--prompt", "x", "--temperature", "hot"],
            &["--temperature", "hot"],
        ),
        (
            "temperature is negative",
            &["generate", "--prompt", "x", "--temperature", "-1"],
            &["temperature", "-1"],
        ),
        (
            "temperature is NaN",
            &["generate", "--prompt", "x", "--temperature", "nan"],
            &["temperature", "NaN"],
        ),
        ("seed is negative", &["generate", "--prompt", "x", "--seed", "-3"], &["--seed", "-3"]),
        ("tokens are no numbers", &["logits", "--tokens", "1,two"], &["--tokens", "1,two"]),
        ("tokens are empty", &["logits", "--tokens", ""], &["--tokens"]),
        ("tokens end early", &["logits", "--tokens", "1,"], &["--tokens"]),
        ("token out of range", &["logits", "--tokens", "1,256"], &["256"]),
        (
            "prefill is the context",
            &["eval", "--text", &text, "--context", "64", "--prefill", "64"],
            &["prefill", "64"],
        ),
        (
            "prefill over the default context",
            &["eval", "--text", &text, "--prefill", "1024"],
            &["prefill", "1024"],
        ),
        ("context over the maximum", &["eval", "--text", &text, "--context", "2049"], &["2049", "2048"]),
        ("retrieval over the maximum", &["retrieval", "--context", "4096"], &["4096", "2048"]),
        (
            "documents without end",
            &["retrieval", "--documents", "18446744073709551615"],
            &["documents", "10000", "18446744073709551615"],
        ),
        ("retrieval too short", &["retrieval", "--context", "20"], &["context", "20"]),
        (
            "generation over the maximum",
            &["generate", "--prompt", "x", "--max-tokens", "2048"],
            &["2049", "2048"],
        ),
        ("demo over the maximum", &["demo", "--context", "2049"], &["2049", "2048"]),
        (
            "text too short",
            &["eval", "--text", &text, "--context", "2048", "--windows", "900"],
            &["text", "76623"],
        ),
        ("text is missing", &["eval", "--text", "/nonexistent/text"], &["/nonexistent/text"]),
        ("text is a folder", &["eval", "--text", "/"], &["cannot read /"]),
        (
            "unknown mode",
            &["eval", "--text", &text, "--kv", "sparse-ish"],
            &["KV", "sparse-ish", "known: dense"],
        ),
        (
            "unknown linear mode",
            &["generate", "--prompt", "x", "--weights", "tape"],
            &["linear", "tape", "known: dense"],
        ),
        ("no share", &["generate", "--prompt", "x", "--weights", "host"], &["host:SHARE"]),
        ("share over 1", &["eval", "--text", &text, "--weights", "host:1.5"], &["host:1.5", "0 to 1"]),
        ("unknown format", &["demo", "--weights", "host:0.5,format=int3"], &["stored, int8 or int4", "int3"]),
        (
            "unknown ranks mode",
            &["generate", "--prompt", "x", "--ranks", "2", "--sp", "mob"],
            &["ranks", "mob", "known: single, auto"],
        ),
        ("mode without a name", &["generate", "--prompt", "x", "--kv", ",dtype=f16"], &["NAME[:FILE]"]),
        ("unknown option", &["generate", "--prompt", "x", "--kv", "dense,bits=2"], &["bits", "dtype"]),
        ("bad option", &["generate", "--prompt", "x", "--kv", "dense,dtype=int4"], &["dtype", "int4"]),
        ("mode takes no file", &["generate", "--prompt", "x", "--kv", "dense:plan"], &["no file"]),
        ("mode takes no other", &["generate", "--prompt", "x", "--kv", "dense+dense"], &["composed"]),
        ("no model", &["generate", "--prompt", "x", "--model", "/nonexistent"], &["/nonexistent"]),
    ];
    for (case, arguments, named) in cases {
        refuse(case, arguments, named);
    }
}

#[test]
fn an_unwritable_json_path_stops_the_command_before_its_work() {
    let folder = tempfile::tempdir().unwrap();
    let heldout = heldout();
    let missing = folder.path().join("missing/report.json");
    // Work would find that the model is missing; the path is found first.
    for (case, file) in
        [("no such folder", missing.as_path()), ("a folder", folder.path()), ("nothing", Path::new(""))]
    {
        let arguments = ["eval", "--text", &heldout, "--model", "/nonexistent", "--json", path(file)];
        refuse(case, &arguments, &["cannot write", path(file)]);
    }
    // And a failure later leaves neither a file nor a change.
    let (new, old) = (folder.path().join("new.json"), folder.path().join("old.json"));
    std::fs::write(&old, "kept").unwrap();
    for file in [&new, &old] {
        refuse(
            "context",
            &["eval", "--text", &heldout, "--context", "9999", "--json", path(file)],
            &["9999"],
        );
        refuse("token", &["logits", "--tokens", "999", "--json", path(file)], &["999"]);
    }
    assert!(!new.exists());
    assert_eq!(std::fs::read_to_string(&old).unwrap(), "kept");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "a temporary file is left");
}

/// A command that is broken off while it works leaves nothing beside its output.
#[test]
fn nothing_is_written_before_the_end() {
    use std::io::{BufRead, BufReader};
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("report.json");
    let mut child = Command::new(env!("CARGO_BIN_EXE_engine"))
        .args(["eval", "--text", &heldout(), "--json", path(&file)])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // The first line says that work begins; it takes many seconds.
    let mut line = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
    child.kill().unwrap();
    assert!(!child.wait().unwrap().success(), "it was over before it was broken off");
    assert!(line.contains("1024 tokens"), "{line}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "a file is left");
}

/// A link stays a link, and a device a device: a rename would put a file in their place.
#[cfg(unix)]
#[test]
fn links_and_devices_are_written_in_place() {
    let folder = tempfile::tempdir().unwrap();
    let (file, link) = (folder.path().join("file"), folder.path().join("link"));
    std::fs::write(&file, "x".repeat(100_000)).unwrap();
    std::os::unix::fs::symlink(&file, &link).unwrap();
    succeed(&["logits", "--tokens", "1,2", "--json", path(&link)]);
    assert!(link.symlink_metadata().unwrap().is_symlink());
    assert_eq!(read_json(&file)["tokens"], json!([1, 2]), "the old content is gone");

    let device = folder.path().join("null");
    std::os::unix::fs::symlink("/dev/null", &device).unwrap();
    succeed(&["logits", "--tokens", "1,2", "--json", path(&device)]);
    assert!(device.symlink_metadata().unwrap().is_symlink());
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
