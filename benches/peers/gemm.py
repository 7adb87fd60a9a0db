"""Matrix products: torch.matmul in bf16 (cuBLAS) and torch._int_mm; the largest are the matrix ceilings of the machine."""

import torch

from _measure import compare, require_gpu

# (m, n, k): one token, small batches and a prefill of a Llama-3-8B MLP, and the square that shows the peak.
CASES = [(1, 28672, 4096), (16, 28672, 4096), (64, 28672, 4096), (4096, 28672, 4096), (8192, 8192, 8192)]


def bf16(m, n, k):
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    w = torch.randn(n, k, dtype=torch.bfloat16, device="cuda")
    return lambda: torch.matmul(x, w.T)


def int8(m, n, k):
    x = torch.randint(-127, 128, (m, k), dtype=torch.int8, device="cuda")
    w = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda")
    # Refuses m <= 16; exact, so compared with one of its rows in f64.
    result = torch._int_mm(x, w.T)[:1]
    if not torch.equal(result.double(), x[:1].double() @ w.T.double()):
        raise RuntimeError("wrong result")
    return lambda: torch._int_mm(x, w.T)


def main():
    require_gpu()
    for m, n, k in CASES:
        shape, flops = f"{m}x{n}x{k}", 2 * m * n * k
        elements = m * k + n * k
        compare(f"matmul/bf16/{shape}", {"torch-matmul": lambda: bf16(m, n, k)}, nbytes=2 * (elements + m * n), flops=flops)
        compare(f"matmul/int8/{shape}", {"torch-int-mm": lambda: int8(m, n, k)}, nbytes=elements + 4 * m * n, flops=flops)


if __name__ == "__main__":
    main()
