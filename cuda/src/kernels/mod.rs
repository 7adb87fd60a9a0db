//! Typed kernels: one struct per kernel owns its function and its only launch.
