"""A kernel for a CPU: training, with or without dropout, and scores that are changed one by one.

It computes `BLOCK` queries at a time, over no later keys than they see and no earlier ones than a window reaches, so
a causal pass does little more than half the work. It keeps the weights for the backward pass. That is written by hand,
because autograd would add up gradients of the size of k and v for every block. What changes the scores is
differentiated by autograd, a block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layers import survivors
from .pairs import Heads, Pairs, Scoring, joined, per_head

BLOCK = 64  # queries


@dataclass(frozen=True)
class _Plan:
    """What the blocks of one call have in common, and no gradient flows to."""

    heads: int
    ordered: bool  # no query sees a key of a higher index
    window: int | None  # keys that a query sees at most, by index, its own the last of them; None: all
    dropout: float
    score: Callable[..., Tensor] | None
    rest: bool
    of_query: int  # how many of the further tensors are data of the query; the others are data of the key

    def changed(self, scores: Tensor, data: list[Tensor]) -> Tensor:
        """Return the scores (B N) l S of one block as `score` changes them, in float32 at least."""
        z = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.score is None:
            return z
        changed = self.score(z.unflatten(0, (-1, self.heads)), *data)
        return changed.to(z.dtype).expand(-1, self.heads, -1, -1).flatten(0, 1)

    def parts(self, queries: int, keys: int) -> Iterator[tuple[slice, slice]]:
        """Yield the blocks of queries, and for each the keys that it can see at most."""
        for start in range(0, queries, BLOCK):
            end = min(start + BLOCK, queries)
            first = 0 if self.window is None else max(start - self.window + 1, 0)
            yield slice(start, end), slice(first, end) if self.ordered else slice(0, keys)

    def part(self, data: tuple[Tensor, ...], at: slice, reach: slice) -> list[Tensor]:
        """Return the part of `data` (as it broadcasts to B N L S) that a block of queries reads."""
        of_query = [t[:, :, at] for t in data[: self.of_query]]
        return of_query + [t[..., reach] for t in data[self.of_query :]]


def attend(q: Heads, k: Heads, v: Tensor, pairs: Pairs, scoring: Scoring, dropout: float) -> Tensor:
    """Return the weighted sum of the values that each query sees: B L N V."""
    B, L, N, _ = q[0].shape
    query = (joined(q, N) * scoring.scale).transpose(1, 2).flatten(0, 1)
    key = joined(k, N).transpose(1, 2).flatten(0, 1)
    value = per_head(v, N).transpose(1, 2).flatten(0, 1)
    ordered = pairs.mask.plain and L == v.shape[1]
    rest = scoring.rest is not None
    plan = _Plan(N, ordered, pairs.mask.window, dropout, scoring.score, rest, len(scoring.of_query))
    seen = None if pairs.causal else pairs.dense()
    with torch.autocast("cpu", enabled=False):
        y = _Blocks.apply(plan, query, key, value, seen, scoring.rest, *scoring.data)
    return y.unflatten(0, (B, N)).transpose(1, 2)


def _hide(scores: Tensor, seen: Tensor | None, n_heads: int, at: slice, reach: slice) -> Tensor | None:
    """Lower the scores (B N) l s of pairs that may not see each other, in place: queries `at`, keys `reach`. Return the
    queries that see no key; None: there are none."""
    least = torch.finfo(scores.dtype).min
    if seen is None:
        size = at.stop - at.start
        scores[:, :, at.start - reach.start :] += scores.new_full((size, size), least).triu_(1)
        return None
    visible = seen[:, :, at, reach]
    scores.unflatten(0, (-1, n_heads)).add_(visible.to(scores.dtype).sub_(1).mul_(-least))
    return ~visible.any(-1, keepdim=True)


def _softmax(scores: Tensor, rest: Tensor | None, n_heads: int) -> Tensor:
    """Return the weights of scores (B N) l S, in place of them; a `rest` (N) takes its part of the weight."""
    if rest is None:
        return torch.softmax(scores, -1)
    total = scores.logsumexp(-1, keepdim=True).unflatten(0, (-1, n_heads))
    total = torch.logaddexp(total, rest.to(scores.dtype)[:, None, None]).flatten(0, 1)
    return scores.sub_(total).exp_()


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seen: Tensor | None,
        rest: Tensor | None,
        *data: Tensor,
    ) -> Tensor:
        """q: (B N) L H, scaled; k: (B N) S H; v: (B N) S V; seen: B|1 N|1 L S, or None for causal; rest: N, or None;
        data: as they broadcast to B N L S."""
        y = v.new_empty(*q.shape[:2], v.shape[2])
        saved = []
        plain = plan.score is None and not plan.rest
        for at, reach in plan.parts(q.shape[1], k.shape[1]):
            raw = torch.bmm(q[:, at], k[:, reach].transpose(1, 2))
            scores = raw if plain else plan.changed(raw, plan.part(data, at, reach)).contiguous()
            if plan.score is not None and scores.data_ptr() == raw.data_ptr():
                scores = scores.clone()  # what follows is in place, and the backward pass reads `raw`
            blind = _hide(scores, seen, plan.heads, at, reach)
            weights = _softmax(scores, rest, plan.heads)
            if blind is not None:
                weights.unflatten(0, (-1, plan.heads)).masked_fill_(blind, 0)
            kept, ctx.scale = survivors(weights, plan.dropout) if plan.dropout else (None, 1.0)
            dropped = weights if kept is None else weights * kept
            y[:, at] = torch.bmm(dropped.to(v.dtype), v[:, reach])
            saved += [weights, kept, raw if plan.score is not None else None]
        ctx.plan = plan
        ctx.further = len(data)
        ctx.save_for_backward(q, k, v, *data, *saved)
        return y.mul_(ctx.scale) if plan.dropout else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        q, k, v, *others = ctx.saved_tensors
        data = tuple(others[: ctx.further])
        saved = others[ctx.further :]
        dy = (grads[0] * ctx.scale).contiguous()
        dq = torch.empty_like(q)
        dk = torch.zeros_like(k)
        dv = torch.zeros_like(v)
        wanted = [i for i in range(len(data)) if ctx.needs_input_grad[6 + i]]
        ddata = [torch.zeros_like(t) if i in wanted else None for i, t in enumerate(data)]
        drest = None
        for i, (at, reach) in enumerate(plan.parts(q.shape[1], k.shape[1])):
            weights, kept, raw = saved[3 * i : 3 * i + 3]
            dropped = weights if kept is None else weights * kept
            dv[:, reach].baddbmm_(dropped.to(v.dtype).transpose(1, 2), dy[:, at])
            dweights = torch.bmm(dy[:, at], v[:, reach].transpose(1, 2)).to(weights.dtype)
            if kept is not None:
                dweights.mul_(kept)
            if plan.rest:
                drest = _rest_gradient(weights, dweights, plan.heads, drest)
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            if raw is not None:
                dscores = _through(plan, raw, data, ddata, dscores, at, reach)
            dscores = dscores.to(q.dtype)
            dq[:, at] = torch.bmm(dscores, k[:, reach])
            dk[:, reach].baddbmm_(dscores.transpose(1, 2), q[:, at])
        return None, dq, dk, dv, None, drest, *ddata


def _rest_gradient(weights: Tensor, dweights: Tensor, n_heads: int, before: Tensor | None) -> Tensor:
    """The gradient of the rest's logits (N) of one block of weights (B N) l S, added to that of the blocks before."""
    taken = 1 - weights.sum(-1)
    moved = -(taken * (weights * dweights).sum(-1)).unflatten(0, (-1, n_heads)).sum((0, 2))
    return moved if before is None else before + moved


def _through(
    plan: _Plan,
    raw: Tensor,
    data: tuple[Tensor, ...],
    ddata: list[Tensor | None],
    dscores: Tensor,
    at: slice,
    reach: slice,
) -> Tensor:
    """The gradient of the scores before `score` changed them; that of its data is added to `ddata`."""
    parts = plan.part(data, at, reach)
    into = [i for i, t in enumerate(ddata) if t is not None]
    with torch.enable_grad():
        leaf = raw.detach().requires_grad_()
        leaves = [t.detach().requires_grad_(i in into) for i, t in enumerate(parts)]
        changed = plan.changed(leaf, leaves)
        found = torch.autograd.grad(changed, [leaf, *(leaves[i] for i in into)], dscores, allow_unused=True)
    totals = plan.part(tuple(t if t is not None else data[i] for i, t in enumerate(ddata)), at, reach)
    for i, gradient in zip(into, found[1:], strict=True):
        if gradient is not None:
            totals[i] += gradient
    return torch.zeros_like(raw) if found[0] is None else found[0]
