"""Contents of a mechanism's memory: latents, selected tokens, gates between memories, load of experts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..model import Decoder
from ..ranges import checked
from ..recording import record_attention
from .capture import Layer, watch


@dataclass
class Inside:
    """Findings about one layer, as plain numbers, ready for JSON. A part that its mechanism lacks is empty."""

    layer: int
    mechanism: str
    rank: int = 0  # floats of the latent, as configured; 0: no latent
    effective_rank: float | None = None  # exp of the entropy of the latent's variance over its principal axes
    variance_left: list[float] = field(default_factory=list)  # share of the variance that r axes leave, r = 0, 1, ...
    path: list[list[float]] = field(default_factory=list)  # the first sequence's tokens on the first two axes
    key_angles: list[list[float]] = field(default_factory=list)  # between the heads' subspaces, heads x heads, degrees
    value_angles: list[list[float]] = field(default_factory=list)
    selection_recall: float | None = None  # share of the dense top-k that the indexer selected
    selection_chance: float | None = None  # recall of a random choice of as many tokens
    selection_distance: list[list[float]] = field(default_factory=list)  # [distance in tokens, share of the selected]
    gate: list[list[float]] = field(default_factory=list)  # position -> weight of each memory, mean over sequences
    recalled_distance: list[list[float]] = field(default_factory=list)  # [distance in chunks, share of recalled weight]
    expert_load: list[float] = field(default_factory=list)  # share of the tokens' choices that each expert got

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


@torch.no_grad()
@checked
def inside(model: Decoder, tokens: Tensor) -> list[Inside]:
    """Return the findings about every layer of `model` as it reads `tokens` (B L).

    Layers that cache plain keys and values have none.
    """
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
        if layer.config.from_latent:
            weights = [block.attention.get_parameter(f"{name}.weight") for name in layer.config.from_latent]
            per_head = [weight.unflatten(0, (layer.config.n_heads, -1)) for weight in weights]
            one.key_angles, one.value_angles = map(angles, per_head)
        if layer.config.selects is not None:
            _selection(one, block.attention, block.attention_norm(layer.residual), layer, layer.config.selects)
        if layer.gate is not None:
            one.gate = layer.gate.double().mean(0).tolist()
            one.recalled_distance = _recalled(layer)
        if layer.load is not None:
            one.expert_load = (layer.load / layer.load.sum()).tolist()
        found.append(one)
    return found


def _latent(one: Inside, latent: Tensor) -> None:
    """Fill in what a latent (B L R) says: its ranks, its variance and its path."""
    flat = latent.double().flatten(0, 1)
    centred = flat - flat.mean(0)
    _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
    share = sizes**2 / (sizes**2).sum().clamp(min=torch.finfo(sizes.dtype).tiny)
    one.rank = latent.shape[-1]
    one.effective_rank = (-torch.xlogy(share, share).sum()).exp().item()
    one.variance_left = [1.0, *(1 - share.cumsum(0)).clamp(min=0).tolist()]
    one.path = ((latent[0].double() - flat.mean(0)) @ axes[:2].T).tolist()


def angles(subspaces: Tensor) -> list[list[float]]:
    """Return the mean principal angle between the row spaces of each pair of N matrices (N H R), in degrees.

    It is 0 where they are one subspace, and 90 where they are orthogonal.
    """
    bases = torch.linalg.qr(subspaces.double().transpose(1, 2)).Q  # N R H
    overlap = torch.einsum("nrh,mrg->nmhg", bases, bases)
    cosines = torch.linalg.svdvals(overlap).clamp(max=1)
    return torch.rad2deg(cosines.acos().mean(-1)).tolist()


def _selection(one: Inside, attention: nn.Module, x: Tensor, layer: Layer, width: str) -> None:
    """Fill in how the selected tokens compare with the strongest of dense attention on the same input x (B L D).

    `width`: the field of the Config with the number of tokens that a query selects.
    """
    length = x.shape[1]
    top_k: int = getattr(layer.config, width)
    counted = torch.arange(length, device=x.device) >= top_k  # earlier queries see everything they may
    if not counted.any():
        return
    positions = torch.arange(length, device=x.device).expand(x.shape[:2])
    selected = layer.maps[0].amax(1) > 0  # B L S
    everything: dict[str, Any] = {width: length}
    attention.config = replace(layer.config, **everything)  # type: ignore[assignment]
    try:
        with record_attention() as maps:
            attention(x, positions)
    finally:
        attention.config = layer.config  # type: ignore[assignment]
    dense = maps[0].mean(1)
    best = torch.zeros_like(selected).scatter(-1, dense.topk(top_k).indices, True)
    one.selection_recall = (best & selected)[:, counted].sum().item() / best[:, counted].sum().item()
    one.selection_chance = (top_k / (torch.arange(length)[counted.cpu()] + 1)).mean().item()
    distance = (positions[:, :, None] - positions[:, None])[selected & counted[:, None]]
    one.selection_distance = _histogram(distance, torch.ones_like(distance, dtype=torch.float64))


def _recalled(layer: Layer) -> list[list[float]]:
    """Return the histogram of how far back the last memory's attention reaches, in chunks."""
    groups = [spec.every for spec in layer.config.cache_spec.beside.values()]
    if not groups:
        return []
    group = groups[0]
    weights = layer.maps[-1].double().mean(1)
    chunk = torch.arange(weights.shape[-1], device=weights.device) // group
    return _histogram((chunk[:, None] - chunk).expand_as(weights), weights)


def _histogram(distance: Tensor, weight: Tensor) -> list[list[float]]:
    """Return [[distance, share of the weight], ...].

    Distances up to 15 are exact. From 16 on, bins double in size and have the name of their smallest distance.
    """
    distance = distance.flatten()
    weight = weight.flatten()
    if not weight.sum():
        return []
    edge = torch.where(distance >= 16, 2 ** distance.clamp(min=1).double().log2().floor().long(), distance)
    values, which = edge.unique(return_inverse=True)
    share = torch.zeros(len(values), dtype=torch.float64, device=weight.device).index_add(0, which, weight.double())
    share = share / share.sum()
    return [[float(v), s] for v, s in zip(values.tolist(), share.tolist(), strict=True) if s > 0 and v >= 0]
