"""JAX's cuDNN attention on the prefill shapes. JAX keeps its own streams, so it is timed by its own means, apart from the others.

The time is that of a jitted call until its result is ready, over several calls in a row and divided: host overhead shows where
a call is short, and L2 is as the calls leave it. Every line says so.
"""

import os
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from _measure import first_line, require_gpu, write

CASES = [("4096-causal", 4096, True), ("16384-full", 16384, False), ("16384-causal", 16384, True)]
Q_HEADS, KV_HEADS, DIM = 32, 8, 128
CALLS, ROUNDS = 5, 15
NOTE = "wall time of 5 jitted calls in a row, warm L2"


def measure(tokens, causal):
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.PRNGKey(1), 3)
    q, k, v = (
        jax.random.normal(key, (1, tokens, heads, DIM), jnp.bfloat16)
        for key, heads in zip(keys, (Q_HEADS, KV_HEADS, KV_HEADS))
    )
    attend = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn"))
    attend(q, k, v).block_until_ready()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            out = attend(q, k, v)
        out.block_until_ready()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return sorted(times)


def main():
    require_gpu()
    for name, tokens, causal in CASES:
        line = {"bench": f"attention/prefill/bf16/{name}", "implementation": "jax-cudnn"}
        try:
            times = measure(tokens, causal)
            pairs = tokens * (tokens + 1) // 2 if causal else tokens * tokens
            line |= {
                "median_us": times[len(times) // 2],
                "p10_us": times[round((len(times) - 1) * 0.1)],
                "p90_us": times[round((len(times) - 1) * 0.9)],
                "samples": len(times),
                "bytes": 2 * tokens * DIM * (2 * Q_HEADS + 2 * KV_HEADS),
                "flops": 4 * pairs * Q_HEADS * DIM,
                "note": NOTE,
            }
        except Exception as error:  # a peer that fails is reported, not fatal
            line["skipped"] = first_line(error)
        write(line)


if __name__ == "__main__":
    main()
