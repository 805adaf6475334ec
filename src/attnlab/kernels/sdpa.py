"""PyTorch's scaled_dot_product_attention: flash kernels where they exist, `is_causal` wherever it is true.

One case is not PyTorch's: training on a CPU. There its flash kernel has a slow backward pass and no dropout, so
`cpu_blocks` is used (1.05 to 2.8 times faster, measured from 64 to 2048 tokens). The choice depends only on the device,
dropout, the length, and whether gradients are needed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import cpu_blocks
from .pairs import Pairs, per_head

LONGEST = 2048  # tokens up to which training on a CPU keeps the attention weights


def attend(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float, dropout: float) -> Tensor:
    """Return softmax(q k^T scale) v for the pairs that may see each other: B L N V."""
    if pairs.full and not dropout:
        return _one_query(q, k, v, scale)
    if q.device.type == "cpu" and _trains(q, k, v, dropout) and not torch.compiler.is_compiling():
        return cpu_blocks.attend(q, k, v, pairs, scale, dropout)
    k = per_head(k, q.shape[2]).transpose(1, 2)
    v = per_head(v, q.shape[2]).transpose(1, 2)
    q = q.transpose(1, 2)
    if pairs.causal:
        return scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True, scale=scale).transpose(1, 2)
    seen = pairs.dense()
    y = scaled_dot_product_attention(q, k, v, seen, dropout, scale=scale)
    return y.masked_fill(~seen.any(-1, keepdim=True), 0).transpose(1, 2)  # a query that sees no key gives 0


def _trains(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> bool:
    needs_gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return dropout > 0 or (needs_gradients and k.shape[1] <= LONGEST)


def _one_query(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of one query per sequence. Query heads that share a key head become the queries of one call, so that no
    stored row is copied."""
    B, _, N, H = q.shape
    q = q.view(B, k.shape[2], -1, H)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    if H == v.shape[-1]:
        y = scaled_dot_product_attention(q, k, v, scale=scale)
    else:  # no fused kernel takes keys and values of different sizes, and PyTorch's other one would scale a copy of k
        y = torch.softmax((q * scale) @ k.transpose(2, 3), -1) @ v
    return y.reshape(B, 1, N, -1)
