//! Products of all that cases may vary: whole for `EXHAUSTIVE=1`, else a few of them.

/// Whether `EXHAUSTIVE=1` asks for everything, however long it takes.
pub fn exhaustive() -> bool {
    std::env::var("EXHAUSTIVE").is_ok_and(|value| value == "1")
}

/// All cases, or `few` of them from everywhere in the list, each with its place in it.
pub fn cases<T>(all: Vec<T>, few: usize) -> Vec<(usize, T)> {
    let (step, len) = (golden_step(all.len()), all.len());
    let count = if exhaustive() { len } else { few.min(len) };
    let mut all: Vec<Option<T>> = all.into_iter().map(Some).collect();
    // The step is coprime to the length, so no case comes twice, and neighbours differ in every factor.
    let places = (0..count).map(|i| i * step % len);
    places.filter_map(|place| Some((place, all[place].take()?))).collect()
}

/// A number coprime to `len` near `len` over the golden ratio, whose multiples spread most evenly.
fn golden_step(len: usize) -> usize {
    let gcd = |mut a: usize, mut b: usize| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let start = (len as f64 * 0.618).round() as usize;
    (start.max(1)..).find(|step| gcd(*step, len) <= 1).expect("1 more than a multiple is coprime")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_are_different_ones() {
        for len in [1, 2, 12, 100, 5850] {
            let few = cases((0..len).collect(), 12);
            let mut places: Vec<usize> = few.iter().map(|(place, _)| *place).collect();
            assert!(few.iter().all(|(place, case)| place == case));
            places.sort_unstable();
            places.dedup();
            assert_eq!(places.len(), if exhaustive() { len } else { len.min(12) }, "of {len}");
            // From everywhere: the widest gap is less than four times the mean one.
            let gap = places.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(1);
            assert!(gap <= 4 * len.div_ceil(12), "gap {gap} of {len}");
        }
        assert!(cases(Vec::<u8>::new(), 5).is_empty());
    }
}
