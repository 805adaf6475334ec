"""Memory-keyed attention: each token asks three memories, and a gate computed from its query weighs the answers.

    o[t] = W_o sum_l lambda[t, l] Attn(q[t], W_k M_l, W_v M_l)         lambda[t] = softmax(MLP(q[t]))
    M_1: the tokens up to t         M_2: the mean of each completed chunk of c tokens, strictly before t's own chunk
    M_3: the tokens of the `recall` chunks of M_2 whose mean keys match q[t] best, attended in full

After arXiv 2603.20586, made causal: the published code averaged M_2 over the whole sequence and left M_3 zero. W_k and
W_v are shared; the rotary position of a mean key is that of its chunk's last token. The gate starts near lambda_1 = 1,
and a memory that holds nothing yet has weight 0. Caches 2 K H floats per token, 2 K H per completed chunk, and the
running sum of the current chunk (D).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import Cache, Output, Seen, extend
from ..errors import UserError
from ..layers import Linear, linear
from ..ops import attend, chunk_sums, newest, spread
from ..recording import note
from ..spec import CAUSAL, CacheSpec, Mask
from . import gqa


@dataclass(frozen=True, kw_only=True)
class Config(gqa.Config):
    chunk: int = 16
    recall: int = 2
    window: int | None = None  # of M_1; None: all

    formula = "o[t] = sum_l lambda[t,l] softmax(q[t] (W_k M_l)^T / sqrt(H)) W_v M_l"
    source = "arXiv 2603.20586, made causal"
    caches = "keys and values of every token and of every completed chunk, and one running sum"
    impls = ("reference", "sdpa")
    cache_width = "n_kv_heads"
    variants = {"chunks of 3": {"chunk": 3}, "window": {"chunk": 4, "recall": 1, "window": 5, "n_kv_heads": 1}}

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.chunk, self.recall, self.window or 1) < 1:
            raise UserError(
                f"chunk {self.chunk}, recall {self.recall} and window {self.window} must each be at least 1"
            )

    @property
    def default_kv_heads(self) -> int:
        return self.n_heads

    @property
    def relative(self) -> bool:
        return False  # chunks lie on a fixed grid of positions

    @property
    def cache_spec(self) -> CacheSpec:
        row = super().cache_spec.rows
        return CacheSpec(row, state={"sum": (self.d_model,)}, beside={"chunks": CacheSpec(row, every=self.chunk)})

    def flops(self, queries: int, keys: int) -> int:
        D, N, H, c = self.d_model, self.n_heads, self.head_dim, self.chunk
        before, chunks, hidden = (keys - queries) // c, keys // c, gate_width(self)
        sums = 2 * (queries // c + 2) * queries * D * (queries > 1)  # of one token: no product
        rest = 4 * (chunks - before) * D * self.n_kv_heads * H + 2 * queries * hidden * (N * H + 3)
        attend = 4 * queries * N * H * (chunks + keys) + 2 * queries * chunks * self.n_kv_heads * H
        return super().flops(queries, keys) + sums + rest + attend


def gate_width(config: Config) -> int:
    return max(config.d_model // 8, 4)


def make_gate(config: gqa.Config, width: int, sources: int) -> nn.Sequential:
    """MLP from a token's query to the logits of its sources; source 0 starts with nearly all the weight."""
    last = Linear(width, sources)
    nn.init.normal_(last.weight, std=0.01)
    with torch.no_grad():
        last.bias.copy_(torch.tensor([5.0] + [0.0] * (sources - 1)))
    return nn.Sequential(Linear(config.n_heads * config.head_dim, width), nn.GELU(), last)


class Attention(gqa.Attention):
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.gate = make_gate(config, gate_width(config), 3)

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        c, before, own = self.config, cache, positions // self.config.chunk
        q, k, v = self.heads(x)
        logits = self.gate(q.flatten(2))
        q, k = self.turn(q, positions), self.turn(k, positions)
        seen, cache = extend(cache, positions, k=k, v=v)
        chunks, cache = self.summarise(x, positions, before, cache)
        keep = self.recall(q, own, chunks, seen)
        recent = replace(mask, window=c.window)

        def ask(memory: Seen, at: Tensor, rule: Mask, keep: Tensor | None = None) -> Tensor:
            k, v, dropout = memory.rows["k"], memory.rows["v"], c.dropout if self.training else 0.0
            return attend(q, k, v, at, memory.positions, rule, impl=c.impl, dropout=dropout, keep=keep)

        answers = ask(seen, positions, recent), ask(chunks, own - 1, CAUSAL), ask(seen, positions, CAUSAL, keep)
        empty = (positions < c.chunk)[..., None] & torch.tensor([False, True, True], device=x.device)
        weight = note("gate", logits.masked_fill(empty, -torch.inf).softmax(-1).to(x.dtype))
        y = sum(weight[:, :, i, None, None] * answer for i, answer in enumerate(answers))
        return self.o(torch.as_tensor(y).flatten(2)), cache

    def summarise(self, x: Tensor, positions: Tensor, before: Cache | None, after: Cache | None) -> tuple[Seen, Any]:
        """Mean keys and values of the chunks that these tokens complete, joined to those in memory."""
        c, L, q_size = self.config, x.shape[1], self.config.n_heads * self.config.head_dim
        sums, which, still_open = chunk_sums(x, positions, c.chunk, None if before is None else before.state["sum"])
        told = 0 if before is None else before.tokens % c.chunk
        count = L // c.chunk + 1 if before and before.ragged else (told + L) // c.chunk
        sums, which = sums[:, :count], which[:, :count]
        bias = None if self.qkv.bias is None else self.qkv.bias[q_size:]
        k, v = linear(sums / c.chunk, self.qkv.weight[q_size:], bias).unflatten(-1, (-1, c.head_dim)).chunk(2, 2)
        k = self.turn(self.k_norm(k), which * c.chunk + c.chunk - 1)
        chunks, kept = extend(before and before.beside["chunks"], which, L, k=k, v=v)
        return chunks, after and kept and replace(after.with_state(sum=still_open), beside={"chunks": kept})

    def recall(self, q: Tensor, own: Tensor, chunks: Seen, seen: Seen) -> Tensor:
        """B 1 L S, True for the tokens of the chunks whose mean keys match the query best, heads together."""
        c = self.config
        grouped = q.unflatten(2, (c.n_kv_heads, -1)).sum(3)
        scores = torch.einsum("blkh,bckh->blc", grouped, chunks.rows["k"].to(q.dtype))
        past = CAUSAL(own[:, :, None] - 1, chunks.positions[:, None])
        best = newest(scores.masked_fill(~past, -torch.inf), c.recall)
        return spread(best, chunks.positions, seen.positions // c.chunk)[:, None]
