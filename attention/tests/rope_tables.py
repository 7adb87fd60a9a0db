"""Prints the expected frequencies of tests/rope.rs. Standard library only.

The formulas are written down here a second time, from their sources and plane by plane, so that the Rust code is checked
against something other than itself:

- linear: Chen et al., arXiv 2306.15595.
- dynamic: NTK-aware base, as in Hugging Face transformers `_compute_dynamic_ntk_parameters`.
- yarn: Peng et al., arXiv 2309.00071, and transformers `_compute_yarn_parameters`.
- llama3: Meta's llama-models `apply_scaling`, and transformers `_compute_llama3_parameters`.
"""

import math


def plain(dim, base):
    return [1.0 / base ** (2 * j / dim) for j in range(dim // 2)]


def linear(dim, base, factor):
    return [f / factor for f in plain(dim, base)], 1.0


def dynamic(dim, base, factor, original, length):
    n = max(length, original)
    base = base * ((factor * n / original) - (factor - 1)) ** (dim / (dim - 2))
    return plain(dim, base), 1.0


def yarn(dim, base, factor, original, fast, slow, attention, truncate=True):
    def correction_dim(turns):
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = correction_dim(fast), correction_dim(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    result = []
    for j, f in enumerate(plain(dim, base)):
        extrapolation = 1 - min(max((j - low) / (high - low), 0), 1)
        result.append(f / factor * (1 - extrapolation) + f * extrapolation)
    return result, attention


def llama3(dim, base, factor, low_freq_factor, high_freq_factor, original):
    result = []
    for f in plain(dim, base):
        wavelength = 2 * math.pi / f
        if wavelength < original / high_freq_factor:
            result.append(f)
        elif wavelength > original / low_freq_factor:
            result.append(f / factor)
        else:
            smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
            result.append((1 - smooth) * f / factor + smooth * f)
    return result, 1.0


def mscale(factor, m):
    return 0.1 * m * math.log(factor) + 1.0


CASES = [
    ("plain, Llama 2", (plain(128, 10000.0), 1.0)),
    ("linear, 4x", linear(128, 10000.0, 4.0)),
    ("dynamic, 2x at 10000 of 4096", dynamic(128, 10000.0, 2.0, 4096, 10000)),
    ("dynamic, shorter than training", dynamic(128, 10000.0, 2.0, 4096, 100)),
    ("llama3, Llama 3.1 8B", llama3(128, 500000.0, 8.0, 1.0, 4.0, 8192)),
    ("llama3, Llama 3.2 1B", llama3(64, 500000.0, 32.0, 1.0, 4.0, 8192)),
    ("yarn, Qwen 2.5", yarn(128, 1000000.0, 4.0, 32768, 32, 1, mscale(4.0, 1.0))),
    ("yarn, DeepSeek", yarn(64, 10000.0, 40.0, 4096, 32, 1, mscale(40.0, 1.0) / mscale(40.0, 0.707))),
    ("yarn, gpt-oss", yarn(64, 150000.0, 32.0, 4096, 32, 1, mscale(32.0, 1.0), truncate=False)),
]

for name, (frequencies, attention) in CASES:
    n = len(frequencies)
    planes = [0, 1, n // 4, 3 * n // 8, n // 2, 5 * n // 8, 3 * n // 4, n - 1]
    print(f'// {name}')
    print(f'{attention!r}, &[{", ".join(f"({j}, {frequencies[j]!r})" for j in planes)}]')
