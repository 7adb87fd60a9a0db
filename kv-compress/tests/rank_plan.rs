//! The planner: within budget, monotone, deterministic, and able to say why.

mod common;

use attention::HeadShape;
use attention::testing::Rng;
use kv_compress::calibrate::Calibration;
use kv_compress::projection::{Projection, project};
use kv_compress::rank_plan::{
    HeadProfile, HeadWeight, Planner, Profile, RankPlan, Reason, Side, Weights, layer_proportional,
    layer_threshold,
};
use kv_compress::{Error, HeadRanks};
use proptest::prelude::*;

fn shapes() -> Vec<HeadShape> {
    vec![HeadShape::new(4, 2, 64, 64).unwrap(), HeadShape::new(8, 4, 96, 48).unwrap()]
}

/// Losses that fall like `decay^i` from `start` to 0, each step saving less than the one before.
fn easing(dim: usize, start: f64, decay: f64) -> Vec<f64> {
    let last = decay.powi(dim as i32 / 16);
    (0..=dim / 16).map(|i| start * (decay.powi(i as i32) - last) / (1.0 - last)).collect()
}

/// Losses that fall like `decay^i` from `start`, and to 0 at once where nothing is left to lose: the last step may save most.
fn falling(dim: usize, start: f64, decay: f64) -> Vec<f64> {
    (0..=dim / 16).map(|i| if i == dim / 16 { 0.0 } else { start * decay.powi(i as i32) }).collect()
}

fn profile(seed: u64) -> Profile {
    let mut rng = Rng::new(seed);
    let mut losses = |dim| easing(dim, rng.uniform() + 0.01, 0.1 + 0.8 * rng.uniform());
    let layers = shapes()
        .iter()
        .map(|shape| {
            (0..shape.kv_heads())
                .map(|_| HeadProfile { keys: losses(shape.qk_dim()), values: losses(shape.v_dim()) })
                .collect()
        })
        .collect();
    Profile::from_losses(shapes(), layers).unwrap()
}

fn planner(profile: &Profile) -> Planner {
    Planner::new(profile, &Weights::equal(profile)).unwrap()
}

/// What a plan loses by the profile.
fn lost(profile: &Profile, plan: &RankPlan) -> f64 {
    let mut sum = 0.0;
    for (heads, ranks) in profile.layers().iter().zip(plan.layers()) {
        for (head, ranks) in heads.iter().zip(ranks.heads()) {
            sum += head.keys[ranks.k / 16] + head.values[ranks.v / 16];
        }
    }
    sum
}

fn contains(large: &RankPlan, small: &RankPlan) -> bool {
    let heads = |plan: &RankPlan| -> Vec<HeadRanks> {
        plan.layers().iter().flat_map(|layer| layer.heads().to_vec()).collect()
    };
    heads(large).iter().zip(heads(small)).all(|(a, b)| a.k >= b.k && a.v >= b.v)
}

const LEAST: usize = 2 * (2 * 32 + 4 * 32);
const FULL: usize = 2 * (2 * 128 + 4 * 144);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn budgets_are_kept_and_plans_nested(seed in 0u64..1 << 40, a in LEAST..FULL + 100, b in LEAST..FULL + 100) {
        let profile = profile(seed);
        let planner = planner(&profile);
        let (small, large) = (planner.within(a.min(b)).unwrap(), planner.within(a.max(b)).unwrap());
        for (plan, budget) in [(&small, a.min(b)), (&large, a.max(b))] {
            let bytes = plan.bytes_per_token();
            prop_assert!(bytes <= budget && (bytes + 32 > budget || bytes == FULL), "{} of {}", bytes, budget);
            let counted: usize = plan.layers().iter().flat_map(|l| l.heads()).map(|r| 2 * (r.k + r.v)).sum();
            prop_assert_eq!(bytes, counted);
        }
        prop_assert!(contains(&large, &small));
        prop_assert!(lost(&profile, &large) <= lost(&profile, &small) + 1e-12);
        prop_assert_eq!(planner.within(a).unwrap(), self::planner(&profile).within(a).unwrap());
        // Greedy by gain is never worse than equal ranks of the same bytes, where gains fall.
        let uniform = RankPlan::uniform(profile.shapes(), a).unwrap();
        let same_bytes = planner.within(uniform.bytes_per_token()).unwrap();
        prop_assert!(lost(&profile, &same_bytes) <= lost(&profile, &uniform) + 1e-12);
    }

    #[test]
    fn a_tighter_target_never_gets_less(seed in 0u64..1 << 40, a in 0f64..1.0, b in 0f64..1.0, noise in 0f64..0.5) {
        let profile = profile(seed);
        let planner = planner(&profile);
        let worst = lost(&profile, &planner.within(LEAST).unwrap());
        // A measure that is noisy, but the same for the same plan.
        let mut calls = 0;
        let mut measure = |plan: &RankPlan| {
            calls += 1;
            let jitter = Rng::new(plan.bytes_per_token() as u64).uniform() * noise * worst;
            let full = plan.bytes_per_token() == FULL;
            Ok(if full { 0.0 } else { lost(&profile, plan) + jitter })
        };
        let tight = planner.accurate(a.min(b) * worst, &mut measure).unwrap();
        let loose = planner.accurate(a.max(b) * worst, &mut measure).unwrap();
        prop_assert!(contains(&tight, &loose));
        for (plan, target) in [(&tight, a.min(b)), (&loose, a.max(b))] {
            prop_assert!(measure(plan).unwrap() <= target * worst, "the target is met");
        }
        prop_assert!(calls <= 2 * (2 + planner.steps().len().ilog2() as usize + 1) + 2, "{} calls", calls);
    }
}

#[test]
fn bytes_go_where_the_loss_is() {
    let shape = HeadShape::new(2, 2, 64, 64).unwrap();
    let easy = || HeadProfile { keys: falling(64, 1.0, 0.01), values: falling(64, 1.0, 0.01) };
    let hard = || HeadProfile { keys: falling(64, 1.0, 0.9), values: falling(64, 1.0, 0.2) };
    let profile = Profile::from_losses(vec![shape], vec![vec![easy(), hard()]]).unwrap();
    let plan = planner(&profile).within(2 * 128).unwrap();
    let heads = plan.layers()[0].heads();
    assert_eq!((heads[0], heads[1]), (HeadRanks { k: 16, v: 16 }, HeadRanks { k: 64, v: 32 }));
    // The last step of the hard keys saves 0.73 at once; it must not wait for the small steps before it.
    let reason = &plan.reasons()[2];
    assert_eq!((reason.head, reason.side, reason.rank, reason.dim), (1, Side::Keys, 64, 64));
    assert_eq!((reason.kept, reason.next_gain), (1.0, None));
    let weights = vec![vec![HeadWeight { keys: 1e6, values: 1.0 }, HeadWeight { keys: 0.0, values: 1.0 }]];
    let weighted = Planner::new(&profile, &Weights::new(&profile, weights).unwrap()).unwrap();
    let heads = weighted.within(2 * 128).unwrap().layers()[0].heads().to_vec();
    assert_eq!(heads[0].k, 64, "a head that matters more gets more");
    assert_eq!(heads[1].k, 16, "one that does not matter gets the least");
}

#[test]
fn the_table_and_the_json_say_why() {
    let profile = profile(3);
    let plan = planner(&profile).within(700).unwrap();
    let table = plan.to_string();
    assert_eq!(table.lines().count(), 2 + 12, "{table}");
    let json: serde_json::Value = serde_json::from_str(&plan.to_json()).unwrap();
    let reasons = json["reasons"].as_array().unwrap();
    assert_eq!((json["rule"].as_str(), reasons.len()), (Some("budget"), 12));
    for (reason, line) in reasons.iter().zip(table.lines().skip(2)) {
        let (rank, dim) = (reason["rank"].as_u64().unwrap(), reason["dim"].as_u64().unwrap());
        assert!(line.contains(&format!("{rank}/{dim}")), "{line}");
        let gained = reason["last_gain"].as_f64();
        assert_eq!(gained.is_none(), rank == 16, "every step but the first was earned: {reason}");
        if let (Some(last), Some(next)) = (gained, reason["next_gain"].as_f64()) {
            assert!(last >= next, "{reason}");
        }
    }
    // Every step taken saved at least as much as any left out.
    let least = reasons.iter().filter_map(|r| r["last_gain"].as_f64()).fold(f64::INFINITY, f64::min);
    let most = reasons.iter().filter_map(|r| r["next_gain"].as_f64()).fold(0.0, f64::max);
    assert!(least >= most, "{least} and {most}");
    let given = RankPlan::full(&shapes()).unwrap();
    assert_eq!(given.to_string().lines().count(), 1 + 6);
}

#[test]
fn measured_weights_follow_the_model() {
    let profile = profile(5);
    // A model that suffers from keys of the second layer alone.
    let measure = |plan: &RankPlan| {
        let mut loss = 1.0;
        for (head, ranks) in profile.layers()[1].iter().zip(plan.layers()[1].heads()) {
            loss += 3.0 * head.keys[ranks.k / 16];
        }
        Ok(loss)
    };
    let mut calls = 0;
    let weights = Weights::measured(&profile, 32, |plan| {
        calls += 1;
        measure(plan)
    })
    .unwrap();
    assert_eq!(calls, 2 * 6 + 1);
    let plan = Planner::new(&profile, &weights).unwrap().within(LEAST + 32 * 20).unwrap();
    let weights = |layer: usize, side| -> Vec<f64> {
        let of = |r: &&Reason| r.layer == layer && r.side == side;
        plan.reasons().iter().filter(of).map(|reason| reason.weight).collect()
    };
    // Keys of both layers are drawn to their common slope: those that the model feels from above, the others from below.
    let mean = |weights: Vec<f64>| weights.iter().sum::<f64>() / weights.len() as f64;
    let (felt, other) = (mean(weights(1, Side::Keys)), mean(weights(0, Side::Keys)));
    assert!(felt > 1.5 * other && felt <= 3.0 + 1e-9, "{felt} and {other}: {plan}");
    let unfelt = [weights(0, Side::Values), weights(1, Side::Values)].concat();
    assert!(unfelt.iter().all(|&w| w > 0.0 && w < 0.03), "no head is worth nothing: {plan}");

    // Where the profile is right, every weight is the one slope there is.
    let right = Weights::measured(&profile, 16, |plan| Ok(2.0 + 5.0 * lost(&profile, plan))).unwrap();
    let plan = Planner::new(&profile, &right).unwrap().within(FULL).unwrap();
    assert!(plan.reasons().iter().all(|reason| (reason.weight - 5.0).abs() < 1e-9), "{plan}");

    // All heads of a layer at once: fewer calls, and the same where the profile is right.
    let mut calls = 0;
    let by_layer = Weights::measured_by_layer(&profile, 16, |plan| {
        calls += 1;
        Ok(2.0 + 5.0 * lost(&profile, plan))
    });
    assert_eq!(calls, 2 * 2 + 1);
    let plan = Planner::new(&profile, &by_layer.unwrap()).unwrap().within(FULL).unwrap();
    assert!(plan.reasons().iter().all(|reason| (reason.weight - 5.0).abs() < 1e-9), "{plan}");

    // A measure that shows no harm at all says nothing.
    let deaf = Weights::measured(&profile, 16, |_| Ok(2.0)).unwrap();
    assert_eq!(deaf, Weights::equal(&profile));

    let failing = Weights::measured(&profile, 32, |_| Err("the model is gone".into()));
    assert!(matches!(failing, Err(Error::Measure(_))));
    for rank in [0, 8, 112] {
        assert!(Weights::measured(&profile, rank, measure).is_err(), "rank {rank}");
    }
}

#[test]
fn what_cannot_be_planned_is_an_error() {
    let profile = profile(1);
    let planner = planner(&profile);
    for (case, error) in [
        ("budget", planner.within(LEAST - 1).unwrap_err()),
        ("uniform budget", RankPlan::uniform(&shapes(), LEAST - 1).unwrap_err()),
    ] {
        assert!(matches!(error, Error::Argument { argument: "bytes_per_token", .. }), "{case}: {error}");
        assert!(error.to_string().contains(&LEAST.to_string()), "{case}: {error}");
    }
    assert_eq!(RankPlan::uniform(&shapes(), LEAST).unwrap().bytes_per_token(), LEAST);
    let full = RankPlan::uniform(&shapes(), FULL + 1000).unwrap();
    assert_eq!((full.bytes_per_token(), full.layers()), (FULL, RankPlan::full(&shapes()).unwrap().layers()));
    let hopeless = planner.accurate(-1.0, |_| Ok(0.5)).unwrap_err();
    assert!(matches!(hopeless, Error::Argument { argument: "most", .. }), "{hopeless}");
    let nan = planner.accurate(1.0, |_| Ok(f64::NAN)).unwrap_err();
    assert!(matches!(nan, Error::Measure(_)), "{nan}");
    let odd = HeadShape::new(1, 1, 72, 72).unwrap();
    assert!(RankPlan::full(&[odd]).is_err(), "72 is no multiple of 16");
    for dim in [8, 24, 72] {
        let layer = common::Layer::new(HeadShape::new(2, 1, dim, 16).unwrap(), 30, 16, 0.9, 1);
        let mut calibration = Calibration::new([layer.shape]);
        *calibration.layer_mut(0).unwrap() = layer.calibration();
        let bases = vec![project(0, &calibration.layers()[0], Projection::Optimal).unwrap()];
        let refused = Profile::new(&calibration, &bases, &[1.0]).unwrap_err().to_string();
        assert!(refused.contains("multiple of 16"), "{dim} dimensions: {refused}");
    }
    for (case, losses) in [("short", vec![1.0; 4]), ("NaN", vec![f64::NAN; 5]), ("negative", vec![-1.0; 5])] {
        let head = HeadProfile { keys: losses, values: vec![1.0; 5] };
        let shape = HeadShape::new(1, 1, 64, 64).unwrap();
        assert!(Profile::from_losses(vec![shape], vec![vec![head]]).is_err(), "{case}");
    }
    let one = HeadWeight { keys: 1.0, values: 1.0 };
    assert!(Weights::new(&profile, vec![vec![one; 2]]).is_err());
    assert!(Weights::new(&profile, vec![vec![one; 2], vec![HeadWeight { keys: -1.0, ..one }; 4]]).is_err());
}

/// The allocations of others: per layer, within budget, and no better by the profile than ours at equal bytes.
#[test]
fn allocations_per_layer() {
    for seed in 0..20 {
        let profile = profile(seed);
        let mut last = 0;
        for budget in (LEAST..=FULL).step_by(64) {
            let threshold = layer_threshold(&profile, budget).unwrap();
            let weights = [(1.0, 3.0), (2.0, 0.5)];
            let proportional = layer_proportional(&shapes(), &weights, budget).unwrap();
            for plan in [&threshold, &proportional] {
                assert!(plan.bytes_per_token() <= budget, "seed {seed}: {plan}");
                for layer in plan.layers() {
                    assert!(
                        layer.heads().iter().all(|head| *head == layer.heads()[0]),
                        "seed {seed}: {plan}"
                    );
                }
                let ours = planner(&profile).within(plan.bytes_per_token()).unwrap();
                assert!(lost(&profile, &ours) <= lost(&profile, plan) + 1e-12, "seed {seed}, {budget} bytes");
            }
            assert!(threshold.bytes_per_token() >= last, "seed {seed}: a larger budget is used");
            last = threshold.bytes_per_token();
        }
        assert_eq!(last, FULL);
    }
    let heavy = layer_proportional(&shapes(), &[(0.0, 0.0), (1.0, 0.0)], LEAST + 4 * 32 * 5).unwrap();
    assert_eq!(heavy.layers()[1].heads()[0], HeadRanks { k: 96, v: 16 }, "all the weight is on these keys");
    assert!(layer_threshold(&profile(1), LEAST - 1).is_err());
    assert!(layer_proportional(&shapes(), &[(1.0, 1.0)], FULL).is_err());
    assert!(layer_proportional(&shapes(), &[(1.0, f64::NAN), (1.0, 1.0)], FULL).is_err());
    assert!(layer_proportional(&shapes(), &[(1.0, 1.0), (1.0, 1.0)], LEAST - 1).is_err());
}
