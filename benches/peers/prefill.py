"""Prefill attention: PyTorch SDPA with its flash and cuDNN back ends forced, FlashInfer's Hopper back end."""

from _attention import BACKENDS, DIM, KV_HEADS, Q_HEADS, inputs, reference, sdpa
from _measure import compare, require_gpu

# (name, queries, keys, causal), as in benches/benches/prefill.rs.
CASES = [
    ("4096-causal", 4096, 4096, True),
    ("16384-full", 16384, 16384, False),
    ("16384-causal", 16384, 16384, True),
    ("2048-after-30720", 2048, 32768, True),
    ("64-after-32704", 64, 32768, True),
]
# The plain reference needs queries * keys * group scores in f32.
MOST_SCORES = 1 << 30


def flashinfer_prefill(q, k, v, causal):
    import flashinfer

    nhd = lambda x: x[0].transpose(0, 1).contiguous()
    q, k, v = nhd(q), nhd(k), nhd(v)
    run = lambda: flashinfer.single_prefill_with_kv_cache(q, k, v, causal=causal, kv_layout="NHD", backend="fa3")
    return lambda: run().transpose(0, 1)[None]


def main():
    require_gpu()
    for name, queries, keys, causal in CASES:
        q, k, v = inputs(1, queries, keys)
        variants = {
            peer: lambda backend=backend: sdpa(backend, q, k, v, causal) for peer, backend in BACKENDS.items()
        }
        variants["flashinfer-fa3"] = lambda: flashinfer_prefill(q, k, v, causal)
        # Query i of n sees keys - n + i + 1 keys.
        pairs = queries * (2 * keys - queries + 1) // 2 if causal else queries * keys
        small = queries * keys * (Q_HEADS // KV_HEADS) <= MOST_SCORES
        compare(
            f"attention/prefill/bf16/{name}",
            variants,
            nbytes=(2 * q.numel() + k.numel() + v.numel()) * q.element_size(),
            flops=4 * pairs * Q_HEADS * DIM,
            expected=reference(q, k, v, causal) if small else None,
        )


if __name__ == "__main__":
    main()
