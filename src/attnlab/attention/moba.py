"""Mixture of block attention: each query head attends to its own block and to the earlier blocks it scores best.

    score[t, n, i] = q[t, n] . mean of k[s, n // (N/K)] over the c tokens s of block i      blocks before that of t
    o[t, n]        = gqa over the tokens s <= t of the block of t and of the top_k - 1 best others

Lu et al. 2025 (arXiv 2502.13189), as moba_naive.py beside it computes it; block is B there, top_k is k. The choice has
no gradient. Of equal scores the later block wins, so decoding in chunks chooses the same blocks.
Caches 2 K H floats per token, K H per complete block, and the sum of the keys of the open block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..cache import Cache, Output, Seen, extend
from ..ops import chunk_sums, newest, spread
from ..ranges import Count
from ..spec import CAUSAL, CacheSpec, Mask
from . import gqa


@dataclass(frozen=True, kw_only=True)
class Config(gqa.Config):
    block: Count = 16  # tokens
    top_k: Count = 3  # blocks, the query's own among them

    formula = "o[t] = softmax over s in top-k_i q[t] . mean(k[block i]) of (q[t] k[s]^T / sqrt(H)) v[s]"
    source = "Lu et al. 2025, arXiv 2502.13189"
    caches = "keys and values of every token, the mean key of every complete block, and one running sum"
    chooses = True
    swatch = (5, 7, 2)
    impls = ("reference", "sdpa")
    variants = {
        "blocks of 3": {"block": 3, "n_kv_heads": 2},
        "own": {"block": 4, "top_k": 1, "n_kv_heads": 1, "qk_norm": 1e-6},
    }

    @property
    def default_kv_heads(self) -> int:
        return self.n_heads

    @property
    def relative(self) -> bool:
        return False  # blocks lie on a fixed grid of positions

    @property
    def cache_spec(self) -> CacheSpec:
        rows = super().cache_spec.rows
        width = self.n_kv_heads * self.head_dim
        blocks = CacheSpec({"mean": rows["k"]}, every=self.block)
        return CacheSpec(rows, state={"sum": (width,)}, beside={"blocks": blocks})

    def flops(self, queries: int, keys: int) -> int:
        scores = 2 * queries * (keys // self.block) * self.n_heads * self.head_dim
        sums = sum_flops(queries, self.block, self.n_kv_heads * self.head_dim)
        return super().flops(queries, keys) + sums + scores


def sum_flops(queries: int, block: int, width: int) -> int:
    """Return the FLOPs of `chunk_sums` of so many rows of this width."""
    return 2 * (queries // block + 2) * queries * width


def completed(x: Tensor, positions: Tensor, block: int, before: Cache | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of x (B L D) over the blocks that these tokens complete (B M D), their numbers (B M; -1: none),
    and the sum of the open block (B D)."""
    L = x.shape[1]
    sums, number, still_open = chunk_sums(x, positions, block, None if before is None else before.state["sum"])
    if before is not None and before.ragged:
        most = L // block + 1  # blocks that any sequence can complete
    else:
        most = (L if before is None else before.tokens % block + L) // block
    return sums[:, :most], number[:, :most], still_open


def tokens_of(best: Tensor, blocks: Seen, own: Tensor, stored: Tensor) -> Tensor:
    """Return the tokens that each query may read: those of its own block, and of the `best` blocks.

    best: B N L M, bool, of the blocks in memory; own: B L, and stored: B S, the numbers of the blocks in which queries
    and stored tokens lie -> B N L S.
    """
    heads, queries = best.shape[1:3]
    chosen = spread(best.flatten(1, 2), blocks.positions, stored).unflatten(1, (heads, queries))
    return chosen | (own[:, :, None] == stored[:, None])[:, None]


class Attention(gqa.Attention):
    config: Config

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        c = self.config
        q, k, v = self.project(x, positions)
        seen, after = extend(cache, positions, k=k, v=v)
        with torch.no_grad():
            blocks, after = self.summarise(k, positions, cache, after)
            keep = self.choose(q, positions // c.block, blocks, seen)
        return self.o(self.ask(q, seen, positions, mask, keep=keep).flatten(2)), after

    def summarise(
        self, k: Tensor, positions: Tensor, before: Cache | None, after: Cache | None
    ) -> tuple[Seen, Cache | None]:
        """Return the mean keys of all complete blocks, and `after` with what is kept of them.

        `before` and `after` are the cache without and with the new tokens, whose keys are k (B L K H).
        """
        c = self.config
        sums, number, still_open = completed(k.flatten(2), positions, c.block, before)
        mean = (sums / c.block).unflatten(-1, (-1, c.head_dim))
        blocks, kept = extend(None if before is None else before.beside["blocks"], number, k.shape[1], mean=mean)
        if after is None or kept is None:
            return blocks, None
        return blocks, replace(after.with_state(sum=still_open), beside={"blocks": kept})

    def choose(self, q: Tensor, own: Tensor, blocks: Seen, seen: Seen) -> Tensor:
        """Return B N L S, True for the stored tokens of the blocks that a query head chooses; own: B L, its block."""
        c = self.config
        exact = torch.promote_types(q.dtype, torch.float32)
        grouped = q.to(exact).unflatten(2, (c.n_kv_heads, -1))
        scores = torch.einsum("blkgh,bmkh->bkglm", grouped, blocks.rows["mean"].to(exact)).flatten(1, 2)
        past = CAUSAL(own[:, None, :, None] - 1, blocks.positions[:, None, None])
        scores = scores.masked_fill(~past, -torch.inf)
        best = newest(scores, c.top_k - 1) if c.top_k > 1 else torch.zeros_like(scores, dtype=torch.bool)
        return tokens_of(best, blocks, own, seen.positions // c.block)


def weights_from(source: Any, config: Config) -> dict[str, Tensor]:
    """Return the weights of the dense layer `source`: the same, where `top_k` blocks reach the whole context."""
    tensors: dict[str, Tensor] = source.tensors(qkv=source.qkv, o=source.out)
    return tensors
