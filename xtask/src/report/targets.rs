//! What each crate's kernels must reach and aim at, as quotients of measured times.

use super::ratios::Bound::{self, AtLeast, AtMost, Exactly};
use super::ratios::Target;
use super::ratios::Unit::{self, Microseconds, Milliseconds, Percent, Seconds, Tflops, Times};
use super::ratios::Value::{
    self, At, BeyondRead, Least, Link, LinkBytes, Longest, Number, Operations, Peer, Read, Time,
};

pub(super) const fn target(
    name: &'static str,
    (numerator, denominator): (Value, Value),
    unit: Unit,
    (must, aim): (Bound, Bound),
    source: &'static str,
) -> Target {
    Target { name, numerator, denominator, unit, must, aim, source }
}

/// The share of the read bandwidth that a bench reaches.
pub(super) const fn share(bench: &'static str) -> (Value, Value) {
    (Read(bench), Time(bench))
}

const fn tflops(bench: &'static str) -> (Value, Value) {
    (Operations(bench), Time(bench))
}

pub(super) const fn time(bench: &'static str) -> (Value, Value) {
    (Time(bench), Number(1.0))
}

/// How much faster a bench is than a peer.
const fn faster(bench: &'static str, peer: &'static str) -> (Value, Value) {
    (Peer(bench, peer), Time(bench))
}

pub(super) const fn least(must: f64, aim: f64) -> (Bound, Bound) {
    (AtLeast(must), AtLeast(aim))
}

pub(super) const fn most(must: f64, aim: f64) -> (Bound, Bound) {
    (AtMost(must), AtMost(aim))
}

/// Bytes of the bf16 weights of `hybrid-gemm`, gate and up of an 8B Llama.
const WEIGHTS: f64 = 28672.0 * 4096.0 * 2.0;
pub(super) const WRITES: &[&str] = &["write_bandwidth"];
pub(super) const HOST_READS: &[&str] = &["host_read_by_loads", "host_read_by_bulk_copies"];

const CUDNN: &str = "torch-sdpa-cudnn";
pub(super) const BYTES: &str = "bound by bytes";
const FA3: &str = "cuDNN and FlashAttention-3 on H100: 600 to 650 TFLOP/s";
const MMA_SYNC: &str = "FlashAttention-2 on H100: 330 to 390 TFLOP/s";
const FIXED: &str = "published decode kernels at 4K tokens: 5 to 13 us more than their bytes take";
const ISSUE: &str = "instructions of unpacking beside the bytes of the codes";
const BALANCED: &str = "work dealt by bytes";
const LINK: &str = "bound by the host link, measured alone in the same run";
const OVERLAP: &str = "both links at once: the longer of the two times";
const CUBLAS: &str = "mma.sync reaches some 63 % of wgmma";
const LATENCY: &str = "one short launch";

/// All of them, by crate.
pub(super) const TARGETS: &[Target] = &[
    target(
        "dense decode, 64 × 4096, 1.1 GB",
        share("attention/decode/bf16/64x4096"),
        Percent,
        least(0.85, 0.92),
        BYTES,
    ),
    target(
        "dense decode, 1 × 128K, 0.5 GB",
        share("attention/decode/bf16/1x131072"),
        Percent,
        least(0.85, 0.92),
        BYTES,
    ),
    target(
        "dense decode, 1 × 4096: beyond its bytes",
        (BeyondRead("attention/decode/bf16/1x4096"), Number(1.0)),
        Microseconds,
        most(9.0, 6.0),
        FIXED,
    ),
    target(
        "dense decode, 128K among 63 × 4096 to uniform of equal bytes",
        (Time("attention/decode/bf16/63x4096+131072"), Time("attention/decode/bf16/64xuniform")),
        Times,
        most(1.15, 1.05),
        BALANCED,
    ),
    target(
        "prefill, 16K, full",
        tflops("attention/prefill/bf16/16384-full"),
        Tflops,
        least(500.0, 650.0),
        FA3,
    ),
    target(
        "prefill, 16K, causal",
        tflops("attention/prefill/bf16/16384-causal"),
        Tflops,
        least(450.0, 610.0),
        FA3,
    ),
    target(
        "prefill step, 16K, full",
        tflops("attention/prefill/bf16/16384-full-step"),
        Tflops,
        least(500.0, 650.0),
        FA3,
    ),
    target(
        "prefill step, 16K, causal",
        tflops("attention/prefill/bf16/16384-causal-step"),
        Tflops,
        least(450.0, 610.0),
        FA3,
    ),
    target(
        "prefill by mma.sync, 16K, full",
        tflops("attention/prefill/bf16/16384-full-mma-sync"),
        Tflops,
        least(330.0, 390.0),
        MMA_SYNC,
    ),
    target(
        "prefill by mma.sync, 16K, causal",
        tflops("attention/prefill/bf16/16384-causal-mma-sync"),
        Tflops,
        least(300.0, 350.0),
        MMA_SYNC,
    ),
    target(
        "prefill step by mma.sync, 16K, full",
        tflops("attention/prefill/bf16/16384-full-step-mma-sync"),
        Tflops,
        least(330.0, 390.0),
        MMA_SYNC,
    ),
    target(
        "prefill step by mma.sync, 16K, causal",
        tflops("attention/prefill/bf16/16384-causal-step-mma-sync"),
        Tflops,
        least(300.0, 350.0),
        MMA_SYNC,
    ),
    target(
        "prefill, 8K, full, against cuDNN",
        faster("attention/prefill/bf16/8192-full", CUDNN),
        Times,
        least(0.85, 1.1),
        FA3,
    ),
    target(
        "prefill, 8K, causal, against cuDNN",
        faster("attention/prefill/bf16/8192-causal", CUDNN),
        Times,
        least(0.85, 1.1),
        FA3,
    ),
    target(
        "append of 8192 tokens, of write bandwidth",
        (At(WRITES, "attention/append/bf16/8192"), Time("attention/append/bf16/8192")),
        Percent,
        least(0.7, 0.7),
        BYTES,
    ),
    target("append of one token", time("attention/append/bf16/1"), Microseconds, most(3.0, 3.0), LATENCY),
    target(
        "decode on 2-bit codes, 1 × 128K",
        time("homomorphic-quant/hack_decode/2-bit/1x131072"),
        Microseconds,
        most(46.0, 27.0),
        "the method's released Triton kernel on H200: 127 us; bf16: 138 us",
    ),
    target(
        "decode on 2-bit codes, 1 × 128K, of read bandwidth",
        share("homomorphic-quant/hack_decode/2-bit/1x131072"),
        Percent,
        least(0.45, 0.75),
        ISSUE,
    ),
    target(
        "decode on 4-bit codes, 1 × 128K",
        share("homomorphic-quant/hack_decode/4-bit/1x131072"),
        Percent,
        least(0.65, 0.85),
        ISSUE,
    ),
    target(
        "decode on 8-bit codes, 1 × 128K",
        share("homomorphic-quant/hack_decode/8-bit/1x131072"),
        Percent,
        least(0.75, 0.9),
        ISSUE,
    ),
    target(
        "decode on 2-bit codes, 16 × 32K, against dense bf16",
        (
            Time("attention/decode/bf16/16x32768-64-heads"),
            Time("homomorphic-quant/hack_decode/2-bit/16x32768"),
        ),
        Times,
        least(3.0, 5.0),
        BYTES,
    ),
    target(
        "decode on 2-bit codes, 1 × 128K, against dequantizing in registers",
        (
            Time("homomorphic-quant/hack_dequant_decode/2-bit/1x131072"),
            Time("homomorphic-quant/hack_decode/2-bit/1x131072"),
        ),
        Times,
        least(1.0, 1.4),
        ISSUE,
    ),
    target(
        "prefill on 8-bit codes, 8K, causal, against cuDNN on bf16",
        faster("homomorphic-quant/hack_prefill/8-bit/8192-causal", CUDNN),
        Times,
        least(1.0, 1.35),
        "8-bit products at twice the rate, exponentials at the same",
    ),
    target(
        "quantizing 8192 tokens of a layer, 2 bits",
        time("homomorphic-quant/hack_append/2-bit/1x8192"),
        Microseconds,
        most(20.0, 11.0),
        BYTES,
    ),
    target(
        "quantizing append of one token, 2 bits",
        time("homomorphic-quant/hack_append/2-bit/1x1"),
        Microseconds,
        most(3.0, 3.0),
        LATENCY,
    ),
    target(
        "low-rank decode, mixed ranks, 16 × 32K",
        share("kv-compress/decode/bf16/mixed/16x32768"),
        Percent,
        least(0.8, 0.92),
        BYTES,
    ),
    target(
        "low-rank decode, mixed to uniform ranks of equal bytes",
        (Time("kv-compress/decode/bf16/mixed/16x32768"), Time("kv-compress/decode/bf16/uniform/16x32768")),
        Times,
        most(1.15, 1.05),
        BALANCED,
    ),
    target(
        "low-rank decode, one wide head to even ranks of equal bytes",
        (Time("kv-compress/decode/bf16/one-wide/16x32768"), Time("kv-compress/decode/bf16/even/16x32768")),
        Times,
        most(1.15, 1.05),
        BALANCED,
    ),
    target(
        "low-rank decode at half the bytes, against dense",
        (Time("kv-compress/decode/bf16/dense/16x32768"), Time("kv-compress/decode/bf16/mixed/16x32768")),
        Times,
        least(1.7, 1.95),
        BYTES,
    ),
    target(
        "low-rank decode against rebuilding keys and values",
        (
            Time("kv-compress/decode/bf16/reconstruct/16x32768"),
            Time("kv-compress/decode/bf16/uniform/16x32768"),
        ),
        Times,
        least(3.0, 5.0),
        BYTES,
    ),
    target(
        "calibration of a layer on the CPU, 32K tokens",
        (Time("kv-compress/calibrate/f64/32768"), Number(1e6)),
        Seconds,
        most(60.0, 15.0),
        "two CPU cores",
    ),
    target(
        "attention over listed pages in the order of memory, 1 GB",
        share("sparse-attn/attend/bf16/identity/8x8x2048of16"),
        Percent,
        least(0.8, 0.88),
        BYTES,
    ),
    target(
        "gathered pages, against the order of memory",
        (
            Time("sparse-attn/attend/bf16/identity/8x8x2048of16"),
            Time("sparse-attn/attend/bf16/gathered/8x8x2048of16"),
        ),
        Percent,
        least(0.9, 0.95),
        "a page is whole lines of memory",
    ),
    target(
        "gather of 4096 pages of 4 KiB, of the best read of host memory",
        (At(HOST_READS, "sparse-attn/gather/bf16/4096of4KiB"), Time("sparse-attn/gather/bf16/4096of4KiB")),
        Percent,
        least(0.9, 0.97),
        LINK,
    ),
    target(
        "gather of 4096 pages of 16 KiB, of the best read of host memory",
        (At(HOST_READS, "sparse-attn/gather/bf16/4096of16KiB"), Time("sparse-attn/gather/bf16/4096of16KiB")),
        Percent,
        least(0.9, 0.97),
        LINK,
    ),
    target(
        "score and top-k, 128K context, to the time of its bytes",
        (Time("sparse-attn/select/bf16/1x8x8192"), Read("sparse-attn/select/bf16/1x8x8192")),
        Times,
        most(2.0, 1.25),
        BYTES,
    ),
    target(
        "resolve, 2048 of 12,288 slots, 8 heads, a tenth missing",
        time("sparse-attn/resolve/u32/8x2048of12288"),
        Microseconds,
        most(10.0, 5.0),
        LATENCY,
    ),
    target(
        "sparse step against dense decode, 8 × 128K, all resident",
        (Time("attention/decode/bf16/8x131072"), Time("sparse-attn/step/bf16/8x128K")),
        Times,
        least(6.0, 10.0),
        "2048 of 131,072 tokens read, and 512 bytes of summary per page",
    ),
    target(
        "product of 16 tokens, weights in HBM",
        share("hybrid-gemm/hybrid_small_m/bf16/16/1"),
        Percent,
        least(0.8, 0.92),
        BYTES,
    ),
    target(
        "product of 64 tokens, weights in HBM",
        share("hybrid-gemm/hybrid_small_m/bf16/64/1"),
        Percent,
        least(0.8, 0.92),
        BYTES,
    ),
    target(
        "product of 16 tokens, weights in host memory, best path",
        (
            Link("hybrid-gemm/hybrid_small_m/bf16/16/0"),
            Least(&["hybrid-gemm/hybrid_small_m/bf16/16/0", "hybrid-gemm/hybrid_small_m/bf16/16/0/staged"]),
        ),
        Percent,
        least(0.9, 0.97),
        LINK,
    ),
    split("product of 16 tokens, half of the weights in HBM", "hybrid-gemm/hybrid_small_m/bf16/16/0.5", {
        &[Link("hybrid-gemm/hybrid_small_m/bf16/16/0.5"), Read("hybrid-gemm/hybrid_small_m/bf16/16/0.5")]
    }),
    split("product of 16 tokens, 90 % of the weights in HBM", "hybrid-gemm/hybrid_small_m/bf16/16/0.9", {
        &[Link("hybrid-gemm/hybrid_small_m/bf16/16/0.9"), Read("hybrid-gemm/hybrid_small_m/bf16/16/0.9")]
    }),
    split("product of 16 tokens, 99 % of the weights in HBM", "hybrid-gemm/hybrid_small_m/bf16/16/0.99", {
        &[Link("hybrid-gemm/hybrid_small_m/bf16/16/0.99"), Read("hybrid-gemm/hybrid_small_m/bf16/16/0.99")]
    }),
    target(
        "product of 2048 tokens, staged, against the longer of link and cuBLAS",
        (
            Longest(&[
                Link("hybrid-gemm/hybrid_large_m/bf16/2048/0/staged"),
                Peer("hybrid-gemm/hybrid_large_m/bf16/2048/1", "torch-matmul"),
            ]),
            Time("hybrid-gemm/hybrid_large_m/bf16/2048/0/staged"),
        ),
        Percent,
        least(0.95, 0.98),
        OVERLAP,
    ),
    target(
        "product of 16,384 tokens, staged, against the longer of link and cuBLAS",
        (
            Longest(&[
                Link("hybrid-gemm/hybrid_large_m/bf16/16384/0/staged"),
                Peer("hybrid-gemm/hybrid_large_m/bf16/16384/1", "torch-matmul"),
            ]),
            Time("hybrid-gemm/hybrid_large_m/bf16/16384/0/staged"),
        ),
        Percent,
        least(0.95, 0.98),
        OVERLAP,
    ),
    target(
        "product of 512 tokens, weights in HBM, against cuBLAS",
        faster("hybrid-gemm/hybrid_large_m/bf16/512/1", "torch-matmul"),
        Percent,
        least(0.55, 0.62),
        CUBLAS,
    ),
    target(
        "product of 2048 tokens, weights in HBM, against cuBLAS",
        faster("hybrid-gemm/hybrid_large_m/bf16/2048/1", "torch-matmul"),
        Percent,
        least(0.55, 0.62),
        CUBLAS,
    ),
    target(
        "product of 8192 tokens, weights in HBM, against cuBLAS",
        faster("hybrid-gemm/hybrid_large_m/bf16/8192/1", "torch-matmul"),
        Percent,
        least(0.55, 0.62),
        CUBLAS,
    ),
    target(
        "product of 16 tokens from host memory, int4 against bf16",
        (
            Least(&["hybrid-gemm/hybrid_small_m/bf16/16/0", "hybrid-gemm/hybrid_small_m/bf16/16/0/staged"]),
            Least(&["hybrid-gemm/hybrid_small_m/int4/16/0", "hybrid-gemm/hybrid_small_m/int4/16/0/staged"]),
        ),
        Times,
        least(3.4, 3.7),
        LINK,
    ),
    target(
        "bytes over the link, product of 16 tokens, to the bytes of the weights",
        (LinkBytes("hybrid-gemm/hybrid_small_m/bf16/16/0"), Number(WEIGHTS)),
        Times,
        (Exactly(1.0), Exactly(1.0)),
        "each byte crosses once",
    ),
    target(
        "bytes over the link, 2048 tokens staged, to the bytes of the weights",
        (LinkBytes("hybrid-gemm/hybrid_large_m/bf16/2048/0/staged"), Number(WEIGHTS)),
        Times,
        (Exactly(1.0), Exactly(1.0)),
        "each byte crosses once",
    ),
    target(
        "ring of 8 ranks of 8K on one GPU, to one launch",
        (
            Time("seq-parallel/ring/bf16/8-ranks-of-8192-causal"),
            Time("seq-parallel/ring-step/bf16/65536-causal"),
        ),
        Times,
        most(1.15, 1.05),
        "the same products; states read and written between them",
    ),
    target(
        "step of 4K with a carried state, to one without",
        (Time("seq-parallel/ring-step/bf16/4096-full-middle"), Time("seq-parallel/ring-step/bf16/4096-full")),
        Times,
        most(1.12, 1.01),
        "states of 4K queries: 12 % of the bytes, beside the products",
    ),
    target(
        "ring with communication as long as its steps, to its steps alone",
        (Time("seq-parallel/ring-sim/f32/whole-1.0"), Time("seq-parallel/ring-sim/f32/compute-1.0")),
        Times,
        most(1.05, 1.01),
        "exchanges run beside steps; modelled clock",
    ),
    target(
        "plan of 256 sequences on 1024 ranks, zigzag",
        (Time("seq-parallel/plan/u32/zigzag"), Number(1e3)),
        Milliseconds,
        most(10.0, 1.0),
        "before every prompt",
    ),
];

/// A split product: its time to the longer of its two links' times.
const fn split(name: &'static str, bench: &'static str, links: &'static [Value; 2]) -> Target {
    target(name, (Time(bench), Longest(links)), Times, most(1.1, 1.03), OVERLAP)
}
