"""Qwen2: Llama with biases on queries, keys and values, and a sliding window in the layers that say so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config import ModelConfig
from ...model import attention_configs
from . import llama
from .llama import EXTRA, PREFIX, SLOT, table

__all__ = ["EXTRA", "PREFIX", "SLOT", "table"]

MODEL_TYPES = ("qwen2",)
MECHANISMS = (*llama.MECHANISMS, "sliding")


def to_model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the ModelConfig of the config.json of a Qwen2."""
    return llama.model_config(hf, attention={"bias": True, "o_bias": False}, windows=windows(hf))


def from_model_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a Qwen2 for a ModelConfig."""
    return {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **llama.fields(config), **layers(config)}


def windows(hf: Mapping[str, Any]) -> list[int | None]:
    """Return the tokens that each layer sees, None: all."""
    size = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    first = hf.get("max_window_layers", 28)
    count = hf["num_hidden_layers"]
    kinds = hf.get("layer_types") or ["full_attention" if i < first else "sliding_attention" for i in range(count)]
    return [size if kind == "sliding_attention" else None for kind in kinds]


def layers(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of config.json that say so: the inverse of `windows`."""
    found = [getattr(each, "window", None) for each in attention_configs(config)]
    sizes = {size for size in found if size is not None}
    return {
        "use_sliding_window": bool(sizes),
        "sliding_window": max(sizes, default=None),
        "layer_types": ["full_attention" if size is None else "sliding_attention" for size in found],
    }
