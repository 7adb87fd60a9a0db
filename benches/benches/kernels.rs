//! Every kernel: `cargo bench -p longkv-benches -- attention/decode` runs a part.
//!
//! One executable, because each carries all of criterion and they travel to machines with a GPU. There a module runs in a process of its
//! own, so that what is measured is kept when time is up: `--modules` lists them, and `LONGKV_BENCH=decode,append` runs those alone.

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

use longkv_benches::modules;

/// In the order in which a machine with little time should run them: what others build on first.
const MODULES: &[(&str, fn())] = &[
    ("decode", decode::benches),
    ("homomorphic_quant", homomorphic_quant::benches),
    ("kv_compress", kv_compress::benches),
    ("sparse_attn", sparse_attn::benches),
    ("hybrid_gemm", hybrid_gemm::benches),
    ("prefill", prefill::benches),
    ("seq_parallel_steps", seq_parallel_steps::benches),
    ("append", append::benches),
    ("merge_states", merge_states::benches),
    ("seq_parallel", seq_parallel::benches),
];

fn main() {
    if std::env::args().any(|argument| argument == modules::LIST) {
        MODULES.iter().for_each(|(name, _)| println!("{name}"));
        return;
    }
    let names: Vec<_> = MODULES.iter().map(|(name, _)| *name).collect();
    let wanted = modules::wanted(std::env::var(modules::VARIABLE).ok().as_deref(), &names)
        .unwrap_or_else(|message| panic!("{message}"));
    MODULES.iter().filter(|(name, _)| wanted.contains(name)).for_each(|(_, benches)| benches());
    criterion::Criterion::default().configure_from_args().final_summary();
}
