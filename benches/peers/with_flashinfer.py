"""FlashInfer, from wheels that travel with the bundle: its paged decode and its Hopper prefill, on the problems of the other peers.

It compiles for minutes, so it is timed last and by itself. `--build` compiles what the cases need by running small ones, and writes no
figure: that is done while tests leave the CPU time.
"""

import sys

import torch

from _attention import DIM, KV_HEADS, Q_HEADS, inputs, reference
from _measure import compare, missing, require_gpu
from decode import CASES as DECODES
from prefill import CASES as PREFILLS
from prefill import problem
from quantized_decode import BITS
from quantized_decode import CASES as QUANTIZED
from quantized_decode import Q_HEADS as QUANTIZED_Q_HEADS
from sparse import STEPS

DECODE, PREFILL = "flashinfer", "flashinfer-fa3"


def decode(q, k, v):
    """Paged decode with tensor cores, pages of 64 tokens, planned once. q [batch, q_heads, 1, dim], k and v [batch, kv_heads, keys, dim]."""
    import flashinfer

    (batch, kv_heads, keys, dim), page = k.shape, 64
    pages = batch * keys // page
    paged = lambda x: x.reshape(batch, kv_heads, keys // page, page, dim).transpose(1, 2).reshape(pages, kv_heads, page, dim)
    cache = torch.stack([paged(k), paged(v)], dim=1).contiguous()
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * (keys // page)
    indices = torch.arange(pages, dtype=torch.int32, device="cuda")
    last = torch.full((batch,), page, dtype=torch.int32, device="cuda")
    wrapper.plan(starts, indices, last, q.shape[1], kv_heads, dim, page, q_data_type=q.dtype, kv_data_type=k.dtype)
    flat = q.reshape(batch, q.shape[1], dim)
    return lambda: wrapper.run(flat, cache)


def prefill(q, k, v, causal):
    """One sequence with the back end for Hopper; causal is aligned to the end. Shapes as in `decode`, with batch 1."""
    import flashinfer

    nhd = lambda x: x[0].transpose(0, 1).contiguous()
    q, k, v = nhd(q), nhd(k), nhd(v)
    run = lambda: flashinfer.single_prefill_with_kv_cache(q, k, v, causal=causal, kv_layout="NHD", backend="fa3")
    return lambda: run().transpose(0, 1)[None]


def build():
    """Compiles both kernels, each for itself, by small problems of the same types and dimensions."""
    failures = []
    for name, run in (
        (DECODE, lambda: decode(*inputs(1, 1, 256))()),
        (DECODE, lambda: decode(*inputs(1, 1, 256, q_heads=QUANTIZED_Q_HEADS))()),
        (PREFILL, lambda: prefill(*inputs(1, 256, 256), causal=True)()),
        (PREFILL, lambda: prefill(*inputs(1, 256, 256), causal=False)()),
    ):
        try:
            run()
            torch.cuda.synchronize()
        except Exception as error:  # the other may compile
            failures.append(f"{name}: {error}")
    if failures:
        raise SystemExit("\n".join(failures))


def decodes(benches, q_heads, batch, keys):
    """Times one decode under the names of some benches."""
    if not missing(benches, DECODE):
        return
    q, k, v = inputs(batch, 1, keys, q_heads=q_heads)
    compare(
        benches,
        {DECODE: lambda: decode(q, k, v)},
        nbytes=2 * k.numel() * k.element_size(),
        flops=4 * keys * q.numel(),
        expected=lambda: reference(q, k, v, causal=False),
    )


def main():
    require_gpu()
    if sys.argv[1:] == ["--build"]:
        return build()
    for name, batch, keys, q_heads in DECODES:
        decodes(f"attention/decode/bf16/{name}", q_heads, batch, keys)
    for name, queries, keys, causal in PREFILLS:
        bench = f"attention/prefill/bf16/{name}"
        if missing(bench, PREFILL):
            q, k, v = inputs(1, queries, keys)
            variants = {PREFILL: lambda: prefill(q, k, v, causal)}
            compare(bench, variants, **problem(queries, keys, causal, q, k, v))
    for name, batch, keys in QUANTIZED:
        benches = [f"homomorphic-quant/hack_decode/{bits}-bit/{name}" for bits in BITS]
        decodes(benches, QUANTIZED_Q_HEADS, batch, keys)
    for requests, tokens in STEPS:
        # A whole step against attention over every key of the same context.
        bench = f"sparse-attn/step/bf16/{requests}x{tokens >> 10}K"
        if missing(bench, f"dense-{DECODE}"):
            q, k, v = inputs(requests, 1, tokens)
            compare(
                bench,
                {f"dense-{DECODE}": lambda: decode(q, k, v)},
                nbytes=2 * k.numel() * 2,
                flops=4 * tokens * q.numel(),
                expected=lambda: reference(q, k, v, causal=False),
            )


if __name__ == "__main__":
    main()
