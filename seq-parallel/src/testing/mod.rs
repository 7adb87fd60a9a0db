//! What the tests of every back-end share: one suite that a transport passes or does not.
//!
//! Enable feature `testing` in `[dev-dependencies]`. Every rank of a group calls [`conform`] with its own end, whether ranks are threads,
//! streams or processes; what a rank finds wrong is a panic that says where. [`faults`] is for ends that fail on purpose.

mod conformance;
mod contents;
pub mod faults;

pub use conformance::{CASES, Case, conform};
pub use contents::{Contents, Rows, on_ranks, sequences, spec};
