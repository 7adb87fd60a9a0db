//! The kernels against the CPU semantics: on the emulator in every order of warps and lanes, and on a GPU.
#![cfg(feature = "cuda")]

mod attend;
mod gather;
mod pages;
mod resolve;
mod select;
mod step;
