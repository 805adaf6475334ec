"""A kernel for training on a CPU, with or without dropout.

It computes `BLOCK` queries at a time, over no later keys than they can see, so a causal pass does little more than half
the work. It keeps the weights for the backward pass. That is written by hand, because autograd would add up gradients
of the size of k and v for every block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..layers import survivors
from .pairs import Pairs, per_head

BLOCK = 64  # queries


def attend(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float, dropout: float) -> Tensor:
    """Return softmax(q k^T scale) v for the pairs that may see each other: B L N V."""
    B, L, N, _ = q.shape
    q = (q * scale).transpose(1, 2).flatten(0, 1)
    k = per_head(k, N).transpose(1, 2).flatten(0, 1)
    v = per_head(v, N).transpose(1, 2).flatten(0, 1)
    ordered = pairs.mask.plain and L == k.shape[1]
    with torch.autocast("cpu", enabled=False):
        y = _Blocks.apply(q, k, v, None if pairs.causal else pairs.dense(), N, ordered, dropout)
    return y.unflatten(0, (B, N)).transpose(1, 2)


def _parts(queries: int, keys: int, ordered: bool) -> Iterator[tuple[slice, int]]:
    """The blocks of queries, and for each the number of keys that it can see at most."""
    for start in range(0, queries, BLOCK):
        end = min(start + BLOCK, queries)
        yield slice(start, end), end if ordered else keys


def _hide(scores: Tensor, seen: Tensor | None, n_heads: int, at: slice) -> Tensor | None:
    """Lower the scores of pairs that may not see each other, in place. Return the queries that see no key; None: there
    are none."""
    least = torch.finfo(scores.dtype).min
    if seen is None:
        size = at.stop - at.start
        scores[:, :, at.start :] += scores.new_full((size, size), least).triu_(1)
        return None
    visible = seen[:, :, at, : scores.shape[2]]
    scores.unflatten(0, (-1, n_heads)).add_(visible.to(scores.dtype).sub_(1).mul_(-least))
    return ~visible.any(-1, keepdim=True)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, n_heads: int, ordered: bool, p: float
    ) -> Tensor:
        """q: (B N) L H, scaled; k: (B N) S H; v: (B N) S V; seen: B|1 N|1 L S, or None for causal."""
        y = v.new_empty(*q.shape[:2], v.shape[2])
        saved = []
        for at, reach in _parts(q.shape[1], k.shape[1], ordered):
            scores = torch.bmm(q[:, at], k[:, :reach].transpose(1, 2))
            blind = _hide(scores, seen, n_heads, at)
            weights = torch.softmax(scores, -1)
            if blind is not None:
                weights.unflatten(0, (-1, n_heads)).masked_fill_(blind, 0)
            kept, ctx.scale = survivors(weights, p) if p else (None, 1.0)
            dropped = weights if kept is None else weights * kept
            y[:, at] = torch.bmm(dropped, v[:, :reach])
            saved += [weights, kept]
        ctx.ordered = ordered
        ctx.save_for_backward(q, k, v, *saved)
        return y.mul_(ctx.scale) if p else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *saved = ctx.saved_tensors
        dy = (grads[0] * ctx.scale).contiguous()
        dq = torch.empty_like(q)
        dk = torch.zeros_like(k)
        dv = torch.zeros_like(v)
        for i, (at, reach) in enumerate(_parts(q.shape[1], k.shape[1], ctx.ordered)):
            weights, kept = saved[2 * i : 2 * i + 2]
            dropped = weights if kept is None else weights * kept
            dv[:, :reach].baddbmm_(dropped.transpose(1, 2), dy[:, at])
            dweights = torch.bmm(dy[:, at], v[:, :reach].transpose(1, 2))
            if kept is not None:
                dweights.mul_(kept)
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            dq[:, at] = torch.bmm(dscores, k[:, :reach])
            dk[:, :reach].baddbmm_(dscores.transpose(1, 2), q[:, at])
        return dq, dk, dv, None, None, None, None
