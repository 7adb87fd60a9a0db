//! `--ranks` and `--sp`, whatever the command.

use crate::{heldout, refuse, succeed};

const PROMPT: &str = "import os\n\ndef main():\n";

fn generate(more: &[&str]) -> String {
    let arguments = ["generate", "--prompt", PROMPT, "--max-tokens", "8", "--kv", "dense,dtype=f32"];
    succeed(&[&arguments, more].concat())
}

/// The same text; then why it was shared so, where somebody had to choose, and who holds what.
#[test]
fn ranks_share_a_prompt() {
    let alone = generate(&[]);
    for (more, chosen) in [
        (&["--ranks", "4"][..], true),
        (&["--ranks", "8", "--sp", "auto,region=4"], true),
        (&["--ranks", "3", "--sp", "ring"], false),
        (&["--sp", "hybrid,ulysses=2", "--ranks", "4"], false),
        (&["--sp", "megatron", "--ranks", "2"], false),
        (&["--sp", "fast,node=2,region=2,attention=megatron", "--ranks", "4"], false),
    ] {
        let text = generate(more);
        let more_text = text.strip_prefix(&alone).unwrap_or_else(|| panic!("{more:?}: {text}"));
        let sharing = more_text.contains("Sharing 23 tokens among") && more_text.contains("; chosen");
        assert_eq!(sharing, chosen, "{more:?}: {more_text}");
        // The last token that was generated was never run: 23 + 7 tokens, and 4 bytes an element.
        let bytes = 30 * 4 * 1024;
        let held: Vec<_> = more_text.lines().filter(|line| line.contains(" holds ")).collect();
        assert!(
            matches!(held[..], [line] if line.contains("rank 0") && line.contains(" 30 tokens")),
            "{more_text}"
        );
        assert!(held[0].ends_with(" bytes") && !held[0].contains("sent"), "{more_text} {bytes}");
    }
}

/// Each rank has its share, and says how much; text and perplexity are one rank's.
#[test]
fn ranks_keep_their_shards() {
    let alone = generate(&[]);
    for sharing in ["ring,kv=sharded", "auto,kv=sharded", "megatron,region=2,kv=sharded"] {
        let text = generate(&["--ranks", "4", "--sp", sharing]);
        let more = text.strip_prefix(&alone).unwrap_or_else(|| panic!("{sharing}: {text}"));
        assert!(more.contains("Keys and values, sharded over 4 ranks:"), "{more}");
        let numbers = |line: &str| -> Vec<usize> {
            line.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse().ok()).collect()
        };
        let held: Vec<Vec<usize>> =
            more.lines().filter(|line| line.contains(" holds ")).map(numbers).collect();
        assert_eq!(held.len(), 4, "{more}");
        let mut tokens = 0;
        for (rank, line) in held.iter().enumerate() {
            let [found, new, bytes, sent, decoded] = line[..] else { panic!("{more}") };
            assert_eq!((found, bytes * 7, decoded), (rank, bytes / new * new * 7, 7), "{more}");
            assert!(sent > 0 && [7, 8].contains(&new), "{more}");
            tokens += new;
        }
        assert_eq!(tokens, 30, "{more}");
    }
    let heldout = heldout();
    let eval = |more: &[&str]| {
        let arguments = ["eval", "--text", &heldout, "--context", "96", "--windows", "2"];
        let text = succeed(&[&arguments, more].concat());
        let line = text.lines().find(|line| line.starts_with("nll per token")).map(str::to_string);
        (line.unwrap_or_else(|| panic!("{text}")), text)
    };
    let (nll, text) = eval(&["--ranks", "3", "--sp", "ring,kv=sharded"]);
    assert_eq!(nll, eval(&[]).0, "{text}");
    assert!(text.contains("sharded over 3 ranks") && text.contains("for 72 decoded tokens"), "{text}");
    // What cannot be sharded is not compared.
    let demo = succeed(&["--context", "48", "--ranks", "2", "--sp", "ring,kv=sharded"]);
    assert!(demo.contains("dense,dtype=bf16") && demo.contains("sharded over 2 ranks"), "{demo}");
    assert!(demo.contains("hack4 is left out: mode \"hack4\": hack4 cannot be sharded"), "{demo}");
}

#[test]
fn ranks_that_make_no_sense() {
    let refused = |more: &[&str], named: &[&str]| {
        refuse(&format!("{more:?}"), &[&["generate", "--prompt", "x"], more].concat(), named);
    };
    refused(&["--ranks", "2", "--sp", "ring,kv=sharded", "--kv", "hack8"], &["hack8 cannot be sharded"]);
    refused(&["--ranks", "2", "--sp", "ring,kv=spread"], &["kv: expected gathered or sharded"]);
    refused(&["--ranks", "3", "--sp", "megatron"], &["Megatron: q_heads = 4 cannot be dealt to 3 ranks"]);
    refused(&["--ranks", "4", "--sp", "fast,node=2,region=4"], &["a divisor of 2 ranks of a node, found 4"]);
    refused(
        &["--ranks", "2", "--sp", "megatron", "--weights", "host:0.5"],
        &["expected --weights dense, found host:0.5"],
    );
}
