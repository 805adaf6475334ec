"""Attention for training on a CPU, with or without dropout: `BLOCK` queries at a time, over no later keys than they can
see, so that a causal pass does little more than half the work. It keeps the weights for the backward pass, which is
written out, because autograd would add up whole-size gradients of every block's slice of k and v."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..layers import survivors
from .pairs import Pairs, per_head

BLOCK = 64


def attend(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float, dropout: float) -> Tensor:
    B, L, N, _ = q.shape
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q * scale, per_head(k, N), per_head(v, N)))
    ordered = pairs.mask.plain and L == k.shape[1]
    with torch.autocast("cpu", enabled=False):
        y = _Blocks.apply(q, k, v, None if pairs.causal else pairs.dense(), N, ordered, dropout)
    return y.unflatten(0, (B, N)).transpose(1, 2)


def _parts(queries: int, keys: int, ordered: bool) -> Iterator[tuple[slice, int]]:
    """Blocks of queries, and how many keys each can see at most."""
    for start in range(0, queries, BLOCK):
        end = min(start + BLOCK, queries)
        yield slice(start, end), end if ordered else keys


def _hide(scores: Tensor, seen: Tensor | None, n_heads: int, at: slice) -> Tensor | None:
    """Put what may not be seen out of reach, in place; returns the rows that see nothing, where there can be any."""
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
        y, saved = v.new_empty(*q.shape[:2], v.shape[2]), []
        for at, reach in _parts(q.shape[1], k.shape[1], ordered):
            scores = torch.bmm(q[:, at], k[:, :reach].transpose(1, 2))
            blind = _hide(scores, seen, n_heads, at)
            weights = torch.softmax(scores, -1)
            if blind is not None:
                weights.unflatten(0, (-1, n_heads)).masked_fill_(blind, 0)
            kept, ctx.scale = survivors(weights, p) if p else (None, 1.0)
            y[:, at] = torch.bmm(weights if kept is None else weights * kept, v[:, :reach])
            saved += [weights, kept]
        ctx.ordered = ordered
        ctx.save_for_backward(q, k, v, *saved)
        return y.mul_(ctx.scale) if p else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *saved = ctx.saved_tensors
        dy = (grads[0] * ctx.scale).contiguous()
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i, (at, reach) in enumerate(_parts(q.shape[1], k.shape[1], ctx.ordered)):
            weights, kept = saved[2 * i : 2 * i + 2]
            left = weights if kept is None else weights * kept
            dv[:, :reach].baddbmm_(left.transpose(1, 2), dy[:, at])
            dweights = torch.bmm(dy[:, at], v[:, :reach].transpose(1, 2))
            dweights = dweights if kept is None else dweights.mul_(kept)
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            dq[:, at] = torch.bmm(dscores, k[:, :reach])
            dk[:, :reach].baddbmm_(dscores.transpose(1, 2), q[:, at])
        return dq, dk, dv, None, None, None, None
