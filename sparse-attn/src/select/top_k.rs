//! The k best scores, as a total order that every backend shares.
//!
//! Larger scores first; of equal scores the lowest number. A NaN ranks with -inf, last, and +0 equals −0. Exactly
//! `min(k, n)` numbers come out, so that shapes do not depend on values.

/// A score as an unsigned key: a larger key is a better score. NaN and -inf make 0, so no score is lost behind them.
pub fn key(score: f32) -> u32 {
    if score.is_nan() || score == f32::NEG_INFINITY {
        return 0;
    }
    // Adding +0 turns −0 into +0. Negative numbers have their order reversed, then lie below all positive ones.
    let bits = (score + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// Numbers of the `k` best scores, in increasing order.
pub fn top_k(scores: &[f32], k: usize) -> Vec<u32> {
    let mut ranked: Vec<(u32, u32)> =
        scores.iter().zip(0u32..).map(|(&score, number)| (!key(score), number)).collect();
    if k < ranked.len() {
        if k > 0 {
            ranked.select_nth_unstable(k - 1);
        }
        ranked.truncate(k);
    }
    let mut numbers: Vec<u32> = ranked.into_iter().map(|(_, number)| number).collect();
    numbers.sort_unstable();
    numbers
}

/// All numbers, best first.
pub fn ranking(scores: &[f32]) -> Vec<u32> {
    let mut numbers: Vec<u32> = (0..scores.len() as u32).collect();
    numbers.sort_by_key(|&number| !key(scores[number as usize]));
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_and_what_is_no_number() {
        const NAN: f32 = f32::NAN;
        const LOW: f32 = f32::NEG_INFINITY;
        const HIGH: f32 = f32::INFINITY;
        for (name, scores, k, expected) in [
            ("all equal", &[1.0; 5][..], 3, &[0, 1, 2][..]),
            ("the best", &[0.5, 3.0, -1.0, 2.0], 2, &[1, 3]),
            ("zeros of both signs are equal", &[-0.0, 0.0, -0.0], 2, &[0, 1]),
            ("negative", &[-3.0, -1.0, -2.0], 1, &[1]),
            ("k past the end", &[1.0, 2.0], 5, &[0, 1]),
            ("none", &[1.0, 2.0], 0, &[]),
            ("no scores", &[], 3, &[]),
            ("NaN last", &[NAN, 1.0, NAN, -5.0], 2, &[1, 3]),
            ("NaN and -inf are equal", &[LOW, NAN, LOW, 1.0], 3, &[0, 1, 3]),
            ("only NaN", &[NAN; 3], 2, &[0, 1]),
            ("infinity first", &[1.0, HIGH, f32::MAX], 1, &[1]),
            ("lowest finite above -inf", &[LOW, f32::MIN], 1, &[1]),
        ] {
            assert_eq!(top_k(scores, k), expected, "{name}");
            let mut first: Vec<u32> = ranking(scores).into_iter().take(k).collect();
            first.sort_unstable();
            assert_eq!(first, expected, "{name}, by ranking");
        }
    }

    #[test]
    fn keys_keep_the_order_of_numbers() {
        let values = [f32::MIN, -1.0, -f32::MIN_POSITIVE, -1e-45, 0.0, 1e-45, 1.0, f32::MAX, f32::INFINITY];
        assert!(values.windows(2).all(|pair| key(pair[0]) < key(pair[1])));
        assert!(key(f32::MIN) > key(f32::NEG_INFINITY));
    }
}
