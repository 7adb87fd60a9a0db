//! From scores per query head to scores per KV head.
//!
//! Under grouped-query attention all query heads of a group read the same pages, so the group selects together: by the
//! largest raw score, or by the maximum, mean or sum of what each head's softmax over the partitions gives (ShadowKV takes
//! the maximum, FreeKV found the mean better, RetroInfer sums).

use attention::Score;

/// How the scores of a group become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Aggregation {
    /// Largest raw score.
    Raw,
    /// Largest probability.
    Max,
    /// Mean probability.
    Mean,
    /// Sum of probabilities.
    Sum,
}

/// Aggregates scores `[rows, partitions]`, before scale, into `[partitions]`.
///
/// A NaN stays NaN and takes no part in its row's softmax. A row whose best score is -inf has probabilities 0; scores of
/// +inf share a row's whole weight.
pub fn aggregate(
    aggregation: Aggregation,
    rule: &Score,
    scores: &[f32],
    partitions: usize,
    out: &mut Vec<f32>,
) {
    out.clear();
    if partitions == 0 {
        return;
    }
    let rows = scores.len() / partitions;
    let mut total = vec![0.0f64; partitions];
    if matches!(aggregation, Aggregation::Raw | Aggregation::Max) {
        total.fill(f64::NEG_INFINITY);
    }
    for row in scores.chunks_exact(partitions) {
        let softmax = aggregation != Aggregation::Raw;
        for (total, score) in total.iter_mut().zip(if softmax {
            probabilities(row, rule)
        } else {
            row.iter().map(|&score| f64::from(score)).collect()
        }) {
            *total = match aggregation {
                _ if total.is_nan() || score.is_nan() => f64::NAN,
                Aggregation::Raw | Aggregation::Max => total.max(score),
                Aggregation::Mean | Aggregation::Sum => *total + score,
            };
        }
    }
    let divisor = if aggregation == Aggregation::Mean { rows as f64 } else { 1.0 };
    out.extend(total.iter().map(|total| (total / divisor) as f32));
}

/// The softmax of a row, in f64.
fn probabilities(row: &[f32], rule: &Score) -> Vec<f64> {
    let mut scores: Vec<f64> = row.iter().map(|&score| rule.apply_f64(f64::from(score))).collect();
    let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    for score in &mut scores {
        *score = match best {
            f64::NEG_INFINITY if !score.is_nan() => 0.0,
            f64::INFINITY if !score.is_nan() => f64::from(u8::from(*score == f64::INFINITY)),
            _ => (*score - best).exp(),
        };
    }
    let sum: f64 = scores.iter().filter(|score| !score.is_nan()).sum();
    if sum > 0.0 {
        scores.iter_mut().for_each(|score| *score /= sum);
    }
    scores
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(aggregation: Aggregation, scores: &[f32], partitions: usize) -> Vec<f32> {
        let mut out = Vec::new();
        aggregate(aggregation, &Score::new(0.5).unwrap(), scores, partitions, &mut out);
        out
    }

    #[test]
    fn of_two_heads_by_hand() {
        // Softmax of 0 and 2 ln 3, scaled by a half: 1/4 and 3/4. The other head: 1/2 and 1/2.
        let scores = [0.0, 2.0 * 3f32.ln(), 1.0, 1.0];
        for (aggregation, expected) in [
            (Aggregation::Raw, [1.0, 2.0 * 3f32.ln()]),
            (Aggregation::Max, [0.5, 0.75]),
            (Aggregation::Mean, [0.375, 0.625]),
            (Aggregation::Sum, [0.75, 1.25]),
        ] {
            let found = run(aggregation, &scores, 2);
            let close = found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6);
            assert!(close, "{aggregation:?}: {found:?}, not {expected:?}");
        }
    }

    #[test]
    fn rows_without_numbers() {
        const LOW: f32 = f32::NEG_INFINITY;
        for aggregation in [Aggregation::Raw, Aggregation::Max, Aggregation::Mean, Aggregation::Sum] {
            let found = run(aggregation, &[f32::NAN, 1.0, LOW], 3);
            assert!(found[0].is_nan() && found[1] > found[2], "{aggregation:?}: {found:?}");
            let found = run(aggregation, &[LOW, LOW], 2);
            assert!(found.iter().all(|x| !x.is_nan()), "{aggregation:?}: {found:?}");
            assert!(run(aggregation, &[], 0).is_empty());
        }
        assert_eq!(run(Aggregation::Sum, &[f32::INFINITY, 1.0, f32::INFINITY], 3), [0.5, 0.0, 0.5]);
    }
}
