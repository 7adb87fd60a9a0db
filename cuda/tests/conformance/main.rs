//! Does each device-side wrapper do what the PTX ISA says?
//!
//! Every test runs one conformance kernel on random registers or memory and compares with a table that is written here from
//! the text of the PTX ISA, not from the wrappers or the emulator. The same body runs in the emulator, in several orders of
//! warps and lanes, and on a GPU.

extern crate longkv_cuda as cuda;

mod blocks;
mod copies;
mod data;
mod fragments;
mod isa;
mod matrices;
mod numbers;
mod split;
mod streams;
mod warps;
mod wgmma;
