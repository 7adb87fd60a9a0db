//! The stand-ins, from the tests of `cuda`.

#[path = "../../../cuda/tests/support/fake_driver.rs"]
pub(crate) mod fake_driver;
#[path = "../../../cuda/tests/support/mod.rs"]
mod files;

use files::{FakeNvrtc, library, skip};
