"""What sparse attention over two memories competes with: the copy engine, gathers and top-k of PyTorch, and dense attention.

Shapes are those of benches/benches/sparse_attn: 32 query heads over 8 KV heads of 128 channels in bf16.
"""

import torch

from _attention import DIM, KV_HEADS, Q_HEADS, decode_peers, inputs, reference, sdpa
from _measure import compare, require_gpu
from torch.nn.attention import SDPBackend

# (pages, tokens of a page)
GATHERS = [(4096, 8), (4096, 16), (4096, 32), (128, 16)]
# (requests, pages of a KV head, tokens of a page)
ATTENDS = [(8, 512, 16), (8, 2048, 16), (8, 256, 32), (1, 128, 16)]
# (requests, partitions of a KV head, partitions selected)
SELECTS = [(1, 2048, 128), (1, 8192, 128), (8, 8192, 128)]
# (requests, tokens)
STEPS = [(1, 32 << 10), (1, 128 << 10), (8, 32 << 10), (8, 128 << 10)]


def one_copy(nbytes):
    """As many bytes in one piece: what the copy engine reaches at best."""
    host = torch.randint(-100, 100, (nbytes,), dtype=torch.int8).pin_memory()
    device = torch.empty(nbytes, dtype=torch.int8, device="cuda")
    return lambda: device.copy_(host, non_blocking=True)


def copy_per_page(pages, nbytes):
    """One copy for each page, from all over a pool that is four times as large."""
    host = torch.randint(-100, 100, (4 * pages, nbytes), dtype=torch.int8).pin_memory()
    device = torch.empty(pages, nbytes, dtype=torch.int8, device="cuda")
    chosen = torch.randperm(4 * pages)[:pages].tolist()

    def run():
        for to, page in enumerate(chosen):
            device[to].copy_(host[page], non_blocking=True)
        return device

    return run


def gather_then_attend(q, k_pool, v_pool, pages):
    """index_select of whole pages, then dense attention. k_pool, v_pool [rows, 4·pages, tokens, dim]; pages [rows, pages]."""
    rows = pages.shape[0]
    # A page is one row of the flat pool, so that one index moves all of it.
    index = (pages + torch.arange(rows, device="cuda")[:, None] * k_pool.shape[1]).flatten()

    def run():
        flat = lambda pool: pool.flatten(2).flatten(0, 1)
        take = lambda pool: torch.index_select(flat(pool), 0, index).view(rows // KV_HEADS, KV_HEADS, -1, DIM)
        return sdpa(SDPBackend.FLASH_ATTENTION, q, take(k_pool), take(v_pool), causal=False)()

    return run


def score_and_select(q, low, high, selected):
    """Quest's bound from the least and the greatest key of each partition, mean over the group, then top-k."""
    requests = q.shape[0]
    grouped = q.view(requests, KV_HEADS, Q_HEADS // KV_HEADS, DIM)

    def run():
        up, down = grouped.clamp(min=0), grouped.clamp(max=0)
        bound = up @ high.transpose(2, 3) + down @ low.transpose(2, 3)
        return bound.float().softmax(-1).mean(2).topk(selected, -1).indices

    return run


def main():
    require_gpu()
    for pages, tokens in GATHERS:
        nbytes = tokens * 2 * DIM * 2
        compare(
            f"sparse-attn/gather/bf16/{pages}of{nbytes // 1024}KiB",
            {"copy-engine-one-copy": lambda: one_copy(pages * nbytes), "copy-engine-per-page": lambda: copy_per_page(pages, nbytes)},
            nbytes=pages * nbytes,
            flops=0,
        )
    for requests, pages, tokens in ATTENDS:
        rows = requests * KV_HEADS
        pool = lambda: torch.randn(rows, 4 * pages, tokens, DIM, dtype=torch.bfloat16, device="cuda")
        k_pool, v_pool = pool(), pool()
        q = torch.randn(requests, Q_HEADS, 1, DIM, dtype=torch.bfloat16, device="cuda")
        chosen = torch.stack([torch.randperm(4 * pages, device="cuda")[:pages] for _ in range(rows)])
        take = lambda pool: pool[torch.arange(rows, device="cuda")[:, None], chosen].reshape(requests, KV_HEADS, -1, DIM)
        compare(
            f"sparse-attn/attend/bf16/gathered/{requests}x8x{pages}of{tokens}",
            {"torch-gather-sdpa": lambda: gather_then_attend(q, k_pool, v_pool, chosen)},
            nbytes=2 * rows * pages * tokens * DIM * 2,
            flops=4 * pages * tokens * q.numel(),
            expected=reference(q, take(k_pool), take(v_pool), causal=False),
        )
    for requests, partitions, selected in SELECTS:
        q = torch.randn(requests, Q_HEADS, DIM, dtype=torch.bfloat16, device="cuda")
        low, high = torch.randn(2, requests, KV_HEADS, partitions, DIM, dtype=torch.bfloat16, device="cuda").sort(0).values
        compare(
            f"sparse-attn/select/bf16/{requests}x8x{partitions}",
            {"torch-score-topk": lambda: score_and_select(q, low, high, selected)},
            nbytes=2 * low.numel() * 2,
            flops=4 * partitions * q.numel(),
        )
    for requests, tokens in STEPS:
        q, k, v = inputs(requests, 1, tokens)
        # A whole step against attention over every key of the same context.
        compare(
            f"sparse-attn/step/bf16/{requests}x{tokens >> 10}K",
            {f"dense-{name}": make for name, make in decode_peers(q, k, v).items()},
            nbytes=2 * k.numel() * 2,
            flops=4 * tokens * q.numel(),
            expected=reference(q, k, v, causal=False),
        )


if __name__ == "__main__":
    main()
