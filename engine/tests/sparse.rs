//! The sparse modes: what they read, what they save, and that they are dense where the budget allows.

mod support;

use longkv_engine::eval::{Report, Windows, evaluate};
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
fn a_context_within_the_budget_is_dense_bit_by_bit() {
    let windows = Windows::new(160, 64, 1).unwrap();
    for (dtype, dense) in [("f16", "dense"), ("bf16", "dense,dtype=bf16")] {
        let dense = eval(dense, windows);
        for kv in ["sparse-quest", "sparse-shadowkv", "sparse-retro"] {
            let report = eval(&format!("{kv},budget=160,dtype={dtype}"), windows);
            assert_eq!(report.nll_per_token, dense.nll_per_token, "{kv} in {dtype}");
            assert_eq!((report.device_kv_share, report.kv_hit_rate), (1.0, None), "{kv} in {dtype}");
            assert_eq!(report.host_kv_bytes_per_token, 0.0, "{kv} in {dtype}");
        }
    }
}

/// A fifth of the context read at a step, and two fifths kept: most of the quality stays, and less than half of the bytes.
#[test]
fn a_small_budget_saves_memory_and_keeps_quality() {
    let windows = Windows::new(640, 480, 1).unwrap();
    let dense = eval("dense", windows);
    for kv in ["sparse-quest", "sparse-shadowkv", "sparse-retro"] {
        let report = eval(&format!("{kv},budget=128"), windows);
        let rise = report.nll_per_token - dense.nll_per_token;
        println!(
            "{kv}: nll {:+.4}, {:.0} bytes per token on the device, {:.1} % of the tokens there, hits {:?}",
            rise,
            report.kv_bytes_per_token,
            100.0 * report.device_kv_share,
            report.kv_hit_rate
        );
        assert!(rise.abs() < 0.1, "{kv}: nll {} against {}", report.nll_per_token, dense.nll_per_token);
        assert!(rise != 0.0, "{kv}: nothing was left out");
        assert!(report.kv_bytes_per_token < 0.6 * dense.kv_bytes_per_token, "{kv}");
        assert!(report.host_kv_bytes_per_token > 0.8 * dense.kv_bytes_per_token, "{kv}");
        assert!((0.05..0.5).contains(&report.device_kv_share), "{kv}: {}", report.device_kv_share);
        assert!(report.kv_hit_rate.is_some_and(|rate| rate > 0.3 && rate < 1.0), "{kv}: {report:?}");
        assert_eq!(report.kv_budget, Some(128), "{kv}");
    }
}

#[test]
fn every_option_is_read() {
    let model = load(&bundled()).unwrap();
    let run = |kv: &str| {
        let mut session = session(&model, kv, 400);
        let prompt: Vec<u32> = (0..300).map(|i| i * 37 % 256).collect();
        session.prefill(&prompt).unwrap();
        (0..20).for_each(|token| drop(session.decode(token).unwrap()));
        (session.decode(65).unwrap(), session.memory())
    };
    for (kv, options) in [
        (
            "sparse-quest",
            &["budget=208", "buffer=0", "page=32", "aggregate=raw", "sinks=0", "recent=64", "dense-layers=1"]
                [..],
        ),
        ("sparse-quest", &["dtype=bf16", "scorer=mean", "scorer=cuboid", "scorer=meanstd"]),
        ("sparse-shadowkv", &["budget=136", "page=16", "aggregate=mean"]),
        ("sparse-retro", &["cluster=8", "segment=64", "reindex=16", "estimate=0", "recent=16"]),
    ] {
        let plain = run(&format!("{kv},budget=160"));
        for option in options {
            let name = match option.starts_with("budget") {
                true => format!("{kv},{option}"),
                false => format!("{kv},budget=160,{option}"),
            };
            assert!(run(&name) != plain, "{name} changes nothing");
        }
    }
    // Without a budget it follows the context, and is never too small to work.
    for kv in ["sparse-quest", "sparse-shadowkv", "sparse-retro"] {
        for capacity in [8, 2048] {
            let mut session = session(&model, kv, capacity);
            session.prefill(&[1, 2, 3]).unwrap();
            assert!(session.traffic().is_some_and(|traffic| traffic.budget >= capacity / 10), "{kv}");
        }
    }
    for (bad, named) in [
        ("sparse-quest,budget=60", "at least 64 tokens"),
        ("sparse-quest,budget=x", "a number of tokens"),
        ("sparse-quest,page=20", "one of [8, 16, 32, 64]"),
        ("sparse-quest,scorer=best", "minmax, cuboid, meanstd, mean"),
        ("sparse-quest,aggregate=min", "raw or max or mean or sum"),
        ("sparse-quest,dtype=f32", "f16 or bf16"),
        ("sparse-quest,buffer=-1", "0 to 1024"),
        ("sparse-quest,cluster=8", "unknown option"),
        ("sparse-shadowkv,scorer=mean", "unknown option"),
        ("sparse-retro,estimate=2", "0 to 1"),
        ("sparse-retro,cluster=0", "at least 1"),
    ] {
        match kv::check(&mode(bad)) {
            Err(error @ Error::Mode { .. }) => assert!(error.to_string().contains(named), "{bad}: {error}"),
            other => panic!("{bad}: {other:?}"),
        }
    }
}
