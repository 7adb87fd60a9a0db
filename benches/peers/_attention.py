"""Shapes, inputs and PyTorch's attention back ends, shared by the peers of decode and prefill."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# As benches/benches/decode.rs and prefill.rs have them.
Q_HEADS, KV_HEADS, DIM = 32, 8, 128
BACKENDS = {"torch-sdpa-flash": SDPBackend.FLASH_ATTENTION, "torch-sdpa-cudnn": SDPBackend.CUDNN_ATTENTION}


def inputs(batch, queries, keys, dtype=torch.bfloat16):
    """q [batch, q_heads, queries, dim], k and v [batch, kv_heads, keys, dim]."""
    random = lambda heads, tokens: torch.randn(batch, heads, tokens, DIM, dtype=dtype, device="cuda")
    return random(Q_HEADS, queries), random(KV_HEADS, keys), random(KV_HEADS, keys)


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


def reference(q, k, v, causal):
    """f32 softmax attention, one KV head at a time so that scores stay small."""
    group = Q_HEADS // KV_HEADS
    out = torch.empty(q.shape, dtype=torch.float32, device="cuda")
    for batch in range(q.shape[0]):
        for head in range(KV_HEADS):
            heads = slice(head * group, (head + 1) * group)
            scores = q[batch, heads].float() @ k[batch, head].float().T * DIM**-0.5
            if causal and q.shape[2] > 1:
                scores.masked_fill_(~causal_at_the_end(q.shape[2], k.shape[2]), float("-inf"))
            out[batch, heads] = torch.softmax(scores, dim=-1) @ v[batch, head].float()
    return out
