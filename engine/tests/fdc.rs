//! The KV mode `fdc`: low-rank keys and values by a plan.

mod support;

use kv_compress::projection::{Projection, project};
use kv_compress::rank_plan::RankPlan;
use kv_compress::{CompressionPlan, LayerRanks};
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
    let windows = Windows::new(512, 128, 2).unwrap();
    let (dense, dense_bytes) = nll(&model, "dense", &heldout, windows);
    let (half, half_bytes) = nll(&model, "fdc-0.5", &heldout, windows);
    let (auto, auto_bytes) = nll(&model, "fdc-auto", &heldout, windows);
    // 512 tokens are whole pages of 64: nothing is padded.
    assert_eq!(half_bytes, dense_bytes / 2.0);
    assert!(auto_bytes < dense_bytes, "{auto_bytes} bytes of {dense_bytes}");
    assert!(auto <= 1.01 * dense, "fdc-auto: {auto} nats, dense {dense}");
    assert!(half < 1.05 * dense, "fdc-0.5: {half} nats, dense {dense}");
    // The plans are those of this model and were not planned on this text.
    for (name, bytes) in [("fdc-0.5", half_bytes), ("fdc-auto", auto_bytes)] {
        let plan = read_plan(&plan_path(&mode(name), &bundled()).unwrap()).unwrap();
        assert_eq!(plan.bytes_per_token() as f64, bytes, "{name}");
        assert_eq!(plan.reasons().len(), 16, "{name} can say why");
    }
}

/// A cache that remembers the first layer's attention output.
struct First<C> {
    cache: C,
    out: Option<ndarray::Array2<f32>>,
}

impl<C: KvCache> KvCache for First<C> {
    fn forward(&mut self, step: &kv::Step<'_>) -> Result<ndarray::Array2<f32>, Error> {
        let out = self.cache.forward(step)?;
        if step.layer == 0 {
            self.out = Some(out.clone());
        }
        Ok(out)
    }
    fn append(&mut self, step: &kv::Step<'_>) -> Result<(), Error> {
        self.cache.append(step)
    }
    fn len(&self) -> usize {
        self.cache.len()
    }
    fn memory(&self) -> kv::KvMemory {
        self.cache.memory()
    }
    fn clear(&mut self) {
        self.cache.clear();
    }
    fn scramble(&mut self, rng: &mut fastrand::Rng) {
        self.cache.scramble(rng);
    }
}

/// What a probe says that keys or values of a head lose at a rank is what a cache of that rank loses of its layer's output.
#[test]
fn a_probe_foresees_the_error_of_the_output() {
    let model = load(&bundled()).unwrap();
    let tokens = &text("calibration.txt")[..256];
    let geometry = kv::Geometry::new(model.config(), 256).unwrap();
    let mut recorder = kv::Recorder::new(geometry.clone()).unwrap();
    model.forward(tokens, 0, &mut recorder).unwrap();
    let calibration = recorder.finish();
    let layers = calibration.layers().iter().enumerate();
    let bases: Vec<_> = layers.map(|(l, layer)| project(l, layer, Projection::Optimal).unwrap()).collect();
    let mut probe = kv::Probe::new(geometry.clone(), &bases).unwrap();
    model.forward(tokens, 0, &mut probe).unwrap();
    let profile = probe.finish().unwrap();
    for heads in profile.layers() {
        let whole: f64 = heads.iter().map(|head| head.values[0]).sum();
        assert!((whole - 1.0).abs() < 1e-3, "without values nothing is left of the output: {whole}");
        for losses in heads.iter().flat_map(|head| [&head.keys, &head.values]) {
            assert_eq!((losses.len(), losses[4]), (5, 0.0));
            assert!(losses.windows(2).all(|pair| pair[1] < pair[0]), "{losses:?}");
        }
    }

    let shapes: Vec<_> = geometry.layers.iter().map(|spec| spec.shape).collect();
    let first = |cut: Option<(usize, bool)>| {
        let mut layers: Vec<_> = shapes.iter().map(|shape| LayerRanks::full(shape).unwrap()).collect();
        if let Some((head, keys)) = cut {
            let mut ranks = layers[0].heads().to_vec();
            *(if keys { &mut ranks[head].k } else { &mut ranks[head].v }) = 16;
            layers[0] = LayerRanks::new(&shapes[0], ranks).unwrap();
        }
        let ranks = RankPlan::new(layers).unwrap();
        let plan = CompressionPlan::new(&calibration, Projection::Optimal, &bases, &ranks).unwrap();
        let mut cache = First { cache: Fdc::new(&geometry, plan, &FdcStorage::Half).unwrap(), out: None };
        model.forward(tokens, 0, &mut cache).unwrap();
        cache.out.unwrap()
    };
    let whole = first(None);
    let energy = |x: &ndarray::Array2<f32>| x.iter().map(|x| f64::from(x * x)).sum::<f64>();
    for head in 0..2 {
        for keys in [true, false] {
            let lost = energy(&(first(Some((head, keys))) - &whole)) / energy(&whole);
            let of_head = &profile.layers()[0][head];
            let foreseen = if keys { of_head.keys[1] } else { of_head.values[1] };
            // Heads of a group may add to each other's errors or cancel them, which the probe does not see.
            let ratio = lost / foreseen;
            assert!((0.5..2.0).contains(&ratio), "head {head}, keys {keys}: {lost}, foreseen {foreseen}");
        }
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

fn engine(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_engine")).args(arguments).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn compress_then_inspect_then_eval() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let (plan, small, json, svg) = (path("plan"), path("text"), path("json"), path("svg"));
    let bytes = std::fs::read(bundled().join("calibration.txt")).unwrap();
    std::fs::write(&small, &bytes[..1024]).unwrap();
    let compress = ["compress", "--text", &small, "--context", "64", "--ratio", "0.6", "--out", &plan];
    let (code, stdout, stderr) = engine(&compress);
    assert_eq!(code, Some(0), "{stderr}");
    let made = read_plan(folder.path().join("plan").as_path()).unwrap();
    assert!(made.bytes_per_token() <= 1228 && made.bytes_per_token() > 1228 - 32);
    assert!(stdout.contains(&format!("{} bytes per token of 2048", made.bytes_per_token())), "{stdout}");

    let (code, shown, stderr) = engine(&["inspect", &plan, "--json", &json, "--svg", &svg]);
    assert_eq!(code, Some(0), "{stderr}");
    for (layer, projection) in made.layers().iter().enumerate() {
        let line = shown.lines().find(|line| line.starts_with(&format!("layer {layer:>3}"))).unwrap();
        let numbers: Vec<usize> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let expected: Vec<usize> =
            projection.ranks().heads().iter().flat_map(|head| [head.k, head.v]).collect();
        assert_eq!(numbers[1..], expected, "{line}");
    }
    let reasons: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!(reasons.as_array().unwrap().len(), 16);
    let drawing = std::fs::read_to_string(&svg).unwrap();
    assert!(drawing.starts_with("<svg") && drawing.matches("<rect").count() == 16, "{drawing}");

    let kv = format!("fdc:{plan}");
    let (code, stdout, stderr) =
        engine(&["eval", "--text", &small, "--kv", &kv, "--context", "64", "--windows", "1"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.contains(&format!("{:.1} on the device", made.bytes_per_token() as f64)), "{stdout}");

    for (case, arguments, named) in [
        ("no target", vec!["compress", "--text", &small, "--out", &plan], "--ratio"),
        ("two targets", [&compress[..], &["--keep-accuracy", "0.99"]].concat(), "--keep-accuracy"),
        ("no text", vec!["compress", "--ratio", "0.5", "--out", &plan], "--text"),
        ("no out", vec!["compress", "--ratio", "0.5", "--text", &small], "--out"),
        ("a projection", [&compress[..], &["--projection", "best"]].concat(), "optimal, joint or key-only"),
        (
            "a ratio",
            vec!["compress", "--text", &small, "--context", "64", "--ratio", "2", "--out", &plan],
            "ratio",
        ),
        ("nothing to inspect", vec!["inspect"], "FILE"),
        ("no plan", vec!["inspect", &small], "truncated or damaged"),
    ] {
        let (code, stdout, stderr) = engine(&arguments);
        assert_eq!(
            (code, stdout.as_str(), stderr.lines().count() >= 1),
            (Some(2), "", true),
            "{case}: {stderr}"
        );
        assert!(stderr.lines().last().unwrap().contains(named), "{case}: {stderr}");
    }
}

/// Low-rank, then quantized: fewer bytes than either, and the score follows what the cache holds.
#[test]
fn codes_of_projected_tokens() {
    let model = load(&bundled()).unwrap();
    let heldout = text("heldout.txt");
    let windows = Windows::new(512, 384, 1).unwrap();
    let dense_bytes = kv::dense_bytes_per_token(model.config()) as f64;
    let (half, half_bytes) = nll(&model, "fdc-0.5", &heldout, windows);
    let (exact, _) = nll(&model, "fdc-0.5+hack8", &heldout, windows);
    let (four, four_bytes) = nll(&model, "fdc-0.5+hack4", &heldout, windows);
    let (_, codes_bytes) = nll(&model, "hack4", &heldout, windows);
    assert!((exact - half).abs() < 0.02, "8-bit codes change little: {exact} and {half}");
    assert!(four < half + 0.2, "4-bit codes: {four}, without {half}");
    assert!(
        four_bytes < 0.6 * half_bytes && four_bytes < 0.8 * codes_bytes,
        "{four_bytes} of {half_bytes} and {codes_bytes}"
    );
    assert!(dense_bytes / four_bytes > 3.5, "{dense_bytes} and {four_bytes}");
}
