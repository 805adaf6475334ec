"""PyTorch's scaled_dot_product_attention: flash kernels where they exist, `is_causal` wherever it is true."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import Pairs, per_head
from .drop import dropout as drop

BLOCK = 64  # queries


def attend(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float, dropout: float) -> Tensor:
    if pairs.full and not dropout:
        return _one_query(q, k, v, scale)
    k, v = per_head(k, q.shape[2]), per_head(v, q.shape[2])
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if dropout and q.device.type == "cpu" and not torch.compiler.is_compiling():
        return _in_blocks(q, k, v, pairs, scale, dropout).transpose(1, 2)
    if pairs.causal:
        return scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True, scale=scale).transpose(1, 2)
    seen = pairs.dense()
    y = scaled_dot_product_attention(q, k, v, seen, dropout, scale=scale)
    return y.masked_fill(~seen.any(-1, keepdim=True), 0).transpose(1, 2)  # a query that sees nothing gives 0


def _one_query(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The query heads that share a key head become the queries of one call: nothing stored is copied."""
    B, _, N, H = q.shape
    grouped = q.view(B, k.shape[2], -1, H)
    y = scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return y.reshape(B, 1, N, -1)


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float, dropout: float) -> Tensor:
    """With dropout there is no fused kernel on a CPU: some queries at a time, then, over no later keys than needed."""
    L, S = q.shape[2], k.shape[2]
    hidden = ~pairs.dense()
    out = []
    with torch.autocast("cpu", enabled=False):
        for start in range(0, L, BLOCK):
            end = min(start + BLOCK, L)
            reach = end if pairs.causal else S
            scores = (q[:, :, start:end] * scale) @ k[:, :, :reach].transpose(2, 3)
            unseen = hidden[:, :, start:end, :reach]
            scores = scores + torch.zeros(unseen.shape, dtype=q.dtype).masked_fill_(unseen, torch.finfo(q.dtype).min)
            weights = drop(scores.softmax(-1), dropout)
            if not pairs.causal:
                weights = weights.masked_fill(unseen.all(-1, keepdim=True), 0)
            out.append(weights @ v[:, :, :reach])
    return torch.cat(out, 2)
