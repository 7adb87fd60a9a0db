//! Every kernel: `cargo bench -p longkv-benches -- attention/decode` runs a part.
//!
//! One executable, because each carries all of criterion and they travel to machines with a GPU.

mod append;
mod decode;
mod kv_compress;
mod merge_states;
mod prefill;

criterion::criterion_main!(
    append::benches,
    decode::benches,
    kv_compress::benches,
    merge_states::benches,
    prefill::benches
);
