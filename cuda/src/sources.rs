//! The text of every header in `cuda/include`, embedded so that kernels compile without files.

/// Headers as `(name in #include "…", text)`.
pub const HEADERS: &[(&str, &str)] = &[];
