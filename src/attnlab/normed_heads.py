"""Heads that are normed before they become a latent, and what that costs.

A norm is no product of matrices, so it cannot be taken into the factors of a latent. Where a trained model norms its
query and key heads (Qwen3) they are made and normed as there, and the latent is a product of [norm(k); v] of all heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError
from .layers import Linear, RMSNorm


class NormedHeads(nn.Module):
    """Queries, keys and values of all heads, the first two normed head by head."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.sizes = [config.n_heads, config.from_heads, config.from_heads]
        self.qkv = Linear(config.d_model, sum(self.sizes) * config.head_dim, bias=config.bias)
        self.q_norm = RMSNorm(config.head_dim, eps=config.head_eps)
        self.k_norm = RMSNorm(config.head_dim, eps=config.head_eps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: B L D -> queries B L N H, and all keys, then all values: B L 2KH."""
        q, k, v = self.qkv(x).unflatten(-1, (sum(self.sizes), -1)).split(self.sizes, 2)
        return self.q_norm(q), torch.cat([self.k_norm(k), v], 2).flatten(2)


class PerHead(nn.Module):
    """One matrix for each head."""

    def __init__(self, heads: int, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, out, width) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x: B L N H -> B L N M, flattened to B L NM."""
        return torch.einsum("blnh,nmh->blnm", x, self.weight).flatten(2)


def query_map(config: Any) -> nn.Module:
    """Return the map that makes the queries of all heads: from x, a latent of their own, or normed heads."""
    width = config.head_dim + config.rope_dim
    if config.from_heads:
        return PerHead(config.n_heads, config.head_dim, width)
    return Linear(config.q_rank or config.d_model, config.n_heads * width, bias=config.bias)


def kv_width(config: Any) -> int:
    """Return the size of the vector that the latent is made from."""
    return 2 * config.from_heads * config.head_dim or int(config.d_model)


def check_heads(config: Any) -> None:
    """Raise `UserError` for key/value heads that there cannot be."""
    if config.from_heads and (config.q_rank or config.n_heads % config.from_heads):
        raise UserError(
            f"from_heads is {config.from_heads}: give a divisor of n_heads, {config.n_heads}, and leave out q_rank"
        )


def source_flops(config: Any) -> int:
    """Return the FLOPs per token of what comes before attention, and of the output matrix."""
    width = config.head_dim + config.rope_dim
    down = config.kv_rank + config.rope_dim
    rest = config.d_model * config.n_heads * config.v_dim
    if config.from_heads:
        heads = config.d_model * (config.n_heads + 2 * config.from_heads) * config.head_dim
        queries = config.n_heads * config.head_dim * width
        return 2 * (heads + queries + 2 * config.from_heads * config.head_dim * down + rest)
    into = config.n_heads * width
    queries = (config.d_model + into) * config.q_rank if config.q_rank else config.d_model * into
    return 2 * (queries + config.d_model * down + rest)


def core_flops(config: Any, queries: int, keys: int, absorbed: bool) -> int:
    """Return the FLOPs that differ between the modes: W_uk and W_uv, scores, and the weighted sum."""
    up = config.kv_rank * (config.head_dim + config.v_dim)
    if absorbed:
        return 2 * config.n_heads * (queries * up + queries * keys * (2 * config.kv_rank + config.rope_dim))
    return 2 * config.n_heads * (keys * up + queries * keys * (config.head_dim + config.rope_dim + config.v_dim))


def absorbing_is_less(config: Any, queries: int, keys: int) -> bool:
    """Return whether the absorbed mode needs fewer FLOPs."""
    return core_flops(config, queries, keys, absorbed=True) < core_flops(config, queries, keys, absorbed=False)
