//! What products ask of the driver, against the stand-in of `cuda/tests/fake`, which writes it down and keeps the order between
//! streams. Nothing runs: the numbers are the emulator's business.
#![cfg(feature = "cuda")]
#![allow(unexpected_cfgs, reason = "what `support` borrows asks for features of `cuda`")]

extern crate cuda as longkv_cuda;

mod adaptive;
mod grouped;
mod order;
mod staged;
mod support;
