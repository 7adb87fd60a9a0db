//! Evaluation is decode: what is scored went through the mode's own cache.

mod support;

use longkv_engine::eval::{Windows, evaluate, evaluate_with};
use longkv_engine::retrieval::{Questions, retrieve};
use longkv_engine::tokenizer::Tokenizer;
use longkv_engine::{Error, kv};
use support::{bundled, load, session};

fn text() -> Vec<u32> {
    std::fs::read(bundled().join("heldout.txt")).unwrap().into_iter().map(u32::from).collect()
}

/// Every mode that the engine can run without a file.
fn modes() -> Vec<&'static str> {
    let mut modes = kv::DEMO.to_vec();
    modes.push("dense,dtype=f32");
    // The demo's budgets hold all of a short context.
    modes.extend([
        "sparse-quest,budget=64",
        "sparse-shadowkv,budget=64",
        "sparse-retro,budget=64,recent=8,reindex=8",
    ]);
    modes
}

#[test]
fn garbage_in_the_cache_raises_the_nll() {
    let (model, text) = (load(&bundled()).unwrap(), text());
    let windows = Windows::new(192, 96, 2).unwrap();
    for kv in modes() {
        let mut session = session(&model, kv, windows.context);
        let honest = evaluate(&mut session, kv, &text, windows, |_, _| {}).unwrap();
        let mut rng = fastrand::Rng::with_seed(3);
        let garbage =
            evaluate_with(&mut session, kv, &text, windows, |_, _| {}, |cache| cache.scramble(&mut rng))
                .unwrap();
        let rise = garbage.nll_per_token - honest.nll_per_token;
        assert!(rise > 0.2, "{kv}: {} with garbage, {} without", garbage.nll_per_token, honest.nll_per_token);
    }
}

#[test]
fn the_report_counts_what_was_done() {
    let (model, text) = (load(&bundled()).unwrap(), text());
    for (kv, bytes) in [("dense", 2048.0), ("dense,dtype=bf16", 2048.0), ("dense,dtype=f32", 4096.0)] {
        let mut session = session(&model, kv, 64);
        let windows = Windows::new(64, 16, 3).unwrap();
        let mut steps = Vec::new();
        let report = evaluate(&mut session, kv, &text, windows, |done, all| steps.push((done, all))).unwrap();
        assert_eq!(report.tokens, 3 * 48, "{kv}: one score per decoded token");
        assert_eq!(report.kv_bytes_per_token, bytes, "{kv}");
        assert_eq!(report.dense_kv_bytes_per_token, 2048.0, "{kv}: 4 layers × 2 × 2 heads × 64 × 2 bytes");
        assert_eq!(report.host_kv_bytes_per_token, 0.0, "{kv}");
        assert!((report.perplexity.ln() - report.nll_per_token).abs() < 1e-9, "{kv}");
        assert!(report.decode_tokens_per_s > 0.0 && report.prefill_tokens_per_s > 0.0, "{kv}");
        assert_eq!(steps.last(), Some(&(192, 192)), "{kv}");
        assert!(steps.is_sorted(), "{kv}: progress goes back");
    }
    // The text ends with the window: its last token has no successor to be scored against.
    let mut session = session(&model, "dense", 64);
    let report =
        evaluate(&mut session, "dense", &text[..64], Windows::new(64, 16, 1).unwrap(), |_, _| {}).unwrap();
    assert_eq!(report.tokens, 47);
}

/// The model was trained on such text: far from a uniform guess over 256 bytes (ln 256 = 5.5), and not better than its
/// own training loss allows.
#[test]
fn the_bundled_model_reads_its_language() {
    let (model, text) = (load(&bundled()).unwrap(), text());
    let mut session = session(&model, "dense", 512);
    let report =
        evaluate(&mut session, "dense", &text, Windows::new(512, 128, 2).unwrap(), |_, _| {}).unwrap();
    assert!((1.0..2.5).contains(&report.nll_per_token), "{} nats per byte", report.nll_per_token);
}

#[test]
fn scores_are_the_logits_own() {
    let (model, text) = (load(&bundled()).unwrap(), text());
    let windows = Windows::new(24, 6, 1).unwrap();
    let mut session = session(&model, "dense,dtype=f32", 24);
    let report = evaluate(&mut session, "dense,dtype=f32", &text, windows, |_, _| {}).unwrap();
    let mut cache = kv::open(&support::mode("dense,dtype=f32"), &model, 24).unwrap();
    let hidden = model.forward(&text[..24], 0, &mut *cache).unwrap();
    let logits = model.logits(hidden.view()).unwrap();
    // -ln softmax in f64, written out.
    let nll = |position: usize| {
        let row = logits.row(position).mapv(f64::from);
        row.mapv(f64::exp).sum().ln() - row[text[position + 1] as usize]
    };
    let expected = (6..24).map(nll).sum::<f64>() / 18.0;
    assert!((report.nll_per_token - expected).abs() < 1e-4, "{} is not {expected}", report.nll_per_token);
}

#[test]
fn windows_that_make_no_evaluation() {
    let model = load(&bundled()).unwrap();
    for (context, prefill, count, named) in
        [(16, 0, 1, "prefill"), (16, 16, 1, "prefill"), (16, 17, 1, "prefill"), (16, 4, 0, "windows")]
    {
        match Windows::new(context, prefill, count) {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, named),
            other => panic!("{context}, {prefill}, {count}: {other:?}"),
        }
    }
    for (context, prefill, count, tokens, fits) in [
        (16, 4, 2, 32, true),
        (16, 4, 2, 31, false),
        (2, 1, 1, 2, false), // nothing left to score
        (2, 1, 1, 3, true),
        (2049, 4, 1, 10_000, false),
    ] {
        let checked = Windows::new(context, prefill, count).unwrap().check(model.config(), tokens);
        assert_eq!(checked.is_ok(), fits, "{context}, {prefill}, {count}, {tokens}: {checked:?}");
    }
}

#[test]
fn retrieval_counts_right_answers() {
    let model = load(&bundled()).unwrap();
    let tokenizer = Tokenizer::read(&bundled(), model.config()).unwrap();
    let mut session = session(&model, "dense", 256);
    // "set abc0 = 12345\n" and "get abc0 -> 12345\n" are 17 and 18 bytes: 35 hold one pair and its question, 256 nine pairs.
    for (context, documents, asked) in [(35, 3, 3), (64, 4, 4), (256, 2, 10)] {
        let questions = Questions::plant(&tokenizer, context, documents, 1).unwrap();
        let report = retrieve(&mut session, "dense", &questions, |_, _| {}).unwrap();
        assert_eq!(report.questions, asked, "context {context}");
        assert!(report.right <= asked);
        assert_eq!(report.accuracy, report.right as f64 / asked as f64);
    }
    for (context, documents, named) in [(34, 1, "context"), (64, 0, "documents")] {
        match Questions::plant(&tokenizer, context, documents, 1).map(drop) {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, named),
            other => panic!("{context}, {documents}: {other:?}"),
        }
    }
}
