//! `engine generate`.

use crate::succeed;

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
