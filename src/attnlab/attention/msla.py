"""Multi-head sparse latent attention: mla whose queries attend only to the k best stored tokens.

    I[t, s] = sum_j w[t, j] relu(qI[t, j] . kI[s])     a small *indexer*: J heads, one shared key of size R_I per token
    o[t]    = mla of x[t] over the k tokens s <= t with the highest I[t, s], the newest `local` always among them

DeepSeek-V3.2 (arXiv 2512.02556). The indexer reads x detached and learns only from KL(attention, mean of heads ||
softmax I): over all tokens in the first `warmup` training calls, while attention is dense too, then over the selected.
Ties go to the newer token, so chunks decode alike. `shipped` is the indexer as its weights were published: qI from the
query latent, kI normed, rope_dim of each rotary. Caches R + rope_dim + R_I floats per token. With k >= T it is mla.
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
from ..recording import begins_step, with_loss
from ..spec import CAUSAL, CacheSpec, Mask
from . import mla


@dataclass(frozen=True, kw_only=True)
class Config(mla.Config):
    top_k: int = 32
    local: int = 4  # the newest tokens, always selected
    index_heads: int = 2
    index_dim: int = 16
    warmup: int = 100  # training calls with dense attention
    learn_every: int = 8  # of this many queries, one teaches the indexer
    shipped: bool = False

    formula = "o[t] = mla(x[t]) over top-k_s sum_j w[t,j] relu(qI[t,j] . kI[s])"
    source = "DeepSeek-V3.2 2025, arXiv 2512.02556"
    caches, selects = "one latent, one rotary key and one indexer key", "top_k"
    impls = ("reference", "sdpa")
    variants = {
        "absorbed": {"top_k": 5, "local": 2, "mode": "absorbed"},
        "expanded": {"top_k": 3, "local": 0, "mode": "expanded"},
        "shipped": {"top_k": 12, "local": 4, "q_rank": 24, "shipped": True},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.local <= self.top_k or self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}, local {self.local}: give a top_k of 1 or more and local up to it")
        if min(self.index_heads, self.index_dim, self.learn_every) < 1 or self.index_dim % 2:
            raise UserError(f"index_heads {self.index_heads} must be positive, index_dim {self.index_dim} even")
        if self.shipped and not (self.q_rank and self.rope_dim <= self.index_dim):
            raise UserError(f"shipped needs a q_rank, and an index_dim of at least rope_dim, {self.rope_dim}")

    def check_context(self, context: int) -> None:
        if self.top_k > context:
            raise UserError(f"msla's top_k is {self.top_k} and the context {context}: give at most that, or use mla")

    @property
    def cache_spec(self) -> CacheSpec:
        return CacheSpec({**super().cache_spec.rows, "index": (self.index_dim,)}, reads={"latent": self.top_k})

    def gathers(self, queries: int, keys: int) -> bool:
        """Whether reading only the selected rows beats a mask over all of them."""
        return queries == 1 and self.top_k < keys

    def flops(self, queries: int, keys: int) -> int:
        D, J, E, Q = self.d_model, self.index_heads, self.index_dim, self.q_rank
        index_q = (D + J * E) * Q if self.shipped else D * J * E
        indexer = 2 * queries * (index_q + D * (J + E)) + 2 * queries * keys * J * E
        return super().flops(queries, self.top_k if self.gathers(queries, keys) else keys) + indexer


class Attention(mla.Attention):
    config: Config
    calls: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__(c := config)
        self.index_q = Linear(c.q_rank if c.shipped else c.d_model, c.index_heads * c.index_dim, bias=False)
        self.index_k = Linear(c.d_model, c.index_dim, bias=False)
        self.index_norm = nn.LayerNorm(c.index_dim, eps=1e-6) if c.shipped else nn.Identity()
        self.index_w = Linear(c.d_model, c.index_heads, bias=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))  # steps of training

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        c, still = self.config, x.detach()
        self.calls += self.training and torch.is_grad_enabled() and cache is None and begins_step()
        q, latent = self.project(x, positions)
        index_k = self.turn(self.index_norm(self.index_k(still))[:, :, None], positions)[:, :, 0]
        seen, cache = extend(cache, positions, latent=latent, index=index_k)
        with torch.no_grad():
            keep = self.select(still, seen, positions, mask)
        if c.gathers(x.shape[1], seen.positions.shape[1]):
            y = self.mix(q, seen.pick(keep[:, 0], c.top_k), positions, replace(mask, plain=False))
        else:
            y = self.mix(q, seen, positions, mask, keep[:, None] if c.top_k < keep.shape[-1] else None)
        if torch.is_grad_enabled() and cache is None:
            y = with_loss(y, "indexer", self.divergence(still, q, seen, positions, keep))
        return self.o(y.flatten(2)), cache

    def turn(self, heads: Tensor, positions: Tensor) -> Tensor:
        c, size = self.config, self.config.rope_dim if self.config.shipped else self.config.index_dim
        return torch.cat([rope(heads[..., :size], positions, c.rope_theta, (), c.rope_scaling), heads[..., size:]], -1)

    def score(self, x: Tensor, seen: Seen, positions: Tensor) -> Tensor:
        """The indexer's opinion of every stored token: B L S."""
        c = self.config
        source = self.q_norm(self.q_down(x)).detach() if c.shipped else x
        q = self.turn(self.index_q(source).unflatten(-1, (c.index_heads, -1)), positions)
        return index_scores(q, seen.rows["index"], self.index_w(x) * (c.index_heads * c.index_dim) ** -0.5)

    def select(self, x: Tensor, seen: Seen, positions: Tensor, mask: Mask) -> Tensor:
        """The pairs that attention may use: B L S."""
        c = self.config
        scores, query, key = self.score(x, seen, positions), one_row(positions)[:, :, None], one_row(seen.positions)
        allowed = mask(query, key := key[:, None])
        bias = scores.new_zeros(allowed.shape).masked_fill(query - key < c.local, torch.inf)
        keep = newest(scores + bias.masked_fill(~allowed, -torch.inf), c.top_k)
        return keep | (allowed & (self.calls <= c.warmup)) if self.training else keep

    def divergence(self, x: Tensor, q: Tensor, seen: Seen, positions: Tensor, keep: Tensor) -> Tensor:
        """KL(attention || softmax of the scores) over the kept tokens, mean over queries, in nats."""
        every = self.config.learn_every
        x, q, positions, keep = (t[:, (t.shape[1] - 1) % every :: every] for t in (x, q, positions, keep))
        with torch.no_grad():
            q, k, _ = self.absorb(q, seen.rows["latent"])
            weights = attention_weights(q, k, positions, seen.positions, CAUSAL, self.scale, keep=keep[:, None])
        scores = self.score(x, seen, positions)
        return kl(weights.mean(1, dtype=scores.dtype), scores, keep, positions >= 0)
