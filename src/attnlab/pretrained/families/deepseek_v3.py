"""DeepSeek-V3: V2 whose experts have a score of their own each, and are chosen with a bias from the best groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...config import ModelConfig
from ...model import Decoder
from .. import extras
from ..tensor_names import Row, only
from . import deepseek_v2 as v2
from .deepseek_v2 import PREFIX

__all__ = ["PREFIX"]

MODEL_TYPES = ("deepseek_v3",)
MECHANISMS = v2.MECHANISMS
EXTRA = (*v2.EXTRA, extras.Extra(r"^model\.layers\.(\d+)\.", extras.further_layer))  # that guesses one token more


def to_model_config(hf: Mapping[str, Any], mechanism: str = "mla", own: Mapping[str, Any] = {}) -> ModelConfig:
    """Return the ModelConfig of the config.json of a DeepSeek-V3.

    `own` are further options of the mechanism.
    """
    only(hf, rope_interleave=True, topk_method="noaux_tc", scoring_func="sigmoid")
    groups = {"groups": hf.get("n_group") or 1, "groups_kept": hf.get("topk_group") or 1, "group_best": 2}
    experts = v2.experts_config(hf, score="sigmoid", normalize=hf.get("norm_topk_prob", True), **groups)
    return v2.model_config(hf, experts, mechanism, own)


def from_model_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a DeepSeek-V3 for a ModelConfig."""
    e = config.experts
    return {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        **v2.fields(config),
        "norm_topk_prob": e.normalize,
        "n_group": e.groups,
        "topk_group": e.groups_kept,
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
    }


def table(model: Decoder) -> Iterator[Row]:
    """Return the rows of tensor names."""
    return v2.table(model, choice="gate.e_score_correction_bias")
