//! Tests of the emulator, on kernels of its own (`planted/`).

mod common;
mod launches;
mod mistakes;
mod speed;
