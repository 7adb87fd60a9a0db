"""JAX on the prefill shapes: cuDNN's attention, and the Hopper kernel of its Pallas (Mosaic GPU), written independently of cuDNN.

JAX keeps its own streams, so it is timed by its own means, apart from the others: the time is that of a jitted call until its result
is ready, over several calls in a row and divided. Host overhead shows where a call is short, and L2 is as the calls leave it. Every
line says so.
"""

import os
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from _measure import WrongResult, first_line, had, require_gpu, write

CASES = [
    ("16384-causal", 16384, True),
    ("16384-full", 16384, False),
    ("8192-causal", 8192, True),
    ("8192-full", 8192, False),
    ("4096-causal", 4096, True),
]
Q_HEADS, KV_HEADS, DIM = 32, 8, 128
CALLS, ROUNDS = 5, 15
NOTE = "wall time of 5 jitted calls in a row, warm L2"
# (queries of a warpgroup, keys of a tile, tiles in flight): what fits its shared memory at 128 channels.
TILES = [(64, 128, 3), (64, 128, 2), (64, 64, 4)]


def cudnn(causal):
    import jax

    return jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn"))


def pallas(causal, tiles):
    """It scales no scores, so its queries are scaled before the clock starts."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu as kernel

    block_q, block_kv, steps = tiles
    config = kernel.TuningConfig(block_q=block_q, block_kv=block_kv, max_concurrent_steps=steps, causal=causal)
    return lambda q, k, v: kernel.attention(q, k, v, config)


def measure(attend, q, k, v):
    attend(q, k, v).block_until_ready()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            out = attend(q, k, v)
        out.block_until_ready()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return sorted(times)


def check(found, expected):
    import jax.numpy as jnp

    found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
    error = float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))
    if not error < 2e-2:
        raise WrongResult(f"wrong result: relative error {error:.1e}")


def first_that_runs(attempts, q, k, v, expected):
    """The times of the first of some (words, attend, dtype) that runs and is right, and its words; else the last one's error."""
    error = None
    for words, make, dtype in attempts:
        try:
            attend = make()
            inputs = [x.astype(dtype) for x in (q, k, v)]
            if expected is not None:
                check(attend(*inputs), expected)
            return measure(attend, *inputs), words
        except Exception as caught:  # another may run
            error = caught
    raise error


def main():
    require_gpu()
    import jax
    import jax.numpy as jnp

    for name, tokens, causal in CASES:
        bench = f"attention/prefill/bf16/{name}"
        keys = jax.random.split(jax.random.PRNGKey(1), 3)
        q, k, v = (
            jax.random.normal(key, (1, tokens, heads, DIM), jnp.bfloat16)
            for key, heads in zip(keys, (Q_HEADS, KV_HEADS, KV_HEADS))
        )
        try:
            expected = cudnn(causal)(q, k, v)
        except Exception:  # the line of cuDNN says why
            expected = None
        scaled = (q.astype(jnp.float32) * DIM**-0.5).astype(jnp.bfloat16)
        # The published kernel keeps f16 in shared memory: where it refuses bf16 it is timed with f16, and says so.
        attempts = [
            (f"{jnp.dtype(dtype).name}, tiles {tiles}", lambda tiles=tiles: pallas(causal, tiles), dtype)
            for dtype in (jnp.bfloat16, jnp.float16)
            for tiles in TILES
        ]
        variants = {
            "jax-cudnn": ([("bfloat16", lambda: cudnn(causal), jnp.bfloat16)], q, None),
            "jax-pallas-mosaic": (attempts, scaled, expected),
        }
        for implementation, (attempts, queries, expected) in variants.items():
            if had(bench, implementation):
                continue
            line = {"bench": bench, "implementation": implementation}
            try:
                times, words = first_that_runs(attempts, queries, k, v, expected)
                pairs = tokens * (tokens + 1) // 2 if causal else tokens * tokens
                line |= {
                    "median_us": times[len(times) // 2],
                    "p10_us": times[round((len(times) - 1) * 0.1)],
                    "p90_us": times[round((len(times) - 1) * 0.9)],
                    "samples": len(times),
                    "bytes": 2 * tokens * DIM * (2 * Q_HEADS + 2 * KV_HEADS),
                    "flops": 4 * pairs * Q_HEADS * DIM,
                    "note": f"{NOTE}; {words}",
                }
            except WrongResult as error:
                line["failed"] = first_line(error)
            except Exception as error:  # a peer that fails is reported, not fatal
                line["skipped"] = first_line(error)
            write(line)


if __name__ == "__main__":
    main()
