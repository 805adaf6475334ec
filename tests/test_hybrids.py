"""Presets of published hybrids: the parameters of transformers' own models, less what the preset says it leaves out;
and small ones that learn and decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from attnlab import Decoder, presets

FULL = (4, 8, 12, 16, 20, 24, 27)  # of Kimi Linear's layers, from 1


def gpt_oss() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(GptOssConfig(num_hidden_layers=24, num_local_experts=32))


def gemma_3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "head_dim": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1}
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=262_144, sliding_window=512, **sizes, **heads))


def qwen3_next() -> Any:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    return Qwen3NextForCausalLM(Qwen3NextConfig())


def kimi_linear() -> Any:
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    kda = [i for i in range(1, 28) if i not in FULL]
    layers = {"full_attn_layers": list(FULL), "kda_layers": kda, "head_dim": 128, "num_heads": 32}
    return KimiLinearForCausalLM(KimiLinearConfig(linear_attn_config={**layers, "short_conv_kernel_size": 4}))


def biases_of_experts(name: str) -> bool:
    return ".mlp." in name and ("bias" in name)


LEFT_OUT: list[tuple[str, Callable[[], Any], Callable[[str], bool]]] = [
    ("gpt-oss-20b", gpt_oss, biases_of_experts),
    ("gemma-3-1b", gemma_3, lambda name: "post_attention_layernorm" in name or "post_feedforward_layernorm" in name),
    ("qwen3-next-80b", qwen3_next, lambda name: "shared_expert_gate" in name),
    ("kimi-linear-48b", kimi_linear, lambda name: False),
]


@pytest.mark.parametrize(("name", "published", "left_out"), LEFT_OUT, ids=[each[0] for each in LEFT_OUT])
def test_a_hybrid_has_the_parameters_of_the_published_model(
    name: str, published: Callable[[], Any], left_out: Callable[[str], bool]
) -> None:
    with torch.device("meta"):
        ours = Decoder(presets.get(name).model).parameter_count()
        theirs = {key: value.numel() for key, value in published().named_parameters()}
    without = sum(count for key, count in theirs.items() if left_out(key))
    assert ours == sum(theirs.values()) - without
    said = " ".join(presets.about(name).split())
    assert f"{ours:,} parameters" in said
    assert f"({without:,} parameters)" in said if without else "Nothing is left out" in said


SMALL = {
    "gpt-oss-small": "gpt-oss-20b",
    "gemma-3-small": "gemma-3-1b",
    "qwen3-next-small": "qwen3-next-80b",
    "kimi-linear-small": "kimi-linear-48b",
}


@pytest.mark.parametrize(("name", "whole"), SMALL.items())
def test_a_small_hybrid_learns_and_decodes(name: str, whole: str) -> None:
    config = presets.get(name).model
    layers = presets.get(whole).model.layers
    assert config.layers == layers[: config.n_layers] and set(config.layers) == set(layers)
    torch.manual_seed(0)
    model = Decoder(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    tokens = torch.randint(65, (2, 33))
    losses = []
    for _ in range(6):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    model.eval()
    with torch.no_grad():
        want, _ = model(tokens)
        first, cache = model(tokens[:, :20], cache=model.empty_cache(2, 33))
        rest, _ = model(tokens[:, 20:], cache=cache)
    torch.testing.assert_close(torch.cat([first, rest], 1), want, rtol=1e-3, atol=1e-3)


def test_the_latent_layers_of_kimi_linear_know_no_positions() -> None:
    from attnlab import attention
    from attnlab.model import attention_configs

    config = attention_configs(presets.get("kimi-linear-48b").model)[3]
    places = config.rope_places  # type: ignore[attr-defined]
    layer = attention.build("mla", d_model=16, n_heads=2, head_dim=4, rope_places=places[:2]).double()
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    far = torch.arange(5)[None] * 1000
    torch.testing.assert_close(layer(x, far)[0], layer(x, torch.arange(5)[None])[0], rtol=0, atol=0)
