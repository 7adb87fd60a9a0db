"""What attention on codes competes with: the same problem on bf16 vectors, and on int8 vectors in Triton.

Bytes are those that each peer reads. Ours with dequantization in registers, over the same pages, is a kernel of the project.
"""

from _attention import DIM, KV_HEADS, decode_peers, inputs, reference
from _measure import compare, require_gpu
from _split_kv import split_kv

# As benches/benches/homomorphic_quant.rs has them.
Q_HEADS = 64
CASES = [("1x131072", 1, 131072), ("16x32768", 16, 32768), ("1x4096", 1, 4096), ("1x32768", 1, 32768)]
BITS = (2, 4, 8)


def main():
    require_gpu()
    for name, batch, keys in CASES:
        q, k, v = inputs(batch, 1, keys, q_heads=Q_HEADS)
        benches = [f"homomorphic-quant/hack_decode/{bits}-bit/{name}" for bits in BITS]
        elements, flops = 2 * batch * keys * KV_HEADS * DIM, 4 * keys * q.numel()
        expected = reference(q, k, v, causal=False)
        compare(benches, decode_peers(q, k, v), nbytes=2 * elements, flops=flops, expected=expected)
        # Lossy by design, so held to a looser bound; bytes are codes and one f32 scale per vector.
        int8 = {"triton-int8": lambda: split_kv(q, k, v, int8=True)}
        nbytes = elements + 4 * elements // DIM
        compare(benches, int8, nbytes=nbytes, flops=flops, expected=expected, tolerance=5e-2)


if __name__ == "__main__":
    main()
