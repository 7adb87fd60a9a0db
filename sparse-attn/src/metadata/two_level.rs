//! A directory of segments that exist only while something in them is resident.
//!
//! A directory over the pages of the context would save nothing: residency is scattered, and of segments of 32 pages with
//! 9 % of the pages resident 96 % are in use. So the second level is keyed by a hash: a table of twice as many entries as
//! slots, in buckets of 8 entries, of which every page may lie in two. Buckets are grouped into segments that are
//! allocated with their first entry and freed with their last.

use super::{Metadata, NONE};

/// Entries of a bucket.
const WAYS: usize = 8;
/// Buckets of a segment.
const BUCKETS: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    page: u32,
    slot: u16,
}

const EMPTY: Entry = Entry { page: NONE, slot: 0 };

#[derive(Debug, Clone)]
struct Segment {
    entries: [Entry; WAYS * BUCKETS],
    used: usize,
}

/// Two hash choices of 8-way buckets, in segments on demand. Up to 65,536 slots.
#[derive(Debug, Clone)]
pub struct TwoLevel {
    /// The page of each slot.
    owners: Vec<u32>,
    /// The static level.
    directory: Vec<Option<Box<Segment>>>,
    /// Entries that found both their buckets full: next to never at half load.
    stash: Vec<Entry>,
}

impl TwoLevel {
    /// Segments that exist now.
    pub fn segments(&self) -> usize {
        self.directory.iter().flatten().count()
    }

    /// Bytes of the table alone, without the owners of slots: what stands against a flat table of slots by page.
    pub fn table_bytes(&self) -> usize {
        let entry = size_of::<u32>() + size_of::<u16>();
        self.directory.len() * size_of::<u32>()
            + self.segments() * WAYS * BUCKETS * entry
            + self.stash.len() * entry
    }

    /// Segment and first entry of the two buckets of a page.
    fn buckets(&self, page: u32) -> [(usize, usize); 2] {
        let buckets = self.directory.len() * BUCKETS;
        // Two odd multipliers (Knuth; xxHash); the high bits of the product choose.
        [0x9e37_79b1u32, 0x85eb_ca77].map(|multiplier| {
            let hash = (page ^ (page >> 15)).wrapping_mul(multiplier);
            let bucket = ((u64::from(hash) * buckets as u64) >> 32) as usize;
            (bucket / BUCKETS, bucket % BUCKETS * WAYS)
        })
    }

    fn ways(&self, (segment, first): (usize, usize)) -> &[Entry] {
        self.directory[segment].as_ref().map_or(&[], |segment| &segment.entries[first..first + WAYS])
    }
}

impl Metadata for TwoLevel {
    fn new(slots: usize) -> Self {
        assert!(slots <= usize::from(u16::MAX) + 1, "{slots} slots are more than 16 bits number");
        let segments = (2 * slots).div_ceil(WAYS * BUCKETS).max(1);
        TwoLevel { owners: vec![NONE; slots], directory: vec![None; segments], stash: Vec::new() }
    }

    fn slots(&self) -> usize {
        self.owners.len()
    }

    fn owner(&self, slot: usize) -> u32 {
        self.owners[slot]
    }

    fn lookup(&self, page: u32) -> Option<usize> {
        if page == NONE {
            return None;
        }
        let [first, second] = self.buckets(page);
        let mut entries = self.ways(first).iter().chain(self.ways(second)).chain(&self.stash);
        entries.find(|entry| entry.page == page).map(|entry| usize::from(entry.slot))
    }

    fn insert(&mut self, slot: usize, page: u32) {
        debug_assert_eq!(self.owners[slot], NONE, "slot {slot}");
        self.owners[slot] = page;
        let entry = Entry { page, slot: slot as u16 };
        let used = |ways: &[Entry]| ways.iter().filter(|entry| entry.page != NONE).count();
        let [first, second] = self.buckets(page);
        // The emptier bucket; the first of equals.
        let (loads, second_is_emptier) = {
            let (a, b) = (used(self.ways(first)), used(self.ways(second)));
            (a.min(b), b < a)
        };
        if loads == WAYS {
            self.stash.push(entry);
            return;
        }
        let (segment, start) = if second_is_emptier { second } else { first };
        let segment = self.directory[segment]
            .get_or_insert_with(|| Box::new(Segment { entries: [EMPTY; WAYS * BUCKETS], used: 0 }));
        let ways = &mut segment.entries[start..start + WAYS];
        if let Some(free) = ways.iter_mut().find(|entry| entry.page == NONE) {
            *free = entry;
            segment.used += 1;
        }
    }

    fn remove(&mut self, slot: usize) -> u32 {
        let page = std::mem::replace(&mut self.owners[slot], NONE);
        if page == NONE {
            return NONE;
        }
        if let Some(place) = self.stash.iter().position(|entry| entry.page == page) {
            self.stash.swap_remove(place);
            return page;
        }
        for (number, start) in self.buckets(page) {
            let Some(segment) = &mut self.directory[number] else { continue };
            let ways = &mut segment.entries[start..start + WAYS];
            if let Some(entry) = ways.iter_mut().find(|entry| entry.page == page) {
                *entry = EMPTY;
                segment.used -= 1;
                if segment.used == 0 {
                    self.directory[number] = None;
                }
                return page;
            }
        }
        page
    }

    fn bytes(&self) -> usize {
        self.owners.len() * size_of::<u32>() + self.table_bytes()
    }
}
