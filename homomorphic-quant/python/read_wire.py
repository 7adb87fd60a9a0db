"""Reads a stream of homomorphic-quant (version 1, canonical pages) with numpy alone, as its documentation says.

python3 read_wire.py STREAM OUT: writes to OUT, as little-endian f32, for each segment in the order of the stream, the keys
[tokens, qk_dim] and then the values [tokens, v_dim] that its codes stand for.
"""
import struct
import sys
import zlib

import numpy as np

stream, out = open(sys.argv[1], "rb"), open(sys.argv[2], "wb")
crc = 0  # of what was taken since the last checksum


def take(size):
    global crc
    data = stream.read(size)
    crc = zlib.crc32(data, crc)
    return data


def check():
    global crc
    assert stream.read(4) == struct.pack("<I", crc), "checksum, or the stream ends early"
    crc = 0


magic, version, status, layout, axes, dtype, pi, sinks, sums, tokens, layers, heads, qk_dim, v_dim = (
    struct.unpack("<8sHHHBBHHB19xQIIII", take(64)))
check()
assert (magic, version, status, layout) == (b"longkvHQ", 1, 0, 1)
widths = np.frombuffer(take(layers * heads), np.uint8).reshape(layers, heads)
check()


def halves(shape):
    raw = np.frombuffer(take(2 * int(np.prod(shape))), "<u2").reshape(shape)
    return raw.view(np.float16).astype("f8") if dtype == 1 else (raw.astype("<u4") << 16).view("<f4").astype("f8")


def block(dim, bits, per_channel, sums_along):  # one matrix of a closed block: codes, scales, minima, sums
    channels = next(c for c in range(min(pi, dim), 0, -16) if dim % c == 0)  # Π_c
    packed = np.frombuffer(take(pi * dim * bits // 8), np.uint8).reshape(pi, -1, 1)
    code = (packed >> np.arange(0, 8, bits, dtype=np.uint8) & (2**bits - 1)).reshape(pi, dim)
    scale, low = (halves((1, dim) if per_channel else (pi, dim // channels)) for _ in range(2))
    if not per_channel:
        scale, low = (np.repeat(x, channels, axis=1) for x in (scale, low))
    if sums:
        parts, axis = (code.reshape(pi, -1, channels), 2) if sums_along == "channels" else (code, 0)
        kind = np.dtype("u1" if parts.shape[axis] * (2**bits - 1) <= 255 else "<u2")
        expected = parts.sum(axis, dtype="i8").ravel()
        assert (np.frombuffer(take(expected.size * kind.itemsize), kind) == expected).all(), "code sums"
    return scale * code + low


while True:
    kind, layer, head, _, size = struct.unpack("<IIIIQ", take(24))
    check()
    if kind == 2:
        break
    k_bits, v_bits = divmod(int(widths[layer, head]), 16)
    first = min(tokens, sinks)
    blocks, rest = divmod(tokens - first, pi)
    closed = [(block(qk_dim, k_bits, axes == 1, "channels"), block(v_dim, v_bits, axes == 2, "tokens")) for _ in range(blocks)]
    sink, tail = ((halves((n, qk_dim)), halves((n, v_dim))) for n in (first, rest))
    check()
    for part in range(2):
        np.concatenate([sink[part], *(b[part] for b in closed), tail[part]]).astype("<f4").tofile(out)
assert not stream.read(), "bytes after the end"
