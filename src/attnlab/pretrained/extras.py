"""Tensors that a file holds beyond those that its config needs: each is compared with what stands in its place.

Such a tensor says in other words what the config or another tensor says: a causal mask, rotary frequencies, the
embedding once more as the head. One that agrees is left out. One that does not is part of another model than the config
describes, and is refused, but for the head, which is then taken from the file, as transformers does.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ..config import ModelConfig
from ..errors import UserError
from ..model import Decoder, attention_configs
from ..ops import frequencies
from ..spec import UNSCALED
from .folders import LazyTensor

Tensors = Mapping[str, LazyTensor]  # by name

NEAR = 5e-3  # relative difference of a number that was stored as bfloat16
MASKED = -9e3  # the score of what is masked, or less; -10,000 as bfloat16 is a little more


class ExtraPlace(NamedTuple):
    """The place of an extra tensor: its name as `Extra.pattern` matched it, and the model it came with."""

    name: re.Match[str]
    model: Decoder  # on the meta device
    hf: Mapping[str, Any]  # the content of config.json


class Extra(NamedTuple):
    """A kind of extra tensor."""

    pattern: str  # of its name
    agrees: Callable[[LazyTensor, ExtraPlace], bool]  # whether it says what the config says


def causal(tensor: LazyTensor, place: ExtraPlace) -> bool:
    """Return whether a mask is the causal one."""
    size = tensor.shape[-1] if tensor.shape else 0
    if size < 1 or tensor.shape != (*[1] * (len(tensor.shape) - 2), size, size):
        return False
    return torch.equal(tensor.load().reshape(size, size) != 0, torch.ones(size, size).tril() != 0)


def masking(tensor: LazyTensor, place: ExtraPlace) -> bool:
    """Return whether a number is the score of what is masked."""
    value = tensor.load()
    return value.numel() == 1 and value.item() <= MASKED


def rotating(tensor: LazyTensor, place: ExtraPlace) -> bool:
    """Return whether rotary frequencies are those of the config, before or after they are scaled."""
    config = place.model.config
    found = tensor.load().double().flatten()
    ours = [
        frequencies(len(found), config.rope_theta, scaling, torch.float64)
        for scaling in dict.fromkeys((config.rope_scaling, UNSCALED))
    ]
    turning = [(getattr(layer, "rope_dim", None), layer.head_dim) for layer in attention_configs(config)]
    sizes = {head_dim if part is None else part for part, head_dim in turning}
    fits = config.positions == "rope" and 2 * len(found) in sizes
    return fits and any(torch.allclose(found, each, rtol=NEAR, atol=1e-7) for each in ours)


def further_layer(tensor: LazyTensor, place: ExtraPlace) -> bool:
    """Return whether a layer comes after those of the model: DeepSeek's that predict further tokens."""
    count = place.hf.get("num_nextn_predict_layers", 1)
    return int(place.name[1]) - place.model.config.n_layers in range(count or 0)


MASKS = (Extra(r"\.attn\.bias$", causal), Extra(r"\.attn\.masked_bias$", masking))
FREQUENCIES = (Extra(r"rotary_emb\.inv_freq$", rotating),)


def left_out(
    family: ModuleType, place: tuple[Decoder, Mapping[str, Any]], found: Tensors, wanted: Container[str], source: str
) -> dict[str, LazyTensor]:
    """Return the tensors `found` without those that are the family's `EXTRA` and not `wanted`.

    `place`: the model on the meta device, and the content of its config.json. Raises `UserError` for an extra tensor
    that does not agree with them.
    """
    kept = {}
    for name, tensor in found.items():
        matches = [(extra, re.search(extra.pattern, name)) for extra in family.EXTRA]
        kinds = [(extra, match) for extra, match in matches if match is not None]
        if name in wanted or not kinds:
            kept[name] = tensor
        elif not any(extra.agrees(tensor, ExtraPlace(match, *place)) for extra, match in kinds):
            raise UserError(
                f"{source} has {name}, which is not what its config.json makes of it, so that attnlab would compute "
                "another model: bring the config.json that belongs to these weights"
            )
    return kept


def tied_or_not(
    config: ModelConfig, family: ModuleType, found: Tensors, source: str
) -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """Return the config and the tensors of a model whose config says that its head is the embedding.

    Where the file has another matrix for the head, that is the head, and a line on stderr says so. Where it has one of
    the two, that is both.
    """
    untied = replace(config, tied=False)
    with torch.device("meta"):
        model = Decoder(untied)
    names = {row.ours[0]: row.theirs[0] for row in family.table(model) if len(row.ours) == len(row.theirs) == 1}
    head = names["head.weight"]
    embed = names["embed.weight"]
    rest = {name: tensor for name, tensor in found.items() if name != head}
    if head not in found:
        return config, rest
    if embed not in found:
        return config, {**rest, embed: found[head]}
    if found[head].shape == found[embed].shape and torch.equal(found[head].load(), found[embed].load()):
        return config, rest
    print(
        f"attnlab: the config of {source} says that the head is the embedding, and {head} is another matrix: "
        "that is the head",
        file=sys.stderr,
    )
    return untied, dict(found)
