"""Mistral: Llama with a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config import ModelConfig
from ...model import attention_configs
from . import llama
from .llama import EXTRA, PREFIX, SLOT, table

__all__ = ["EXTRA", "PREFIX", "SLOT", "table"]

MODEL_TYPES = ("mistral",)
MECHANISMS = (*llama.MECHANISMS, "sliding")


def to_model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the ModelConfig of the config.json of a Mistral."""
    return llama.model_config(hf, attention={"bias": False}, windows=[hf.get("sliding_window", 4096)])


def from_model_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a Mistral for a ModelConfig."""
    return {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        **llama.fields(config),
        "sliding_window": getattr(attention_configs(config)[0], "window", None),
    }
