"""The forms of a recurrence with a matrix as state: token by token, which is the specification, and chunk by chunk.

`recurrence.recur` is the only caller. B sequences, K heads of queries and keys for G heads of values each, L tokens in
M chunks of C, H key and V value channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad


class Parts(NamedTuple):
    """The arguments of a scan, pads blotted out: N heads are K groups of G, which share queries and keys."""

    q: Tensor  # B K 1 L H
    k: Tensor  # B K 1 L H
    v: Tensor  # B K G L V
    decay: Tensor  # B K G L 1, or H where each key channel has its own
    beta: Tensor | None  # B K G L 1
    state: Tensor  # B K G H V
    dtype: torch.dtype  # of the values as they were given


def recurrent(parts: Parts, _: int) -> tuple[Tensor, Tensor]:
    """Go token by token. Return y, B K G L V, and the state, B K G H V."""
    state = parts.state
    fall = parts.decay.exp()
    y = []
    for t in range(parts.v.shape[3]):
        k = parts.k[..., t, :]
        v = parts.v[..., t, :]
        state = state * fall[..., t, :, None]
        if parts.beta is not None:
            v = parts.beta[..., t, :] * (v - _read(state, k))
        state = state + k[..., None] * v[..., None, :]
        y.append(_read(state, parts.q[..., t, :]))
    return torch.stack(y, 3), state


def _read(state: Tensor, key: Tensor) -> Tensor:
    """Return S^T k. state: B K G H V, key: B K 1 H -> B K G V."""
    return (key[..., None, :] @ state)[..., 0, :]


def chunked(parts: Parts, chunk: int) -> tuple[Tensor, Tensor]:
    """Go chunk by chunk: within one, products of tokens (the WY form for the delta rule); between them, the state.

    With G[i] the log decay from the start of a chunk to its token i, F[i, j] = exp(G[i] - G[j]) for i >= j, and S the
    state before it: (I + tril(b k k^T F, -1)) U = b (v - exp(G) k S), y = exp(G) q S + (q k^T F) U, and without beta
    U = v. No exponent is above 0.
    """
    L = parts.v.shape[3]
    C = chunk_size(chunk, L)
    q, k, v, decay, beta = (t if t is None else _cut(t, C) for t in parts[:5])  # B K G M C X
    assert q is not None and k is not None and v is not None and decay is not None
    scores, gram, since, until = (_by_channel if decay.shape[-1] > 1 else _by_head)(q, k, decay, beta is not None)
    start = since.exp()  # decay from the chunk's start to a token, B K G M C 1|H
    end = start[..., -1, :, None]  # over the whole chunk, B K G M 1|H 1
    into = start * q
    out = k * until.exp()  # decayed from a token to the chunk's end
    system = None
    wrote = None
    if beta is not None:
        v = beta * v
        system = beta * gram
        wrote = beta * start * k
    heads = v.shape[:3]
    each = (None if t is None else t.flatten(0, 2) for t in (scores, system, into, wrote, out, v, end, parts.state))
    y, state = _Chunks.apply(*each)
    return y.unflatten(0, heads).flatten(3, 4)[..., :L, :], state.unflatten(0, heads)


def chunk_size(chunk: int, tokens: int) -> int:
    """Return the tokens of a chunk: `chunk` rounded down to a power of two, or the one that holds all `tokens`."""
    return min(1 << (chunk.bit_length() - 1), 1 << max(tokens - 1, 0).bit_length())


def _cut(t: Tensor, size: int) -> Tensor:
    """Return t (B K G L X) in chunks, the last one filled up with zeros: B K G M C X."""
    rest = -t.shape[3] % size
    return (pad(t, (0, 0, 0, rest)) if rest else t).contiguous().unflatten(3, (-1, size))


def _by_head(q: Tensor, k: Tensor, decay: Tensor, delta: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `_by_channel` does, for one rate per head: decay B K G M C 1."""
    C = q.shape[-2]
    wide = decay[..., 0].double() if decay.device.type != "mps" else decay[..., 0]
    total = wide.cumsum(-1)  # in float64, because differences of large sums are taken
    hidden = torch.ones(C, C, dtype=torch.bool, device=q.device).triu(1)
    fall = (total[..., :, None] - total[..., None, :]).to(q.dtype).masked_fill(hidden, -torch.inf).exp()
    until = (total[..., -1:] - total).to(q.dtype)[..., None]
    scores = (q @ k.mT) * fall
    gram = (k @ k.mT) * fall if delta else scores
    return scores, gram, total.to(q.dtype)[..., None], until


def _by_channel(q: Tensor, k: Tensor, decay: Tensor, delta: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q k^T and k k^T, each weighed by the decay between the two tokens (B K G M C C, of which what is below the
    diagonal counts), and the log decay from the chunk's start to each token and from it to the end (B K G M C H).

    Blocks of 1, 2, 4, ... tokens are joined in pairs. A query of the later block and a key of the earlier one meet at
    the border, so that both decays are products of numbers up to 1, and all sums are of numbers that are not positive.
    """
    H = q.shape[-1]
    decay = decay.expand(*decay.shape[:-1], H)
    rows = torch.stack([q, k]) if delta else q[None]  # R B K G M C H
    one = decay.shape[:-1]
    blocks = (rows * k).sum(-1).expand(-1, *one)[..., None, None]  # R B K G M C/s s s
    since = decay[..., None, :]  # B K G M C/s s H
    until = torch.zeros_like(since)
    while since.shape[-3] > 1:
        size = since.shape[-2]
        late = rows.unflatten(-2, (-1, 2, size))[..., 1, :, :] * since[..., 1::2, :, :].exp()
        early = k.unflatten(-2, (-1, 2, size))[..., 0, :, :] * until[..., 0::2, :, :].exp()
        corner = late @ early.mT if size > 1 else (late * early).sum(-1, keepdim=True)
        above = torch.cat([blocks[..., 0::2, :, :], torch.zeros_like(corner)], -1)
        below = torch.cat([corner, blocks[..., 1::2, :, :]], -1)
        blocks = torch.cat([above, below], -2)
        first = since[..., 0::2, :, :]
        second = since[..., 1::2, :, :]
        joined = torch.cat([until[..., 0::2, :, :] + second[..., -1:, :], until[..., 1::2, :, :]], -2)
        since = torch.cat([first, second + first[..., -1:, :]], -2)
        until = joined
    blocks = blocks[..., 0, :, :]
    return blocks[0], blocks[-1], since[..., 0, :, :], until[..., 0, :, :]


class _Chunks(torch.autograd.Function):
    """The scan over chunks, n sequences and heads at once. Autograd's backward took more than twice as long."""

    @staticmethod
    def forward(  # noqa: PLR0913  # the matrices of a chunk
        ctx: Any,
        scores: Tensor,  # n M C C: what token i takes from token j of its chunk, 0 for j > i
        gram: Tensor | None,  # n M C C, below the diagonal: what token i corrects of token j; None: no delta rule
        into: Tensor,  # n M C H: what reads the state before the chunk
        wrote: Tensor | None,  # n M C H: what finds in that state what is to be corrected
        out: Tensor,  # n M C H: what writes into the state after the chunk
        v: Tensor,  # n M C V
        end: Tensor,  # n M 1|H 1: what is left of the state before the chunk after it
        state: Tensor,  # n H V
    ) -> tuple[Tensor, Tensor]:
        """Return y, n M C V, and the state after the last chunk, n H V."""
        n, M, _, V = v.shape
        before = state.new_empty(n, M, *state.shape[1:])
        if gram is None:
            new = v
            triangle = None
            w = None
            written = out.mT @ v
        else:
            assert wrote is not None
            triangle = inverse(gram)
            new, w = (triangle @ torch.cat([v, wrote], -1)).split([V, wrote.shape[-1]], -1)
            new = new.contiguous()
        u = new if w is None else new.clone()
        for m in range(M):
            before[:, m] = state
            state = end[:, m] * state
            if w is None:
                state = state + written[:, m]
            else:
                new[:, m] = torch.baddbmm(u[:, m], w[:, m], before[:, m], alpha=-1)
                state = torch.baddbmm(state, out[:, m].mT, new[:, m])
        ctx.save_for_backward(scores, triangle, into, w, out, u, new, end, before)
        return into @ before + scores @ new, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, state: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients; `state` is that of the state after the last chunk, then after each before it."""
        scores, triangle, into, w, out, u, new, end, before = ctx.saved_tensors
        after = torch.empty_like(before)
        read = into.mT @ dy
        dnew = scores.mT @ dy
        for m in reversed(range(dy.shape[1])):
            after[:, m] = state
            state = end[:, m] * state + read[:, m]
            if w is not None:
                dnew[:, m] = torch.baddbmm(dnew[:, m], out[:, m], after[:, m])
                state = torch.baddbmm(state, w[:, m].mT, dnew[:, m], alpha=-1)
        if w is None:
            dnew = dnew + out @ after
        dend = (before * after).sum(-1, keepdim=True)
        if end.shape[2] == 1:
            dend = dend.sum(2, keepdim=True)
        dscores = (dy @ new.mT).tril_()
        dinto = dy @ before.mT
        dout = new @ after.mT
        if w is None:
            return dscores, None, dinto, None, dout, dnew, dend, state
        right = triangle.mT @ torch.cat([dnew, -(dnew @ before.mT)], -1)
        dv, dwrote = right.split([u.shape[-1], w.shape[-1]], -1)
        dgram = (right @ torch.cat([u, w], -1).mT).tril_(-1).neg_()
        return dscores, dgram, dinto, dwrote, dout, dv, dend, state


def inverse(below: Float[Tensor, "*B C C"]) -> Float[Tensor, "*B C C"]:
    """Return (I + tril(below, -1))^-1. C is a power of two.

    Blocks of 1, 2, 4, ... are joined in pairs: [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]].
    """
    C = below.shape[-1]
    size = 1
    found = torch.ones_like(below[..., 0])[..., None, None]  # C/s s s: the inverses of the blocks on the diagonal
    while size < C:
        cut = below.unflatten(-1, (-1, 2, size)).unflatten(-4, (-1, 2, size))  # C/2s 2 s C/2s 2 s
        corner = cut[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        first = found[..., 0::2, :, :]
        second = found[..., 1::2, :, :]
        joined = found.new_zeros(*found.shape[:-3], C // (2 * size), 2 * size, 2 * size)
        joined[..., :size, :size] = first
        joined[..., size:, size:] = second
        joined[..., size:, :size] = -corner if size == 1 else -(second @ corner @ first)
        found = joined
        size *= 2
    return found[..., 0, :, :]
