//! Bytes and `tokenizer.json`: encoding, places in the text, and streaming.

mod support;

use longkv_engine::tokenizer::Tokenizer;
use longkv_engine::{Config, Error};
use serde_json::{Value, json};
use support::bundled;

/// A tokenizer in the manner of Llama 2: spaces are "▁", unknown characters fall back to bytes, a BOS comes first.
fn llama_like() -> Value {
    let mut vocab: serde_json::Map<String, Value> = serde_json::Map::new();
    let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
    let letters = "▁abcdefghijklmnopqrstuvwxyz=->0123456789".chars().map(String::from);
    let merged = ["▁s", "▁se", "▁set", "12", "▁12"].map(String::from);
    for piece in ["<unk>", "<s>"].map(String::from).into_iter().chain(bytes).chain(letters).chain(merged) {
        let id = vocab.len();
        vocab.insert(piece, json!(id));
    }
    json!({
        "version": "1.0",
        "added_tokens": [{
            "id": 1, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true
        }],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        ]},
        "pre_tokenizer": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        ]},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
            "merges": [["▁", "s"], ["▁s", "e"], ["▁se", "t"], ["1", "2"], ["▁", "12"]]
        }
    })
}

fn config(vocab_size: usize) -> Config {
    let mut config = Config::read(&bundled()).unwrap();
    config.vocab_size = vocab_size;
    config
}

fn both() -> [(&'static str, Tokenizer); 2] {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), llama_like().to_string()).unwrap();
    [
        ("bytes", Tokenizer::read(&bundled(), &config(256)).unwrap()),
        ("tokenizer.json", Tokenizer::read(folder.path(), &config(32_000)).unwrap()),
    ]
}

#[test]
fn text_survives_encoding_decoding_and_streaming() {
    for (kind, tokenizer) in both() {
        for text in
            ["set abc = 12345", "  two spaces", "Grüße, 世界 — 🦀!\n", "a\n b\n\n  set\n12\n", "x", "\n"]
        {
            let tokens = tokenizer.encode(text.as_bytes()).unwrap();
            let decoded = tokenizer.decode(&tokens).unwrap();
            assert_eq!(String::from_utf8_lossy(&decoded), text, "{kind}");
            assert_eq!(String::from_utf8_lossy(&streamed(&tokenizer, &tokens)), text, "{kind}, streamed");
        }
        assert!(tokenizer.encode(b"").unwrap().len() <= 1, "{kind}: at most a BOS");
    }
}

/// Lengths that a file sets were meant for batches in training.
#[test]
fn a_files_truncation_and_padding_are_left_out() {
    let text = "set abc = 12345 ".repeat(8);
    let [_, (_, plain)] = both();
    let expected = plain.pieces(text.as_bytes()).unwrap();
    assert!(expected.len() > 64);
    let truncation = json!({"direction": "Right", "max_length": 40, "strategy": "LongestFirst", "stride": 0});
    let padding = |strategy: Value| {
        json!({"strategy": strategy, "direction": "Right", "pad_to_multiple_of": 64, "pad_id": 0, "pad_type_id": 0,
               "pad_token": "<unk>"})
    };
    for (case, key, value) in [
        ("truncation", "truncation", truncation),
        ("fixed padding", "padding", padding(json!({"Fixed": 1000}))),
        ("padding of a batch", "padding", padding(json!("BatchLongest"))),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mut file = llama_like();
        file[key] = value;
        std::fs::write(folder.path().join("tokenizer.json"), file.to_string()).unwrap();
        let tokenizer = Tokenizer::read(folder.path(), &config(32_000)).unwrap();
        assert_eq!(tokenizer.pieces(text.as_bytes()).unwrap(), expected, "{case}");
    }
}

fn streamed(tokenizer: &Tokenizer, tokens: &[u32]) -> Vec<u8> {
    let mut stream = tokenizer.stream();
    let mut bytes = Vec::new();
    for &token in tokens {
        bytes.extend(stream.push(token).unwrap());
    }
    bytes.extend(stream.finish().unwrap());
    bytes
}

/// A model may choose any tokens, bytes that make no characters among them.
#[test]
fn streamed_tokens_are_utf8_and_none_is_lost() {
    let [_, (_, tokenizer)] = both();
    let byte = |byte: u32| byte + 2;
    let letter = tokenizer.encode(b"a").unwrap()[2];
    let [c3, a9, bd] = [0xc3, 0xa9, 0xbd].map(byte);
    for (case, tokens, expected) in [
        ("whole", vec![letter, c3, a9, letter], "aéa"),
        ("cut at the end", vec![letter, c3], "a\u{fffd}"),
        ("bytes alone", vec![bd, bd], "\u{fffd}\u{fffd}"),
        ("a third byte after two that fit", vec![letter, c3, a9, bd, letter], "aé\u{fffd}\u{fffd}a"),
        ("several, and the end", vec![letter, c3, a9, bd, bd], "aé\u{fffd}\u{fffd}\u{fffd}"),
        ("a line break among them", vec![byte(10), bd, letter, c3, a9], "\n\u{fffd}aé"),
    ] {
        let found =
            String::from_utf8(streamed(&tokenizer, &tokens)).unwrap_or_else(|e| panic!("{case}: {e}"));
        assert_eq!(found, expected, "{case}");
    }
    for seed in 0..50 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let tokens: Vec<u32> = (0..200).map(|_| rng.u32(2..302)).collect();
        let found = streamed(&tokenizer, &tokens);
        let found = String::from_utf8(found).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        // What is no byte comes through as it is, whatever stands around it.
        let letters = |text: &str| text.matches(|c: char| c.is_ascii_lowercase()).count();
        let decoded = String::from_utf8(tokenizer.decode(&tokens).unwrap()).unwrap();
        assert!(letters(&found) >= letters(&decoded), "seed {seed}: {found:?}, not {decoded:?}");
    }
}

#[test]
fn pieces_know_their_place() {
    for (kind, tokenizer) in both() {
        let text = "set é = 12345\nset";
        let pieces = tokenizer.pieces(text.as_bytes()).unwrap();
        let mut covered = vec![false; text.len()];
        for piece in &pieces {
            covered[piece.bytes.clone()].fill(true);
        }
        assert!(covered.iter().all(|&covered| covered), "{kind}: {pieces:?}");
        // The digits, wherever their tokens begin.
        let digits: Vec<u32> = pieces
            .iter()
            .filter(|piece| piece.bytes.start < 14 && 9 < piece.bytes.end)
            .map(|piece| piece.token)
            .collect();
        let found = String::from_utf8(tokenizer.decode(&digits).unwrap()).unwrap();
        assert_eq!(found.trim(), "12345", "{kind}: {pieces:?}");
    }
}

#[test]
fn special_tokens_stand_for_no_text() {
    let [_, (_, tokenizer)] = both();
    let pieces = tokenizer.pieces(b"set").unwrap();
    assert_eq!(pieces[0].token, 1, "BOS comes first");
    assert!(pieces[0].bytes.is_empty());
    assert_eq!(pieces.len(), 2, "merged: {pieces:?}");
    assert_eq!(tokenizer.decode(&[1]).unwrap(), b"");
    assert!(tokenizer.encode(b"\xff\xfe").unwrap_err().to_string().contains("UTF-8"));
}

#[test]
fn only_a_vocabulary_of_bytes_needs_no_file() {
    let folder = tempfile::tempdir().unwrap();
    assert!(Tokenizer::read(folder.path(), &config(256)).is_ok());
    assert!(matches!(Tokenizer::read(folder.path(), &config(257)), Err(Error::Read { .. })));
    std::fs::write(folder.path().join("tokenizer.json"), "{").unwrap();
    assert!(matches!(Tokenizer::read(folder.path(), &config(256)), Err(Error::Malformed { .. })));
}
