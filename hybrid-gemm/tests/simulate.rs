//! The simulation against the closed form, the optimum of alpha on slices of a device, and controllers in the loop.

use hybrid_gemm::controller::{Controller, Observation, Rule};
use hybrid_gemm::cost_model::AlphaTerms;
use hybrid_gemm::simulate::{Simulation, simulate};
use hybrid_gemm::tuner::{Timer, Tuner};
use hybrid_gemm::{
    DType, DeviceProfile, Error, Format, GemmConfig, GemmPlan, MigSlice, Path, PathChoice, Placement,
    Residency, Tiling,
};

/// The makespan rule where link and HBM tell their own times, as in a simulation.
const TRUE_TIMES: Rule = Rule::Makespan { margin: 0.0 };
const BF16: Format = Format::Float(DType::BF16);

fn plan(n: usize, k: usize, hbm: f64, tokens: usize, device: DeviceProfile) -> GemmPlan {
    let placement = Placement::packed(Tiling::new(n, k, BF16).unwrap(), Residency::HbmFraction(hbm)).unwrap();
    GemmPlan::new(placement, GemmConfig::new(tokens, DType::BF16, device)).unwrap()
}

/// Formats whose scales come in tiles, with zero points, and from beside the matrix, where partial tiles and blocks end.
#[test]
fn traffic_of_quantised_weights_is_the_closed_forms() {
    let device = || DeviceProfile::gh200().slice(MigSlice::TwoG);
    let mut simulated = 0;
    for (format, bits, scale_bits) in [
        (Format::Int4 { group: 128 }, 4.0, 16.0 / 128.0),
        (Format::Int4ZeroPoints { group: 128 }, 4.0, 20.0 / 128.0),
        (Format::Int4ZeroPoints { group: 32 }, 4.0, 20.0 / 32.0),
        (Format::Fp8Rows, 8.0, 0.0),
        (Format::Fp8Blocks, 8.0, 0.0),
    ] {
        for (n, k, tokens) in [(1024, 1024, 16), (1000, 1000, 300), (2048, 512, 600)] {
            for hbm in [0.0, 0.4, 1.0] {
                let placement =
                    Placement::packed(Tiling::new(n, k, format).unwrap(), Residency::HbmFraction(hbm))
                        .unwrap();
                let plan = GemmPlan::new(placement, GemmConfig::new(tokens, DType::BF16, device())).unwrap();
                let alphas = [0.25, 0.5].map(|alpha| Path::Direct { alpha });
                for path in plan.candidates(tokens).into_iter().map(|candidate| candidate.path).chain(alphas)
                {
                    let Ok(launches) = plan.launches_of(path, tokens) else { continue };
                    let case = format!("{format}, {path}: {tokens} × [{n}, {k}], {hbm} in HBM");
                    let predicted = plan.model().predict(&launches);
                    let found = simulate(&plan, path, tokens).unwrap();
                    assert_eq!(found.traffic, predicted.traffic, "{case}");
                    let hbm_bytes = predicted.hbm_bytes as f64;
                    assert!((found.hbm_bytes - hbm_bytes).abs() <= 1e-9 * hbm_bytes, "{case}: {hbm_bytes}");
                    simulated += 1;
                }
            }
        }
        // Bytes of a matrix of whole tiles, to the last one: codes with what lies among them, and a scale for each slab of fp8.
        let (n, k) = (1024, 1024);
        let placement = Placement::packed(Tiling::new(n, k, format).unwrap(), Residency::Host).unwrap();
        let plan = GemmPlan::new(placement, GemmConfig::new(16, DType::BF16, device())).unwrap();
        let traffic = simulate(&plan, Path::Direct { alpha: 1.0 }, 16).unwrap().traffic;
        assert_eq!(traffic.link_bytes as f64, (n * k) as f64 * (bits + scale_bits) / 8.0, "{format}");
        let beside = if format == Format::Fp8Blocks { n / 64 * (k / 128) * 4 } else { 0 };
        assert_eq!(traffic.hbm_weight_bytes, beside as u64, "{format}");
    }
    assert!(simulated > 150, "{simulated} products");
}

/// GH200 and its slices.
fn slices() -> Vec<DeviceProfile> {
    let gh200 = DeviceProfile::gh200();
    let slices = [MigSlice::ThreeG, MigSlice::TwoG, MigSlice::OneG].map(|slice| gh200.slice(slice));
    std::iter::once(gh200).chain(slices).collect()
}

/// Tile by tile, the simulation moves what the closed form says, and takes no less time.
#[test]
fn traffic_is_the_closed_forms() {
    let mut simulated = 0;
    for (n, k, tokens) in
        [(4096, 4096, 16), (4096, 4096, 600), (1000, 1000, 300), (6144, 1024, 2048), (64, 64, 1)]
    {
        for hbm in [0.0, 0.4, 1.0] {
            for device in [DeviceProfile::h200(), DeviceProfile::gh200().slice(MigSlice::TwoG)] {
                let plan = plan(n, k, hbm, tokens, device);
                let alphas = [0.25, 0.5, 0.75].map(|alpha| Path::Direct { alpha });
                for path in plan.candidates(tokens).into_iter().map(|candidate| candidate.path).chain(alphas)
                {
                    let Ok(launches) = plan.launches_of(path, tokens) else { continue };
                    let case =
                        format!("{path}: {tokens} × [{n}, {k}], {hbm} in HBM, {}", plan.config().device.name);
                    let predicted = plan.model().predict(&launches);
                    let found = simulate(&plan, path, tokens).unwrap();
                    assert_eq!(found.traffic, predicted.traffic, "{case}");
                    let hbm_bytes = predicted.hbm_bytes as f64;
                    assert!(
                        (found.hbm_bytes - hbm_bytes).abs() <= 1e-9 * hbm_bytes,
                        "{case}: {} of {hbm_bytes}",
                        found.hbm_bytes
                    );
                    let least = predicted.link_s.max(predicted.hbm_s).max(predicted.math_s);
                    assert!(found.time_s >= 0.999 * least, "{case}: {} is under {least}", found.time_s);
                    assert!(
                        found.link_busy_s <= 1.001 * found.time_s && found.hbm_busy_s <= 1.001 * found.time_s,
                        "{case}"
                    );
                    simulated += 1;
                }
            }
        }
    }
    assert!(simulated > 60, "{simulated} products");
}

/// Large products overlap well: the closed form is close to the simulation where its roles finish together.
#[test]
fn large_products_take_what_is_predicted() {
    for (case, hbm, tokens, device, room) in [
        ("PCIe, decoding", 0.0, 16, DeviceProfile::h200(), 1.02),
        ("C2C, decoding", 0.0, 16, DeviceProfile::gh200(), 1.10),
        ("PCIe, half in HBM", 0.5, 16, DeviceProfile::h200(), 1.02),
        ("PCIe, prefill", 0.0, 4096, DeviceProfile::h200(), 1.10),
        ("HBM alone", 1.0, 16, DeviceProfile::h200(), 1.25),
    ] {
        let plan = plan(28672, 4096, hbm, tokens, device);
        let (path, predicted) = plan.choose(tokens).unwrap();
        let found = simulate(&plan, path, tokens).unwrap();
        let ratio = found.time_s / predicted.time_s;
        assert!(
            ratio > 0.97 && ratio < room,
            "{case}, {path}: simulated {} s, predicted {}",
            found.time_s,
            predicted.time_s
        );
    }
}

/// Simulated times over alpha in sixteenths.
fn curve(plan: &GemmPlan, tokens: usize) -> Vec<f64> {
    (0..=16)
        .map(|i| simulate(plan, Path::Direct { alpha: f64::from(i) / 16.0 }, tokens).unwrap().time_s)
        .collect()
}

/// The paper's point: between the two dataflows lies something better than both, and where it lies moves with the slice.
#[test]
fn the_optimum_of_alpha_is_inside_and_moves_with_the_slice() {
    let mut optima = Vec::new();
    for device in slices() {
        let name = device.name.clone();
        let plan = plan(28672, 4096, 0.0, 1024, device);
        let times = curve(&plan, 1024);
        let best = (0..=16).min_by(|a, b| times[*a].total_cmp(&times[*b])).unwrap();
        optima.push((name, best, times[best] / times[0].min(times[16])));
    }
    for (name, best, gain) in &optima[..3] {
        assert!(
            (1..16).contains(best) && *gain < 0.95,
            "{name}: best at {best}/16, {gain} of the better end: {optima:?}"
        );
    }
    // Less HBM for the same link: more output-stationary blocks.
    assert!(optima.windows(2).all(|pair| pair[0].1 <= pair[1].1) && optima[0].1 < optima[3].1, "{optima:?}");
}

/// What a call on a device would tell.
fn observe(found: &Simulation, noise: &mut fastrand::Rng) -> Observation {
    let mut of_roles = noise.clone();
    let role_s = [0, 1].map(|role| found.role_s[role] * (1.0 + 0.05 * (2.0 * of_roles.f64() - 1.0)));
    let mut noisy = |seconds: f64| seconds * (1.0 + 0.05 * (2.0 * noise.f64() - 1.0));
    Observation {
        time_s: noisy(found.time_s),
        link_bytes: found.traffic.link_bytes as f64,
        hbm_bytes: found.hbm_bytes,
        link_busy_s: noisy(found.link_busy_s),
        hbm_busy_s: noisy(found.hbm_busy_s),
        role_s,
    }
}

/// A controller in the loop with the simulation; the link's rate steps down and up again. Gives, per phase, the last time and the
/// best of all alphas.
fn step_response(rule: Rule, hidden: bool) -> Vec<(f64, f64, f64)> {
    // Four columns per SM: with one, whole waves would hide what alpha does.
    let (n, k, tokens) = (15360, 1024, 1024);
    let nominal = DeviceProfile::gh200().slice(MigSlice::ThreeG);
    let at = |rate: f64| plan(n, k, 0.0, tokens, nominal.with_link(rate));
    let ends = [1.0, 0.0].map(|alpha| {
        let plan = at(nominal.link_reads_per_s);
        plan.model().predict(&plan.launches_of(Path::Direct { alpha }, tokens).unwrap())
    });
    let terms = AlphaTerms::between(&ends[0], &ends[1]);
    let make = |link, alpha| Controller::new(rule, terms, link, nominal.hbm_bytes_per_s, alpha).unwrap();
    let mut controller = make(nominal.link_reads_per_s, 0.0);
    let mut noise = fastrand::Rng::with_seed(41);
    let mut phases = Vec::new();
    for share in [1.0, 0.4, 1.0] {
        let rate = share * nominal.link_reads_per_s;
        // A change that the controller is told of starts its averages anew at the rate it now counts on.
        if !hidden {
            controller = make(rate, controller.alpha());
        }
        let plan = at(rate);
        let time = |alpha| simulate(&plan, Path::Direct { alpha }, tokens).unwrap();
        for _ in 0..50 {
            let found = time(controller.alpha());
            let mut call = observe(&found, &mut noise);
            if rule == Rule::makespan() {
                [call.link_busy_s, call.hbm_busy_s] = call.role_s;
            }
            controller.observe(&call);
        }
        let best = curve(&plan, tokens).into_iter().fold(f64::INFINITY, f64::min);
        phases.push((controller.alpha(), time(controller.alpha()).time_s, best));
    }
    phases
}

/// Within 50 calls of a step that nobody announces, with 5 % noise, the makespan rule is within 8 % of the best alpha.
#[test]
fn the_makespan_rule_follows_a_hidden_step() {
    for (phase, (alpha, found, best)) in step_response(TRUE_TIMES, true).into_iter().enumerate() {
        assert!(found <= 1.08 * best, "phase {phase}, seed 41: alpha {alpha} takes {found}, the best {best}");
    }
}

/// So it is where the times of the two roles stand for those of link and HBM, as a device tells them, within 12 %: it keeps off the
/// ends, and one of them may be the best.
#[test]
fn the_makespan_rule_follows_the_times_of_roles() {
    for (phase, (alpha, found, best)) in step_response(Rule::makespan(), true).into_iter().enumerate() {
        assert!(found <= 1.12 * best, "phase {phase}, seed 41: alpha {alpha} takes {found}, the best {best}");
    }
}

/// And the rule that goes by steps of the same times, within 12 %.
#[test]
fn roles_that_finish_together_follow_a_hidden_step() {
    for (phase, (alpha, found, best)) in step_response(Rule::together(), true).into_iter().enumerate() {
        assert!(found <= 1.12 * best, "phase {phase}, seed 41: alpha {alpha} takes {found}, the best {best}");
    }
}

/// The paper's rule converges too where the rates it counts on are the true ones.
#[test]
fn the_utilisation_rule_follows_an_announced_step() {
    for (phase, (alpha, found, best)) in step_response(Rule::utilisation(), false).into_iter().enumerate() {
        assert!(found <= 1.15 * best, "phase {phase}, seed 41: alpha {alpha} takes {found}, the best {best}");
    }
}

/// And it moves the wrong way where another tenant takes the link: its own bytes then use less of it.
#[test]
fn the_utilisation_rule_misreads_a_busy_link() {
    let [alone, shared, _] = step_response(Rule::utilisation(), true)[..] else { panic!("three phases") };
    let makespan = step_response(TRUE_TIMES, true)[1];
    assert!(shared.0 >= alone.0, "alpha went from {} to {}", alone.0, shared.0);
    assert!(shared.1 > 1.1 * makespan.1, "{} s, the makespan rule {}", shared.1, makespan.1);
}

#[test]
fn a_budget_of_the_link_is_kept() {
    let terms = AlphaTerms {
        link_output_stationary: 4e9,
        link_weight_stationary: 1e9,
        hbm_always: 1e9,
        hbm_weight_stationary: 9e9,
    };
    let call = Observation {
        time_s: 0.01,
        link_bytes: 3e9,
        hbm_bytes: 5e9,
        link_busy_s: 0.01,
        hbm_busy_s: 0.005,
        role_s: [0.0; 2],
    };
    let alpha = |budget| {
        let mut controller = Controller::new(TRUE_TIMES, terms, 375e9, 3.4e12, 0.0).unwrap();
        controller.set_link_budget(budget).unwrap();
        controller.observe(&call);
        controller.alpha()
    };
    assert_eq!(alpha(None), terms.balance(300e9, 1000e9));
    assert_eq!(alpha(Some(900e9)), terms.balance(300e9, 1000e9), "more than there is");
    assert_eq!(alpha(Some(100e9)), terms.balance(100e9, 1000e9));
    // Times of roles are equal where they finish together, whatever HBM could do: under a budget its nominal rate counts.
    let mut by_roles = Controller::new(Rule::makespan(), terms, 375e9, 3.4e12, 0.5).unwrap();
    by_roles.set_link_budget(Some(300e9)).unwrap();
    by_roles.observe(&Observation { link_busy_s: 0.01, hbm_busy_s: 0.01, ..call });
    let Rule::Makespan { margin } = Rule::makespan() else { panic!("another rule") };
    assert_eq!(by_roles.alpha(), terms.balance(300e9, 3.4e12).max(margin));
    assert!(by_roles.alpha() < terms.balance(300e9, 500e9), "what the time of the role would say of HBM");
    let mut controller = Controller::new(TRUE_TIMES, terms, 375e9, 3.4e12, 0.5).unwrap();
    for silent in [Observation { link_busy_s: 0.0, ..call }, Observation { hbm_bytes: 0.0, ..call }] {
        controller.observe(&silent);
        assert_eq!(controller.alpha(), 0.5, "nothing was learned");
    }
    // A role without a time: alpha leaves the end, where both have one.
    let mut at_end = Controller::new(Rule::makespan(), terms, 375e9, 3.4e12, 0.0).unwrap();
    at_end.observe(&Observation { link_busy_s: 0.0, ..call });
    assert_eq!(at_end.alpha(), 1.0 / 16.0);
    for margin in [-0.1, 0.5, f64::NAN] {
        assert!(Controller::new(Rule::Makespan { margin }, terms, 375e9, 3.4e12, 0.5).is_err(), "{margin}");
    }
    assert!(controller.set_link_budget(Some(0.0)).is_err());
    assert!(Controller::new(TRUE_TIMES, terms, 375e9, 3.4e12, 1.5).is_err());
    assert!(Controller::new(TRUE_TIMES, terms, f64::NAN, 3.4e12, 0.5).is_err());
    for (rule, named) in [
        (Rule::Together { tolerance: 0.1, step: 0.6, dwell: 2 }, "step"),
        (Rule::Together { tolerance: 0.1, step: f64::NAN, dwell: 2 }, "step"),
        (Rule::Together { tolerance: f64::NAN, step: 0.1, dwell: 2 }, "tolerance"),
        (Rule::Utilisation { tau: 0.1, step: 0.0, dwell: 2 }, "step"),
        (Rule::Utilisation { tau: -0.1, step: 0.1, dwell: 2 }, "tau"),
    ] {
        let error = Controller::new(rule, terms, 375e9, 3.4e12, 0.5).unwrap_err().to_string();
        assert!(error.contains(named), "{rule:?}: {error}");
    }
    // The widest step that there is, and a role without blocks.
    let widest = Rule::Together { tolerance: 0.1, step: 0.5, dwell: 0 };
    let mut controller = Controller::new(widest, terms, 375e9, 3.4e12, 0.0).unwrap();
    controller.observe(&call);
    assert_eq!(controller.alpha(), 0.5);
}

/// A timer that simulates, and finds one kind of path much slower than the model thinks.
struct Biased {
    asked: Vec<Path>,
}

impl Timer for Biased {
    fn time(&mut self, plan: &GemmPlan, path: Path, tokens: usize) -> Result<f64, Error> {
        self.asked.push(path);
        let slow = if matches!(path, Path::Staged { .. }) { 10.0 } else { 1.0 };
        Ok(slow * simulate(plan, path, tokens)?.time_s)
    }
}

/// What is timed decides over what is predicted, once per shape.
#[test]
fn the_tuner_believes_the_clock() {
    let plan = plan(4096, 2048, 0.0, 1024, DeviceProfile::gh200().slice(MigSlice::TwoG));
    let ranked = Tuner::rank(&plan, 1024, 100);
    assert!(ranked.len() > 15 && ranked.windows(2).all(|pair| pair[0].1 <= pair[1].1), "{ranked:?}");
    assert_eq!(ranked[0].0, plan.choose(1024).unwrap().0);
    let mut timer = Biased { asked: Vec::new() };
    let mut tuner = Tuner::new();
    let chosen = tuner.choose(&plan, 1000, &mut timer).unwrap();
    assert!(!matches!(chosen, Path::Staged { .. }), "{chosen}");
    let asked = timer.asked.len();
    assert_eq!(timer.asked[..3], timer.asked[3..6], "candidates take turns");
    assert_eq!(tuner.choose(&plan, 1024, &mut timer).unwrap(), chosen, "the same bucket");
    assert_eq!(timer.asked.len(), asked, "and nothing was timed again");
    tuner.choose(&plan, 300, &mut timer).unwrap();
    assert!(timer.asked.len() > asked, "another bucket");
    // A path that is asked for is not tuned away.
    let config = GemmConfig { path: PathChoice::Only(Path::Direct { alpha: 0.5 }), ..plan.config().clone() };
    let fixed = GemmPlan::new(*plan.placement(), config).unwrap();
    assert_eq!(Tuner::rank(&fixed, 1024, 100).len(), 1);
    let other = tuner.choose(&fixed, 1024, &mut timer).unwrap();
    assert_eq!(other, Path::Direct { alpha: 0.5 }, "what another plan chose is not open to this one");
    assert_eq!(tuner.choose(&plan, 1024, &mut timer).unwrap(), chosen, "nor the other way round");
}
