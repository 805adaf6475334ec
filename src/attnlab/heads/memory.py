"""Inside what a mechanism remembers: latents, what an indexer selects, what a gate trusts, which experts work."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..attention import mla, msla
from ..model import Decoder
from ..recording import record_attention
from .capture import Layer, watch


@dataclass
class Inside:
    """One layer; a part that its mechanism does not have is empty. Lists are plain numbers, ready for JSON."""

    layer: int
    mechanism: str
    rank: int = 0  # of the latent, as configured
    effective_rank: float | None = None  # exp of the entropy of the latent's variance over its principal axes
    variance_left: list[float] = field(default_factory=list)  # share of the variance that r axes leave, r = 0, 1, ...
    path: list[list[float]] = field(default_factory=list)  # the first sequence's tokens on the first two axes
    key_angles: list[list[float]] = field(default_factory=list)  # heads x heads, degrees
    value_angles: list[list[float]] = field(default_factory=list)
    selection_recall: float | None = None  # share of the dense top-k that the indexer selected
    selection_chance: float | None = None  # what a random choice of as many tokens would reach
    selection_distance: list[list[float]] = field(default_factory=list)  # [distance in tokens, share of the selected]
    gate: list[list[float]] = field(default_factory=list)  # position -> weight of each memory, mean over sequences
    recalled_distance: list[list[float]] = field(default_factory=list)  # [distance in chunks, share of recalled weight]
    expert_load: list[float] = field(default_factory=list)  # share of the tokens' choices that each expert got

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def inside(model: Decoder, tokens: Tensor) -> list[Inside]:
    """Look inside every layer while it reads `tokens` (B L). Layers that remember plain keys and values say nothing."""
    training = model.training
    model.eval()
    with watch(model) as layers:
        model(tokens)
    model.train(training)
    found = []
    for number, (block, layer) in enumerate(zip(model.blocks(), layers, strict=True)):
        one = Inside(number, model.config.layers[number])
        if layer.latent is not None:
            _latent(one, layer.latent)
        if isinstance(block.attention, mla.Attention):
            up = (block.attention.k_up, block.attention.v_up)
            one.key_angles, one.value_angles = (angles(w.weight.unflatten(0, (layer.config.n_heads, -1))) for w in up)
        if isinstance(block.attention, msla.Attention):
            _selection(one, block.attention, block.attention_norm(layer.residual), layer)
        if layer.gate is not None:
            one.gate = layer.gate.double().mean(0).tolist()
            one.recalled_distance = _recalled(layer)
        if layer.load is not None:
            one.expert_load = (layer.load / layer.load.sum()).tolist()
        found.append(one)
    return found


def _latent(one: Inside, latent: Tensor) -> None:
    flat = latent.double().flatten(0, 1)
    centred = flat - flat.mean(0)
    _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
    share = sizes**2 / (sizes**2).sum().clamp(min=torch.finfo(sizes.dtype).tiny)
    one.rank = latent.shape[-1]
    one.effective_rank = (-torch.xlogy(share, share).sum()).exp().item()
    one.variance_left = [1.0, *(1 - share.cumsum(0)).clamp(min=0).tolist()]
    one.path = ((latent[0].double() - flat.mean(0)) @ axes[:2].T).tolist()


def angles(subspaces: Tensor) -> list[list[float]]:
    """Mean principal angle, in degrees, between the row spaces of each pair of N matrices (N H R): 0 where they are
    one subspace, 90 where they share nothing."""
    bases = torch.linalg.qr(subspaces.double().transpose(1, 2)).Q  # N R H
    overlap = torch.einsum("nrh,mrg->nmhg", bases, bases)
    cosines = torch.linalg.svdvals(overlap).clamp(max=1)
    return torch.rad2deg(cosines.acos().mean(-1)).tolist()


def _selection(one: Inside, attention: msla.Attention, x: Tensor, layer: Layer) -> None:
    """Against dense attention of the same layer on the same input."""
    length = x.shape[1]
    positions = torch.arange(length, device=x.device).expand(x.shape[:2])
    sparse: msla.Config = attention.config
    selected = layer.maps[0].amax(1) > 0  # B L S
    attention.config = replace(sparse, top_k=length, local=0)
    try:
        with record_attention() as maps:
            attention(x, positions)
    finally:
        attention.config = sparse
    dense = maps[0].mean(1)
    counted = torch.arange(length, device=x.device) >= sparse.top_k  # earlier queries see everything they may
    if not counted.any():
        return
    best = torch.zeros_like(selected).scatter(-1, dense.topk(sparse.top_k).indices, True)
    one.selection_recall = (best & selected)[:, counted].sum().item() / best[:, counted].sum().item()
    one.selection_chance = (sparse.top_k / (torch.arange(length)[counted.cpu()] + 1)).mean().item()
    distance = (positions[:, :, None] - positions[:, None])[selected & counted[:, None]]
    one.selection_distance = _histogram(distance, torch.ones_like(distance, dtype=torch.float64))


def _recalled(layer: Layer) -> list[list[float]]:
    """How far back, in chunks, the attention of the last memory reaches."""
    groups = [spec.every for spec in layer.config.cache_spec.beside.values()]
    if not groups:
        return []
    group = groups[0]
    weights = layer.maps[-1].double().mean(1)
    chunk = torch.arange(weights.shape[-1], device=weights.device) // group
    return _histogram((chunk[:, None] - chunk).expand_as(weights), weights)


def _histogram(distance: Tensor, weight: Tensor) -> list[list[float]]:
    """[[distance, share], ...]: up to 15 exact, from 16 on in bins that double, by their nearest distance."""
    distance, weight = distance.flatten(), weight.flatten()
    if not weight.sum():
        return []
    edge = torch.where(distance >= 16, 2 ** distance.clamp(min=1).double().log2().floor().long(), distance)
    values, which = edge.unique(return_inverse=True)
    share = torch.zeros(len(values), dtype=torch.float64, device=weight.device).index_add(0, which, weight.double())
    share = share / share.sum()
    return [[float(v), s] for v, s in zip(values.tolist(), share.tolist(), strict=True) if s > 0 and v >= 0]
