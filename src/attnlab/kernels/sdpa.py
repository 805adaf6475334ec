"""PyTorch's scaled_dot_product_attention: flash kernels where they exist, `is_causal` wherever it is true.

Two cases are not PyTorch's. Training on a CPU: there its flash kernel has a slow backward pass and no dropout, so
`cpu_blocks` is used (1.05 to 2.8 times faster, measured from 64 to 2048 tokens). And scores that are changed one by
one, or a rest, which PyTorch's kernel does not know: `cpu_blocks` on a CPU, the reference elsewhere. The choice depends
only on the device, dropout, the length, whether gradients are needed, and what is asked.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import cpu_blocks, reference
from .pairs import Heads, Pairs, Scoring, joined, per_head

LONGEST = 2048  # tokens up to which training on a CPU keeps the attention weights


def attend(q: Heads, k: Heads, v: Tensor, pairs: Pairs, scoring: Scoring, dropout: float) -> Tensor:
    """Return the weighted sum of the values that each query sees: B L N V."""
    if pairs.full and not dropout:
        return _one_query(q, k, v, scoring)
    eager = v.device.type == "cpu" and not torch.compiler.is_compiling()
    if eager and (_trains(q, k, v, dropout) or not scoring.plain):
        return cpu_blocks.attend(q, k, v, pairs, scoring, dropout)
    if not scoring.plain:
        return reference.attend(q, k, v, pairs, scoring, dropout)
    heads = q[0].shape[2]
    key = joined(k, heads).transpose(1, 2)
    value = per_head(v, heads).transpose(1, 2)
    query = joined(q, heads).transpose(1, 2)
    scale = scoring.scale
    if pairs.causal:
        y = scaled_dot_product_attention(query, key, value, None, dropout, is_causal=True, scale=scale)
        return y.transpose(1, 2)
    seen = pairs.dense()
    y = scaled_dot_product_attention(query, key, value, seen, dropout, scale=scale)
    return y.masked_fill(~seen.any(-1, keepdim=True), 0).transpose(1, 2)  # a query that sees no key gives 0


def _trains(q: Heads, k: Heads, v: Tensor, dropout: float) -> bool:
    needs_gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (*q, *k, v))
    return dropout > 0 or (needs_gradients and v.shape[1] <= LONGEST)


def _one_query(q: Heads, k: Heads, v: Tensor, scoring: Scoring) -> Tensor:
    """Attention of one query per sequence. Query heads that share a key head become the queries of one product, so that
    no stored row is copied, and keys in parts are not put together."""
    B, _, N, H = q[0].shape
    values = v.transpose(1, 2)  # B K S V
    if scoring.plain and len(q) == 1 and H == v.shape[-1]:
        queries = q[0].view(B, k[0].shape[2], -1, H)
        y = scaled_dot_product_attention(queries, k[0].transpose(1, 2), values, scale=scoring.scale)
        return y.reshape(B, 1, N, -1)
    # no fused kernel takes keys and values of different sizes, and PyTorch's other one would scale a copy of k
    scores = [_products(query, key, scoring.scale) for query, key in zip(q, k, strict=True)]
    weights = scoring.weights(torch.stack(scores).sum(0) if len(scores) > 1 else scores[0], None)
    return (weights.view(B, values.shape[1], -1, v.shape[1]) @ values).reshape(B, 1, N, -1)


def _products(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return the scaled products of one query per sequence, B 1 N H, with the keys B S K H: B N 1 S."""
    B, _, N, H = q.shape
    queries = (q * scale).view(B, k.shape[2], -1, H)
    return (queries @ k.permute(0, 2, 3, 1)).view(B, N, 1, -1)
