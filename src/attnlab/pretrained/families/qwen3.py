"""Qwen3: Qwen2 with a norm over each query and key head in place of the biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config import ModelConfig
from . import llama, qwen2
from .llama import EXTRA, PREFIX, table

__all__ = ["EXTRA", "PREFIX", "table"]

MODEL_TYPES = ("qwen3",)
MECHANISMS = qwen2.MECHANISMS


def to_model_config(hf: Mapping[str, Any]) -> ModelConfig:
    options = {"bias": hf.get("attention_bias", False), "qk_norm": hf.get("rms_norm_eps", 1e-6)}
    return llama.plan(hf, attention=options, windows=qwen2.windows(hf), head_dim=128)


def from_model_config(config: ModelConfig) -> dict[str, Any]:
    shared = {**llama.fields(config), **qwen2.layers(config)}
    return {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **shared}
