"""Qwen3: Qwen2 with a norm over each query and key head in place of the biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config import ModelConfig
from . import llama, qwen2
from .llama import EXTRA, PREFIX, SLOT, table

__all__ = ["EXTRA", "PREFIX", "SLOT", "table"]

MODEL_TYPES = ("qwen3",)
MECHANISMS = qwen2.MECHANISMS


def to_model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the ModelConfig of the config.json of a Qwen3."""
    options = {"bias": hf.get("attention_bias", False), "qk_norm": hf.get("rms_norm_eps", 1e-6)}
    return llama.model_config(hf, attention=options, windows=qwen2.windows(hf), head_dim=128)


def from_model_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a Qwen3 for a ModelConfig."""
    shared = {**llama.fields(config), **qwen2.layers(config)}
    return {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **shared}
