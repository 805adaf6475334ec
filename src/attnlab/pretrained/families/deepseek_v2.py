"""DeepSeek-V2: latent attention and experts.

Its rotary pairs are neighbours, ours are half a head apart, so the rows that make them are put in another order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from ...config import ExpertsConfig, ModelConfig
from ...model import Decoder, attention_configs
from ..rope_config import mscale, rope_fields, rotary, rotary_parameters
from ..tensor_names import Row, absent, only, permuted, same, split_heads, stacked
from . import llama
from .llama import PREFIX, ends, feed_forward, norms

__all__ = ["PREFIX"]

MODEL_TYPES = ("deepseek_v2",)
MECHANISMS = ("mla",)
EXTRA = llama.EXTRA


def to_model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the ModelConfig of the config.json of a DeepSeek-V2."""
    only(hf, scoring_func="softmax")
    only(hf, norm_topk_prob=False)  # transformers and DeepSeek's own code differ on what else it would mean
    greedy = hf.get("topk_method", "greedy") == "greedy"
    experts = experts_config(hf, score="softmax", normalize=False)
    if not greedy:
        experts = replace(experts, groups=hf["n_group"], groups_kept=hf["topk_group"])
    return model_config(hf, experts, bias=hf.get("mlp_bias", False))


def from_model_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a DeepSeek-V2 for a ModelConfig."""
    e = config.experts
    return {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        **fields(config),
        "mlp_bias": config.bias,
        "norm_topk_prob": False,
        "topk_method": "greedy" if e.groups == 1 else "group_limited_greedy",
        "n_group": e.groups,
        "topk_group": e.groups_kept,
    }


def experts_config(hf: Mapping[str, Any], **own: Any) -> ExpertsConfig:
    """Return the fields of the experts that the versions share, with further ones from `own`."""
    return ExpertsConfig(
        kind="swiglu",
        width=hf["moe_intermediate_size"],
        shared=hf.get("n_shared_experts") or 0,
        dense_layers=hf.get("first_k_dense_replace") or 0,
        scale=hf.get("routed_scaling_factor", 1.0),
        **own,
    )


def model_config(
    hf: Mapping[str, Any],
    experts: ExpertsConfig,
    mechanism: str = "mla",
    own: Mapping[str, Any] = {},
    bias: bool = False,
) -> ModelConfig:
    """Return the ModelConfig of any version; `own` are further options of the mechanism."""
    only(hf, hidden_act="silu", moe_layer_freq=1, num_key_value_heads=hf["num_attention_heads"])
    theta, scaling = rotary(hf)
    if scaling.kind != "none" and (weight := rope_fields(hf).get("mscale_all_dim")):
        scaling = replace(scaling, sharpness=mscale(scaling.factor, weight) ** 2)
    options = {
        "kv_rank": hf["kv_lora_rank"],
        "q_rank": hf.get("q_lora_rank") or 0,
        "rope_dim": hf["qk_rope_head_dim"],
        "v_dim": hf["v_head_dim"],
        "bias": hf.get("attention_bias", False),
        "dropout": hf.get("attention_dropout") or 0.0,
        **own,
    }
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        context=hf["max_position_embeddings"],
        n_layers=hf["num_hidden_layers"],
        d_model=hf["hidden_size"],
        n_heads=hf["num_attention_heads"],
        head_dim=hf["qk_nope_head_dim"],
        mechanisms=(mechanism,),
        options={mechanism: options},
        positions="rope",
        rope_theta=theta,
        rope_scaling=scaling,
        norm="rms",
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        ff="moe",
        ff_dim=hf["intermediate_size"],
        n_experts=hf["n_routed_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        experts=experts,
        bias=bias,
        tied=hf.get("tie_word_embeddings", False),
    )


def fields(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of config.json that the versions share: the inverse of `model_config`."""
    a: Any = attention_configs(config)[0]
    e = config.experts
    scaling = config.rope_scaling
    rope = rotary_parameters(config)
    if scaling.sharpness != 1 and scaling.factor > 1:
        rope["mscale_all_dim"] = round((math.sqrt(scaling.sharpness) - 1) / (0.1 * math.log(scaling.factor)), 12)
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "num_hidden_layers": config.n_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads,
        "qk_nope_head_dim": a.head_dim,
        "qk_rope_head_dim": a.rope_dim,
        "v_head_dim": a.v_dim,
        "kv_lora_rank": a.kv_rank,
        "q_lora_rank": a.q_rank or None,
        "attention_bias": a.bias,
        "attention_dropout": a.dropout,
        "rope_parameters": rope,
        "rms_norm_eps": config.resolved_norm_eps,
        "hidden_act": "silu",
        "intermediate_size": config.resolved_ff_dim,
        "moe_intermediate_size": config.resolved_expert_dim,
        "n_routed_experts": config.n_experts,
        "num_experts_per_tok": config.experts_per_token,
        "n_shared_experts": e.shared,
        "first_k_dense_replace": min(e.dense_layers, config.n_layers),
        "routed_scaling_factor": e.scale,
        "tie_word_embeddings": config.tied,
    }


def table(model: Decoder, choice: str | None = None) -> Iterator[Row]:
    """Yield the rows of tensor names.

    `choice`: their name for the bias on the choice of experts; None: they have none.
    """
    config = model.config
    yield from ends()
    for i, c in enumerate(attention_configs(config)):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        yield from norms(ours, theirs)
        yield from latent(c, f"{ours}attention.", f"{theirs}self_attn.")
        if not config.has_experts(i):
            yield from feed_forward(f"{ours}ff", f"{theirs}mlp", config.resolved_ff_dim)
            continue
        ff, mlp = f"{ours}ff", f"{theirs}mlp"
        each = range(config.n_experts)
        yield same(f"{ff}.router.weight", f"{mlp}.gate.weight")
        yield same(f"{ff}.bias", f"{mlp}.{choice}") if choice else absent(f"{ff}.bias", config.n_experts)
        wide = [f"{mlp}.experts.{e}.{name}_proj.weight" for e in each for name in ("gate", "up")]
        yield stacked(f"{ff}.into", wide, config.n_experts)
        yield stacked(f"{ff}.out", [f"{mlp}.experts.{e}.down_proj.weight" for e in each], config.n_experts)
        shared = config.resolved_expert_dim * config.experts.shared
        yield from feed_forward(f"{ff}.shared", f"{mlp}.shared_experts", shared)


def latent(c: Any, ours: str, theirs: str) -> Iterator[Row]:
    """Yield the rows of one layer's attention."""
    half_split = torch.arange(c.rope_dim).view(-1, 2).T.flatten()  # 0 2 4 ... 1 3 5 ...
    head = torch.cat([torch.arange(c.head_dim), c.head_dim + half_split])
    queries = (torch.arange(c.n_heads)[:, None] * len(head) + head).flatten()
    remembered = torch.cat([torch.arange(c.kv_rank), c.kv_rank + half_split])
    yield permuted(f"{ours}q.weight", f"{theirs}q_{'b_' if c.q_rank else ''}proj.weight", queries)
    yield absent(f"{ours}q.bias", len(queries))
    for part in ("weight", "bias"):
        yield same(f"{ours}q_down.{part}", f"{theirs}q_a_proj.{part}")
        yield permuted(f"{ours}down.{part}", f"{theirs}kv_a_proj_with_mqa.{part}", remembered)
        yield same(f"{ours}o.{part}", f"{theirs}o_proj.{part}")
    yield same(f"{ours}q_norm.weight", f"{theirs}q_a_layernorm.weight")
    yield same(f"{ours}norm.weight", f"{theirs}kv_a_layernorm.weight")
    up = [f"{ours}k_up.weight", f"{ours}v_up.weight"]
    yield split_heads(up, f"{theirs}kv_b_proj.weight", c.n_heads, [c.head_dim, c.v_dim])
