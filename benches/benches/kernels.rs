//! Every kernel: `cargo bench -p longkv-benches -- attention/decode` runs a part.
//!
//! One executable, because each carries all of criterion and they travel to machines with a GPU. There a module runs in a process of its
//! own, so that what is measured is kept when time is up: `--modules` lists them, and `LONGKV_BENCH=decode,append` runs those alone.
//! Cases on a GPU are those that targets are judged by; `EXHAUSTIVE=1` runs all. What the file named by `LONGKV_FIGURES_HAD` has is not
//! measured again. A case that fails is written down with its reason; the others go on, and the end is a failure.

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

use longkv_benches::{case, modules};

/// In the order in which a machine with little time should run them: what others build on first.
const MODULES: &[(&str, fn())] = &[
    ("decode", decode::benches),
    ("homomorphic_quant", homomorphic_quant::benches),
    ("kv_compress", kv_compress::benches),
    ("prefill", prefill::benches),
    ("seq_parallel_steps", seq_parallel_steps::benches),
    ("sparse_attn", sparse_attn::benches),
    ("hybrid_gemm", hybrid_gemm::benches),
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
    if case::failed() > 0 {
        eprintln!("{} cases failed", case::failed());
        std::process::exit(1);
    }
}
