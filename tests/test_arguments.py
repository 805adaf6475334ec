"""The public functions and configs refuse arguments of a wrong kind or range, and name them."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import numpy as np
import pytest
import torch

from attnlab import (
    Cache,
    CacheSpec,
    DataConfig,
    Decoder,
    Mask,
    ModelConfig,
    RunConfig,
    TrainConfig,
    UserError,
    attend,
    attention,
    extend,
    generate,
    load_model,
    presets,
    rope,
)
from attnlab.errors import quoted
from attnlab.files import parse_json
from attnlab.ranges import Count, Range, Share, check_fields, check_value

attend, rope, extend = map(inspect.unwrap, (attend, rope, extend))  # without what the tests put around them

NONSENSE = ["seven", math.nan, -math.inf, [3], {"a": 1}, -(10**40), b"7", object()]
MODEL = Decoder(ModelConfig(vocab_size=11, context=9, n_layers=1, d_model=16, n_heads=2))
Q = torch.randn(1, 3, 2, 4)
AT = torch.arange(3)[None]
SPEC = CacheSpec({"k": (2, 3)})
TOKENS = torch.zeros(1, 3, dtype=torch.int64)

CALLS: dict[str, tuple[Callable[[Any], Any], set[str]]] = {  # argument -> a call, and what of NONSENSE it may take
    "d_model": (lambda bad: ModelConfig(d_model=bad), set()),
    "rope_theta": (lambda bad: ModelConfig(rope_theta=bad), set()),
    "norm_eps": (lambda bad: ModelConfig(norm_eps=bad), set()),
    "mechanisms": (lambda bad: ModelConfig(mechanisms=bad), set()),
    "options": (lambda bad: ModelConfig(options=bad), set()),
    "rope_scaling": (lambda bad: ModelConfig(rope_scaling=bad), set()),
    "tied": (lambda bad: ModelConfig(tied=bad), set()),
    "lr": (lambda bad: TrainConfig(lr=bad), set()),
    "betas": (lambda bad: TrainConfig(betas=(0.5, bad)), set()),
    "guard": (lambda bad: TrainConfig(guard=bad), set()),
    "warmup": (lambda bad: TrainConfig(warmup=bad), set()),
    "pack": (lambda bad: DataConfig(pack=bad), set()),
    "val_fraction": (lambda bad: DataConfig(val_fraction=bad), set()),
    "seed": (lambda bad: RunConfig(seed=bad), set()),
    "model": (lambda bad: RunConfig(model=bad), set()),
    "kv_rank": (lambda bad: attention.build("mla", kv_rank=bad), set()),
    "n_kv_heads": (lambda bad: attention.build("gqa", n_kv_heads=bad), set()),
    "window": (lambda bad: attention.build("sliding", window=bad), set()),
    "index_dim": (lambda bad: attention.build("msla", index_dim=bad), set()),
    "mechanism": (attention.build, set()),
    "preset": (presets.get, set()),
    "window ": (lambda bad: Mask(window=bad), set()),
    "keep": (lambda bad: CacheSpec({"k": (2,)}, keep=bad), set()),
    "spec": (lambda bad: Cache.empty(bad, 1, 4), set()),
    "batch": (lambda bad: Cache.empty(SPEC, bad, 4), set()),
    "max_len": (lambda bad: Cache.empty(SPEC, 1, bad), set()),
    "q": (lambda bad: attend(bad, Q, Q, AT, AT), set()),
    "v": (lambda bad: attend(Q, Q, bad, AT, AT), set()),
    "k_pos": (lambda bad: attend(Q, Q, Q, AT, bad), set()),
    "mask": (lambda bad: attend(Q, Q, Q, AT, AT, bad), set()),
    "scale": (lambda bad: attend(Q, Q, Q, AT, AT, scale=bad), {"-10"}),
    "impl": (lambda bad: attention.build("mha", impl=bad), set()),
    "keep ": (lambda bad: attend(Q, Q, Q, AT, AT, keep=bad), set()),
    "x": (lambda bad: rope(bad, AT, 1e4), set()),
    "positions": (lambda bad: rope(Q, bad, 1e4), set()),
    "theta": (lambda bad: rope(Q, AT, bad), set()),
    "places": (lambda bad: rope(Q, AT, 1e4, bad), set()),
    "cache": (lambda bad: extend(bad, AT, k=torch.zeros(1, 3, 2, 3)), set()),
    "positions ": (lambda bad: extend(None, bad, k=torch.zeros(1, 3, 2, 3)), set()),
    "config": (Decoder, set()),
    "tokens": (lambda bad: MODEL(bad), set()),
    "cache ": (lambda bad: MODEL(TOKENS, None, bad), set()),
    "documents": (lambda bad: MODEL(TOKENS, documents=bad), set()),
    "targets": (lambda bad: MODEL.loss(TOKENS, bad), set()),
    "model ": (lambda bad: generate(bad, [[1]], 2), set()),
    "prompt": (lambda bad: generate(MODEL, [bad], 2), {"[3]"}),
    "temperature": (lambda bad: generate(MODEL, [[1]], 2, bad), set()),
    "top_p": (lambda bad: generate(MODEL, [[1]], 2, top_p=bad), set()),
    "step": (lambda bad: load_model("nowhere", bad), set()),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_argument_of_no_sense_is_named(name: str) -> None:
    call, fine = CALLS[name]
    for bad in NONSENSE:
        if str(bad)[:3] in fine:
            continue
        with pytest.raises((UserError, TypeError, ValueError)) as error:
            call(bad)
        assert name.strip() in str(error.value) and "\n" not in str(error.value), (bad, error.value)


def test_ids_shapes_and_sizes_are_refused_by_name() -> None:
    for call, words in (
        (lambda: MODEL(torch.tensor([[11]])), ["tokens", "0 to 10"]),
        (lambda: MODEL(torch.tensor([[-1]])), ["tokens"]),
        (lambda: MODEL(torch.zeros(3, dtype=torch.int64)), ["tokens", "(3,)"]),
        (lambda: MODEL.loss(TOKENS, torch.full((1, 3), 40)), ["targets", "0 to 10"]),
        (lambda: attend(Q, Q[:, :, :1].expand(1, 3, 3, 4), Q[:, :, :1].expand(1, 3, 3, 4), AT, AT), ["multiple of K"]),
        (lambda: attend(Q, Q, Q, AT[:, :2], AT), ["q_pos (1, 2)"]),
        (lambda: rope(Q[..., :3], AT, 1e4), ["even"]),
        (lambda: extend(Cache.empty(SPEC, 1, 4), AT, z=torch.zeros(1, 3, 2, 3)), ["'k'", "'z'"]),
        (lambda: Cache.empty(SPEC, 2**30, 2**30), ["would take"]),
        (lambda: MODEL.empty_cache(1, 2**30), ["would take"]),
        (lambda: Decoder(ModelConfig(vocab_size=2**31 - 1, d_model=2**14, n_heads=2)), ["parameters would take"]),
        (lambda: generate(MODEL, [[1]], 2**31 - 1), ["would take"]),
        (lambda: load_model("nowhere", device="abacus"), ["'abacus'"]),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert all(word in str(error.value) for word in words), error.value


def test_numbers_of_other_libraries_become_pythons() -> None:
    config = TrainConfig(steps=np.int64(7), lr=np.float32(0.5))  # type: ignore[arg-type]
    assert type(config.steps) is int and type(config.lr) is float
    assert ModelConfig(mechanisms=["mla", "mha"]).mechanisms == ("mla", "mha")  # type: ignore[arg-type]


@dataclass
class Own:
    count: Count = 3
    share: Share | None = 0.5
    kind: Literal["a", "b"] = "a"
    other: Any = None
    free: Annotated[float, Range()] = 0.0


class Inner(TypedDict):
    number: Count


class Outer(TypedDict):
    inner: Inner
    many: NotRequired[dict[str, list[float]]]


def test_ranges_in_words() -> None:
    assert Range(1).words == "at least 1" and Range(above=0, most=1).words == "above 0 and at most 1"
    assert Range(0, 1).words == "from 0 to 1" and Range().words == "finite"
    check_fields(Own(share=None, other=object()))
    for field, value, words in (
        ("count", True, "a whole number"),
        ("count", 10**5000, "digits"),
        ("share", 1.5, "from 0 to 1"),
        ("kind", None, "expected one of a, b"),
        ("free", math.inf, "finite"),
    ):
        with pytest.raises(UserError, match=words) as error:
            check_fields(Own(**{field: value}), "own.")
        assert f"own.{field}" in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "x lacks inner"),
        ('{"inner": {"number": 0}}', "inner.number is 0"),
        ('{"inner": [1]}', "inner is [1]: it must be an object"),
        ('{"inner": {"number": 1}, "many": {"a": [1, null]}}', "many.a is None"),
        ("[" * 100_000, "nested too deeply"),
        ('{"inner": ' + "8" * 6000 + "}", "not readable JSON"),
        ('{"inner": {"number": 1}, "more": "\\udfff"}', "not readable JSON"),
        ('"\\ud83d\\ude00"', "must be an object"),
        ("", "not readable JSON"),
    ],
)
def test_json_of_another_kind_is_one_sentence(text: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse_json("x", text, Outer, "mend it")
    assert said in str(error.value) and str(error.value).startswith("x") and str(error.value).endswith("mend it")
    assert parse_json("x", '{"inner": {"number": 2}, "more": "\\ud83d\\ude00"}', Outer)["more"] == "😀"


def test_values_are_quoted_on_one_line(tmp_path: Path) -> None:
    class Loud:
        def __repr__(self) -> str:
            raise RuntimeError

    assert quoted("a\nb") == r"'a\nb'" and quoted(Loud()) == "a Loud" and len(quoted("z" * 10**6)) < 120
    with pytest.raises(UserError, match="whole number"):
        check_value("n", json.loads("1.5"), Count)
