"""nanoGPT's ckpt.pt: GPT-2 with exact gelu, matrices that are not transposed, and biases or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...config import ModelConfig
from ...model import Decoder
from ..tensor_names import Row, same
from . import gpt2
from .gpt2 import EXTRA, PREFIX

__all__ = ["EXTRA", "PREFIX"]

MODEL_TYPES = ("nanogpt",)


def to_model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the ModelConfig of nanoGPT's model_args."""
    return ModelConfig(
        vocab_size=hf["vocab_size"] or 50304,  # the default, where it says None
        context=hf["block_size"],
        n_layers=hf["n_layer"],
        d_model=hf["n_embd"],
        n_heads=hf["n_head"],
        positions="learned",
        norm="layer",
        ff="gelu",
        bias=hf.get("bias", True),
        dropout=hf.get("dropout", 0.0),
    )


def table(model: Decoder) -> Iterator[Row]:
    """Return the rows of tensor names."""
    return gpt2.table(model, matrix=same)
