"""What a config refuses, to the last allowed value, and what follows from it."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from typing import Any

import pytest

from attnlab.config import DataConfig, Execution, ExpertsConfig, ModelConfig, RunConfig, TrainConfig, from_dict, to_dict
from attnlab.errors import UserError

MODEL = ModelConfig(d_model=4, n_heads=1)


@pytest.mark.parametrize("name", ["vocab_size", "context", "n_layers", "d_model", "n_heads"])
def test_sizes_of_a_model_begin_at_one(name: str) -> None:
    assert getattr(replace(MODEL, **{name: 1}), name) == 1
    for value in (0, -3):
        with pytest.raises(UserError, match=rf"^model\.{name} is {value}: it must be at least 1$"):
            replace(MODEL, **{name: value})


@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        *((name, [1, 2], [0, -1]) for name in ("steps", "batch_size", "accumulate", "log_every")),
        *((name, [1, 2], [0, -1]) for name in ("eval_every", "eval_batches", "save_every")),
        ("keep", [0, 1], [-1]),
        ("lr", [1e-9, 2.0], [0.0, -1e-9]),
        ("decay", [1e-9, 1.0], [0.0, -0.1, 1.001]),
        ("distill", [0.0, 0.5, 1.0], [-0.001, 1.001]),
        ("spike", [0.0, 3.0], [-0.001]),
        ("optimizer", ["adamw", "muon"], ["adam"]),
        ("schedule", ["cosine", "wsd"], ["cosin"]),
        ("precision", ["auto", "fp32", "bf16", "fp16"], ["fp8"]),
        ("guard", ["stop", "skip", "rewind"], ["go"]),
        ("train", ["all", "attention", "new"], ["none"]),
    ],
)
def test_training_is_refused_from_the_first_value_that_makes_no_sense(name: str, allowed: Any, refused: Any) -> None:
    for value in allowed:
        assert getattr(TrainConfig(**{name: value}), name) == value
    for value in refused:
        with pytest.raises(UserError, match=rf"train\.{name} .*{re.escape(str(value))}"):
            TrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("field", "given"),
    [("positions", "rotary"), ("norm", "batch"), ("ff", "relu"), ("balance", "none")],
)
def test_a_word_that_is_no_choice_is_refused(field: str, given: str) -> None:
    with pytest.raises(UserError, match=rf"unknown model\.{field} '{given}': expected one of"):
        replace(MODEL, **{field: given})


def test_data_is_refused_from_the_first_value_that_makes_no_sense() -> None:
    assert DataConfig(val_fraction=0.999).val_fraction == 0.999 and DataConfig(pack="documents").pack == "documents"
    for value in (0.0, 1.0, -0.1):
        with pytest.raises(UserError, match=rf"val_fraction is {value}"):
            DataConfig(val_fraction=value)
    with pytest.raises(UserError, match=r"data\.pack 'document'"):
        DataConfig(pack="document")  # type: ignore[arg-type]


def test_experts_are_refused_from_the_first_value_that_makes_no_sense() -> None:
    for allowed in ({"width": 1}, {"width": None}, {"shared": 0}, {"dense_layers": 0}, {"shared": 2, "width": 3}):
        ExpertsConfig(**allowed)
    for refused in ({"width": 0}, {"shared": -1}, {"dense_layers": -1}, {"shared": 1, "dense_layers": -1, "width": 1}):
        with pytest.raises(UserError, match=r"model\.experts\.\w+ is -?\d+: it must be at least"):
            ExpertsConfig(**refused)
    with pytest.raises(UserError, match=r"model\.experts\.score 'max'"):
        ExpertsConfig(score="max")  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [1, 4, 6])
def test_groups_of_experts_are_equal_and_leave_enough_to_choose(n: int) -> None:
    """Every small case, against the groups written out."""
    seen = set()
    for groups, kept, best, chosen in itertools.product(*[range(4)] * 3, {0, 1, n - 1, n, n + 1}):
        if min(groups, kept, best) < 1:
            with pytest.raises(UserError, match="must be at least 1"):
                ExpertsConfig(groups=groups, groups_kept=kept, group_best=best)
            continue
        experts = ExpertsConfig(groups=groups, groups_kept=kept, group_best=best)
        parts = [range(k, n, groups) for k in range(groups)]
        fine = bool(parts) and len({len(part) for part in parts}) == 1 and best in range(1, len(parts[0]) + 1)
        fine = fine and kept in range(1, groups + 1) and chosen in range(1, sum(map(len, parts[:kept])) + 1)
        try:
            replace(MODEL, ff="moe", n_experts=n, experts_per_token=chosen, experts=experts)
            assert fine, (groups, kept, best, chosen)
        except UserError as error:
            assert not fine, (groups, kept, best, chosen)
            assert str(error).startswith("model.experts_per_token is" if not 1 <= chosen <= n else "model.experts has")
        seen.add(fine)
    assert seen == {True, False}
    replace(
        MODEL, ff="gelu", n_experts=n, experts_per_token=n + 1, experts=ExpertsConfig(groups=n + 3)
    )  # not looked at


def test_heads_divide_the_model_or_have_a_size_of_their_own() -> None:
    assert replace(MODEL, d_model=12, n_heads=3).head_dim is None
    assert replace(MODEL, d_model=13, n_heads=3, head_dim=8).head_dim == 8
    with pytest.raises(UserError, match=r"model\.d_model 13 does not divide into model\.n_heads 3"):
        replace(MODEL, d_model=13, n_heads=3)


def test_layers_repeat_the_mechanisms_and_options_belong_to_one_of_them() -> None:
    mixed = replace(MODEL, n_layers=5, mechanisms=("sliding", "sliding", "mla"))
    assert mixed.layers == ["sliding", "sliding", "mla", "sliding", "sliding"]
    assert RunConfig(model=mixed).mechanism == "sliding+mla" and RunConfig(model=MODEL).mechanism == "mha"
    assert replace(mixed, options={"mla": {}, "mla@2": {}, "sliding@4": {}}).options
    for unused in ("mha", "mla@3", "mla@5", "sliding@2", "sliding@5"):
        with pytest.raises(UserError, match=f"options names {unused}, which no layer uses"):
            replace(mixed, options={"mla": {}, unused: {}})
    with pytest.raises(UserError, match="mechanisms is empty"):
        replace(MODEL, mechanisms=())


def test_what_is_not_given_follows_from_the_rest() -> None:
    assert (MODEL.resolved_norm_eps, replace(MODEL, norm="rms").resolved_norm_eps) == (1e-5, 1e-6)
    assert replace(MODEL, norm="rms", norm_eps=0.5).resolved_norm_eps == 0.5
    for d in range(1, 50):
        model = replace(MODEL, d_model=d)
        two_thirds = next(width for width in itertools.count(8, 8) if 3 * width >= 8 * d)
        gated = replace(model, ff="moe", experts=ExpertsConfig(kind="swiglu"))
        plain = replace(model, ff="moe", experts=ExpertsConfig(kind="gelu"))
        assert [each.resolved_ff_dim for each in (model, plain)] == [4 * d] * 2
        assert [each.resolved_ff_dim for each in (replace(model, ff="swiglu"), gated)] == [two_thirds] * 2
        assert replace(gated, ff_dim=d).resolved_ff_dim == gated.experts.groups * d == d
    assert (gated.ff_kind, plain.ff_kind, replace(gated, ff="relu2").ff_kind) == ("swiglu", "gelu", "relu2")
    assert gated.resolved_expert_dim == gated.resolved_ff_dim
    assert replace(gated, experts=ExpertsConfig(width=3)).resolved_expert_dim == 3
    dense = replace(gated, n_layers=4, experts=ExpertsConfig(dense_layers=2))
    assert [dense.has_experts(layer) for layer in range(4)] == [False, False, True, True]
    assert not any(replace(dense, ff="gelu").has_experts(layer) for layer in range(4))


def test_a_teacher_and_its_share_come_together() -> None:
    assert RunConfig(teacher="old", train=TrainConfig(distill=0.5)).teacher == "old"
    for teacher, share in (("old", 0.0), ("", 0.5)):
        with pytest.raises(UserError, match="give both, or neither"):
            RunConfig(teacher=teacher, train=TrainConfig(distill=share))


def test_the_key_changes_with_every_part_but_the_name() -> None:
    run = RunConfig()
    others = [
        replace(run, seed=1),
        replace(run, init="old"),
        replace(run, data=DataConfig(tokenizer="byte")),
        replace(run, train=replace(run.train, clip=0.5)),
        replace(run, model=replace(run.model, mechanisms=("mla",))),
        replace(run, model=replace(run.model, options={"mha": {"bias": True}})),
        replace(run, model=replace(run.model, options={"mha@1": {"bias": True}})),
    ]
    keys = [each.key for each in (run, *others)]
    assert len(set(keys)) == len(keys) and all(re.fullmatch("[0-9a-f]{12}", key) for key in keys)
    assert replace(run, name="other").key == run.key == from_dict(RunConfig, json.loads(json.dumps(to_dict(run)))).key


@pytest.mark.parametrize("kind", [ExpertsConfig, ModelConfig, DataConfig, TrainConfig, RunConfig, Execution])
def test_configs_are_given_by_name_and_stay_as_they_are(kind: type[Any]) -> None:
    first = fields(kind)[0].name
    with pytest.raises(FrozenInstanceError):
        setattr(kind(), first, getattr(kind(), first))
    with pytest.raises(TypeError, match="positional"):
        kind(getattr(kind(), first))


def test_the_key_does_not_depend_on_the_order_of_options() -> None:
    one, other = {"mla": {"kv_rank": 8, "bias": True}, "mha": {}}, {"mha": {}, "mla": {"bias": True, "kv_rank": 8}}
    mixed = replace(MODEL, mechanisms=("mha", "mla"))
    assert len({RunConfig(model=replace(mixed, options=options)).key for options in (one, other)}) == 1


def test_plain_experts_have_nothing_of_deepseeks() -> None:
    plain = ExpertsConfig(width=None, shared=0, dense_layers=0, scale=1.0, groups=1, groups_kept=1, group_best=1)
    assert ExpertsConfig() == plain and plain.normalize and not Execution().recompute


@dataclass(frozen=True)
class Inner:
    pair: tuple[int, int] | None = None
    ends: tuple[str, ...] = ()
    any: list[int] | None = None


@dataclass(frozen=True)
class Outer:
    inner: Inner
    name: str = "x"


def test_tuples_come_back_from_json_and_lists_stay() -> None:
    for inner in (Inner(), Inner((1, 2), ("a",), [3])):
        assert from_dict(Outer, to_dict(Outer(inner))) == Outer(inner)
    made = from_dict(Outer, {"inner": {"pair": [1, 2], "any": [1, 2]}})
    assert made.inner.pair == (1, 2) and made.inner.any == [1, 2]


def test_an_unknown_field_is_named_with_its_place() -> None:
    with pytest.raises(UserError, match=r"unknown field in Outer 'inne': .*did you mean 'inner'"):
        from_dict(Outer, {"inne": {}})
    with pytest.raises(UserError, match=r"^unknown field in inner 'pairs': expected one of any, ends, pair"):
        from_dict(Outer, {"inner": {"pairs": [1, 2]}})
    with pytest.raises(UserError, match=r"^unknown field in model\.experts 'shard': .*did you mean 'shared'"):
        from_dict(RunConfig, {"model": {"experts": {"shard": 1}}})


def test_what_would_never_end_is_refused() -> None:
    assert replace(MODEL, n_layers=10_000).n_layers == 10_000
    for layers in (10_001, 10**7, 10**30):
        with pytest.raises(UserError, match=r"^model\.n_layers is \S.*: it must be from 1 to 10000$"):
            replace(MODEL, n_layers=layers)
    assert TrainConfig(batch_size=1000, accumulate=1000).accumulate == 1000
    for batch_size, accumulate in ((1, 10**9), (1001, 1000), (10**9, 1)):
        with pytest.raises(UserError, match=rf"train\.accumulate {accumulate} is more than 1,000,000 sequences a step"):
            TrainConfig(batch_size=batch_size, accumulate=accumulate)
