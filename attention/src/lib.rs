//! Vocabulary shared by the attention crates.
