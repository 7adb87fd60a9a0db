//! Help, and command lines that make no sense.

use longkv_engine::{kv, linear, ranks};

use crate::{heldout, refuse, succeed};

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
        (
            "unknown format",
            &["demo", "--weights", "host:0.5,format=int3"],
            &["stored, int8, int4, int4-zero-points, fp8-rows or fp8-blocks", "int3"],
        ),
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
