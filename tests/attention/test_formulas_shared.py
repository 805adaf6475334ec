"""Layers that give rows to later ones, and layers whose fields follow from their place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnlab import UserError, attention
from attnlab.attention import cla, gqa
from attnlab.cache import Cache, extend
from attnlab.config import ModelConfig
from attnlab.convert import convert
from attnlab.laws import check_class
from attnlab.laws.stack import judged_layer
from attnlab.model import Decoder, attention_configs, cache_floats
from attnlab.spec import CAUSAL, NOTHING, AttentionConfig, Mask


def shape(mechanisms: Sequence[str], layers: int = 4, **options: Any) -> ModelConfig:
    given = dict(options)
    return ModelConfig(
        vocab_size=40,
        context=32,
        n_layers=layers,
        d_model=32,
        n_heads=4,
        mechanisms=tuple(mechanisms),
        options=given,
        positions="rope",
    )


def decoder(config: ModelConfig) -> Decoder:
    torch.manual_seed(3)
    model = Decoder(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def turn(x: Tensor, position: int) -> Tensor:
    """A head of four numbers after its rotary embedding, pair by pair."""
    y = x.clone()
    for i in range(2):
        angle = position * 10_000.0 ** (-i / 2)
        y[i] = x[i] * math.cos(angle) - x[i + 2] * math.sin(angle)
        y[i + 2] = x[i + 2] * math.cos(angle) + x[i] * math.sin(angle)
    return y


@pytest.mark.parametrize(
    ("mechanisms", "share", "makes"),
    [
        (["cla"], 2, [True, False, True, False, True, False]),
        (["cla"], 3, [True, False, False, True, False, False]),
        (["cla"], 1, [True] * 6),
        (["cla"], None, [True] + [False] * 5),
        (["sliding", "sliding", "sliding", "cla", "cla", "cla"], None, [None] * 3 + [True, False, False]),
        (["cla", "mha", "cla"], 2, [True, None, False, True, None, False]),
    ],
)
def test_a_layer_takes_what_the_last_of_its_kind_made(mechanisms, share, makes):
    configs = attention_configs(shape(mechanisms, 6, cla={"share": share}))
    assert [getattr(each, "own", None) for each in configs] == makes
    kept = [each.cache_spec.floats(9) for each in configs if isinstance(each, cla.Config)]
    assert kept == [9 * 2 * 8 * (own is True) for own in makes if own is not None]


@pytest.mark.parametrize(
    "mechanisms", [["cla"], ["sliding", "cla", "mla", "cla"], ["cla", "gated_delta"]], ids="+".join
)
def test_a_model_whose_layers_share_decodes_as_it_trains(mechanisms):
    options = {"sliding": {"window": 4}, "cla": {"share": None}}
    model = decoder(shape(mechanisms, 4, **{name: options[name] for name in options if name in mechanisms}))
    tokens = torch.randint(40, (3, 23))
    whole, _ = model(tokens)
    for ragged in (False, True):
        cache: Any = model.empty_cache(3, 30, ragged=ragged, dtype=torch.float64)
        assert sum(each.allocated_bytes() for each in cache) < 8 * 3 * 33 * 4 * 160
        parts = []
        for chunk in tokens.split([9, 1, 1, 7, 5], 1):
            start = sum(part.shape[1] for part in parts)
            places = torch.arange(start, start + chunk.shape[1]).expand(chunk.shape)
            y, cache = model(chunk, places, cache)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-11)
    documents = torch.tensor([[0] * 7 + [1] * 16, [2] * 23, [3] * 22 + [-1]])
    packed, _ = model(tokens, documents=documents)
    alone, _ = model(tokens[:1, 7:])
    torch.testing.assert_close(packed[:1, 7:], alone, rtol=0, atol=1e-11)


def test_activation_checkpoints_change_no_gradient():
    model = decoder(shape(["cla"], 5, cla={"share": 3}))
    tokens = torch.randint(40, (2, 12))
    found = []
    for model.recompute in (False, True):
        model.zero_grad()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


CASES = [
    ("cla", {"n_kv_heads": 2, "bias": True}),
    ("cla", {"n_kv_heads": 4}),
]


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_a_layer_that_takes_rows_is_its_formula(name: str, fields: dict[str, Any]) -> None:
    config: Any = attention.config(name, d_model=12, n_heads=4, head_dim=4, **fields)
    K = config.n_kv_heads
    torch.manual_seed(4)
    stack: Any = judged_layer(attention.module(name).Attention, config).double().eval()
    x = torch.randn(1, 6, 12, dtype=torch.float64)
    y, _ = stack(x, torch.arange(6)[None])
    first, second = stack.layers
    with torch.no_grad():
        first_y, _ = first(x, torch.arange(6)[None])
        made = first.qkv(x)[0]
        q = second.q(x + first_y)[0].view(6, 4, 4)
        rows = []
        for t in range(6):
            heads = []
            for n in range(4):
                at = 16 + 4 * (n // (4 // K))
                keys = [turn(made[s, at : at + 4], s) for s in range(t + 1)]
                values = [made[s, 4 * K + at : 4 * K + at + 4] for s in range(t + 1)]
                weights = torch.stack([turn(q[t, n], t) @ key / 2 for key in keys]).softmax(0)
                heads.append(sum(w * v for w, v in zip(weights, values, strict=True)))
            rows.append(second.o(torch.cat(heads)))
    torch.testing.assert_close(y[0], torch.stack(rows), rtol=0, atol=1e-12)
    assert {name.partition(".")[0] for name, _ in second.named_parameters()} == {"q", "o"}


@pytest.mark.parametrize(
    ("mechanisms", "options", "said"),
    [
        (["cla"], {"cla": {"own": False}}, r"layer 0 \(cla\) takes k of an earlier layer, and none gives it"),
        (["mha", "cla"], {"cla@1": {"own": False}}, r"layer 1 \(cla\) takes k of an earlier layer, and none gives it"),
        (
            ["cla"],
            {"cla@1": {"n_kv_heads": 4, "own": False}},
            r"layer 1 \(cla\) takes k of shape \(4, 8\), .* gives \(1, 8\)",
        ),
        (["cla"], {"cla": {"share": 0}}, "share is 0: it must be"),
    ],
)
def test_rows_that_nobody_gives_are_refused(mechanisms, options, said):
    with pytest.raises(UserError, match=said):
        Decoder(shape(mechanisms, 4, **options))


def test_rows_of_another_shape_are_not_shared():
    configs = attention_configs(shape(["cla"], 4, **{"cla@1": {"n_kv_heads": 4}, "cla@2": {"n_kv_heads": 4}}))
    assert [each.own for each in configs] == [True, True, False, True]


def test_a_conversion_keeps_keys_and_values_of_the_layers_that_make_them():
    source = decoder(shape(["gqa"], 4, gqa={"n_kv_heads": 2}))
    alone, exact = convert(source, "cla", options={"share": 1})
    assert exact.exact and cache_floats(alone.config) == cache_floats(source.config)
    _, found = convert(source, "cla")
    assert not found.exact and found.cache_share == 0.5
    assert max(found.layer_errors[0::2]) < 1e-12 < min(found.layer_errors[1::2])


def test_the_number_of_differential_attention_follows_from_the_layer():
    model = decoder(shape(["differential", "mha"], 5))
    found = [model.blocks()[i].attention.l0 for i in (0, 2, 4)]
    assert found == pytest.approx([0.8 - 0.6 * math.exp(-0.3 * i) for i in (0, 2, 4)], abs=1e-15)
    given = attention_configs(shape(["differential"], 3, differential={"lambda_init": 0.5}))
    assert [each.lambda_init for each in given] == [0.5] * 3
    assert attention.build("differential").l0 == pytest.approx(0.2)


# A mechanism of one's own that takes what the first layer gives: value residual learning, arXiv 2410.17897.


@dataclass(frozen=True, kw_only=True)
class FirstValues(gqa.Config):
    layer: int = 0

    @property
    def value(self) -> Mapping[str, tuple[int, ...]]:
        return {"first_v": (self.n_kv_heads, self.head_dim)}

    @property
    def gives(self) -> Mapping[str, tuple[int, ...]]:
        return NOTHING if self.layer else self.value

    @property
    def takes(self) -> Mapping[str, tuple[int, ...]]:
        return self.value if self.layer else NOTHING

    def placed(self, before: Sequence[AttentionConfig], depth: int) -> FirstValues:
        return replace(self, layer=len(before))


class ValueResidual(gqa.Attention):
    config: FirstValues

    def __init__(self, config: FirstValues) -> None:
        super().__init__(config)
        if config.layer:
            self.mix = nn.Parameter(torch.tensor(0.5))
        self.first = not config.layer

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Any:
        q, k, v = self.project(x, positions)
        if self.first:
            mask.give(first_v=v)
        else:
            v = self.mix * v + (1 - self.mix) * mask.given["first_v"]
        seen, cache = extend(cache, positions, k=k, v=v)
        return self.o(self.ask(q, seen, positions, mask).flatten(2)), cache


def test_value_residuals_are_a_mechanism_of_a_few_lines_under_every_law():
    results = check_class("value_residual", FirstValues, ValueResidual)
    assert {r.law: r.detail for r in results if r.status == "broken"} == {}
    assert [r.detail for r in results if r.law == "given rows"] == [
        "given as declared: first_v; taken and read: first_v"
    ]
