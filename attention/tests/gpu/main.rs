//! The kernels against the oracle: on the emulator in every order of warps and lanes, and on a GPU.
#![cfg(feature = "cuda")]

mod append;
mod cache;
mod chunk_replay;
mod decode;
mod merge_states;
mod prefill;
