//! Which slot holds which page: tables whose size follows the working set, not the context.
//!
//! Selection is per KV head, so there is a table per request, layer and head. A flat table has an entry for every page of
//! the longest context. [`SlotScan`] keeps only the owner of each slot and finds pages by scanning the owners once per
//! step, which replacement does anyway; [`TwoLevel`] looks single pages up without a scan, for caches that others
//! must find pages in.

mod slot_scan;
mod two_level;

pub use slot_scan::SlotScan;
pub use two_level::TwoLevel;

/// A page number that stands for none: the owner of a free slot, or padding of a list of fixed length.
pub const NONE: u32 = u32::MAX;

/// The slots of one KV head.
pub trait Metadata: std::fmt::Debug + Clone + Send {
    /// `slots` free slots.
    fn new(slots: usize) -> Self;

    /// Slots.
    fn slots(&self) -> usize;

    /// The page of a slot; [`NONE`] when it is free.
    fn owner(&self, slot: usize) -> u32;

    /// The slot of a page.
    fn lookup(&self, page: u32) -> Option<usize>;

    /// The slots of pages `[pages]`, [`NONE`] for those that have none; in one pass where that is cheaper.
    fn lookup_all(&self, pages: &[u32]) -> Vec<u32> {
        pages.iter().map(|&page| self.lookup(page).map_or(NONE, |slot| slot as u32)).collect()
    }

    /// Gives a free slot to a page that has none.
    fn insert(&mut self, slot: usize, page: u32);

    /// Frees a slot; gives the page that had it, or [`NONE`].
    fn remove(&mut self, slot: usize) -> u32;

    /// Bytes on a device.
    fn bytes(&self) -> usize;
}
