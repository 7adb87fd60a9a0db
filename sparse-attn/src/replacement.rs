//! What bucketed LRU is measured against: exact LRU, random replacement and Belady's optimum, over recorded selections.

use std::collections::HashMap;

use crate::Error;
use crate::bucketed_lru::BucketedLru;
use crate::metadata::Metadata;

/// A cache of a fixed number of pages that sees one selection after another.
pub trait Replacement {
    /// Makes the pages of a step resident; gives how many were before.
    ///
    /// # Errors
    /// [`Error::Argument`] when a step has more pages than the cache.
    fn step(&mut self, selected: &[u32]) -> Result<usize, Error>;
}

impl<M: Metadata> Replacement for BucketedLru<M> {
    fn step(&mut self, selected: &[u32]) -> Result<usize, Error> {
        Ok(self.resolve(selected)?.hits())
    }
}

/// Share of all selected pages that were resident; 0 of none.
///
/// # Errors
/// As [`Replacement::step`].
pub fn hit_rate<'a>(
    cache: &mut (impl Replacement + ?Sized),
    steps: impl IntoIterator<Item = &'a [u32]>,
) -> Result<f64, Error> {
    let (mut hits, mut selected) = (0, 0);
    for step in steps {
        hits += cache.step(step)?;
        selected += step.len();
    }
    Ok(hits as f64 / selected.max(1) as f64)
}

/// A cache that evicts the pages with the largest key.
#[derive(Debug, Clone)]
struct Keyed {
    /// `(page, key)`; `None` is free.
    slots: Vec<Option<(u32, u64)>>,
    places: HashMap<u32, usize>,
}

impl Keyed {
    fn new(slots: usize) -> Self {
        Keyed { slots: vec![None; slots], places: HashMap::new() }
    }

    /// Gives the pages of a step their keys and evicts by `key_of_others`; `(slot, page, key)` to a larger number the
    /// sooner it goes.
    fn step(
        &mut self,
        selected: &[u32],
        mut key: impl FnMut(u32) -> u64,
        mut badness: impl FnMut(u64) -> u64,
    ) -> Result<usize, Error> {
        if selected.len() > self.slots.len() {
            let expected = format!("at most {} pages", self.slots.len());
            return Err(Error::argument("selected", expected, selected.len()));
        }
        let wanted: std::collections::HashSet<u32> = selected.iter().copied().collect();
        let misses: Vec<u32> =
            selected.iter().copied().filter(|page| !self.places.contains_key(page)).collect();
        let mut candidates: Vec<(u64, usize)> = Vec::new();
        for (slot, content) in self.slots.iter().enumerate() {
            match content {
                None => candidates.push((u64::MAX, slot)),
                Some((page, _)) if wanted.contains(page) => {}
                Some((_, key)) => candidates.push((badness(*key).min(u64::MAX - 1), slot)),
            }
        }
        // The worst first; of equals the first slot.
        candidates.sort_unstable_by_key(|&(bad, slot)| (!bad, slot));
        let mut victims: Vec<usize> =
            candidates.into_iter().take(misses.len()).map(|(_, slot)| slot).collect();
        victims.sort_unstable();
        for (&page, slot) in misses.iter().zip(victims) {
            if let Some((evicted, _)) = self.slots[slot].replace((page, 0)) {
                self.places.remove(&evicted);
            }
            self.places.insert(page, slot);
        }
        for &page in selected {
            if let Some(Some(content)) = self.places.get(&page).map(|&slot| &mut self.slots[slot]) {
                content.1 = key(page);
            }
        }
        Ok(selected.len() - misses.len())
    }
}

/// Least recently used, exactly, by steps; ties in slot order.
#[derive(Debug, Clone)]
pub struct ExactLru {
    cache: Keyed,
    now: u64,
}

impl ExactLru {
    /// `slots` free slots.
    pub fn new(slots: usize) -> Self {
        ExactLru { cache: Keyed::new(slots), now: 0 }
    }
}

impl Replacement for ExactLru {
    fn step(&mut self, selected: &[u32]) -> Result<usize, Error> {
        self.now += 1;
        let now = self.now;
        self.cache.step(selected, |_| now, |used| now - used)
    }
}

/// Evicts any page that the step does not use.
#[derive(Debug, Clone)]
pub struct Random {
    cache: Keyed,
    rng: fastrand::Rng,
}

impl Random {
    /// `slots` free slots.
    pub fn new(slots: usize, seed: u64) -> Self {
        Random { cache: Keyed::new(slots), rng: fastrand::Rng::with_seed(seed) }
    }
}

impl Replacement for Random {
    fn step(&mut self, selected: &[u32]) -> Result<usize, Error> {
        let rng = &mut self.rng;
        self.cache.step(selected, |_| 0, |_| rng.u64(..))
    }
}

/// Evicts what is used again last: the optimum, which knows the future (Belady, 1966).
#[derive(Debug, Clone)]
pub struct Belady {
    cache: Keyed,
    /// Steps at which each page is used, the next one last.
    uses: HashMap<u32, Vec<u64>>,
}

impl Belady {
    /// `slots` free slots, for exactly these steps.
    pub fn new<'a>(slots: usize, steps: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let mut uses: HashMap<u32, Vec<u64>> = HashMap::new();
        for (step, selected) in (0..).zip(steps) {
            for &page in selected {
                uses.entry(page).or_default().push(step);
            }
        }
        uses.values_mut().for_each(|steps| steps.reverse());
        Belady { cache: Keyed::new(slots), uses }
    }
}

impl Replacement for Belady {
    fn step(&mut self, selected: &[u32]) -> Result<usize, Error> {
        let uses = &mut self.uses;
        let next = |page: u32| {
            let steps = uses.get_mut(&page);
            steps.and_then(|steps| {
                steps.pop();
                steps.last().copied()
            })
        };
        // Keys are the next use, so the page with the largest goes first.
        let mut next = next;
        self.cache.step(selected, |page| next(page).unwrap_or(u64::MAX - 1), |next_use| next_use)
    }
}
