//! The kernels against the oracle and against one rank: on the emulator in every order of warps and lanes, and on a GPU.

mod pack;
mod ring_step;
