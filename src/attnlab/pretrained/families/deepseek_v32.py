"""DeepSeek-V3.2: V3 whose queries read only the tokens that an indexer selects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ...config import ModelConfig
from ...errors import UserError
from ...model import Decoder, attention_configs
from ..tensor_names import Row, same
from . import deepseek_v3 as v3
from .deepseek_v3 import EXTRA, PREFIX

__all__ = ["EXTRA", "PREFIX"]

MODEL_TYPES = ("deepseek_v32",)
MECHANISMS = ("msla",)


def to_model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the ModelConfig of the config.json of a DeepSeek-V3.2."""
    kinds = hf.get("mlp_layer_types") or []
    dense = kinds.count("dense") if kinds else hf.get("first_k_dense_replace", 3)
    if kinds and kinds != ["dense"] * dense + ["sparse"] * (len(kinds) - dense):
        raise UserError(f"config.json says mlp_layer_types = {kinds}, and attnlab computes only dense layers first")
    indexer = {
        "top_k": min(hf["index_topk"], hf["max_position_embeddings"]),
        "local": 0,
        "index_heads": hf["index_n_heads"],
        "index_dim": hf["index_head_dim"],
        "shipped": True,
    }
    return v3.to_model_config({**hf, "first_k_dense_replace": dense}, "msla", indexer)


def from_model_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a DeepSeek-V3.2 for a ModelConfig."""
    a: Any = attention_configs(config)[0]
    return {
        **v3.from_model_config(config),
        "model_type": "deepseek_v32",
        "architectures": ["DeepseekV32ForCausalLM"],
        "index_topk": a.top_k,
        "index_n_heads": a.index_heads,
        "index_head_dim": a.index_dim,
    }


def table(model: Decoder) -> Iterator[Row]:
    """Yield the rows of tensor names."""
    yield from v3.table(model)
    for i, c in enumerate(attention_configs(model.config)):
        ours, theirs = f"layers.{i}.attention.", f"model.layers.{i}.self_attn.indexer."
        for a, b in (("index_q", "wq_b"), ("index_k", "wk"), ("index_norm", "k_norm"), ("index_w", "weights_proj")):
            for part in ("weight", "bias"):
                yield same(f"{ours}{a}.{part}", f"{theirs}{b}.{part}")
        warm = torch.tensor(c.warmup)  # type: ignore[attr-defined]
        yield Row([f"{ours}calls"], [], lambda warm=warm: [warm], lambda calls: [])  # the warm-up is over
