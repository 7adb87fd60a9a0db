//! The quantized modes: what they cost in quality and what they save in bytes, over the same tokens.

mod support;

use longkv_engine::eval::{Report, Windows, evaluate};
use longkv_engine::kv::{Geometry, Hack, HackOptions, KvCache};
use longkv_engine::{Error, kv};
use support::{bundled, load, mode, session};

fn eval(kv: &str, windows: Windows) -> Report {
    let model = load(&bundled()).unwrap();
    let text: Vec<u32> =
        std::fs::read(bundled().join("heldout.txt")).unwrap().into_iter().map(u32::from).collect();
    let mut session = session(&model, kv, windows.context);
    evaluate(&mut session, kv, &text, windows, |_, _| {}).unwrap()
}

#[test]
fn fewer_bits_cost_quality_and_save_bytes() {
    let windows = Windows::new(512, 128, 1).unwrap();
    let dense = eval("dense", windows);
    // Relative rise of the nll, and bytes per token: 4 layers × 2 KV heads, at 512 tokens 7 closed blocks, 4 sinks and room for
    // 64 open tokens. A head's segment has 2048 / 4096 / 8192 bytes of codes, 512 of scales and minima, and its sums.
    let mut rises = Vec::new();
    for (kv, segment, limit) in [
        ("hack8", 8192 + 512 + 256, 0.005),
        ("hack4", 4096 + 512 + 256, 0.03),
        ("hack2", 2048 + 512 + 128, 0.5),
    ] {
        let report = eval(kv, windows);
        assert_eq!(report.tokens, dense.tokens, "paired over the same tokens");
        let rise = report.nll_per_token / dense.nll_per_token - 1.0;
        println!(
            "{kv}: nll {} over {} dense, {} bytes per token",
            report.nll_per_token, dense.nll_per_token, report.kv_bytes_per_token
        );
        assert!(rise.abs() < limit, "{kv}: nll {} against {}", report.nll_per_token, dense.nll_per_token);
        let bytes = 4 * 2 * (7 * segment + (4 + 64) * 256);
        assert_eq!(report.kv_bytes_per_token, f64::from(bytes) / 512.0, "{kv}");
        rises.push(rise);
    }
    assert!(rises[0] < rises[1] && rises[1] < rises[2], "{rises:?}");
}

/// Keys per channel, not per token: the reason for the default.
#[test]
fn per_channel_keys_lose_less_than_per_token_keys() {
    let windows = Windows::new(384, 96, 1).unwrap();
    let [dense, channel, token] =
        ["dense", "hack2,sinks=4", "hack2,layout=token"].map(|kv| eval(kv, windows).nll_per_token);
    println!("dense {dense}, per channel {channel}, per token {token}");
    assert!(dense < channel && channel < token, "dense {dense}, per channel {channel}, per token {token}");
}

/// Wherever a stream is cut, the receiver is empty and takes the next one.
#[test]
fn a_cut_stream_leaves_an_empty_cache() {
    let model = load(&bundled()).unwrap();
    let geometry = Geometry::new(model.config(), 160).unwrap();
    let cache = || Hack::new(&geometry, &HackOptions::new(&mode("hack4"), 4).unwrap()).unwrap();
    let tokens: Vec<u32> = (0..150).map(|i| 32 + i * 7 % 90).collect();
    let mut sender = cache();
    let last = model.forward(&tokens, 0, &mut sender).unwrap();
    let mut stream = Vec::new();
    sender.send(&mut stream, 7).unwrap();
    let mut receiver = cache();
    // The end closely, the rest in steps that meet every kind of frame.
    let cuts = (0..stream.len()).step_by(stream.len() / 23).chain(stream.len() - 40..stream.len());
    for cut in cuts {
        receiver.receive(&stream[..cut], 7, 160).expect_err("a cut stream");
        assert_eq!(receiver.len(), 0, "cut at {cut} of {}", stream.len());
    }
    let mut damaged = stream.clone();
    *damaged.last_mut().unwrap() ^= 1;
    receiver.receive(&damaged[..], 7, 160).expect_err("a damaged end");
    receiver.receive(&stream[..], 7, 160).unwrap();
    assert_eq!(receiver.len(), 150);
    let next = [65];
    let there = model.forward(&next, 150, &mut receiver).unwrap();
    assert_eq!(
        there,
        model.forward(&next, 150, &mut sender).unwrap(),
        "one more token, after {:?}",
        last.dim()
    );
}

#[test]
fn every_option_is_read() {
    let model = load(&bundled()).unwrap();
    for option in [
        "k-bits=8",
        "v-bits=8",
        "partition=32",
        "sinks=0",
        "dtype=f16",
        "layout=token",
        "rounding=stochastic",
        "prefill=codes",
    ] {
        let run = |kv: &str| {
            let mut session = session(&model, kv, 256);
            let prompt: Vec<u32> = (0..200).map(|i| i * 37 % 256).collect();
            session.prefill(&prompt).unwrap();
            session.decode(65).unwrap()
        };
        assert_ne!(run("hack4"), run(&format!("hack4,{option}")), "{option} changes something");
    }
    let stochastic = |seed| format!("hack4,rounding=stochastic,seed={seed}");
    assert!(kv::check(&mode(&stochastic(1))).is_ok());
    for (bad, named) in [
        ("hack4,k-bits=3", "2, 4 or 8"),
        ("hack4,v-bits=x", "2, 4 or 8"),
        ("hack2,partition=48", "32, 64 or 128"),
        ("hack2,sinks=100000", "at most"),
        ("hack2,dtype=f32", "bf16 or f16"),
        ("hack2,layout=head", "channel or token"),
        ("hack2,rounding=up", "nearest or stochastic"),
        ("hack8,prefill=no", "exact or codes"),
        ("hack8,bits=2", "unknown option"),
    ] {
        match kv::check(&mode(bad)) {
            Err(error @ Error::Mode { .. }) => assert!(error.to_string().contains(named), "{bad}: {error}"),
            other => panic!("{bad}: {other:?}"),
        }
    }
}
