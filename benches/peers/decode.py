"""Decode attention: PyTorch SDPA with its flash and cuDNN back ends forced, two Triton kernels of our own."""

from _attention import Q_HEADS, decode_peers, inputs, reference
from _measure import compare, require_gpu
from _split_kv import split_kv

# (name, batch, keys, query heads): the uniform cases of benches/benches/decode.rs; PyTorch takes no ragged batch at this call.
CASES = [
    ("1x131072", 1, 131072, Q_HEADS),
    ("64x4096", 64, 4096, Q_HEADS),
    ("1x4096", 1, 4096, Q_HEADS),
    ("8x131072", 8, 131072, Q_HEADS),
    ("1x32768", 1, 32768, Q_HEADS),
    ("16x4096", 16, 4096, Q_HEADS),
    ("1x131072-64-heads", 1, 131072, 64),
    ("16x32768-64-heads", 16, 32768, 64),
]


def main():
    require_gpu()
    for name, batch, keys, q_heads in CASES:
        q, k, v = inputs(batch, 1, keys, q_heads=q_heads)
        nbytes = 2 * k.numel() * k.element_size()
        flops = 4 * keys * q.numel()
        expected = reference(q, k, v, causal=False)
        compare(f"attention/decode/bf16/{name}", decode_peers(q, k, v), nbytes=nbytes, flops=flops, expected=expected)
        # Lossy by design, so held to a looser bound; bytes are codes and scales.
        int8 = {"triton-int8": lambda: split_kv(q, k, v, int8=True)}
        nbytes = 2 * k.numel() + 2 * 4 * k.numel() // k.shape[-1]
        compare(f"attention/decode/int8/{name}", int8, nbytes=nbytes, flops=flops, expected=expected, tolerance=5e-2)


if __name__ == "__main__":
    main()
