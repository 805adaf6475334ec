"""Latents: keys and values of all heads, factored together.

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
from ..width import Budget

METHODS = {"svd": False, "aware": True}


def widths(source: Dense, budget: Budget) -> dict[str, Any]:
    """Return the fields that shape a layer of latents.

    All rotary pairs and all values of the source are kept where the budget has room for them. Else rotary keys and
    latent get half of it each, which was best where it was measured.
    """
    if source.config.cap:
        raise UserError(
            "a model that caps its scores cannot be converted to latents, which have no cap: convert to gqa"
        )
    usual: Any = budget.build(budget.given)
    fields = _fixed(source, usual)
    source = source.after_norms() if source.norms else source
    K, H, width = source.k.shape
    D = width - 1
    ranks = range(1, min(D, 2 * K * H) + 1)
    if source.frequencies is None:
        return fields | {"rope_dim": 0, "kv_rank": budget.choose("kv_rank", ranks, rope_dim=0)}
    whole = {"rope_dim": K * H, "kv_rank": min(D, K * H)}
    if not whole.keys() & budget.given.keys() and _has_room(budget, fields | whole):
        return fields | whole
    rope_dim = _rope_dim(source, budget, usual, ranks)
    return fields | {"rope_dim": rope_dim, "kv_rank": budget.choose("kv_rank", ranks, rope_dim=rope_dim)}


def _fixed(source: Dense, usual: Any) -> dict[str, Any]:
    """Return the fields that follow from the source alone; `usual` is the Config without them."""
    H = source.k.shape[1]
    fields: dict[str, Any] = {"norm": "none", "q_rank": 0, "v_dim": H, "from_heads": 0}
    if source.norms:
        fields |= {"from_heads": source.kv_heads, "head_eps": source.config.qk_norm}
    if source.biased and not usual.bias:
        fields["bias"] = True
    if usual.head_dim != H:
        fields["head_dim"] = H
    if source.frequencies is not None and usual.rope_theta != source.config.rope_theta:
        fields["rope_theta"] = source.config.rope_theta
    return fields


def _has_room(budget: Budget, fields: dict[str, Any]) -> bool:
    """Return whether a layer with these fields fits into the budget; an int rank fixes the latent, so it never does."""
    if isinstance(budget.rank, float):
        return budget.share(fields) <= budget.rank
    return budget.rank is None


def _rope_dim(source: Dense, budget: Budget, usual: Any, ranks: range) -> int:
    """Return the floats of a token's rotary keys: as many as its latent has, at most those of the source's keys."""
    if "rope_dim" in budget.given:
        given: int = budget.given["rope_dim"]
        return given
    if isinstance(budget.rank, float) and "kv_rank" not in budget.given:
        others = usual.cache_spec.per_token - usual.kv_rank - usual.rope_dim  # neither latent nor rotary keys
        room = budget.floats / budget.context * budget.rank - others
    else:
        room = 2 * budget.choose("kv_rank", ranks)
    K, H = source.k.shape[:2]
    return min(K * H, max(int(room), 0) // 4 * 2)


def weights(
    source: Dense, config: Any, method: str, seen: Statistics | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the places of the rotary pairs, and the tensors of a layer of latents."""
    seen = seen if method == "aware" else None
    if not source.norms:
        return _factored(source, config, seen)
    further, found = _factored(source.after_norms(), config, seen)
    heads = torch.arange(config.n_heads * config.head_dim).view(config.n_heads, 1, -1)
    q = found["q.weight"].unflatten(0, (config.n_heads, -1))
    found["q.weight"] = q.gather(2, heads.expand(-1, q.shape[1], -1))  # each head reads its own part, and no other
    found["down.weight"] = found["down.weight"][:, heads.numel() :]
    found |= {f"heads.{name}": value for name, value in (state(qkv=source.qkv) | source.norms).items()}
    return further, found


def _factored(source: Dense, config: Any, seen: Statistics | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the places of the rotary pairs, and the tensors of a layer whose maps are linear."""
    K = source.kv_heads
    H = config.head_dim
    r = config.rope_dim
    rotating = rotary.split(source, r // 2, seen)
    up, down = low_rank(*problem(source, rotating.rest, seen), rank=config.kv_rank)
    k_up, v_up = (source.per_query(part.unflatten(0, (K, H))) for part in up.chunk(2))
    constant = source.v[..., -1]
    if seen is not None and source.biased:  # the mean of the lost part is a constant too
        lost = source.v[..., :-1] - (up @ down).chunk(2)[1].unflatten(0, (K, H))
        constant = constant + lost @ seen.mean
    scale = math.sqrt((H + r) / H) / config.rope_scaling.sharpness  # the layer divides by sqrt(H + rope_dim)
    q = scale * torch.cat([source.q * config.rope_scaling.magnitude**2, rotating.q], 1)
    bias = source.o_bias + torch.einsum("dnh,nh->d", source.o, source.per_query(constant))
    tensors = state(
        q=q,
        down=torch.cat([torch.nn.functional.pad(down, (0, 1)), rotating.k]),
        o=torch.cat([source.o.flatten(1), bias[:, None]], 1),
    )
    tensors |= {"k_up.weight": k_up.flatten(0, 1), "v_up.weight": v_up.flatten(0, 1)}
    return ({"rope_places": list(rotating.places)} if rotating.places else {}), tensors


def energies(source: Dense, config: Any, method: str, seen: Statistics | None) -> Tensor:
    """Return how much error each rank of the latent removes, greatest first."""
    seen = seen if method == "aware" else None
    source = source.after_norms() if source.norms else source
    return spectrum(*problem(source, rotary.split(source, config.rope_dim // 2, seen).rest, seen))


def problem(source: Dense, keys: Tensor, seen: Statistics | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the matrix to factor [2KH D], and the weights of its inputs [D D] and outputs [2KH 2KH].

    `keys` (K H (D + 1)) are those without rotary embedding. The weights are None where `seen` is.
    """
    matrix = torch.cat([keys, source.v])[..., :-1].flatten(0, 1)
    if seen is None:
        return matrix, None if source.inputs is None else source.inputs[:-1, :-1], None
    inputs = seen.covariance if source.biased else seen.moment[:-1, :-1]
    values = torch.einsum("dnh,dng->nhg", source.o, source.o)  # N H H: the form e -> |W_o e|^2
    v = source.per_query(source.v[..., :-1])
    spread = torch.einsum("nhg,nhd,de,nge->n", values, v, seen.covariance, v)
    queries = source.q @ seen.moment @ source.q.mT * (spread / source.q.shape[1])[:, None, None]
    return matrix, inputs, torch.block_diag(*grouped(source, queries), *grouped(source, values))


def grouped(source: Dense, x: Tensor) -> Tensor:
    """Return the sum of x (N ...) over the queries that read a head: K ..."""
    return x.unflatten(0, (source.kv_heads, -1)).sum(1)
