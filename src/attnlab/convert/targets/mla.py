"""To latents: keys and values of all heads, factored together.

Without rotary embedding, [W_k; W_v] ~ up down: the plain singular value decomposition (svd), or (aware) the one nearest
in what an error does to the layer's output: an input counts as often as calibration text has it, a key error by the
queries that meet it and by how much the values differ that it confuses, a value error by what W_o makes of it. The
constant part of a key shifts all scores of a query alike, so softmax does not see it; the constant part of a value goes
through W_o into its bias, because weights sum to 1. So at full rank nothing is lost.

With rotary embedding, `rotary.split` says which part of the keys stays rotary; the rest is factored as above.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from .. import rotary
from ..calibration import Statistics
from ..dense import Dense, state
from ..low_rank import low_rank, spectrum
from ..width import Wish

METHODS = {"svd": False, "aware": True}


def widths(source: Dense, wish: Wish) -> dict[str, Any]:
    """All rotary pairs and all values of the model, where there is room; else half of it for either, which came out
    best where it was measured."""
    if source.norms:
        raise UserError(
            "a model that norms its query and key heads cannot be converted to latents: a norm is no product"
        )
    K, H, D = source.k.shape[0], source.k.shape[1], source.k.shape[2] - 1
    usual: Any = wish.build(wish.given)
    biased = {"bias": True} if source.biased else {}
    fixed = {"norm": "none", "q_rank": 0, "v_dim": H} | ({} if usual.bias else biased)
    fixed |= {"head_dim": H} if usual.head_dim != H else {}
    if source.frequencies is None:
        return fixed | {"rope_dim": 0, "kv_rank": wish.choose("kv_rank", range(1, min(D, 2 * K * H) + 1), rope_dim=0)}
    whole = fixed | {"rope_dim": K * H, "kv_rank": min(D, K * H)}
    free = not {"rope_dim", "kv_rank"} & set(wish.given)
    if free and (wish.rank is None or (isinstance(wish.rank, float) and wish.share(whole) <= wish.rank)):
        return whole
    latent, beside = wish.given.get("kv_rank", wish.rank), usual.cache_spec.per_token - usual.kv_rank - usual.rope_dim
    room = wish.floats / wish.context * latent - beside if isinstance(latent, float) else 2 * (latent or D)
    dim = wish.given.get("rope_dim", min(K * H, max(int(room), 0) // 4 * 2))
    return fixed | {"rope_dim": dim, "kv_rank": wish.choose("kv_rank", range(1, min(D, 2 * K * H) + 1), rope_dim=dim)}


def weights(
    source: Dense, config: Any, method: str, seen: Statistics | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    K, H, R, r = source.kv_heads, config.head_dim, config.kv_rank, config.rope_dim
    seen = seen if method == "aware" else None
    turning = rotary.split(source, r // 2, seen)
    up, down = low_rank(*problem(source, turning.rest, seen), rank=R)
    k_up, v_up = (source.per_query(part.unflatten(0, (K, H))) for part in up.chunk(2))
    constant = source.v[..., -1]
    if seen is not None and source.biased:  # the mean of what is lost is a constant too
        lost = source.v[..., :-1] - (up @ down).chunk(2)[1].unflatten(0, (K, H))
        constant = constant + lost @ seen.mean
    scale = math.sqrt((H + r) / H) / config.rope_scaling.sharpness  # the layer divides by sqrt(H + rope_dim)
    q = scale * torch.cat([source.q * config.rope_scaling.magnitude**2, turning.q], 1)
    bias = source.o_bias + torch.einsum("dnh,nh->d", source.o, source.per_query(constant))
    tensors = state(
        q=q,
        down=torch.cat([torch.nn.functional.pad(down, (0, 1)), turning.k]),
        o=torch.cat([source.o.flatten(1), bias[:, None]], 1),
    )
    tensors |= {"k_up.weight": k_up.flatten(0, 1), "v_up.weight": v_up.flatten(0, 1)}
    return ({"rope_places": list(turning.places)} if turning.places else {}), tensors


def energies(source: Dense, config: Any, method: str, seen: Statistics | None) -> Tensor:
    """What each rank of the latent takes away of the error, greatest first."""
    seen = seen if method == "aware" else None
    return spectrum(*problem(source, rotary.split(source, config.rope_dim // 2, seen).rest, seen))


def problem(source: Dense, keys: Tensor, seen: Statistics | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What is to be factored [2 K H, D], and how inputs and outputs weigh."""
    matrix = torch.cat([keys, source.v])[..., :-1].flatten(0, 1)
    if seen is None:
        return matrix, None, None
    inputs = seen.covariance if source.biased else seen.moment[:-1, :-1]
    values = torch.einsum("dnh,dng->nhg", source.o, source.o)  # N H H: what |W_o e|^2 makes of an error e
    v = source.per_query(source.v[..., :-1])
    spread = torch.einsum("nhg,nhd,de,nge->n", values, v, seen.covariance, v)
    queries = source.q @ seen.moment @ source.q.mT * (spread / source.q.shape[1])[:, None, None]
    return matrix, inputs, torch.block_diag(*grouped(source, queries), *grouped(source, values))


def grouped(source: Dense, x: Tensor) -> Tensor:
    """N ... -> K ...: the sum over the queries that read a head."""
    return x.unflatten(0, (source.kv_heads, -1)).sum(1)
