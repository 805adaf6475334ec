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

import torch
from torch import Tensor, nn

from ..cache import Cache, Output, Seen, extend
from ..layers import Linear, linear
from ..ops import chunk_sums, newest, spread
from ..ranges import Count
from ..recording import note
from ..spec import CAUSAL, CacheSpec, Mask
from . import gqa


@dataclass(frozen=True, kw_only=True)
class Config(gqa.Config):
    chunk: Count = 16
    recall: Count = 2
    window: Count | None = None  # of M_1; None: all

    formula = "o[t] = sum_l lambda[t,l] softmax(q[t] (W_k M_l)^T / sqrt(H)) W_v M_l"
    source = "arXiv 2603.20586, made causal"
    caches = "keys and values of every token and of every completed chunk, and one running sum"
    chooses = True
    swatch = (4, 5, 0)
    impls = ("reference", "sdpa")
    cache_width = "n_kv_heads"
    variants = {"chunks of 3": {"chunk": 3}, "window": {"chunk": 4, "recall": 1, "window": 5, "n_kv_heads": 1}}

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
        q_size = self.n_heads * self.head_dim
        kv_size = self.n_kv_heads * self.head_dim
        chunks = keys // self.chunk
        completed = chunks - (keys - queries) // self.chunk
        sums = 2 * (queries // self.chunk + 2) * queries * self.d_model
        projections = 4 * completed * self.d_model * kv_size
        gate = 2 * queries * gate_width(self) * (q_size + 3)
        matching = 2 * queries * chunks * kv_size
        attention = 4 * queries * (chunks + keys) * q_size  # of M_2 and M_3
        return super().flops(queries, keys) + sums + projections + gate + matching + attention


def gate_width(config: Config) -> int:
    """Return the hidden size of the gate's MLP."""
    return max(config.d_model // 8, 4)


def make_gate(config: gqa.Config, width: int, sources: int) -> nn.Sequential:
    """Return the MLP from a token's query to the logits of its sources; source 0 starts with nearly all the weight."""
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
        c = self.config
        own = positions // c.chunk  # B L: the chunk of each new token
        q, k, v = self.heads(x)
        logits = self.gate(q.flatten(2))
        q = self.turn(q, positions)
        k = self.turn(k, positions)
        seen, after = extend(cache, positions, k=k, v=v)
        chunks, after = self.summarise(x, positions, cache, after)
        recalled = self.recall(q, own, chunks, seen)
        empty = (positions < c.chunk)[..., None] & torch.tensor([False, True, True], device=x.device)
        weight = note("gate", logits.masked_fill(empty, -torch.inf).softmax(-1).to(x.dtype))

        def answer(source: int, memory: Seen, at: Tensor, rule: Mask, keep: Tensor | None = None) -> Tensor:
            part = weight[:, :, source, None].expand(-1, -1, c.n_heads)
            return part[..., None] * self.ask(q, memory, at, rule, keep=keep, share=part)

        y = answer(0, seen, positions, replace(mask, window=c.window))
        y = y + answer(1, chunks, own - 1, CAUSAL)
        y = y + answer(2, seen, positions, CAUSAL, recalled)
        return self.o(y.flatten(2)), after

    def summarise(
        self, x: Tensor, positions: Tensor, before: Cache | None, after: Cache | None
    ) -> tuple[Seen, Cache | None]:
        """Return the mean keys and values of all completed chunks, and `after` with what is kept of them.

        `before` and `after` are the cache without and with the keys and values of the new tokens x (B L D).
        """
        c = self.config
        L = x.shape[1]
        open_sum = None if before is None else before.state["sum"]
        sums, number, still_open = chunk_sums(x, positions, c.chunk, open_sum)
        if before is not None and before.ragged:
            most = L // c.chunk + 1  # chunks that any sequence can complete
        else:
            most = (L if before is None else before.tokens % c.chunk + L) // c.chunk
        number = number[:, :most]
        q_size = c.n_heads * c.head_dim
        weight = self.qkv.weight[q_size:]
        bias = None if self.qkv.bias is None else self.qkv.bias[q_size:]
        kv = linear(sums[:, :most] / c.chunk, weight, bias)
        k, v = kv.unflatten(-1, (-1, c.head_dim)).chunk(2, 2)
        k = self.turn(self.k_norm(k), number * c.chunk + c.chunk - 1)
        chunks, kept = extend(None if before is None else before.beside["chunks"], number, L, k=k, v=v)
        if after is None or kept is None:
            return chunks, None
        return chunks, replace(after.with_state(sum=still_open), beside={"chunks": kept})

    def recall(self, q: Tensor, own: Tensor, chunks: Seen, seen: Seen) -> Tensor:
        """Return B 1 L S, True for the tokens of the chunks whose mean keys match the query best, heads together."""
        c = self.config
        grouped = q.unflatten(2, (c.n_kv_heads, -1)).sum(3)
        scores = torch.einsum("blkh,bckh->blc", grouped, chunks.rows["k"].to(q.dtype))
        past = CAUSAL(own[:, :, None] - 1, chunks.positions[:, None])
        best = newest(scores.masked_fill(~past, -torch.inf), c.recall)
        return spread(best, chunks.positions, seen.positions // c.chunk)[:, None]
