//! The kernels against the oracle: on the emulator in every order of warps and lanes, and on a GPU.
#![cfg(feature = "cuda")]

mod adaptive;
mod codes;
#[path = "../common/mod.rs"]
mod common;
mod contract;
mod far;
mod grouped;
mod guard;
mod large_m;
mod layouts;
mod matrix;
mod product;
mod resident;
mod small_m;
mod staged;
mod timed;
