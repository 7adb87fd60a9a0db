"""Split-KV decode in Triton, on bf16 or int8 vectors: peers of every decode kernel."""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def split_kernel(q, k, v, k_scale, v_scale, partial_out, partial_lse, keys, per_split, scale: tl.constexpr,
                 GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
                 INT8: tl.constexpr):
    """One split of the keys of one sequence and KV head, for all query heads of the group.

    q [batch, kv_heads, group, dim], k and v [batch, kv_heads, keys, dim] as bf16 or, with one scale per token, int8.
    """
    pair, split = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(1)
    rows, channels = tl.arange(0, ROWS), tl.arange(0, DIM)
    row_mask = rows[:, None] < GROUP
    query = tl.load(q + (pair * GROUP + rows[:, None]) * DIM + channels[None, :], mask=row_mask, other=0.0)
    first = split * per_split
    last = tl.minimum(first + per_split, keys)
    k += pair.to(tl.int64) * keys * DIM
    v += pair.to(tl.int64) * keys * DIM
    k_scale += pair.to(tl.int64) * keys
    v_scale += pair.to(tl.int64) * keys
    if INT8:
        # Queries are quantized per row, so that scores are integer products.
        q_scale = tl.max(tl.abs(query.to(tl.float32)), 1) / 127.0 + 1e-12
        query = libdevice.rint(query.to(tl.float32) / q_scale[:, None]).to(tl.int8)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, DIM), tl.float32)
    for start in range(first, last, TILE):
        tokens = start + tl.arange(0, TILE)
        seen = tokens < last
        key = tl.load(k + tokens[:, None].to(tl.int64) * DIM + channels[None, :], mask=seen[:, None], other=0)
        if INT8:
            products = tl.dot(query, tl.trans(key), out_dtype=tl.int32).to(tl.float32)
            scores = products * q_scale[:, None] * tl.load(k_scale + tokens, mask=seen, other=0.0)[None, :] * scale
        else:
            scores = tl.dot(query, tl.trans(key)) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp(top - new_top)
        weights = tl.exp(scores - new_top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        value = tl.load(v + tokens[:, None].to(tl.int64) * DIM + channels[None, :], mask=seen[:, None], other=0)
        if INT8:
            # The value's scale goes into the weights, which then go back to 8 bits by their own maximum.
            weights *= tl.load(v_scale + tokens, mask=seen, other=0.0)[None, :]
            w_scale = tl.max(weights, 1) / 127.0 + 1e-30
            codes = libdevice.rint(weights / w_scale[:, None]).to(tl.int8)
            out = out * shrink[:, None] + tl.dot(codes, value, out_dtype=tl.int32).to(tl.float32) * w_scale[:, None]
        else:
            out = out * shrink[:, None] + tl.dot(weights.to(value.dtype), value)
        top = new_top
    at = (pair * splits + split) * GROUP + rows
    tl.store(partial_out + at[:, None] * DIM + channels[None, :], out / total[:, None], mask=row_mask)
    tl.store(partial_lse + at, top + tl.log(total), mask=rows < GROUP)


@triton.jit
def merge_kernel(partial_out, partial_lse, out, splits, GROUP: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr):
    """Merges the splits of one query head by their log-sum-exps."""
    pair, row = tl.program_id(0), tl.program_id(1)
    split, channels = tl.arange(0, SPLITS), tl.arange(0, DIM)
    at = (pair * splits + split) * GROUP + row
    lse = tl.load(partial_lse + at, mask=split < splits, other=float("-inf"))
    weights = tl.exp(lse - tl.max(lse, 0))
    states = tl.load(partial_out + at[:, None] * DIM + channels[None, :], mask=split[:, None] < splits, other=0.0)
    merged = tl.sum(states * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + (pair * GROUP + row) * DIM + channels, merged)


def quantized(x):
    """int8 codes and one f32 scale per token."""
    scale = x.float().abs().amax(-1) / 127.0 + 1e-12
    return (x.float() / scale[..., None]).round().to(torch.int8), scale


def split_kv(q, k, v, int8, tile=64):
    """Ours in Triton: a grid of about two blocks per SM, then a merge.

    q [batch, q_heads, 1, dim], k and v [batch, kv_heads, keys, dim] in bf16; with `int8` they are quantized before the clock starts.
    """
    batch, q_heads, _, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    group, pairs = q_heads // kv_heads, batch * kv_heads
    wanted = max(1, 2 * torch.cuda.get_device_properties(0).multi_processor_count // pairs)
    per_split = triton.cdiv(triton.cdiv(keys, wanted), tile) * tile
    splits = triton.cdiv(keys, per_split)
    (k, k_scale), (v, v_scale) = (quantized(k), quantized(v)) if int8 else ((k, k), (v, v))
    partial_out = torch.empty(pairs, splits, group, dim, dtype=torch.float32, device="cuda")
    partial_lse = torch.empty(pairs, splits, group, dtype=torch.float32, device="cuda")
    out = torch.empty(q.shape, dtype=q.dtype, device="cuda")

    def run():
        split_kernel[(pairs, splits)](q, k, v, k_scale, v_scale, partial_out, partial_lse, keys, per_split, dim**-0.5,
                                      group, 16, dim, tile, int8, num_warps=4, num_stages=3)
        merge_kernel[(pairs, group)](partial_out, partial_lse, out, splits, group, dim, triton.next_power_of_2(splits))
        return out

    return run
