//! Bucketed LRU: which pages stay on the device.
//!
//! Every slot has an age in steps, which saturates at the last of a few buckets (64 by default). A step
//!
//! 1. ages every slot by 1;
//! 2. looks the selected pages up: those that are resident get age 0, the others are misses;
//! 3. takes as many victims as there are misses: the oldest bucket first, a free slot older than any bucket, and within the
//!    bucket where the count is reached the first slots in slot order. This is one digit of a radix select;
//! 4. gives the victims, in slot order, to the misses, in the order of selection.
//!
//! Pages of this step have age 0 and are never victims; neither are pages that wait to be written back. While no page
//! is older than the buckets tell apart, this is exact LRU by steps, ties in slot order. The ages' histogram gives the
//! working set for nothing.
//!
//! All of it is deterministic and parallel within a head: on a GPU one block resolves one head, without sorting.

use crate::Error;
use crate::metadata::{Metadata, NONE, SlotScan};

/// Buckets of SPIN.
pub const BUCKETS: u8 = 64;

/// A page that was not resident, and the slot it got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Miss {
    /// Its place in the selection.
    pub place: u32,
    /// The page.
    pub page: u32,
    /// The slot.
    pub slot: u32,
    /// The page that lost the slot; [`NONE`] if it was free.
    pub evicted: u32,
}

/// Where the selected pages are after a step.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Resolution {
    /// The slot of each selected page `[selected]`; [`NONE`] for padding.
    pub slots: Vec<u32>,
    /// Pages to fetch, in the order of selection.
    pub misses: Vec<Miss>,
}

impl Resolution {
    /// Selected pages that were resident.
    pub fn hits(&self) -> usize {
        self.slots.iter().filter(|&&slot| slot != NONE).count() - self.misses.len()
    }
}

/// The slots of one KV head, and which pages they hold.
#[derive(Debug, Clone)]
pub struct BucketedLru<M = SlotScan> {
    metadata: M,
    ages: Vec<u8>,
    /// Slots whose page is not in host memory yet.
    dirty: Vec<bool>,
    buckets: u8,
}

impl<M: Metadata> BucketedLru<M> {
    /// `slots` free slots and `buckets` ages.
    ///
    /// # Errors
    /// [`Error::Argument`] when there are fewer than 2 buckets or more than 254.
    pub fn new(slots: usize, buckets: u8) -> Result<Self, Error> {
        if !(2..=254).contains(&buckets) {
            return Err(Error::argument("buckets", "2 to 254", buckets));
        }
        Ok(BucketedLru { metadata: M::new(slots), ages: vec![0; slots], dirty: vec![false; slots], buckets })
    }

    /// Slots.
    pub fn slots(&self) -> usize {
        self.ages.len()
    }

    /// Which page has which slot.
    pub fn metadata(&self) -> &M {
        &self.metadata
    }

    /// Age of each slot `[slots]`, in steps; of a free slot anything.
    pub fn ages(&self) -> &[u8] {
        &self.ages
    }

    /// Resident pages and their slots, in slot order.
    pub fn residents(&self) -> impl Iterator<Item = (usize, u32)> + '_ {
        (0..self.slots()).map(|slot| (slot, self.metadata.owner(slot))).filter(|&(_, page)| page != NONE)
    }

    /// Pages that are not in host memory yet and their slots, in slot order.
    pub fn dirty(&self) -> impl Iterator<Item = (usize, u32)> + '_ {
        self.residents().filter(|&(slot, _)| self.dirty[slot])
    }

    /// Notes that a slot's page is in host memory now.
    pub fn written_back(&mut self, slot: usize) {
        self.dirty[slot] = false;
    }

    /// Slots by age `[buckets + 1]`; the last entry counts free slots.
    pub fn histogram(&self) -> Vec<usize> {
        let mut histogram = vec![0; usize::from(self.buckets) + 1];
        for slot in 0..self.slots() {
            let bucket = if self.metadata.owner(slot) == NONE { self.buckets } else { self.ages[slot] };
            histogram[usize::from(bucket)] += 1;
        }
        histogram
    }

    /// Pages used in the last `steps` steps, as far as they are still resident: the working set of SparseServe, which takes
    /// 12 steps.
    pub fn working_set(&self, steps: usize) -> usize {
        self.histogram()[..usize::from(self.buckets)].iter().take(steps).sum()
    }

    /// How old a slot counts for eviction: 0 for one that must stay, one more than its age, and more than any age if free.
    fn eviction_age(&self, slot: usize) -> u8 {
        match self.metadata.owner(slot) {
            NONE => self.buckets + 1,
            _ if self.dirty[slot] => 0,
            _ => self.ages[slot] + 1,
        }
    }

    /// The `need` oldest slots that are not in `keep` (in increasing order), in slot order; all that may go if they are
    /// fewer.
    fn victims(&self, need: usize, keep: &[u32]) -> Vec<usize> {
        let mut keys: Vec<u8> = (0..self.slots()).map(|slot| self.eviction_age(slot)).collect();
        keep.iter().filter(|&&slot| slot != NONE).for_each(|&slot| keys[slot as usize] = 0);
        let mut histogram = vec![0usize; usize::from(self.buckets) + 2];
        keys.iter().for_each(|&key| histogram[usize::from(key)] += 1);
        let (mut older, mut threshold) = (0, self.buckets + 1);
        while threshold > 1 && older + histogram[usize::from(threshold)] < need {
            older += histogram[usize::from(threshold)];
            threshold -= 1;
        }
        let mut ties = need - older;
        let taken = |slot: &usize| {
            let tie = keys[*slot] == threshold && ties > 0;
            ties -= usize::from(tie);
            keys[*slot] > threshold || tie
        };
        (0..self.slots()).filter(taken).collect()
    }

    /// One step: makes the selected pages resident. [`NONE`] in the selection is padding and touches nothing.
    ///
    /// # Errors
    /// [`Error::Argument`] when a page is selected twice, or the pages do not fit the slots that may go. Nothing changes then.
    pub fn resolve(&mut self, selected: &[u32]) -> Result<Resolution, Error> {
        let mut sorted: Vec<u32> = selected.iter().copied().filter(|&page| page != NONE).collect();
        sorted.sort_unstable();
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::argument("selected", "every page once", format!("page {} twice", pair[0])));
        }
        let before = self.ages.clone();
        for age in &mut self.ages {
            *age = (*age + 1).min(self.buckets - 1);
        }
        let found = self.metadata.lookup_all(selected);
        let missing = missing(selected, &found).count();
        if self.victims(missing, &found).len() < missing {
            self.ages = before;
            let expected = format!("pages that fit {} slots", self.slots());
            let found = format!("{} pages, {missing} of them not resident", selected.len());
            return Err(Error::argument("selected", expected, found));
        }
        Ok(self.place(selected, found))
    }

    /// Makes pages resident between steps, without ageing, as far as there are slots that may go: for prefetches. Pages
    /// must differ; those that find no slot are [`NONE`] in the result.
    pub fn prefetch(&mut self, pages: &[u32]) -> Resolution {
        let found = self.metadata.lookup_all(pages);
        self.place(pages, found)
    }

    /// Gives pages slots, as far as there are any; `slots` are those that are resident already.
    fn place(&mut self, selected: &[u32], mut slots: Vec<u32>) -> Resolution {
        let places: Vec<usize> = missing(selected, &slots).collect();
        let victims = self.victims(places.len(), &slots);
        for &slot in slots.iter().filter(|&&slot| slot != NONE) {
            self.ages[slot as usize] = 0;
        }
        let mut misses = Vec::with_capacity(places.len());
        for (place, slot) in places.into_iter().zip(victims) {
            let evicted = self.metadata.remove(slot);
            self.metadata.insert(slot, selected[place]);
            self.ages[slot] = 0;
            slots[place] = slot as u32;
            misses.push(Miss { place: place as u32, page: selected[place], slot: slot as u32, evicted });
        }
        Resolution { slots, misses }
    }

    /// Puts a page that was just closed into a slot. Until it is [written back](Self::written_back) it cannot be evicted.
    ///
    /// # Errors
    /// [`Error::Argument`] when no slot may go, or the page has one.
    pub fn insert_dirty(&mut self, page: u32) -> Result<Miss, Error> {
        let Some(&miss) = self.prefetch(&[page]).misses.first() else {
            return Err(Error::argument("page", "one that is not resident, and a slot that may go", page));
        };
        self.dirty[miss.slot as usize] = true;
        Ok(miss)
    }

    /// Frees a slot whose page never arrived.
    pub fn forget(&mut self, slot: usize) {
        self.metadata.remove(slot);
        self.dirty[slot] = false;
    }

    /// Changes the number of slots. Shrinking keeps the youngest pages, of equal age those in the first slots; pages that
    /// are not written back count as the youngest. Gives where each slot that was kept lies now, `(before, after)` in the
    /// order of both, and drops the others.
    ///
    /// # Errors
    /// [`Error::Argument`] when fewer slots are left than pages that are not written back.
    pub fn resize(&mut self, slots: usize) -> Result<Vec<(usize, usize)>, Error> {
        let dirty = self.dirty().count();
        if slots < dirty {
            return Err(Error::argument("slots", format!("at least the {dirty} pages in flight"), slots));
        }
        let mut kept: Vec<usize> = self.residents().map(|(slot, _)| slot).collect();
        kept.sort_by_key(|&slot| (self.eviction_age(slot), slot));
        kept.truncate(slots);
        kept.sort_unstable();
        let mut next = BucketedLru::<M>::new(slots, self.buckets)?;
        // Pages stay in their slots where these still exist; the others fill the gaps in order.
        let stays = |slot: &&usize| **slot < slots;
        let mut gaps = (0..slots).filter(|slot| kept.binary_search(slot).is_err());
        let mut moves = Vec::with_capacity(kept.len());
        for &slot in kept.iter().filter(stays) {
            moves.push((slot, slot));
        }
        for &slot in kept.iter().filter(|slot| !stays(slot)) {
            if let Some(gap) = gaps.next() {
                moves.push((slot, gap));
            }
        }
        for &(from, to) in &moves {
            next.metadata.insert(to, self.metadata.owner(from));
            next.ages[to] = self.ages[from];
            next.dirty[to] = self.dirty[from];
        }
        *self = next;
        Ok(moves)
    }

    /// Bytes on a device: the table, an age and a flag per slot.
    pub fn bytes(&self) -> usize {
        self.metadata.bytes() + 2 * self.slots()
    }

    /// Says what is wrong with the tables, if anything is: slots and owners must name each other.
    pub fn check(&self) -> Option<String> {
        for (slot, page) in self.residents() {
            let found = self.metadata.lookup(page);
            if found != Some(slot) {
                return Some(format!("slot {slot} holds page {page}, which is looked up as {found:?}"));
            }
            if self.ages[slot] >= self.buckets {
                return Some(format!("slot {slot} has age {} of {}", self.ages[slot], self.buckets));
            }
        }
        (0..self.slots())
            .find(|&slot| self.dirty[slot] && self.metadata.owner(slot) == NONE)
            .map(|slot| format!("slot {slot} is free, but not written back"))
    }
}

/// Places of the selected pages that have no slot; padding is none of them.
fn missing<'a>(selected: &'a [u32], slots: &'a [u32]) -> impl Iterator<Item = usize> + 'a {
    (0..selected.len()).filter(|&place| selected[place] != NONE && slots[place] == NONE)
}
