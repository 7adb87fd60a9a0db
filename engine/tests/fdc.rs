//! The KV mode `fdc`: low-rank keys and values by a plan.

mod support;

use kv_compress::CompressionPlan;
use kv_compress::projection::Projection;
use longkv_engine::compress::{Allocation, Compressor, Target};
use longkv_engine::eval::{Windows, evaluate};
use longkv_engine::kv::{self, Fdc, FdcStorage, KvCache, plan_path, read_plan};
use longkv_engine::{Error, Model};
use support::{bundled, golden, load, mode, session};

fn text(name: &str) -> Vec<u32> {
    std::fs::read(bundled().join(name)).unwrap().into_iter().map(u32::from).collect()
}

fn nll(model: &Model, kv: &str, text: &[u32], windows: Windows) -> (f64, f64) {
    let mut session = session(model, kv, windows.context);
    let report = evaluate(&mut session, kv, text, windows, |_, _| {}).unwrap();
    (report.nll_per_token, report.kv_bytes_per_token)
}

/// The two plans that come with the model, on text that neither it nor they have seen.
#[test]
fn the_models_own_plans_keep_their_promises() {
    let model = load(&bundled()).unwrap();
    let heldout = text("heldout.txt");
    let windows = Windows::new(512, 128, 3).unwrap();
    let (dense, dense_bytes) = nll(&model, "dense", &heldout, windows);
    let (half, half_bytes) = nll(&model, "fdc-0.5", &heldout, windows);
    let (auto, auto_bytes) = nll(&model, "fdc-auto", &heldout, windows);
    // 512 tokens are whole pages of 64: nothing is padded.
    assert_eq!(half_bytes, dense_bytes / 2.0);
    assert!(auto_bytes < dense_bytes, "{auto_bytes} bytes of {dense_bytes}");
    assert!(auto <= 1.01 * dense, "fdc-auto: {auto} nats, dense {dense}");
    assert!(half < 1.5 * dense, "fdc-0.5: {half} nats, dense {dense}");
    // The plans are those of this model and were not planned on this text.
    for (name, bytes) in [("fdc-0.5", half_bytes), ("fdc-auto", auto_bytes)] {
        let plan = read_plan(&plan_path(&mode(name), &bundled()).unwrap()).unwrap();
        assert_eq!(plan.bytes_per_token() as f64, bytes, "{name}");
        assert_eq!(plan.reasons().len(), 16, "{name} can say why");
    }
}

/// Full ranks lose nothing but the rounding to f16, which dense has too; prefill, its parts and decoding agree.
#[test]
fn full_ranks_are_dense_and_decoding_is_prefill() {
    let model = load(&bundled()).unwrap();
    let calibration = text("calibration.txt");
    let compressor = Compressor::new(&model, &calibration[..1024], 256, |_, _| {}).unwrap();
    let full = compressor.plan(Projection::Optimal, Allocation::Uniform, Target::Ratio(1.0)).unwrap();
    let half = compressor.plan(Projection::Optimal, Allocation::Uniform, Target::Ratio(0.5)).unwrap();
    assert_eq!(full.bytes_per_token(), full.dense_bytes_per_token());
    let geometry = kv::Geometry::new(model.config(), 128).unwrap();
    let tokens = &text("heldout.txt")[..100];
    let whole = |cache: &mut dyn KvCache| model.forward(tokens, 0, cache).unwrap();
    let fdc = |plan: &CompressionPlan| Fdc::new(&geometry, plan.clone(), &FdcStorage::Half).unwrap();
    let dense = whole(&mut kv::Dense::<half::f16>::new(geometry.clone()).unwrap());
    let close = |case: &str, a: &ndarray::Array2<f32>, b: &ndarray::Array2<f32>, tolerance: f32| {
        let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(worst <= tolerance, "{case}: off by {worst}");
        worst
    };
    close("full ranks", &whole(&mut fdc(&full)), &dense, 1e-4);
    let lossy = whole(&mut fdc(&half));
    assert!((&lossy - &dense).iter().any(|x| x.abs() > 1e-2), "half the ranks do lose something");
    let mut cache = fdc(&half);
    let mut parts = Vec::new();
    for part in [&tokens[..30], &tokens[30..95]].into_iter().chain(tokens[95..].chunks(1)) {
        parts.push(model.forward(part, cache.len(), &mut cache).unwrap());
    }
    let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
    let joined = ndarray::concatenate(ndarray::Axis(0), &views).unwrap();
    close("in parts", &joined, &lossy, 1e-3);
    assert_eq!(cache.len(), 100);
    assert_eq!(
        cache.memory().device,
        128 * half.bytes_per_token(),
        "two pages of 64 tokens, the second not full"
    );
    cache.clear();
    assert_eq!(cache.memory(), kv::KvMemory::default());
}

/// Appended tokens are seen like forwarded ones, and a file makes the same cache as the preset.
#[test]
fn a_plan_file_is_the_preset() {
    let model = load(&bundled()).unwrap();
    let file = bundled().join("plans/fdc-0.5.safetensors");
    let tokens: Vec<u32> = (40..60).collect();
    let mut by_name = session(&model, "fdc-0.5", 32);
    let mut by_file = session(&model, &format!("fdc:{}", file.display()), 32);
    assert_eq!(by_name.prefill(&tokens).unwrap(), by_file.prefill(&tokens).unwrap());
    assert_eq!(by_name.decode(1).unwrap(), by_file.decode(1).unwrap());
    let mut brain = session(&model, "fdc-0.5,dtype=bf16", 32);
    let (a, b) = (brain.prefill(&tokens).unwrap(), by_file.prefill(&[]).err());
    assert!(a.iter().all(|x| x.is_finite()) && b.is_some());
}

#[test]
fn plans_that_do_not_fit_are_refused() {
    let model = load(&bundled()).unwrap();
    let other = load(&golden("qwen3")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        format!("fdc:{}", path.display())
    };
    let own = std::fs::read(bundled().join("plans/fdc-0.5.safetensors")).unwrap();
    let good = write("good", &own);
    for (case, model, mode_text, named) in [
        ("no file", &model, "fdc".to_string(), "fdc needs a plan"),
        ("a file that is not there", &model, "fdc:nowhere".into(), "nowhere"),
        ("no plan", &model, write("text", b"not a plan"), "truncated or damaged"),
        ("cut short", &model, write("cut", &own[..own.len() - 4]), "truncated or damaged"),
        ("weights", &model, format!("fdc:{}", bundled().join("model.safetensors").display()), "kv-compress"),
        (
            "another model",
            &other,
            good.clone(),
            "made for another model: the number of layers is 4 there, 2 here",
        ),
        ("no preset beside it", &other, "fdc-auto".into(), "fdc-auto.safetensors"),
        ("a wide type", &model, "fdc-0.5,dtype=f32".into(), "f16 or bf16"),
        ("a file for a preset", &model, "fdc-0.5:x".into(), "takes no file"),
    ] {
        let error = match kv::open(&mode(&mode_text), model, 64) {
            Err(error) => error.to_string(),
            Ok(_) => panic!("{case}: {mode_text} opens"),
        };
        assert!(error.contains(named), "{case}: {error}");
    }
    let missing = kv::unavailable(&mode("fdc-0.5"), other.path()).unwrap();
    assert!(missing.contains("engine compress"), "{missing}");
    assert_eq!(kv::unavailable(&mode("fdc-0.5"), model.path()), None);
    assert_eq!(kv::unavailable(&mode("dense"), other.path()), None);
}

#[test]
fn what_cannot_be_compressed() {
    let model = load(&bundled()).unwrap();
    let text = text("calibration.txt");
    assert!(matches!(
        Compressor::new(&model, &text[..100], 64, |_, _| {}),
        Err(Error::Argument { argument: "text", .. })
    ));
    assert!(matches!(Compressor::new(&model, &text, 4096, |_, _| {}), Err(Error::Context { .. })));
    let compressor = Compressor::new(&model, &text[..512], 128, |_, _| {}).unwrap();
    for (target, named) in [
        (Target::Ratio(0.0), "ratio"),
        (Target::Ratio(1.01), "ratio"),
        (Target::Ratio(f64::NAN), "ratio"),
        (Target::KeepAccuracy(1.0), "keep-accuracy"),
        (Target::Ratio(0.1), "bytes_per_token"),
    ] {
        let error =
            compressor.plan(Projection::Optimal, Allocation::Uniform, target).unwrap_err().to_string();
        assert!(error.contains(named), "{target:?}: {error}");
    }
    // Heads of 8 dimensions have no rank that is a multiple of 16.
    let small = load(&golden("llama")).unwrap();
    let tokens: Vec<u32> = (0..64).map(|i| i % 40).collect();
    let error = Compressor::new(&small, &tokens, 16, |_, _| {})
        .and_then(|compressor| compressor.plan(Projection::Optimal, Allocation::Adaptive, Target::Ratio(0.5)))
        .unwrap_err();
    assert!(matches!(error, Error::Compress(_)), "{error}");
}
