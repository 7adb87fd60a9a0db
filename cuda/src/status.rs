//! The status word: what a kernel found wrong in values that live in device memory.
//!
//! Lengths and page ids are read by the kernel, so only the kernel can check them, and it cannot return an error. It skips
//! the bad row, gives it output 0 and LSE −∞, and leaves the code and the row's index in one 64-bit word of the caller:
//! the code in bits 32–63, the index in bits 0–31, 0 when all is well. The first report since the word was cleared wins
//! (`cuda/include/tile/status.cuh`). The caller reads the word when it likes; reading it is what costs a synchronization.

use std::fmt;

use crate::params::{self, FaultCode};

/// What a kernel found wrong with one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fault {
    /// What is wrong: one of the `FAULT_…` codes of [`params`].
    pub code: FaultCode,
    /// Index of the row.
    pub index: u32,
}

impl Fault {
    /// Reads a status word; `None` if nothing is wrong.
    pub fn decode(word: u64) -> Option<Self> {
        let (code, index) = ((word >> 32) as u32, word as u32);
        (code != params::FAULT_NONE).then_some(Fault { code, index })
    }

    /// The status word that reports this fault.
    pub fn encode(self) -> u64 {
        u64::from(self.code) << 32 | u64::from(self.index)
    }

    /// The code in words.
    pub fn meaning(self) -> &'static str {
        match self.code {
            params::FAULT_BAD_LENGTH => "its length exceeds the plan's maximum or its memory",
            params::FAULT_BAD_PAGE => "it names a page outside the pool",
            params::FAULT_BAD_SPLITS => "it has more splits than the plan's maximum",
            params::FAULT_BAD_INDEX => "an index lies outside its array",
            params::FAULT_BAD_RANGE => "its range is not ascending or ends outside its array",
            params::FAULT_STALE => "it was given something that was made for an earlier state of it",
            _ => "a fault of unknown code",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "row {}: {} (code {})", self.index, self.meaning(), self.code)
    }
}

impl std::error::Error for Fault {}

#[cfg(feature = "driver")]
mod word {
    use std::sync::Arc;

    use cudarc::driver::{CudaSlice, CudaStream};

    use super::Fault;
    use crate::Error;
    use crate::driver::failed;
    use crate::memory::ViewMut;

    /// A status word in device memory.
    #[derive(Debug)]
    pub struct StatusWord {
        word: CudaSlice<u64>,
    }

    impl StatusWord {
        /// Allocates a word that reports nothing. Enqueues; does not wait.
        pub fn new(stream: &Arc<CudaStream>) -> Result<Self, Error> {
            Ok(StatusWord { word: stream.alloc_zeros(1).map_err(failed("cuMemAllocAsync"))? })
        }

        /// For kernels that report on `stream`.
        pub fn view_mut<'a>(&'a mut self, stream: &'a CudaStream) -> ViewMut<'a, u64> {
            ViewMut::device(&mut self.word, stream)
        }

        /// Waits for the stream and reads the first fault since the word was cleared.
        pub fn read(&self, stream: &Arc<CudaStream>) -> Result<Option<Fault>, Error> {
            let mut word = [0];
            stream.memcpy_dtoh(&self.word, &mut word).map_err(failed("cuMemcpyDtoHAsync"))?;
            stream.synchronize().map_err(failed("cuStreamSynchronize"))?;
            Ok(Fault::decode(word[0]))
        }

        /// Forgets the fault. Enqueues; does not wait.
        pub fn clear(&mut self, stream: &Arc<CudaStream>) -> Result<(), Error> {
            stream.memset_zeros(&mut self.word).map_err(failed("cuMemsetD8Async"))
        }
    }
}

#[cfg(feature = "driver")]
pub use word::StatusWord;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_code_then_index() {
        let cases = [
            ("nothing", 0, None),
            ("an index without a code", 7, None),
            ("row 0", 3 << 32, Some(Fault { code: 3, index: 0 })),
            ("the last row", 2 << 32 | 0xffff_ffff, Some(Fault { code: 2, index: u32::MAX })),
        ];
        for (name, word, expected) in cases {
            assert_eq!(Fault::decode(word), expected, "{name}");
            if let Some(fault) = expected {
                assert_eq!(fault.encode(), word, "{name}");
            }
        }
    }

    #[test]
    fn every_code_has_words_of_its_own() {
        let codes = [
            params::FAULT_BAD_LENGTH,
            params::FAULT_BAD_PAGE,
            params::FAULT_BAD_SPLITS,
            params::FAULT_BAD_INDEX,
            params::FAULT_BAD_RANGE,
            params::FAULT_STALE,
        ];
        let words: std::collections::BTreeSet<_> =
            codes.iter().map(|&code| Fault { code, index: 1 }.meaning()).collect();
        assert_eq!(words.len(), codes.len());
        let unknown = Fault { code: 999, index: 1 };
        assert!(!words.contains(unknown.meaning()));
        assert_eq!(unknown.to_string(), "row 1: a fault of unknown code (code 999)");
    }
}
