"""Llama: grouped queries, RMSNorm, SwiGLU, rotary positions. Mistral and Qwen share most of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...config import ModelConfig
from ...model import Decoder, attention_configs
from .. import extras
from ..rope_config import rotary, rotary_parameters
from ..tensor_names import Row, fused, only, same

MODEL_TYPES = ("llama",)
MECHANISMS = ("mha", "gqa", "mqa")
PREFIX = "model."
SLOT = "model.layers.{}.self_attn"
EXTRA = extras.FREQUENCIES


def to_model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the ModelConfig of the config.json of a Llama."""
    bias = hf.get("attention_bias", False)
    return model_config(hf, bias=hf.get("mlp_bias", False), attention={"bias": bias})


def from_model_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a Llama for a ModelConfig."""
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **fields(config), "mlp_bias": config.bias}


def model_config(
    hf: Mapping[str, Any],
    *,
    attention: Mapping[str, Any],
    windows: Sequence[int | None] = (None,),
    bias: bool = False,
    head_dim: int | None = None,
) -> ModelConfig:
    """Return the ModelConfig of any family like Llama.

    `attention`: options of all layers. `windows`: tokens that each layer sees, None: all; one for all layers, or one
    each.
    """
    only(hf, hidden_act="silu")
    heads = hf["num_attention_heads"]
    options = {**attention, "n_kv_heads": hf.get("num_key_value_heads") or heads}
    if hf.get("attention_dropout"):
        options["dropout"] = hf["attention_dropout"]
    names = tuple("gqa" if window is None else "sliding" for window in windows)
    sizes = {window for window in windows if window is not None}
    each = {"gqa": options, "sliding": {**options, **({"window": max(sizes)} if sizes else {})}}
    theta, scaling = rotary(hf)
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        context=hf["max_position_embeddings"],
        n_layers=hf["num_hidden_layers"],
        d_model=hf["hidden_size"],
        n_heads=heads,
        head_dim=hf.get("head_dim") or head_dim,
        mechanisms=names if len(set(names)) > 1 else names[:1],
        options={name: each[name] for name in dict.fromkeys(names)},
        positions="rope",
        rope_theta=theta,
        rope_scaling=scaling,
        norm="rms",
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        ff="swiglu",
        ff_dim=hf["intermediate_size"],
        bias=bias,
        tied=hf.get("tie_word_embeddings", False),
    )


def fields(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of config.json that the families share: the inverse of `model_config`."""
    first = attention_configs(config)[0]
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "num_hidden_layers": config.n_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": getattr(first, "n_kv_heads", config.n_heads),
        "head_dim": first.head_dim,
        "attention_bias": first.bias,
        "attention_dropout": first.dropout,
        "rope_parameters": rotary_parameters(config),
        "rms_norm_eps": config.resolved_norm_eps,
        "hidden_act": "silu",
        "intermediate_size": config.resolved_ff_dim,
        "tie_word_embeddings": config.tied,
    }


def table(model: Decoder) -> Iterator[Row]:
    """Yield the rows of tensor names."""
    yield from ends()
    for i, c in enumerate(attention_configs(model.config)):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        sizes = [n * c.head_dim for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)]  # type: ignore[attr-defined]
        for part in ("weight", "bias"):
            heads = [f"{theirs}self_attn.{name}_proj.{part}" for name in "qkv"]
            yield fused(f"{ours}attention.qkv.{part}", heads, sizes)
            yield same(f"{ours}attention.o.{part}", f"{theirs}self_attn.o_proj.{part}")
        for name in ("q_norm", "k_norm"):
            yield same(f"{ours}attention.{name}.weight", f"{theirs}self_attn.{name}.weight")
        yield from norms(ours, theirs)
        yield from feed_forward(f"{ours}ff", f"{theirs}mlp", model.config.resolved_ff_dim)


def ends() -> Iterator[Row]:
    """Yield the rows of the embedding, the last norm and the head."""
    yield same("embed.weight", "model.embed_tokens.weight")
    yield same("norm.weight", "model.norm.weight")
    yield same("head.weight", "lm_head.weight")


def norms(ours: str, theirs: str) -> Iterator[Row]:
    """Yield the rows of one layer's norms; `ours` and `theirs` are the layer's names."""
    yield same(f"{ours}attention_norm.weight", f"{theirs}input_layernorm.weight")
    yield same(f"{ours}ff_norm.weight", f"{theirs}post_attention_layernorm.weight")


def feed_forward(ours: str, theirs: str, width: int) -> Iterator[Row]:
    """Yield the rows of a SwiGLU of `width`; `ours` and `theirs` are its names."""
    for part in ("weight", "bias"):
        yield fused(f"{ours}.into.{part}", [f"{theirs}.{name}_proj.{part}" for name in ("gate", "up")], [width, width])
        yield same(f"{ours}.out.{part}", f"{theirs}.down_proj.{part}")
