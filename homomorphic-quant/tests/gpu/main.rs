//! The kernels against the CPU reference: on the emulator in every order of warps and lanes, and on a GPU.
#![cfg(feature = "cuda")]

mod append;
mod close;
mod decode;
mod far;
mod prefill;
mod replay;
mod sequences;
