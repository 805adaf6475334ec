"""Models that `attnlab patch` wrote: a model of another family in which some layers hold mechanisms of ours.

Each of those layers is described by an option of its own, such as "mla@3".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from ...config import ModelConfig
from ...errors import UserError
from ...model import Decoder
from ..tensor_names import Row, same
from . import gpt2, llama, module, names


def patchable() -> dict[str, ModuleType]:
    """Return the families whose attention may be replaced: model_type of the patched model -> the family."""
    bases = [module(name) for name in names() if name != "patched"]
    return {f"attnlab-{kind}": base for base in bases if hasattr(base, "SLOT") for kind in base.MODEL_TYPES}


BASES = patchable()
MODEL_TYPES = tuple(BASES)
MECHANISMS = ()
PREFIX = ""
EXTRA = (*gpt2.EXTRA, *llama.EXTRA)


def to_model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the ModelConfig of the config.json of a patched model.

    Raises `UserError` where a patch kept the model's own output projection.
    """
    base = BASES[hf["model_type"]].to_model_config(hf)
    layers = base.layers
    options = dict(base.options)
    for patch in hf["attnlab"]:
        if patch["keep_output"]:
            raise UserError("the patch kept the model's own output projection, for which a Decoder has no place")
        name = patch["mechanism"]
        own = {field: value for field, value in patch["config"].items() if field != "rope_scaling"}  # the model's
        for i in patch["layers"]:
            layers[i] = name
            options[f"{name}@{i}"] = own
    used = {name: fields for name, fields in options.items() if "@" in name or name in layers}
    return replace(base, mechanisms=tuple(layers), options=used)


def table(model: Decoder) -> Iterator[Row]:
    """Yield the rows of the patched layers, then those of the family for all that was not patched."""
    config = model.config
    family = gpt2 if config.positions == "learned" else llama  # the others have llama's table
    patched = [i for i, name in enumerate(config.layers) if f"{name}@{i}" in config.options]
    replaced = tuple(f"layers.{i}.attention." for i in patched)
    for i, ours in zip(patched, replaced, strict=True):
        parts = [name.removeprefix(ours) for name in model.state_dict() if name.startswith(ours)]
        yield from (same(f"{ours}{part}", f"{family.SLOT.format(i)}.mechanism.{part}") for part in parts)
    for row in family.table(unpatched(config, patched)):
        if not row.ours[0].startswith(replaced):
            yield row


def unpatched(config: ModelConfig, patched: list[int]) -> Decoder:
    """Return the model with mha in the patched layers, which the family's table can name."""
    layers = tuple("mha" if i in patched else name for i, name in enumerate(config.layers))
    options = {name: fields for name, fields in config.options.items() if name in layers}
    with torch.device("meta"):
        return Decoder(replace(config, mechanisms=layers, options=options))
