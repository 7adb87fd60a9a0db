//! What the oracle reports of rows that a kernel would skip.

/// Why a row was skipped. The numbers are those that kernels write to the status word (`cuda/include/status_params.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
#[repr(u32)]
pub enum FaultCode {
    /// A length is larger than what its row can hold.
    BadLength = 1,
    /// A page id lies outside the page pool.
    BadPage = 2,
    /// A row claims more partial states than are stored for it.
    BadSplits = 3,
    /// A row, slot, position or head index lies outside its array.
    BadIndex = 4,
    /// A work range or an offset array is not ascending, or ends outside its array.
    BadRange = 5,
    /// What a row was given was made for an earlier state of it.
    Stale = 6,
}

/// A row whose values in (device) memory make no sense: it was skipped, its output is 0 and its LSE -inf.
///
/// Such values are not [`Error`](crate::Error)s, because no GPU caller could learn of them without reading memory back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fault {
    /// What is wrong with it.
    pub code: FaultCode,
    /// The row's index in the array that counts its lengths, pages or splits.
    pub index: u64,
}
