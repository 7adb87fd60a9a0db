"""Shapes, inputs and PyTorch's attention back ends, shared by the peers of attention kernels."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# As benches/benches/decode.rs and prefill.rs have them.
Q_HEADS, KV_HEADS, DIM = 32, 8, 128
BACKENDS = {"torch-sdpa-flash": SDPBackend.FLASH_ATTENTION, "torch-sdpa-cudnn": SDPBackend.CUDNN_ATTENTION}


def inputs(batch, queries, keys, q_heads=Q_HEADS, dtype=torch.bfloat16):
    """q [batch, q_heads, queries, dim], k and v [batch, kv_heads, keys, dim]."""
    random = lambda heads, tokens: torch.randn(batch, heads, tokens, DIM, dtype=dtype, device="cuda")
    return random(q_heads, queries), random(KV_HEADS, keys), random(KV_HEADS, keys)


def causal_at_the_end(queries, keys):
    """Query i of n sees keys <= keys - n + i, as everywhere in this project; PyTorch's is_causal aligns to the start."""
    return torch.ones(queries, keys, dtype=torch.bool, device="cuda").tril(keys - queries)


def sdpa(backend, q, k, v, causal):
    """One forced back end: PyTorch raises where it cannot take the problem, and never falls back."""
    square = q.shape[2] == k.shape[2]
    mask = causal_at_the_end(q.shape[2], k.shape[2]) if causal and not square and q.shape[2] > 1 else None

    def run():
        with sdpa_kernel([backend]):
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and square, enable_gqa=True)

    return run


def decode_peers(q, k, v):
    """Makers of every peer that decodes bf16 vectors, by name, for `compare`."""
    from _split_kv import flashinfer_decode, split_kv

    peers = {name: lambda backend=backend: sdpa(backend, q, k, v, causal=False) for name, backend in BACKENDS.items()}
    peers["triton-split-kv"] = lambda: split_kv(q, k, v, int8=False)
    peers["flashinfer"] = lambda: flashinfer_decode(q, k, v)
    return peers


def reference(q, k, v, causal):
    """f32 softmax attention, one KV head at a time so that scores stay small."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty(q.shape, dtype=torch.float32, device="cuda")
    for batch in range(q.shape[0]):
        for head in range(k.shape[1]):
            heads = slice(head * group, (head + 1) * group)
            scores = q[batch, heads].float() @ k[batch, head].float().T * q.shape[-1] ** -0.5
            if causal and q.shape[2] > 1:
                scores.masked_fill_(~causal_at_the_end(q.shape[2], k.shape[2]), float("-inf"))
            out[batch, heads] = torch.softmax(scores, dim=-1) @ v[batch, head].float()
    return out
