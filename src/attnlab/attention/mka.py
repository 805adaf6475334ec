"""Memory-keyed attention: each token asks three memories, and a gate computed from its query weighs the answers.

    o[t] = W_o sum_l lambda[t, l] Attn(q[t], W_k M_l, W_v M_l)         lambda[t] = softmax(MLP(q[t]))
    M_1: the tokens up to t         M_2: the mean of each completed chunk of c tokens, strictly before t's own chunk
    M_3: the tokens of the `recall` chunks of M_2 whose mean keys match q[t] best, attended in full

After arXiv 2603.20586, made causal: the published code averaged M_2 over the whole sequence and left M_3 zero. W_k and W_v
are shared; the rotary position of a mean key is that of its chunk's last token. The gate starts near lambda_1 = 1, and
a memory that holds nothing yet has weight 0. Caches 2 K H floats per token, 2 K H per completed chunk, and the running
sum of the current chunk (D).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..cache import Cache, Seen, extend
from ..ops import attend, newest, one_row, rope
from ..spec import CAUSAL, CacheSpec, Mask, UserError
from . import gqa


@dataclass(frozen=True, kw_only=True)
class Config(gqa.Config):
    chunk: int = 16
    recall: int = 2
    window: int | None = None  # of M_1; None: all

    summary = "a gate weighs recent tokens, chunk summaries and recalled chunks"
    formula = "o[t] = sum_l lambda[t,l] softmax(q[t] (W_k M_l)^T / sqrt(H)) W_v M_l"
    source = "arXiv 2603.20586, made causal"
    caches = "keys and values of every token and of every completed chunk, and one running sum"
    impls = ("reference", "sdpa")
    cache_width = "n_kv_heads"
    variants = {
        "chunks of 3": {"chunk": 3, "recall": 2},
        "window": {"chunk": 4, "recall": 1, "window": 5, "n_kv_heads": 1},
    }

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
        touched = chunks if queries == keys else queries // c + 2
        summaries = 2 * touched * queries * D + 2 * (chunks - before) * D * 2 * self.kv_heads * H
        gate = 2 * queries * hidden * (N * H + 3)
        return super().flops(queries, keys) + summaries + gate + 2 * queries * N * H * (3 * chunks + 2 * keys)


def gate_width(config: Config) -> int:
    return max(config.d_model // 8, 4)


def make_gate(config: gqa.Config, width: int, sources: int) -> nn.Sequential:
    """MLP from a token's query to the logits of its sources; source 0 starts with nearly all the weight."""
    gate = nn.Sequential(nn.Linear(config.n_heads * config.head_dim, width), nn.GELU(), nn.Linear(width, sources))
    with torch.no_grad():
        gate[2].bias.zero_()[0] = 5.0
        gate[2].weight.mul_(0.1)
    return gate


class Attention(gqa.Attention):
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.gate = make_gate(config, gate_width(config), 3)

    def forward(
        self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL
    ) -> tuple[Tensor, Cache | None]:
        c = self.config
        q, k, v = self.qkv(x).unflatten(-1, (-1, c.head_dim)).split([c.n_heads, c.kv_heads, c.kv_heads], 2)
        logits = self.gate(q.flatten(2))
        q, k = rope(q, positions, c.rope_theta), rope(k, positions, c.rope_theta)
        before = cache
        seen, cache = extend(cache, positions, k=k, v=v)
        chunks, cache = self.summarise(x, positions, before, cache)

        keep = self.recall(q, positions // c.chunk, chunks, seen)
        dropout = c.dropout if self.training else 0.0
        answers = [
            attend(q, m.rows["k"], m.rows["v"], pos, m.positions, rule, impl=c.impl, dropout=dropout, keep=chosen)
            for m, pos, rule, chosen in (
                (seen, positions, replace(mask, window=c.window), None),
                (chunks, positions // c.chunk - 1, CAUSAL, None),
                (seen, positions, CAUSAL, keep),
            )
        ]
        nothing_yet = (positions < c.chunk)[..., None] & torch.tensor([False, True, True], device=x.device)
        weight = logits.masked_fill(nothing_yet, -torch.inf).softmax(-1).to(answers[0].dtype)
        y = sum(weight[:, :, i, None, None] * answer for i, answer in enumerate(answers))
        return self.o(y.flatten(2)), cache

    def summarise(
        self, x: Tensor, positions: Tensor, before: Cache | None, after: Cache | None
    ) -> tuple[Seen, Cache | None]:
        """Means of the chunks that these tokens complete, as keys and values, added to the memory of chunks.

        Chunk j completes with token (j + 1) c - 1; a call without a cache knows only chunks that lie wholly in it.
        """
        c, L = self.config.chunk, x.shape[1]
        row = one_row(positions)
        real, far = row >= 0, torch.iinfo(torch.int64).max // 2
        start = torch.where(real, row, far).amin(1, keepdim=True)
        first = torch.where(start < far, (start if before else start + c - 1) // c, 0)
        column = torch.arange(L // c + 2 if before else L // c, device=x.device)
        belongs = real[..., None] & ((row // c - first)[..., None] == column)
        sums = torch.einsum("blm,bld->bmd", belongs.to(x.dtype).expand(len(x), -1, -1), x)
        done = (row.amax(1, keepdim=True) + 1) // c  # the first chunk that is not complete
        if before and after:
            start_sum = before.state["sum"].to(x.dtype)
            sums = torch.cat([sums[:, :1] + start_sum[:, None], sums[:, 1:]], 1)
            open_chunk = (done - first)[..., None].expand(len(x), 1, x.shape[2])
            after = after.with_state(sum=sums.gather(1, open_chunk)[:, 0])
            count = L // c + 1 if before.ragged else (before.tokens + L) // c - before.tokens // c
            sums, column = sums[:, :count], column[:count]
        which = torch.where(first + column < done, first + column, -1).expand(len(x), -1)
        q_size = self.config.n_heads * self.config.head_dim
        bias = None if self.qkv.bias is None else self.qkv.bias[q_size:]
        k, v = linear(sums / c, self.qkv.weight[q_size:], bias).unflatten(-1, (-1, self.config.head_dim)).chunk(2, 2)
        k = rope(k, which * c + c - 1, self.config.rope_theta)
        chunks, kept = extend(before and before.beside["chunks"], which, tokens=L, k=k, v=v)
        return chunks, after and replace(after, beside={"chunks": kept})

    def recall(self, q: Tensor, own: Tensor, chunks: Seen, seen: Seen) -> Tensor:
        """B 1 L S, True for the tokens of the chunks whose mean keys match the query best, heads together."""
        c, count = self.config, chunks.positions.shape[1]
        grouped = q.unflatten(2, (c.kv_heads, -1)).sum(3)
        scores = torch.einsum("blkh,bckh->blc", grouped, chunks.rows["k"].to(q.dtype))
        past = (chunks.positions[:, None] >= 0) & (chunks.positions[:, None] < own[:, :, None])
        best = newest(scores.masked_fill(~past, -torch.inf), c.recall) if count else past
        best = (
            torch.cat([best, torch.zeros_like(best[:, :, :1])], -1) if count else torch.zeros_like(own[:, :, None] > 0)
        )
        offset = torch.where(chunks.positions >= 0, chunks.positions - torch.arange(count, device=q.device), 0)
        first = offset.amax(1, keepdim=True) if count else 0
        column = seen.positions // c.chunk - first
        column = torch.where((column >= 0) & (column < count), column, count)
        return best.gather(2, column[:, None].expand(-1, own.shape[1], -1))[:, None]
