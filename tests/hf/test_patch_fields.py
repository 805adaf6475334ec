"""Every field of a host's config that its attention reads: the host's own source says which, and either the patched
model computes what the host does, or the patch is refused."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from attnlab.errors import UserError
from attnlab.hf.hosts import MODELS
from attnlab.hf.patch import patch

SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128}
SHAPE |= {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 50}
SHAPE |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT2 = {"n_layer": 3, "n_embd": 32, "n_head": 4, "n_positions": 128, "vocab_size": 50}

# Fields and what the tests below set them to; (): they change no number in the attention, beyond rounding.
SIZES = {"hidden_size": (), "num_attention_heads": (), "_attn_implementation": (), "num_hidden_layers": ()}
TURNING = {
    "rope_parameters": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0}},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
    ),
    "max_position_embeddings": ({"max_position_embeddings": 64},),
    "head_dim": ({"head_dim": 16},),
    "num_key_value_heads": ({"num_key_value_heads": 1}, {"num_key_value_heads": 4}),
    "attention_dropout": (),  # while training: a test of its own
}
WINDOW = ({"sliding_window": 9}, {"sliding_window": 4096})
BY_LAYER = ["full_attention", "sliding_attention", "sliding_attention"]
LAYERED = (
    {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3},
    {"use_sliding_window": True, "sliding_window": 9, "layer_types": BY_LAYER[::-1]},
    {"use_sliding_window": False, "sliding_window": 9},
)
FIELDS: dict[str, dict[str, Any]] = {
    "GPT2": {
        **SIZES,
        "attn_pdrop": (),
        "resid_pdrop": (),
        "reorder_and_upcast_attn": ({"reorder_and_upcast_attn": True},),
        "scale_attn_weights": ({"scale_attn_weights": False},),
        "scale_attn_by_inverse_layer_idx": (
            {"scale_attn_by_inverse_layer_idx": True},
            {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
        ),
    },
    "Llama": {**SIZES, **TURNING, "attention_bias": ({"attention_bias": True},)},
    "Mistral": {**SIZES, **TURNING, "sliding_window": WINDOW},
    "Qwen2": {**SIZES, **TURNING, "sliding_window": LAYERED, "layer_types": LAYERED},
    "Qwen3": {
        **SIZES,
        **TURNING,
        "attention_bias": ({"attention_bias": True},),
        "rms_norm_eps": ({"rms_norm_eps": 0.1},),
        "sliding_window": LAYERED,
        "layer_types": LAYERED,
    },
}
HOSTS = {cls.__bases__[-1].__name__.partition("For")[0].removesuffix("LMHeadModel"): cls for cls in MODELS}


def fields_read(cls: Any) -> set[str]:
    """The fields of a config that the source of a class reads."""
    found = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls)))):
        named = isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("config", "self.config")
        asked = isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr")
        if named:
            found.add(node.attr)
        elif asked and ast.unparse(node.args[0]) in ("config", "self.config"):
            found.add(node.args[1].value)
    return found


def test_every_host_has_a_table():
    assert set(FIELDS) == set(HOSTS)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_that_the_attention_reads_is_known(name):
    module = sys.modules[HOSTS[name].__bases__[-1].__module__]
    parts = [getattr(module, f"{name}{part}", None) for part in ("Attention", "RotaryEmbedding")]
    read = set().union(*(fields_read(part) for part in parts if part is not None))
    assert len(read) > 5 and read <= set(FIELDS[name]), f"decide what becomes of {sorted(read - set(FIELDS[name]))}"


def host(name: str, **fields: Any) -> Any:
    """A tiny model whose every parameter matters."""
    torch.manual_seed(0)
    form = HOSTS[name].config_class.__bases__[-1]
    usual = {"Mistral": {"sliding_window": None}, "Qwen3": {"head_dim": 8}}.get(name, {})
    config = form(**{**(GPT2 if name == "GPT2" else SHAPE), **usual, **fields})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


CASES = {
    f"{name} {case}": (name, case)
    for name, fields in FIELDS.items()
    for cases in ({str(case): case for value in fields.values() for case in value}.values(),)
    for case in cases
}


@pytest.mark.parametrize("mechanism", ["mha", "sliding"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_field_is_honoured_or_refused(case, mechanism):
    name, fields = CASES[case]
    model = host(name, **fields)
    tokens = torch.randint(50, (2, 31), generator=torch.Generator().manual_seed(1))
    before = model(tokens).logits
    has_window = any(HOSTS[name].windows(model.config))
    options = {"window": 99} if mechanism == "sliding" and not has_window else {}
    try:
        patch(model, mechanism, options=options)
    except UserError as refusal:
        said = str(refusal)
        assert "\n" not in said and any(word in said for word in ("window", "rope_type", "partial_rotary_factor")), said
        torch.testing.assert_close(model(tokens).logits, before)
    else:
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-4)
        assert [each.mechanism.config.head_dim for each in model.adapters().values()] == [
            fields.get("head_dim", 8)
        ] * len(model.blocks())


@torch.no_grad()
def test_heads_and_windows_are_the_models():
    llama = host("Llama")
    patch(llama, "gqa")
    assert {each.mechanism.config.n_kv_heads for each in llama.adapters().values()} == {2}
    mistral = host("Mistral", sliding_window=9)
    for mechanism in ("mha", "mla", "nsa", "linear"):
        with pytest.raises(UserError, match=f"layer 0 of this model sees the last 9 tokens, and {mechanism} would see"):
            patch(mistral, mechanism)
    patch(mistral, "sinks")
    assert {each.mechanism.config.window for each in mistral.adapters().values()} == {9}
    wide = host("Mistral", sliding_window=9)
    patch(wide, "mha", drop_window=True)
    assert type(wide).__name__ == "AttnlabMistralForCausalLM"
    plain = host("Llama", sliding_window=9)  # a field that Llama does not read
    tokens = torch.randint(50, (2, 31), generator=torch.Generator().manual_seed(1))
    before = plain(tokens).logits
    patch(plain, "mha")
    torch.testing.assert_close(plain(tokens).logits, before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_layers_with_and_without_a_window_are_patched_apart():
    fields = {"use_sliding_window": True, "sliding_window": 9, "layer_types": BY_LAYER}
    model = host("Qwen2", **fields)
    tokens = torch.randint(50, (2, 31), generator=torch.Generator().manual_seed(1))
    before = model(tokens).logits
    with pytest.raises(
        UserError, match="layer 1 of this model sees the last 9 tokens and layer 0 all: patch such layers"
    ):
        patch(model, "sliding")
    patch(model, "sliding", layers=[1, 2])
    patch(model, "mha", layers=[0])
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-4)
    chosen = host("Qwen2", **fields)
    patch(chosen, "sliding", options={"window": 5})
    assert {each.mechanism.config.window for each in chosen.adapters().values()} == {5}


@pytest.mark.parametrize("name", FIELDS)
def test_dropout_is_the_models(name):
    field = "attn_pdrop" if name == "GPT2" else "attention_dropout"
    model = host(name, **{field: 0.25})
    patch(model, "mha")
    assert {each.mechanism.config.dropout for each in model.adapters().values()} == {0.25}
