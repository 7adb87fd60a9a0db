//! A small Llama engine.
