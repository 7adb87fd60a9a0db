//! Merging partial states: any split, any order, both forms.

mod common;

use attention::reference::merge_states;
use attention::softmax_state::{Normalised, Raw, Real};
use attention::testing::{Comparison, Inputs, Rng, Tolerance, poison};
use attention::{Error, Fault, FaultCode};
use longkv_attention as attention;
use proptest::prelude::*;

/// Scores and values of `keys` keys; about one key in eight is masked.
fn keys(keys: usize, v_dim: usize, spread: f64, seed: u64) -> (Vec<f64>, Vec<Vec<f64>>) {
    let mut rng = Rng::new(seed);
    let scores = (0..keys)
        .map(|_| if rng.below(8) == 0 { f64::NEG_INFINITY } else { spread * rng.normal() })
        .collect();
    let values = (0..keys).map(|_| (0..v_dim).map(|_| rng.normal()).collect()).collect();
    (scores, values)
}

/// The state of all keys, straight from its definition.
fn whole(scores: &[f64], values: &[Vec<f64>], v_dim: usize) -> (Vec<f64>, f64) {
    let m = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if m == f64::NEG_INFINITY {
        return (vec![0.0; v_dim], m);
    }
    let l: f64 = scores.iter().map(|score| (score - m).exp()).sum();
    let out = (0..v_dim).map(|c| {
        scores.iter().zip(values).map(|(score, value)| (score - m).exp() * value[c]).sum::<f64>() / l
    });
    (out.collect(), m + l.ln())
}

/// Splits keys at random into `parts` states, some of them empty, in random order.
fn split<R: Real>(
    scores: &[f64],
    values: &[Vec<f64>],
    v_dim: usize,
    parts: usize,
    rng: &mut Rng,
) -> Vec<Raw<R>> {
    let mut states = vec![Raw::empty(v_dim); parts];
    for (score, value) in scores.iter().zip(values) {
        states[rng.below(parts)].push(R::from_f64(*score), value.iter().map(|&x| R::from_f64(x)));
    }
    rng.shuffle(&mut states);
    states
}

/// Merges neighbours at random until one state is left: a random tree.
fn tree<S: Clone>(mut states: Vec<S>, merge: impl Fn(&mut S, &S) -> Result<(), Error>, rng: &mut Rng) -> S {
    while states.len() > 1 {
        let at = rng.below(states.len() - 1);
        let other = states.remove(at + 1);
        merge(&mut states[at], &other).unwrap();
    }
    states[0].clone()
}

fn to_f64<R: Real>(x: &[R]) -> Vec<f64> {
    x.iter().map(|x| x.to_f64()).collect()
}

fn check_splits<R: Real>(count: usize, parts: usize, spread: f64, seed: u64, tolerance: Tolerance) {
    let v_dim = 5;
    let (scores, values) = keys(count, v_dim, spread, seed);
    let (out, lse) = whole(&scores, &values, v_dim);
    let mut rng = Rng::new(!seed);
    let states = split::<R>(&scores, &values, v_dim, parts, &mut rng);
    let raw = tree(states.clone(), Raw::merge, &mut rng).normalise();
    let normalised: Vec<Normalised<R>> = states.iter().map(Raw::normalise).collect();
    let normalised = tree(normalised, Normalised::merge, &mut rng);
    let mixed: Vec<Raw<R>> = states.iter().map(|state| Raw::from(&state.normalise())).collect();
    let mixed = tree(mixed, Raw::merge, &mut rng).normalise();
    for (form, state) in [("raw", raw), ("normalised", normalised), ("mixed", mixed)] {
        let case = format!("{form}: {count} keys in {parts} parts, spread {spread}, seed {seed}");
        Comparison::of_f64(&to_f64(&state.out), &out, tolerance).assert(format!("{case}, out"));
        Comparison::of_f64(&[state.lse.to_f64()], &[lse], tolerance).assert(format!("{case}, lse"));
    }
}

proptest! {
    #![proptest_config(common::config(64))]

    #[test]
    fn any_split_in_any_order_is_the_whole(
        count in 0usize..40, parts in 1usize..12, spread in prop_oneof![Just(1.0), Just(30.0)], seed in any::<u64>()
    ) {
        check_splits::<f64>(count, parts, spread, seed, Tolerance::new(1e-12, 1e-12));
        // f32 scores of size 30 are rounded by 1e-6 each, which an exponential turns into 1e-6 relative; values cancel.
        check_splits::<f32>(count, parts, spread, seed, Tolerance::new(2e-5, 1e-5));
    }

    #[test]
    fn merged_rows_equal_a_fold(
        rows in 0usize..6, max_splits in 0usize..9, v_dim in 1usize..9, seed in any::<u64>()
    ) {
        let mut rng = Rng::new(seed);
        let mut partial_out = poison::<f32>(rows * max_splits * v_dim);
        let mut partial_lse = poison::<f32>(rows * max_splits);
        let num_splits: Vec<u32> = (0..rows).map(|_| rng.below(max_splits + 3) as u32).collect();
        let mut folded = Vec::new();
        for (row, &used) in num_splits.iter().enumerate() {
            let used = used as usize;
            let mut state = Normalised::<f64>::empty(v_dim);
            for split in 0..used.min(max_splits) {
                let at = row * max_splits + split;
                // An empty state leaves its output unwritten, as NaN.
                partial_lse[at] = f32::NEG_INFINITY;
                if rng.below(4) > 0 {
                    partial_lse[at] = (10.0 * rng.normal()) as f32;
                    let values = Inputs::Normal.values(1, v_dim, rng.bits());
                    partial_out[at * v_dim..][..v_dim].copy_from_slice(&values);
                    let out = values.into_iter().map(f64::from).collect();
                    state.merge(&Normalised { out, lse: f64::from(partial_lse[at]) }).unwrap();
                }
            }
            folded.push(if used > max_splits { Normalised::empty(v_dim) } else { state });
        }
        let case = format!("rows {rows}, max_splits {max_splits}, v_dim {v_dim}, seed {seed}");
        let merged =
            merge_states(&partial_out, &partial_lse, Some(&num_splits), rows, max_splits, v_dim).unwrap();
        let out: Vec<f64> = folded.iter().flat_map(|state| state.out.clone()).collect();
        let lse: Vec<f64> = folded.iter().map(|state| state.lse).collect();
        Comparison::of_f64(&merged.out, &out, Tolerance::new(1e-13, 1e-13)).assert(format!("{case}, out"));
        Comparison::of_f64(&merged.lse, &lse, Tolerance::new(1e-13, 1e-13)).assert(format!("{case}, lse"));
        let faults: Vec<Fault> = (0..rows)
            .filter(|&row| num_splits[row] as usize > max_splits)
            .map(|row| Fault { code: FaultCode::BadSplits, index: row as u64 })
            .collect();
        prop_assert_eq!(merged.faults, faults);
    }
}

#[test]
fn merge_without_counts_takes_every_split() {
    let merged =
        merge_states(&[1.0, 3.0, 5.0, 7.0], &[0.0, 0.0, -1.0, f32::NEG_INFINITY], None, 2, 2, 1).unwrap();
    assert_eq!(merged.out, [2.0, 5.0]);
    assert_eq!(merged.lse, [2f64.ln(), -1.0]);
    assert!(merged.faults.is_empty());
}

#[test]
fn merge_shows_a_nan_and_only_where_it_is() {
    let merged = merge_states(&[1.0, 2.0, 3.0, 4.0], &[0.0, f32::NAN, 0.0, 0.0], None, 2, 2, 1).unwrap();
    assert!(merged.out[0].is_nan() && merged.lse[0].is_nan());
    assert_eq!((merged.out[1], merged.lse[1]), (3.5, 2f64.ln()));
}

#[test]
fn merge_refuses_lengths_that_do_not_fit() {
    let named = |result: Result<_, Error>| match result {
        Err(Error::Argument { argument, .. }) => argument,
        other => panic!("{other:?}"),
    };
    assert_eq!(named(merge_states(&[0.0; 5], &[0.0; 2], None, 1, 2, 3)), "partial_out");
    assert_eq!(named(merge_states(&[0.0; 6], &[0.0; 3], None, 1, 2, 3)), "partial_lse");
    assert_eq!(named(merge_states(&[0.0; 6], &[0.0; 2], Some(&[1, 1]), 1, 2, 3)), "num_splits");
}
