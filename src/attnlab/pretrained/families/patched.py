"""What `attnlab patch` wrote: a model of another family in which some layers hold mechanisms of ours. Each of those is
described by an option of its layer alone, such as "mla@3"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from ...config import ModelConfig
from ...errors import UserError
from ...model import Decoder
from ..tensor_names import Row, same
from . import gpt2, llama, mistral, qwen2, qwen3

BASES = {f"attnlab-{name}": base for base in (gpt2, llama, mistral, qwen2, qwen3) for name in base.MODEL_TYPES}
MODEL_TYPES = tuple(BASES)
MECHANISMS = ()
PREFIX = ""
EXTRA = rf"{gpt2.EXTRA}|{llama.EXTRA}"


def to_model_config(hf: Mapping[str, Any]) -> ModelConfig:
    base = BASES[hf["model_type"]].to_model_config(hf)
    names, options = base.layers, dict(base.options)
    for patch in hf["attnlab"]:
        if patch["keep_output"]:
            raise UserError("the patch kept the model's own output projection, for which a Decoder has no place")
        name = patch["mechanism"]
        own = {field: value for field, value in patch["config"].items() if field != "rope_scaling"}  # the model's
        for i in patch["layers"]:
            names[i], options[f"{name}@{i}"] = name, own
    used = {name: fields for name, fields in options.items() if "@" in name or name in names}
    return replace(base, mechanisms=tuple(names), options=used)


def table(model: Decoder) -> Iterator[Row]:
    config, state = model.config, model.state_dict()
    family, slot = (gpt2, "attn") if config.positions == "learned" else (llama, "self_attn")
    stack = "transformer.h" if family is gpt2 else "model.layers"
    patched = [i for i, name in enumerate(config.layers) if f"{name}@{i}" in config.options]
    for i in patched:
        ours = f"layers.{i}.attention."
        parts = [name.removeprefix(ours) for name in state if name.startswith(ours)]
        yield from (same(f"{ours}{part}", f"{stack}.{i}.{slot}.mechanism.{part}") for part in parts)
    for row in family.table(plain(config, patched)):
        if not row.ours[0].startswith(tuple(f"layers.{i}.attention." for i in patched)):
            yield row


def plain(config: ModelConfig, patched: list[int]) -> Decoder:
    """The same with mha in the patched layers: what the family knows how to name."""
    names = tuple("mha" if i in patched else name for i, name in enumerate(config.layers))
    options = {name: fields for name, fields in config.options.items() if name in names}
    with torch.device("meta"):
        return Decoder(replace(config, mechanisms=names, options=options))
