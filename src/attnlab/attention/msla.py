"""Multi-head sparse latent attention: mla whose queries attend only to the k best stored tokens.

    I[t, s] = sum_j w[t, j] relu(qI[t, j] . kI[s])     a small *indexer*: J heads, one shared key of size R_I per token
    o[t]    = mla of x[t] over the k tokens s <= t with the highest I[t, s], the newest `local` always among them

DeepSeek-V3.2 (arXiv 2512.02556). Caches R + rope_dim + R_I floats per token. With k >= T it is mla.
Its names: top_k is k, index_heads (J) is H^I, index_dim (R_I) is d^I; qI, kI and w are q^I, k^I and w^I.
The indexer reads x detached and learns only from KL(attention, mean of heads || softmax I): over all tokens in the
first `warmup` training calls, in which attention is dense too, then over the selected ones. Of two equal scores the
newer token wins, so decoding in chunks selects the same tokens. `shipped` is the indexer of the published weights: qI
from the query latent, kI normed, and only rope_dim of each is rotary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..cache import Cache, Output, Seen, extend
from ..errors import UserError
from ..kernels.pairs import one_row
from ..layers import Linear
from ..ops import attention_weights, index_scores, kl, newest, rope
from ..ranges import Count, Size
from ..recording import begins_step, with_loss
from ..spec import CAUSAL, CacheSpec, Mask
from . import mla


@dataclass(frozen=True, kw_only=True)
class Config(mla.Config):
    top_k: Count = 32
    local: Size = 4  # the newest tokens, always selected
    index_heads: Count = 2
    index_dim: Count = 16
    warmup: Size = 100  # training calls with dense attention
    learn_every: Count = 8  # of this many queries, one teaches the indexer
    shipped: bool = False

    formula = "o[t] = mla(x[t]) over top-k_s sum_j w[t,j] relu(qI[t,j] . kI[s])"
    source = "DeepSeek-V3.2 2025, arXiv 2512.02556"
    caches = "one latent, one rotary key and one indexer key"
    chooses = True
    swatch = (2, 2, 1)
    selects = "top_k"
    impls = ("reference", "sdpa")
    variants = {
        "absorbed": {"top_k": 5, "local": 2, "mode": "absorbed"},
        "expanded": {"top_k": 3, "local": 0, "mode": "expanded"},
        "shipped": {"top_k": 12, "local": 4, "q_rank": 24, "shipped": True},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.local > self.top_k:
            raise UserError(f"top_k is {self.top_k}, local {self.local}: give a local up to top_k")
        if self.index_dim % 2:
            raise UserError(f"index_dim is {self.index_dim}: give an even number")
        if self.shipped and not (self.q_rank and self.rope_dim <= self.index_dim):
            raise UserError(f"shipped needs a q_rank, and an index_dim of at least rope_dim, {self.rope_dim}")

    def check_context(self, context: int) -> None:
        if self.top_k > context:
            raise UserError(f"msla's top_k is {self.top_k} and the context {context}: give at most that, or use mla")

    @property
    def cache_spec(self) -> CacheSpec:
        return CacheSpec({**super().cache_spec.rows, "index": (self.index_dim,)}, reads={"latent": self.top_k})

    def gathers(self, queries: int, keys: int) -> bool:
        """Return whether the selected rows are copied out: for one query that is faster than a mask over all rows."""
        return queries == 1 and self.top_k < keys

    def flops(self, queries: int, keys: int) -> int:
        heads = self.index_heads * self.index_dim
        q_product = (self.d_model + heads) * self.q_rank if self.shipped else self.d_model * heads
        projections = 2 * queries * (q_product + self.d_model * (self.index_heads + self.index_dim))
        indexer = projections + 2 * queries * keys * heads
        return super().flops(queries, self.top_k if self.gathers(queries, keys) else keys) + indexer


class Attention(mla.Attention):
    config: Config
    calls: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        q_source = config.q_rank if config.shipped else config.d_model
        self.index_q = Linear(q_source, config.index_heads * config.index_dim, bias=False)
        self.index_k = Linear(config.d_model, config.index_dim, bias=False)
        self.index_norm = nn.LayerNorm(config.index_dim, eps=1e-6) if config.shipped else nn.Identity()
        self.index_w = Linear(config.d_model, config.index_heads, bias=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))  # steps of training

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        learns = torch.is_grad_enabled() and cache is None
        if self.training and learns and begins_step():
            self.calls += 1
        detached = x.detach()
        q, latent = self.project(x, positions)
        index = self.index_norm(self.index_k(detached))
        index = self.turn_index(index[:, :, None], positions)[:, :, 0]
        seen, cache = extend(cache, positions, latent=latent, index=index)
        with torch.no_grad():
            keep = self.select(detached, seen, positions, mask)
        y = self.read(q, seen, keep, positions, mask)
        if learns:
            y = with_loss(y, "indexer", self.divergence(detached, q, seen, positions, keep))
        return self.o(y.flatten(2)), cache

    def read(self, q: Tensor, seen: Seen, keep: Tensor, positions: Tensor, mask: Mask) -> Tensor:
        """Attend to the kept rows (keep: B L S) -> B L N V."""
        c = self.config
        if c.gathers(q.shape[1], seen.positions.shape[1]):
            return self.mix(q, seen.pick(keep[:, 0], c.top_k), positions, replace(mask, plain=False))
        return self.mix(q, seen, positions, mask, keep[:, None] if c.top_k < keep.shape[-1] else None)

    def turn_index(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Return heads of the indexer (B L J R_I), their rotary part turned by position."""
        c = self.config
        size = c.rope_dim if c.shipped else c.index_dim
        turned = rope(heads[..., :size], positions, c.rope_theta, (), c.rope_scaling)
        return torch.cat([turned, heads[..., size:]], -1)

    def score(self, x: Tensor, seen: Seen, positions: Tensor) -> Tensor:
        """Return I, the indexer's score of every stored token: B L S."""
        c = self.config
        q_source = self.q_norm(self.q_down(x)).detach() if c.shipped else x
        q = self.turn_index(self.index_q(q_source).unflatten(-1, (c.index_heads, -1)), positions)
        weight = self.index_w(x) * (c.index_heads * c.index_dim) ** -0.5
        return index_scores(q, seen.rows["index"], weight)

    def select(self, x: Tensor, seen: Seen, positions: Tensor, mask: Mask) -> Tensor:
        """Return the pairs that attention may use: B L S, bool."""
        c = self.config
        scores = self.score(x, seen, positions)
        query = one_row(positions)[:, :, None]  # B|1 L 1
        key = one_row(seen.positions)[:, None]  # B|1 1 S
        allowed = mask(query, key)
        is_local = query - key < c.local
        bias = scores.new_zeros(allowed.shape).masked_fill(is_local, torch.inf).masked_fill(~allowed, -torch.inf)
        keep = newest(scores + bias, c.top_k)
        if self.training:
            keep = keep | (allowed & (self.calls <= c.warmup))
        return keep

    def divergence(self, x: Tensor, q: Tensor, seen: Seen, positions: Tensor, keep: Tensor) -> Tensor:
        """Return KL(attention || softmax of the scores) over the kept tokens, mean over every `learn_every`th query, in
        nats."""
        every = self.config.learn_every
        teachers = slice((x.shape[1] - 1) % every, None, every)
        positions = positions[:, teachers]
        keep = keep[:, teachers]
        with torch.no_grad():
            q, k, _ = self.absorb(q[:, teachers], seen.rows["latent"])
            weights = attention_weights(q, k, positions, seen.positions, CAUSAL, self.scale, keep=keep[:, None])
        scores = self.score(x[:, teachers], seen, positions)
        return kl(weights.mean(1, dtype=scores.dtype), scores, keep, positions >= 0)
