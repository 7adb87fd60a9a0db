//! What happened, counted: per layer of a request, and summed.

use std::ops::AddAssign;

/// Counts since the start. On a GPU they live in device memory and are read when the caller likes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Steps over a selection.
    pub steps: u64,
    /// Steps over the whole context, because it fits the budget or the layer is dense.
    pub dense_steps: u64,
    /// Pages selected, of all KV heads.
    pub selected: u64,
    /// Of these, pages that were on the device.
    pub hits: u64,
    /// Of these, pages that had to be fetched.
    pub misses: u64,
    /// Pages that lost their slot.
    pub evicted: u64,
    /// Pages fetched before they were selected.
    pub prefetched: u64,
    /// Partitions estimated instead of read.
    pub estimated: u64,
    /// Bytes read from host memory.
    pub bytes_in: u64,
    /// Bytes written to host memory.
    pub bytes_out: u64,
}

impl Counters {
    /// What the kernels counted: `[rows, 8]` words of the device, for pages of `page_bytes`. Steps are those of one row: every row
    /// of a request counts each step once. Estimates and dense steps are not counted there.
    #[cfg(feature = "cuda")]
    pub fn of_device(words: &[u64], page_bytes: usize) -> Self {
        let mut all = Counters::default();
        for row in words.chunks_exact(cuda::kernels::sparse_attn::COUNTS) {
            let row: cuda::params::SparseCounts = bytemuck::cast_slice(row)[0];
            all += Counters {
                selected: row.selected,
                hits: row.hits,
                misses: row.misses,
                evicted: row.evicted,
                prefetched: row.prefetched,
                bytes_in: (row.misses + row.prefetched) * page_bytes as u64,
                bytes_out: row.written * page_bytes as u64,
                ..Counters::default()
            };
            all.steps = all.steps.max(row.steps);
        }
        all
    }

    /// Share of the selected pages that were on the device; `None` if none was selected.
    pub fn hit_rate(&self) -> Option<f64> {
        (self.selected > 0).then(|| self.hits as f64 / self.selected as f64)
    }
}

impl AddAssign for Counters {
    fn add_assign(&mut self, other: Self) {
        self.steps += other.steps;
        self.dense_steps += other.dense_steps;
        self.selected += other.selected;
        self.hits += other.hits;
        self.misses += other.misses;
        self.evicted += other.evicted;
        self.prefetched += other.prefetched;
        self.estimated += other.estimated;
        self.bytes_in += other.bytes_in;
        self.bytes_out += other.bytes_out;
    }
}
