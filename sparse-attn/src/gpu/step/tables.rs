//! The tables of slots on the host.

use cuda::params::SPARSE_ROW_IDLE;

use super::super::Extent;
use crate::metadata::NONE;

/// The tables of all rows, on the host: what a step starts from, or what was read back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tables {
    /// Page of each slot `[rows, slots]`, [`NONE`] for a free one.
    pub owners: Vec<u32>,
    /// Age of each slot `[rows, slots]`.
    pub ages: Vec<u8>,
    /// Not 0 for slots whose page is not in host memory yet `[rows, slots]`.
    pub dirty: Vec<u8>,
    /// Run of each slot `[rows, slots]`.
    pub slot_table: Vec<u32>,
    /// Run of each open page `[rows, max_open]`.
    pub open_table: Vec<u32>,
    /// Tokens in closed pages `[rows]`.
    pub closed: Vec<u32>,
    /// Closed partitions `[rows]`.
    pub partitions: Vec<u32>,
    /// How often the row's index has changed `[rows]`.
    pub epoch: Vec<u32>,
    /// Counts `[rows, 8]`, as [`SparseCounts`](cuda::params::SparseCounts).
    pub counts: Vec<u64>,
    /// A [`SparseRow`](cuda::params::SparseRow) each `[rows]`, as the last step found it.
    pub rows: Vec<u32>,
}

impl Tables {
    /// Tables without a page. Row r has runs [r·(slots + max_open), (r + 1)·(slots + max_open)): its slots', then its open pages'.
    /// Any other distribution of runs serves as well, each to one place.
    pub fn empty(extent: &Extent) -> Self {
        let Extent { slots, max_open, .. } = *extent;
        let rows = extent.rows();
        let runs = |first: usize, count: usize| {
            (0..rows)
                .flat_map(|row| (0..count).map(move |i| (row * (slots + max_open) + first + i) as u32))
                .collect()
        };
        Tables {
            owners: vec![NONE; rows * slots],
            ages: vec![0; rows * slots],
            dirty: vec![0; rows * slots],
            slot_table: runs(0, slots),
            open_table: runs(slots, max_open),
            closed: vec![0; rows],
            partitions: vec![0; rows],
            epoch: vec![0; rows],
            counts: vec![0; rows * cuda::kernels::sparse_attn::COUNTS],
            rows: vec![SPARSE_ROW_IDLE; rows],
        }
    }

    /// Says what is wrong with the tables, if anything is: every page of a row in one slot, every run in one place, and no page
    /// that does not exist.
    pub fn check(&self, extent: &Extent) -> Option<String> {
        let (rows, slots) = (extent.rows(), extent.slots);
        let per_slot = [self.owners.len(), self.ages.len(), self.dirty.len(), self.slot_table.len()];
        let per_row = [self.closed.len(), self.partitions.len(), self.epoch.len(), self.rows.len()];
        let fits = slots > 0
            && per_slot == [rows * slots; 4]
            && per_row == [rows; 4]
            && self.open_table.len() == rows * extent.max_open;
        if !fits {
            return Some(format!("tables of other sizes than {rows} rows of {slots} slots"));
        }
        let mut runs: Vec<u32> = self.slot_table.iter().chain(&self.open_table).copied().collect();
        runs.sort_unstable();
        if let Some(pair) = runs.windows(2).find(|pair| pair[0] == pair[1]) {
            return Some(format!("run {} is in two places", pair[0]));
        }
        if let Some(&run) = runs.last().filter(|&&run| run as usize >= extent.runs) {
            return Some(format!("run {run} of {}", extent.runs));
        }
        for (row, owners) in self.owners.chunks_exact(extent.slots).enumerate() {
            let pages = self.closed[row] as usize / extent.page.tokens();
            let mut sorted: Vec<u32> = owners.iter().copied().filter(|&page| page != NONE).collect();
            sorted.sort_unstable();
            if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
                return Some(format!("row {row}: page {} has two slots", pair[0]));
            }
            if let Some(&page) = sorted.last().filter(|&&page| page as usize >= pages) {
                return Some(format!("row {row}: page {page} of {pages}"));
            }
        }
        None
    }
}
