"""attnlab: the ModelConfig as it is, and the tensors under the names of the Decoder, below "model."."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...config import ModelConfig, from_dict, to_dict
from ...errors import UserError
from ...model import Decoder
from ..tensor_names import Row, ours, same

MODEL_TYPES = ("attnlab",)
MECHANISMS: tuple[str, ...] = ()  # any
PREFIX = "model."
EXTRA = ()


def to_model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the ModelConfig of the config.json of an exported folder."""
    if not isinstance(hf.get("attnlab"), dict):
        raise UserError("config.json says model_type attnlab, but has no field 'attnlab'; export the model again")
    return from_dict(ModelConfig, hf["attnlab"])


def from_model_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of an exported folder for a ModelConfig."""
    return {
        "model_type": "attnlab",
        "architectures": ["AttnlabForCausalLM"],
        "attnlab": to_dict(config),
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "max_position_embeddings": config.context,
        "tie_word_embeddings": config.tied,
    }


def table(model: Decoder) -> Iterator[Row]:
    """Return the rows of tensor names."""
    return (same(name, f"model.{name}") for name in ours(model))
