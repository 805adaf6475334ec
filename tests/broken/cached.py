"""Mistakes that show only when somebody's module decodes with a cache of its own kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from broken.any_module import Right


class Tuples(Right):
    """Hands keys and values back, and takes them with the next tokens; the others differ from it in one place."""

    def seen(self, new: int, total: int) -> Tensor:
        return torch.ones(new, total, dtype=torch.bool).tril(total - new)

    def joined(self, past: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)

    def forward(self, x, past_key_value=None, use_cache=False):
        q, k, v = self.heads(x)
        if past_key_value is not None:
            k, v = self.joined(past_key_value, k, v)
        y = scaled_dot_product_attention(q, k, v, self.seen(q.shape[2], k.shape[2]))
        y = self.o(y.transpose(1, 2).flatten(2))
        return (y, None, (k, v)) if use_cache else (y, None)


class TopLeft(Tuples):
    """Lines the mask of a chunk up with the first key."""

    def seen(self, new: int, total: int) -> Tensor:
        return torch.ones(new, total, dtype=torch.bool).tril()


class ForgetsThePast(Tuples):
    """Takes a cache, hands one back, and attends to the new tokens alone."""

    def joined(self, past, k, v):
        return k, v


class SeesItsChunk(Tuples):
    """Masks only where there is no cache: right one token at a time, and wrong for a chunk."""

    def seen(self, new: int, total: int) -> Tensor:
        return super().seen(new, total) | (new != total)


class KeepsMaps(Tuples):
    """Keeps a row of weights for every pair of tokens."""

    def forward(self, x, past_key_value=None, use_cache=False):
        past = past_key_value and past_key_value[:2]
        y, *rest = super().forward(x, past, use_cache)
        if not use_cache:
            return y
        k, v = rest[-1]
        return y, (k, v, torch.zeros(len(x), k.shape[2], k.shape[2]))


class SharesOneCache(Tuples):
    """Writes into one buffer, whatever cache it is handed."""

    kept: list[Tensor] = []

    def joined(self, past, k, v):
        if past[0].shape[2] == 1 or not self.kept or self.kept[0].shape[0] != len(k):
            self.kept = list(past)
        self.kept = [torch.cat([old, new], 2) for old, new in zip(self.kept, (k, v), strict=True)]
        return self.kept[0], self.kept[1]


class Inside(Right):
    """Keeps keys and values in itself, in rows that are counted by `start`."""

    def __init__(self, rows: int = 2048) -> None:
        super().__init__()
        self.rows = rows
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def forward(self, x, start=None):
        if start is None:
            return super().forward(x)
        q, k, v = self.heads(x)
        if start == 0:
            self.keys = k.new_zeros(*k.shape[:2], self.rows, k.shape[3])
            self.values = torch.zeros_like(self.keys)
        total = start + x.shape[1]
        self.keys[:, :, start:total] = k
        self.values[:, :, start:total] = v
        keep = torch.ones(x.shape[1], total, dtype=torch.bool).tril(start)
        y = scaled_dot_product_attention(q, self.keys[:, :, :total], self.values[:, :, :total], keep)
        return self.o(y.transpose(1, 2).flatten(2))


class InsideFromZero(Inside):
    """Writes every chunk into the first rows."""

    def forward(self, x, start=None):
        if not start:
            return super().forward(x, start)
        q, k, _ = self.heads(x)
        self.keys[:, :, : x.shape[1]] = k
        y = scaled_dot_product_attention(q, self.keys[:, :, : start + 1], self.values[:, :, : start + 1])
        return self.o(y.transpose(1, 2).flatten(2))


class Library(nn.Module):
    """In the manner of transformers: rotary tables and a mask handed in, a cache object that it writes to."""

    turns_by_zero = False

    def __init__(self, hidden_size: int = 24) -> None:
        super().__init__()
        self.hidden_size, self.layer_idx, self.head_dim = hidden_size, 0, 8
        self.qkv, self.o = nn.Linear(hidden_size, 3 * hidden_size), nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **kwargs):
        q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in self.qkv(hidden_states).chunk(3, -1))
        cos, sin = (t[:, None] for t in position_embeddings)
        if self.turns_by_zero and q.shape[2] == 1:
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)

        def turn(t):
            a, b = t.chunk(2, -1)
            return t * cos + torch.cat([-b, a], -1) * sin

        q, k = turn(q), turn(k)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        weights = (q @ k.transpose(2, 3) * 8**-0.5 + attention_mask).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2)), weights


class LibraryTurnsByZero(Library):
    """Takes position 0 for every single token."""

    turns_by_zero = True


def bottom_right(q, k, v):
    """Attention of q, k, v [B H T D], whose mask is lined up with the last key."""
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return scaled_dot_product_attention(q, k, v, keep)


def top_left(q, k, v):
    """The same, lined up with the first key."""
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def heads_last(q, k, v):
    """The same as `bottom_right` for q, k, v [B T H D]."""
    return bottom_right(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def without_a_mask(q, k, v):
    return scaled_dot_product_attention(q, k, v)
