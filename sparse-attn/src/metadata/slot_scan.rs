//! The owner of each slot, and nothing else.

use std::collections::HashMap;

use super::{Metadata, NONE};

/// Owners `[slots]`. A step hashes the pages it wants and scans the owners once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotScan {
    owners: Vec<u32>,
}

impl SlotScan {
    /// The page of each slot `[slots]`, [`NONE`] for free ones.
    pub fn owners(&self) -> &[u32] {
        &self.owners
    }
}

impl Metadata for SlotScan {
    fn new(slots: usize) -> Self {
        SlotScan { owners: vec![NONE; slots] }
    }

    fn slots(&self) -> usize {
        self.owners.len()
    }

    fn owner(&self, slot: usize) -> u32 {
        self.owners[slot]
    }

    fn lookup(&self, page: u32) -> Option<usize> {
        self.owners.iter().position(|&owner| owner == page && owner != NONE)
    }

    fn lookup_all(&self, pages: &[u32]) -> Vec<u32> {
        let places: HashMap<u32, usize> =
            pages.iter().enumerate().map(|(place, &page)| (page, place)).collect();
        let mut slots = vec![NONE; pages.len()];
        for (&owner, slot) in self.owners.iter().zip(0u32..).filter(|&(&owner, _)| owner != NONE) {
            if let Some(&place) = places.get(&owner) {
                slots[place] = slot;
            }
        }
        slots
    }

    fn insert(&mut self, slot: usize, page: u32) {
        debug_assert_eq!(self.owners[slot], NONE, "slot {slot}");
        self.owners[slot] = page;
    }

    fn remove(&mut self, slot: usize) -> u32 {
        std::mem::replace(&mut self.owners[slot], NONE)
    }

    fn bytes(&self) -> usize {
        self.owners.len() * size_of::<u32>()
    }
}
