"""Prefill attention: PyTorch SDPA with its flash and cuDNN back ends forced; a chunk of a prompt also in the form that suits cuDNN."""

from _attention import BACKENDS, DIM, KV_HEADS, NOTE_OF_MASK, Q_HEADS, cudnn_in_two, inputs, reference, sdpa
from _measure import compare, require_gpu

# (name, queries, keys, causal), as in benches/benches/prefill.rs, whose plain names are what a caller gets. The longest first: they
# are what a claim rests on.
CASES = [
    ("16384-causal", 16384, 16384, True),
    ("16384-full", 16384, 16384, False),
    ("8192-causal", 8192, 8192, True),
    ("8192-full", 8192, 8192, False),
    ("4096-causal", 4096, 4096, True),
    ("2048-after-30720", 2048, 32768, True),
    ("64-after-32704", 64, 32768, True),
]
# The plain reference needs queries * keys * group scores in f32.
MOST_SCORES = 1 << 30


def problem(queries, keys, causal, q, k, v):
    """What `compare` is told of one case: bytes, operations, and a result where it is small enough."""
    # Query i of n sees keys - n + i + 1 keys.
    pairs = queries * (2 * keys - queries + 1) // 2 if causal else queries * keys
    small = queries * keys * (Q_HEADS // KV_HEADS) <= MOST_SCORES
    return {
        "nbytes": (2 * q.numel() + k.numel() + v.numel()) * q.element_size(),
        "flops": 4 * pairs * Q_HEADS * DIM,
        "expected": (lambda: reference(q, k, v, causal)) if small else None,
    }


def main():
    require_gpu()
    for name, queries, keys, causal in CASES:
        q, k, v = inputs(1, queries, keys)
        variants = {
            peer: lambda backend=backend: sdpa(backend, q, k, v, causal) for peer, backend in BACKENDS.items()
        }
        notes = {}
        if causal and queries != keys:
            variants["torch-sdpa-cudnn-in-two"] = lambda: cudnn_in_two(q, k, v)
            notes["torch-sdpa-cudnn"] = NOTE_OF_MASK
        compare(f"attention/prefill/bf16/{name}", variants, notes=notes, **problem(queries, keys, causal, q, k, v))


if __name__ == "__main__":
    main()
