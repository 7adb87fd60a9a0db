//! Every kernel: `cargo bench -p longkv-benches -- attention/decode` runs a part.
//!
//! One executable, because each carries all of criterion and they travel to machines with a GPU.

mod append;
mod decode;
mod homomorphic_quant;
mod hybrid_gemm;
mod kv_compress;
mod merge_states;
mod prefill;
mod seq_parallel;
mod seq_parallel_steps;
mod sparse_attn;

criterion::criterion_main!(
    append::benches,
    decode::benches,
    homomorphic_quant::benches,
    hybrid_gemm::benches,
    kv_compress::benches,
    merge_states::benches,
    prefill::benches,
    seq_parallel::benches,
    seq_parallel_steps::benches,
    sparse_attn::benches
);
