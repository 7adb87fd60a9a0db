//! The closed forms: traffic, alpha, break-even points, and what a plan makes of them.

mod common;

use hybrid_gemm::cost_model::{
    AlphaTerms, break_even_tokens, free_hbm_fraction, free_host_share, link_demand,
};
use hybrid_gemm::simulate::simulate;
use hybrid_gemm::{
    Alpha, Bound, DType, DeviceProfile, Error, Format, GemmConfig, GemmPlan, MigSlice, Path, PathChoice,
    Placement, Residency, Tiling,
};

const BF16: Format = Format::Float(DType::BF16);

fn placement(n: usize, k: usize, hbm: f64) -> Placement {
    Placement::packed(Tiling::new(n, k, BF16).unwrap(), Residency::HbmFraction(hbm)).unwrap()
}

fn plan(placement: Placement, tokens: usize, device: DeviceProfile) -> GemmPlan {
    GemmPlan::new(placement, GemmConfig::new(tokens, DType::BF16, device)).unwrap()
}

/// Bytes of the paper's gate and up projection: N = 28672, K = 4096, bf16, panels of 256 tokens, 16 K tiles, a final read of the
/// partial sums included.
fn gate_up(tokens: f64) -> AlphaTerms {
    let (n, k) = (28672.0, 4096.0);
    AlphaTerms {
        link_output_stationary: 2.0 * n * k * (tokens / 256.0),
        link_weight_stationary: 2.0 * n * k,
        hbm_always: 2.0 * tokens * (n + k),
        hbm_weight_stationary: 2.0 * 16.0 * 4.0 * tokens * n,
    }
}

/// The optimum moves with the slice's share of HBM: why the paper has a knob.
#[test]
fn alpha_of_a_known_layer() {
    for (hbm, expected) in [
        (3.4e12, [0.0, 0.17, 0.25]),
        (1.7e12, [0.29, 0.40, 0.44]),
        (0.85e12, [0.57, 0.62, 0.63]),
        (0.425e12, [0.77, 0.78, 0.79]),
    ] {
        for (tokens, expected) in [512.0, 1024.0, 2048.0].into_iter().zip(expected) {
            let alpha = gate_up(tokens).balance(375e9, hbm);
            assert!((alpha - expected).abs() < 0.006, "{tokens} tokens at {hbm:e}: {alpha}, not {expected}");
        }
    }
}

/// The closed form is as good as the best of 65 points.
#[test]
fn alpha_is_the_optimum() {
    let mut rng = fastrand::Rng::with_seed(31);
    let mut interior = 0;
    for case in 0..500 {
        let terms = AlphaTerms {
            link_output_stationary: 1e9 * (1.0 + 7.0 * rng.f64()),
            link_weight_stationary: 1e9 * rng.f64(),
            hbm_always: 1e9 * rng.f64(),
            hbm_weight_stationary: 2e10 * rng.f64() * rng.f64(),
        };
        let (link, hbm) = (375e9 * rng.f64() + 1e9, 3e12 * rng.f64() + 1e10);
        let alpha = terms.balance(link, hbm);
        let points = (0..=64).map(|i| terms.time_s(f64::from(i) / 64.0, link, hbm));
        let best = points.fold(f64::INFINITY, f64::min);
        let found = terms.time_s(alpha, link, hbm);
        assert!(
            found <= best * (1.0 + 1e-12),
            "case {case}, seed 31: alpha {alpha} takes {found}, not {best}"
        );
        interior += usize::from(alpha > 0.0 && alpha < 1.0);
    }
    assert!(interior > 100, "{interior} optima between the ends");
    // Weights that are read once either way.
    let once = AlphaTerms { link_output_stationary: 1e9, link_weight_stationary: 1e9, ..gate_up(512.0) };
    assert_eq!(once.balance(375e9, 3.4e12), 1.0);
}

#[test]
fn break_even_points() {
    let h200 = DeviceProfile::h200();
    let gh200 = DeviceProfile::gh200();
    let int4 = Format::Int4 { group: 128 };
    for (case, found, expected) in [
        ("H200", break_even_tokens(BF16, &h200), 14_583.0),
        ("H200 at 35 GB/s", break_even_tokens(BF16, &h200.with_link(35e9)), 20_000.0),
        ("GH200", break_even_tokens(BF16, &gh200), 1_867.0),
        ("H200, int4", break_even_tokens(int4, &h200), 3_646.0),
        ("with zero points", break_even_tokens(Format::Int4ZeroPoints { group: 128 }, &h200), 3_646.0),
        ("H200, fp8", break_even_tokens(Format::Fp8Blocks, &h200), 7_292.0),
        ("share of H200 at 4096 tokens", 1000.0 * free_host_share(BF16, &h200, 4096), 280.9),
        ("share of GH200 at 4096 tokens", free_host_share(BF16, &gh200, 4096), 1.0),
        ("gain of H200", 1e3 / free_hbm_fraction(&h200), 1008.3),
        ("gain of GH200", 1e3 / free_hbm_fraction(&gh200), 1110.3),
        ("gain of 1g", 1e3 / free_hbm_fraction(&gh200.slice(MigSlice::OneG)), 1882.4),
        ("demand", link_demand(16_000_000_000, 0.05), 320e9),
    ] {
        assert!((found - expected).abs() < 1e-3 * expected, "{case}: {found}, not {expected}");
    }
}

/// What the planner takes: the corners where theory leaves no doubt.
#[test]
fn picks() {
    let direct = |alpha| GemmConfig {
        alpha,
        path: PathChoice::Direct,
        ..GemmConfig::new(8192, DType::BF16, DeviceProfile::gh200())
    };
    let layer = placement(28672, 4096, 0.0);
    // One panel: each weight crosses once on any path, over PCIe faster by a copy engine, over C2C as fast in place.
    let one = plan(layer, 64, DeviceProfile::h200());
    assert!(matches!(one.choose(64).unwrap().0, Path::Staged { .. }), "{}", one.explain(64));
    let two = plan(layer, 64, DeviceProfile::gh200());
    assert_eq!(two.choose(64).unwrap().0, Path::Direct { alpha: 1.0 });
    let prediction = one.predict(8).unwrap();
    assert_eq!((prediction.bound, prediction.traffic.link_bytes), (Bound::Link, layer.host_bytes()));
    // PCIe is the narrowest: read once, whatever HBM has to carry.
    let pcie = GemmConfig { device: DeviceProfile::h200(), ..direct(Alpha::Auto) };
    assert_eq!(GemmPlan::new(layer, pcie).unwrap().choose(4096).unwrap().0, Path::Direct { alpha: 0.0 });
    // C2C over a slice: between the ends.
    let slice = GemmConfig { device: DeviceProfile::gh200().slice(MigSlice::ThreeG), ..direct(Alpha::Auto) };
    match GemmPlan::new(layer, slice).unwrap().choose(1024).unwrap().0 {
        Path::Direct { alpha } => assert!(alpha > 0.1 && alpha < 0.9, "alpha {alpha}"),
        other => panic!("{other}"),
    }
    // Where all paths are open: each weight over PCIe once; over C2C, behind the math of this many tokens.
    let (path, prediction) = {
        let plan = plan(layer, 8192, DeviceProfile::h200());
        plan.choose(8192).unwrap()
    };
    assert_eq!(prediction.traffic.link_bytes, layer.host_bytes(), "{path}");
    assert_eq!(plan(layer, 8192, DeviceProfile::gh200()).predict(8192).unwrap().bound, Bound::Math);
    // Nothing in host memory: the link is idle.
    let hbm = plan(placement(4096, 4096, 1.0), 512, DeviceProfile::h200());
    assert_eq!(hbm.predict(512).unwrap().traffic.link_bytes, 0);
    assert_eq!(hbm.workspace_len(512), 0);
}

/// Direct paths are held against what blocks read over the link, staged ones against what a copy engine brings; whichever is
/// faster is taken.
#[test]
fn each_path_has_its_own_rate_of_the_link() {
    let layer = placement(28672, 4096, 0.0);
    let bytes = layer.host_bytes() as f64;
    for (reads, copies, staged) in [(35e9, 54e9, true), (54e9, 35e9, false)] {
        let device = DeviceProfile::custom("", 132, [reads, copies], 4.2e12, 700e12).unwrap();
        let plan = plan(layer, 16, device.clone());
        let [direct, slabs] = [Path::Direct { alpha: 1.0 }, Path::Staged { slab_columns: 32 }].map(|path| {
            let launches = plan.launches_of(path, 16).unwrap();
            (plan.model().predict(&launches), simulate(&plan, path, 16).unwrap())
        });
        for ((predicted, simulated), rate) in [(direct, reads), (slabs, copies)] {
            let link_s = bytes / rate;
            assert!(
                (predicted.link_s - link_s).abs() < 1e-9 * link_s,
                "{} s, not {link_s}",
                predicted.link_s
            );
            let ratio = simulated.time_s / link_s;
            assert!(ratio > 1.0 && ratio < 1.03, "simulated {} s, the link {link_s}", simulated.time_s);
            assert_eq!(simulated.traffic, predicted.traffic);
        }
        let taken = plan.choose(16).unwrap().0;
        assert_eq!(matches!(taken, Path::Staged { .. }), staged, "{reads} and {copies}: {taken}");
        assert_eq!(device.fastest_link(), 54e9);
        let half = device.with_link_share(0.5);
        assert_eq!([half.link_reads_per_s, half.link_copies_per_s], [0.5 * reads, 0.5 * copies]);
    }
}

/// A split is as slow as the slower side, and no slower.
#[test]
fn split_residency() {
    for (device, fraction) in [
        (DeviceProfile::h200(), 0.5),
        (DeviceProfile::h200(), 0.99),
        (DeviceProfile::gh200(), 0.5),
        (DeviceProfile::gh200(), 0.9),
    ] {
        let layer = placement(28672, 4096, fraction);
        let (path, prediction) = plan(layer, 16, device.clone()).choose(16).unwrap();
        let rate = match path {
            Path::Staged { .. } => device.link_copies_per_s,
            _ => device.link_reads_per_s,
        };
        let link = layer.host_bytes() as f64 / rate;
        let hbm = layer.hbm_bytes() as f64 / device.hbm_bytes_per_s;
        let found = prediction.time_s - device.launch_s;
        assert!(
            found >= link.max(hbm) && found < 1.03 * link.max(hbm),
            "{}, {fraction}: {found}",
            device.name
        );
    }
}

/// What cannot be taken is named with its reason.
#[test]
fn explanations() {
    let layer = placement(4096, 4096, 0.5);
    let ampere = DeviceProfile { max_cluster: 1, ..DeviceProfile::h200() };
    let text = plan(layer, 1024, ampere).explain(1024);
    for word in [
        "taken",
        "dropped",
        "multicast to 2 blocks: the device has no thread-block clusters",
        "16.8 MB in host",
    ] {
        assert!(text.contains(word), "{word}: {text}");
    }
    let text = plan(layer, 300, DeviceProfile::h200()).explain(300);
    assert!(text.contains("multicast to 4 blocks: 2 panels of 256 tokens: fewer than a cluster"), "{text}");

    let budget = |sm_budget, path| {
        let config = GemmConfig {
            sm_budget: Some(sm_budget),
            path,
            ..GemmConfig::new(1024, DType::BF16, DeviceProfile::h200())
        };
        GemmPlan::new(layer, config)
    };
    // One SM cannot serve the link and HBM at once, but it can after a copy.
    let small = budget(1, PathChoice::Fastest).unwrap();
    assert!(matches!(small.choose(1024).unwrap().0, Path::Staged { .. }));
    assert!(
        small
            .explain(1024)
            .contains("needs 1 SMs for the link and 1 for the weights in HBM, the budget is 1")
    );
    for (path, named) in [
        (PathChoice::Direct, "the budget is 1"),
        (PathChoice::Only(Path::Multicast { cluster: 8 }), "fewer than a cluster"),
        (PathChoice::Only(Path::Multicast { cluster: 16 }), "clusters have 2 to 8 blocks"),
        (PathChoice::Only(Path::Staged { slab_columns: 0 }), "a column tile"),
    ] {
        match budget(1, path) {
            Err(Error::NoPath(reasons)) => assert!(reasons.contains(named), "{path:?}: {reasons}"),
            other => panic!("{path:?}: {other:?}"),
        }
    }
    // A ring that is larger than what is given for it.
    let wide = Placement::packed(Tiling::new(1 << 16, 1 << 14, BF16).unwrap(), Residency::Host).unwrap();
    let config = GemmConfig {
        path: PathChoice::Only(Path::Staged { slab_columns: 512 }),
        ..GemmConfig::new(1024, DType::BF16, DeviceProfile::h200())
    };
    assert!(matches!(GemmPlan::new(wide, config), Err(Error::NoPath(reasons)) if reasons.contains("ring")));
}

/// Profiles of slices, and of measured ceilings.
#[test]
fn profiles() {
    let gh200 = DeviceProfile::gh200();
    for (slice, sms, hbm) in
        [(MigSlice::OneG, 16, 0.425e12), (MigSlice::TwoG, 32, 0.85e12), (MigSlice::ThreeG, 60, 1.7e12)]
    {
        let profile = gh200.slice(slice);
        profile.check().unwrap();
        assert_eq!((profile.sm_count, profile.hbm_bytes_per_s), (sms, hbm), "{}", profile.name);
        let link = |profile: &DeviceProfile| [profile.link_reads_per_s, profile.link_copies_per_s];
        assert_eq!(link(&profile), link(&gh200), "{}: the link is shared whole", profile.name);
    }
    DeviceProfile::gb200().check().unwrap();
    assert_eq!(break_even_tokens(BF16, &DeviceProfile::gb200()).round(), 8000.0);
    assert!(DeviceProfile::custom("here", 132, [37e9, 54e9], 4.3e12, 780e12).is_ok());
    for (named, profile) in [
        ("sm_count", DeviceProfile::custom("", 0, [1.0, 1.0], 1.0, 1.0)),
        ("link_reads_per_s", DeviceProfile::custom("", 1, [f64::NAN, 1.0], 1.0, 1.0)),
        ("link_copies_per_s", DeviceProfile::custom("", 1, [1.0, 0.0], 1.0, 1.0)),
        ("hbm_bytes_per_s", DeviceProfile::custom("", 1, [1.0, 1.0], -1.0, 1.0)),
        ("flops_per_s", DeviceProfile::custom("", 1, [1.0, 1.0], 1.0, f64::INFINITY)),
    ] {
        assert!(profile.unwrap_err().to_string().contains(named), "{named}");
    }
}

/// An alpha that is no share is refused wherever it comes from; where the budget is smallest it would have no blocks to be a share of.
#[test]
fn paths_with_no_share_are_refused() {
    let config =
        GemmConfig { sm_budget: Some(1), ..GemmConfig::new(300, DType::BF16, DeviceProfile::gh200()) };
    let plan = GemmPlan::new(placement(640, 256, 0.0), config.clone()).unwrap();
    for alpha in [1.5, 7.0, -0.1, f64::NAN, f64::INFINITY] {
        let path = Path::Direct { alpha };
        let reason = plan.launches_of(path, 300).unwrap_err();
        assert!(reason.contains("alpha is 0 to 1"), "{alpha}: {reason}");
        assert!(
            matches!(hybrid_gemm::simulate::simulate(&plan, path, 300), Err(Error::NoPath(_))),
            "{alpha}"
        );
        let only = GemmConfig { path: PathChoice::Only(path), ..config.clone() };
        let single = GemmPlan::new(*plan.placement(), only.clone()).unwrap_err().to_string();
        let group =
            hybrid_gemm::grouped::GroupedPlan::new(vec![*plan.placement()], only).unwrap_err().to_string();
        assert!(single.contains("alpha") && group.contains("alpha"), "{alpha}: {single}; {group}");
    }
}

/// A plan of one direct path serves few tokens too, and takes another alpha later.
#[test]
fn one_direct_path_serves_every_call() {
    let config = GemmConfig::new(300, DType::BF16, DeviceProfile::gh200());
    let only = GemmConfig { path: PathChoice::Only(Path::Direct { alpha: 0.0 }), ..config };
    let mut plan = GemmPlan::new(placement(640, 256, 0.0), only).unwrap();
    for (tokens, alpha) in [(0, 1.0), (7, 1.0), (256, 1.0), (257, 0.0), (300, 0.0)] {
        assert_eq!(plan.choose(tokens).unwrap().0, Path::Direct { alpha }, "{tokens} tokens");
    }
    plan.set_alpha(Alpha::Fixed(0.5)).unwrap();
    assert_eq!(plan.choose(300).unwrap().0, Path::Direct { alpha: 0.5 });
}

/// Where even rows make all dataflows equal the one is taken that does not read a crowded expert again per panel.
#[test]
fn crowded_experts_are_read_once() {
    let config = GemmConfig::new(2048, DType::BF16, DeviceProfile::gh200());
    let experts = vec![placement(1024, 1024, 0.0); 8];
    let plan = hybrid_gemm::grouped::GroupedPlan::new(experts, config).unwrap();
    let rows = [0, 0, 2048, 0, 0, 0, 0, 0];
    assert_eq!(plan.predict(&rows).unwrap().traffic.link_bytes, plan.experts()[2].host_bytes());
}
