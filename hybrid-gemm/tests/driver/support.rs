//! The stand-ins, from the tests of `cuda`.

#[path = "../../../cuda/tests/support/fake_driver.rs"]
pub(crate) mod fake_driver;
#[allow(unexpected_cfgs, dead_code, reason = "features and uses are those of `cuda`")]
#[path = "../../../cuda/tests/support/mod.rs"]
mod files;

use files::{FakeNvrtc, library, skip};
