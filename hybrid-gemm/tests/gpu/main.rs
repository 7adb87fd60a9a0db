//! The kernels against the oracle: on the emulator in every order of warps and lanes, and on a GPU.
#![cfg(feature = "cuda")]

#[path = "../common/mod.rs"]
mod common;
mod contract;
mod large_m;
mod layouts;
mod product;
mod resident;
mod small_m;
