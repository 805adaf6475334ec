"""Native sparse attention: a query reads compressed blocks, the blocks it finds best, and a window; gates add them up.

    o[t] = W_o concat_n sum_b g_b[t, n] Attn(q[t, n], k_b, v_b)      g[t] = sigmoid(W_g x[t]): 3 N gates; b = 1, 2, 3
    b = 1  one key and value per block of c tokens: sum_i w[i] * k_1[i-th token of the block], w learned, at first 1/c;
           of the blocks that end at t or before
    b = 2  the tokens s <= t of top_k blocks: that of t, the one before it, the first one, and the best of the others
           by the weight that branch 1 gives them, summed over the N/K heads of a group
    b = 3  the last `window` tokens

Yuan et al. 2025 (arXiv 2502.11089). Each branch has keys and values of its own, all from x; W_q is shared. Its names: c
is l, d and l', which are equal here; top_k is n, window is w; its phi, an MLP over the block, is the weighted sum here,
so that one running sum decodes it. A compressed key has the rotary position of its block's last token.
Caches 2 K H floats per token, 2 K H per block, as many for each of the last `window` tokens, and one running sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..cache import Cache, Output, Seen, extend
from ..layers import Linear
from ..ops import attention_weights, newest
from ..ranges import Count
from ..spec import CAUSAL, CacheSpec, Mask
from . import gqa
from .moba import completed, sum_flops, tokens_of


@dataclass(frozen=True, kw_only=True)
class Config(gqa.Config):
    block: Count = 16  # tokens
    top_k: Count = 4  # blocks that are read in full, the query's own among them
    window: Count = 32  # tokens

    formula = "o = sum_b sigmoid(W_g x)_b softmax(q k_b^T / sqrt(H)) v_b,  b: compressed, selected, window"
    source = "Yuan et al. 2025, arXiv 2502.11089"
    caches = "keys and values of every token, of every block and of the last `window` tokens, and one running sum"
    chooses = True
    swatch = (6, 8, 3)
    signed = True  # three gates may add up to more than 1
    impls = ("reference", "sdpa")
    variants = {
        "blocks of 3": {"block": 3, "window": 5, "n_kv_heads": 2, "qk_norm": 1e-6},
        "own": {"block": 4, "top_k": 1, "window": 2, "n_kv_heads": 4, "bias": True},
    }

    @property
    def relative(self) -> bool:
        return False  # blocks lie on a fixed grid of positions

    @property
    def kv_size(self) -> int:
        """Return the floats of the keys and values of one branch."""
        return 2 * self.n_kv_heads * self.head_dim

    @property
    def cache_spec(self) -> CacheSpec:
        rows = super().cache_spec.rows
        beside = {"blocks": CacheSpec(rows, every=self.block), "window": CacheSpec(rows, keep=self.window)}
        return CacheSpec(rows, state={"sum": (self.kv_size,)}, beside=beside)

    def flops(self, queries: int, keys: int) -> int:
        width = self.n_heads * self.head_dim
        blocks = keys // self.block
        projections = 2 * queries * self.d_model * (2 * width + 3 * self.kv_size + 3 * self.n_heads)
        recent = self.window if queries == 1 else queries + min(keys - queries, self.window)
        read = 3 * blocks + 2 * keys + 2 * min(keys, recent)  # a block is scored twice
        return projections + 2 * queries * width * read + sum_flops(queries, self.block, self.kv_size)


class Attention(gqa.Attention):
    """q, k and v of gqa are the queries and branch 2; `further` makes keys and values of branches 1 and 3."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.further = Linear(config.d_model, 2 * config.kv_size, bias=config.bias)
        self.within = nn.Parameter(torch.full((config.block, config.kv_size), 1 / config.block))  # w
        self.opening = Linear(config.d_model, 3 * config.n_heads, bias=config.bias)  # W_g

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        c = self.config
        q, k, v = self.project(x, positions)
        first, third = self.further(x).chunk(2, -1)
        (blocks, kept), still_open = self.compress(first, positions, cache)
        seen, after = extend(cache, positions, k=k, v=v)
        recent, ring = extend(
            None if cache is None else cache.beside["window"], positions, **self.rows(third, positions)
        )
        if after is not None and kept is not None and ring is not None:
            after = replace(after.with_state(sum=still_open), beside={"blocks": kept, "window": ring})
        ends = (positions + 1) // c.block - 1  # B L: the last block that ends at the query or before
        with torch.no_grad():
            keep = self.choose(q, positions // c.block, ends, blocks, seen)
        window = replace(mask, window=min(c.window, mask.window or c.window))
        gate = self.opening(x).sigmoid().unflatten(-1, (3, -1)).unbind(2)
        y = gate[0][..., None] * self.ask(q, blocks, ends, CAUSAL, share=gate[0])
        y = y + gate[1][..., None] * self.ask(q, seen, positions, mask, keep=keep, share=gate[1])
        y = y + gate[2][..., None] * self.ask(q, recent, positions, window, share=gate[2])
        return self.o(y.flatten(2)), after

    def rows(self, kv: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Return the keys, normed and turned, and the values in kv (B L 2KH): each B L K H."""
        k, v = kv.unflatten(-1, (2, -1, self.config.head_dim)).unbind(2)
        return {"k": self.turn(self.k_norm(k), positions), "v": v}

    def compress(self, kv: Tensor, positions: Tensor, cache: Cache | None) -> tuple[tuple[Seen, Cache | None], Tensor]:
        """Return the keys and values of all complete blocks, their cache, and the sum of the open block.

        kv: B L 2KH, the keys and values of the new tokens; cache: that of the layer, before them.
        """
        c = self.config
        weighted = self.within[positions % c.block] * kv
        sums, number, still_open = completed(weighted, positions, c.block, cache)
        rows = self.rows(sums, number * c.block + c.block - 1)
        return extend(None if cache is None else cache.beside["blocks"], number, kv.shape[1], **rows), still_open

    def choose(self, q: Tensor, own: Tensor, ends: Tensor, blocks: Seen, seen: Seen) -> Tensor:
        """Return B N L S, True for the stored tokens of the blocks that a query reads in full; own: B L, its block."""
        c = self.config
        exact = torch.promote_types(q.dtype, torch.float32)
        k = blocks.rows["k"].to(exact)
        weights = attention_weights(q.to(exact), k, ends, blocks.positions, CAUSAL, c.head_dim**-0.5)
        scores = weights.unflatten(1, (c.n_kv_heads, -1)).sum(2)  # B K L M
        query = own[:, None, :, None]
        block = blocks.positions[:, None, None]
        always = (block == 0) | (block == query - 1)
        scores = scores.masked_fill(always, torch.inf).masked_fill(~CAUSAL(query - 1, block), -torch.inf)
        best = newest(scores, c.top_k - 1) if c.top_k > 1 else torch.zeros_like(scores, dtype=torch.bool)
        tokens = tokens_of(best, blocks, own, seen.positions // c.block)
        return tokens.repeat_interleave(c.n_heads // c.n_kv_heads, 1)
