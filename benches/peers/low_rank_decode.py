"""What attention in the reduced basis competes with: PyTorch that rebuilds keys and values, then its flash back end.

The cache is low-rank, [batch, kv_heads, keys, rank] with one map [rank, dim] for each KV head; keys and values are rebuilt at
every step, as published low-rank caches do where attention runs in the full dimension. Bytes are those of the low-rank cache.
"""

import torch

from _attention import DIM, KV_HEADS, Q_HEADS, reference, sdpa
from _measure import compare, require_gpu
from torch.nn.attention import SDPBackend

# As benches/benches/kv_compress/decode.rs has them: half of the dimensions of every head.
RANK = 64
CASES = [("1x4096", 1, 4096), ("1x131072", 1, 131072), ("16x32768", 16, 32768)]


def reconstruct_then_attend(q, k_low, v_low, k_map, v_map):
    def run():
        return sdpa(SDPBackend.FLASH_ATTENTION, q, k_low @ k_map, v_low @ v_map, causal=False)()

    return run


def main():
    require_gpu()
    for name, batch, keys in CASES:
        random = lambda *shape: torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        q = random(batch, Q_HEADS, 1, DIM)
        k_low, v_low = random(batch, KV_HEADS, keys, RANK), random(batch, KV_HEADS, keys, RANK)
        # Of unit variance after the map, as the uncompressed vectors of the other benches.
        k_map, v_map = (random(KV_HEADS, RANK, DIM) * RANK**-0.5 for _ in range(2))
        compare(
            [f"kv-compress/decode/bf16/{layer}/{name}" for layer in ("reconstruct", "uniform", "mixed")],
            {"torch-reconstruct-sdpa": lambda: reconstruct_then_attend(q, k_low, v_low, k_map, v_map)},
            nbytes=2 * k_low.numel() * k_low.element_size(),
            flops=4 * keys * q.numel(),
            expected=reference(q, k_low @ k_map, v_low @ v_map, causal=False),
        )


if __name__ == "__main__":
    main()
