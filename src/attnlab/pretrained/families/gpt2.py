"""GPT-2: learned positions, LayerNorm, biases everywhere, and matrices that are stored transposed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ...config import ModelConfig
from ...errors import choose
from ...model import Decoder
from .. import extras
from ..tensor_names import Row, only, same, transposed

MODEL_TYPES = ("gpt2",)
MECHANISMS = ("mha", "gqa")
PREFIX = "transformer."
SLOT = "transformer.h.{}.attn"
EXTRA = extras.MASKS
MATRICES = {
    "attention.qkv": "attn.c_attn",
    "attention.o": "attn.c_proj",
    "ff.into": "mlp.c_fc",
    "ff.out": "mlp.c_proj",
}
GELU = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def to_model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the ModelConfig of the config.json of a GPT-2."""
    only(hf, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    act = hf.get("activation_function", "gelu_new")
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        context=hf["n_positions"],
        n_layers=hf["n_layer"],
        d_model=hf["n_embd"],
        n_heads=hf["n_head"],
        positions="learned",
        norm="layer",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        ff=GELU[choose("activation_function", act, GELU)],  # type: ignore[arg-type]
        ff_dim=hf.get("n_inner"),
        bias=True,
        tied=hf.get("tie_word_embeddings", True),
        dropout=hf.get("resid_pdrop", 0.1),
    )


def from_model_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a GPT-2 for a ModelConfig."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_layer": config.n_layers,
        "n_embd": config.d_model,
        "n_head": config.n_heads,
        "n_inner": config.resolved_ff_dim,
        "activation_function": next((theirs for theirs, ours in GELU.items() if ours == config.ff), "gelu"),
        "layer_norm_epsilon": config.resolved_norm_eps,
        "tie_word_embeddings": config.tied,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
    }


def table(model: Decoder, matrix: Callable[[str, str], Row] = transposed) -> Iterator[Row]:
    """Yield the rows of tensor names; `matrix` makes those of the weights."""
    yield same("embed.weight", "transformer.wte.weight")
    yield same("place.weight", "transformer.wpe.weight")
    for i in range(model.config.n_layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        for a, b in MATRICES.items():
            yield matrix(f"{ours}.{a}.weight", f"{theirs}.{b}.weight")
            yield same(f"{ours}.{a}.bias", f"{theirs}.{b}.bias")
        for part in ("weight", "bias"):
            yield same(f"{ours}.attention_norm.{part}", f"{theirs}.ln_1.{part}")
            yield same(f"{ours}.ff_norm.{part}", f"{theirs}.ln_2.{part}")
    for part in ("weight", "bias"):
        yield same(f"norm.{part}", f"transformer.ln_f.{part}")
    yield same("head.weight", "lm_head.weight")
