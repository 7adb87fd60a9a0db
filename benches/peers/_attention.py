"""Shapes, inputs and PyTorch's attention back ends, shared by the peers of attention kernels."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
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
    queries, keys = q.shape[2], k.shape[2]
    chunk = causal and queries != keys and queries > 1
    mask = None
    if chunk:
        # The flash kernel aligns to the end itself; cuDNN's has no such option here and takes a mask, NOTE_OF_MASK.
        flash = backend == SDPBackend.FLASH_ATTENTION
        mask = causal_lower_right(queries, keys) if flash else causal_at_the_end(queries, keys)

    def run():
        with sdpa_kernel([backend]):
            return scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal and queries == keys, enable_gqa=True
            )

    return run


NOTE_OF_MASK = "a boolean mask, which skips no tile of keys"


def cudnn_in_two(q, k, v):
    """A chunk of a causal prompt for cuDNN without a mask: all keys before it, then its own square, merged by log-sum-exp.

    That is what its kernel can skip tiles by; the merge is PyTorch's elementwise kernels.
    """
    before = k.shape[2] - q.shape[2]
    cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention

    def part(keys, values, causal):
        out, lse = cudnn(q, keys, values, None, True, 0.0, causal)[:2]
        return out.float(), lse.reshape(*q.shape[:3], 1)

    parts = [(k[:, :, :before], v[:, :, :before], False), (k[:, :, before:], v[:, :, before:], True)]
    parts = [(keys.contiguous(), values.contiguous(), causal) for keys, values, causal in parts]

    def run():
        (first, first_lse), (second, second_lse) = (part(*arguments) for arguments in parts)
        share = torch.sigmoid(second_lse - first_lse)
        return torch.lerp(first, second, share).to(q.dtype)

    return run


def decode_peers(q, k, v):
    """Makers of every peer that decodes bf16 vectors without compiling for minutes, by name, for `compare`."""
    from _split_kv import split_kv

    peers = {name: lambda backend=backend: sdpa(backend, q, k, v, causal=False) for name, backend in BACKENDS.items()}
    peers["triton-split-kv"] = lambda: split_kv(q, k, v, int8=False)
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
