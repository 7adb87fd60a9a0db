"""Products whose weights lie in HBM, in pinned host memory or in both: copy then multiply, and double-buffered slabs.

W [n, k] has its first `fraction` of rows in HBM and the rest in pinned host memory. Both peers copy with the copy engine and
multiply with torch.matmul; the second overlaps the copy of a slab with the product of the slab before it.
"""

import torch

from _measure import compare, missing, require_gpu

# As benches/benches/hybrid_gemm.rs has them: gate and up of an 8B Llama. Its plain names are what a caller gets who asks for no path;
# from host memory that may be the project's own slabs.
N, K = 28672, 4096
FEW = [(tokens, fraction) for tokens in (1, 16, 64) for fraction in (1.0, 0.99, 0.9, 0.5, 0.0)]
MANY = [(tokens, fraction) for tokens in (512, 2048, 8192, 16384) for fraction in (1.0, 0.0)]
SLABS = 8


def whole(x, weights):
    """All weights in HBM."""
    return lambda: torch.matmul(x, weights.T)


def copy_then_multiply(x, resident, host):
    staged = torch.empty(host.shape, dtype=host.dtype, device="cuda")
    out = torch.empty(x.shape[0], N, dtype=x.dtype, device="cuda")
    rows = resident.shape[0]

    def run():
        staged.copy_(host, non_blocking=True)
        # Where all of it is in host memory the product goes straight to its place.
        if not rows:
            return torch.matmul(x, staged.T, out=out)
        out[:, :rows] = torch.matmul(x, resident.T)
        out[:, rows:] = torch.matmul(x, staged.T)
        return out

    return run


def double_buffered(x, resident, host):
    """Two slabs of HBM in turn: the copy engine fills one on its own stream while the other is multiplied."""
    slabs = [slab for slab in host.chunk(SLABS) if slab.numel()]
    buffers = [torch.empty(slabs[0].shape, dtype=host.dtype, device="cuda") for _ in range(2)]
    out = torch.empty(x.shape[0], N, dtype=x.dtype, device="cuda")
    side = torch.cuda.Stream()
    filled = [torch.cuda.Event() for _ in slabs]
    used = [torch.cuda.Event() for _ in slabs]

    def run():
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        row = resident.shape[0]
        for i, slab in enumerate(slabs):
            with torch.cuda.stream(side):
                if i >= 2:
                    side.wait_event(used[i - 2])
                buffers[i % 2][: slab.shape[0]].copy_(slab, non_blocking=True)
                filled[i].record(side)
            if i == 0 and row:
                out[:, :row] = torch.matmul(x, resident.T)
            main.wait_event(filled[i])
            out[:, row : row + slab.shape[0]] = torch.matmul(x, buffers[i % 2][: slab.shape[0]].T)
            used[i].record(main)
            row += slab.shape[0]
        main.wait_stream(side)
        return out

    return run


def main():
    require_gpu()
    weights = torch.randn(N, K, dtype=torch.bfloat16, device="cuda")
    for kernel, cases in (("hybrid_small_m", FEW), ("hybrid_large_m", MANY)):
        for tokens, fraction in cases:
            rows = round(N * fraction)
            if fraction == 1.0:
                variants = {"torch-matmul": lambda: whole(x, weights)}
            else:
                variants = {
                    "torch-copy-then-matmul": lambda: copy_then_multiply(x, resident, host),
                    "torch-double-buffered": lambda: double_buffered(x, resident, host),
                }
            bench = f"hybrid-gemm/{kernel}/bf16/{tokens}/{fraction:g}"
            if not any(missing(bench, name) for name in variants):
                continue
            x = torch.randn(tokens, K, dtype=torch.bfloat16, device="cuda")
            resident, host = weights[:rows], weights[rows:].cpu().pin_memory()
            compare(
                bench,
                variants,
                nbytes=2 * (N * K + tokens * (N + K)),
                flops=2 * tokens * N * K,
                expected=torch.matmul(x, weights.T),
            )


if __name__ == "__main__":
    main()
