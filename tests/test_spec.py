"""What all mechanisms share: masks, what a cache costs, and what a config refuses."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from attnlab import attention
from attnlab.errors import UserError, choose, need
from attnlab.spec import CAUSAL, AttentionConfig, CacheSpec, Mask, RopeScaling


def test_a_choice_is_the_word_or_a_sentence_that_names_the_nearest() -> None:
    assert choose("fruit", "pear", (name for name in ("apple", "pear"))) == "pear"
    with pytest.raises(UserError, match=r"^unknown fruit 'peer': expected one of apple, pear; did you mean 'pear'\?$"):
        choose("fruit", "peer", ["apple", "pear"])
    with pytest.raises(UserError, match=r"^unknown fruit 'zzz': expected one of apple, pear$"):
        choose("fruit", "zzz", ["apple", "pear"])


def test_a_users_error_is_met_by_every_process() -> None:
    assert UserError("x").shared and isinstance(UserError("x"), ValueError)


def test_what_is_not_installed_is_told_from_what_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert need("json.decoder", "any") is sys.modules["json.decoder"]
    for missing in ("attnlab_has_no_such_thing", "attnlab_has_no_such_thing.at_all"):
        with pytest.raises(UserError, match=rf"this needs {missing}, .*pip install 'attnlab\[some\]'"):
            need(missing, "some")
    (tmp_path / "broken_for_attnlab.py").write_text("import attnlab_has_no_such_thing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="attnlab_has_no_such_thing"):
        need("broken_for_attnlab", "some")


@pytest.mark.parametrize("window", [None, 1, 3])
def test_a_mask_sees_backwards_as_far_as_its_window(window: int | None) -> None:
    places = np.arange(-1, 8)
    seen = Mask(window=window)(places[:, None], places[None])
    for i, q in enumerate(places):
        visible = [k for k in range(q + 1) if window is None or k in range(q - window + 1, q + 1)]
        assert [k for k, yes in zip(places, seen[i], strict=True) if yes] == visible
    assert Mask() == CAUSAL != Mask(window=4) and not CAUSAL.plain


class Memory:
    """The rows of a `CacheSpec`, one token after another."""

    def __init__(self, spec: CacheSpec) -> None:
        self.spec, self.rows, self.waiting = spec, 0, 0
        self.beside = [Memory(other) for other in spec.beside.values()]

    def pass_one(self) -> None:
        self.waiting += 1
        if self.waiting == self.spec.every:
            self.waiting, self.rows = 0, self.rows + 1
        if self.spec.keep is not None and self.rows > self.spec.keep:
            self.rows = self.spec.keep
        for other in self.beside:
            other.pass_one()

    def floats(self, read: bool) -> int:
        total = sum(np.prod(shape, dtype=int) for shape in self.spec.state.values())
        for name, shape in self.spec.rows.items():
            most = self.spec.reads.get(name) if read else None
            total += np.prod(shape, dtype=int) * (self.rows if most is None else sorted([self.rows, most])[0])
        return total + sum(other.floats(read) for other in self.beside)


def drawn(draw: random.Random, depth: int = 1) -> CacheSpec:
    def shape() -> tuple[int, ...]:
        return tuple(draw.randint(1, 4) for _ in range(draw.randint(0, 3)))

    rows = {name: shape() for name in "abc"[: draw.randint(0, 3)]}
    return CacheSpec(
        rows,
        keep=draw.choice([None, None, 1, 4]),
        state={"s": shape(), "t": shape()} if draw.random() < 0.4 else {},
        every=draw.choice([1, 1, 2, 3]),
        beside={name: drawn(draw, depth - 1) for name in "xy"[: draw.randint(0, 2)]} if depth else {},
        reads={name: draw.randint(1, 5) for name in rows if draw.random() < 0.5},
    )


@pytest.mark.parametrize("seed", range(12))
def test_what_a_cache_costs_is_counted_token_by_token(seed: int) -> None:
    spec = drawn(random.Random(seed), 2)
    memory, costs = Memory(spec), []
    for tokens in range(40):
        costs.append(spec.floats(tokens))
        assert spec.slots(tokens) == memory.rows
        assert (costs[-1], spec.read(tokens)) == (memory.floats(False), memory.floats(True))
        memory.pass_one()
    plain = CacheSpec(spec.rows)  # each token is a row
    assert plain.slots(7) == 7 and plain.floats(7) == plain.read(7) == 7 * plain.per_token
    assert spec.per_token == pytest.approx((costs[36] - costs[24]) / 12)  # whole groups, and every ring is full


def test_rope_scaling_is_refused_from_the_first_value_that_makes_no_sense() -> None:
    RopeScaling(factor=1e-9, original=1, slow=1e-9, fast=2e-9)
    for wrong in ({"factor": 0.0}, {"factor": -1.0}, {"original": 0}, {"slow": 0.0}, {"slow": 4.0}, {"fast": 1.0}):
        with pytest.raises(UserError, match=r"rope_scaling\.\w+ is [-\d.]+( and fast|: it must be)"):
            RopeScaling(**wrong)
    with pytest.raises(UserError, match=r"unknown rope_scaling\.kind 'yarnn'"):
        RopeScaling(kind="yarnn")  # type: ignore[arg-type]


ROWS = CacheSpec({"k": (2,)})


@dataclass(frozen=True, kw_only=True)
class Mine(AttentionConfig):
    """The first line.

    And more."""

    spec: CacheSpec = ROWS

    @property
    def cache_spec(self) -> CacheSpec:
        return self.spec


def test_a_mechanism_is_refused_from_the_first_value_that_makes_no_sense() -> None:
    for name in ("d_model", "n_heads"):
        assert getattr(Mine(**{name: 1}), name) == 1
    assert Mine(head_dim=2).head_dim == 2 and Mine(head_dim=1, rope_theta=None).head_dim == 1
    for name in ("d_model", "n_heads", "head_dim"):
        with pytest.raises(UserError, match=rf"^{name} is 0: it must be at least 1$"):
            Mine(**{name: 0})
    with pytest.raises(UserError, match="head_dim is 3: rotary embedding turns pairs"):
        Mine(head_dim=3)
    assert Mine(dropout=0.0).dropout == 0.0 and Mine(dropout=0.999).dropout == 0.999
    for value in (-0.001, 1.0):
        with pytest.raises(UserError, match=f"dropout is {value}"):
            Mine(dropout=value)
    with pytest.raises(UserError, match="unknown impl 'spda'"):
        Mine(impl="spda")


def test_a_mechanism_without_kernels_takes_any_and_ignores_it() -> None:
    for impl in ("reference", "sdpa", "flex"):
        assert attention.config("latent_lookup", impl=impl).impl == impl


def test_a_mechanism_is_summed_up_by_the_first_line_of_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert __doc__ and Mine.summary == __doc__.splitlines()[0]
    monkeypatch.setattr(sys.modules[__name__], "__doc__", None)
    assert type("Bare", (AttentionConfig,), {"__doc__": "Its own line.\n\nMore.", "__module__": __name__}).summary == (
        "Its own line."
    )


def test_a_mechanism_that_sums_itself_up_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a docstring of its module and without one. What is built on it has a file, and a first line, of its own."""
    body = {"summary": "In its own words.", "__doc__": "Its own line.", "__module__": __name__}
    assert type("Said", (AttentionConfig,), body).summary == "In its own words."
    monkeypatch.setattr(sys.modules[__name__], "__doc__", None)
    said = dataclass(frozen=True, kw_only=True)(type("Said", (AttentionConfig,), body))
    assert said.summary == said().summary == "In its own words."
    assert type("Next", (said,), {"__doc__": "The next.", "__module__": __name__}).summary == "The next."


SAID = ("summary", "formula", "source", "caches", "impls", "carries", "breaks", "from_latent", "selects", "swatch")


@pytest.mark.parametrize("name", attention.names())
def test_what_a_mechanism_declares_is_what_its_class_says(name: str) -> None:
    own = vars(attention.module(name).Config)
    for variable in SAID:
        assert attention.declared(name, variable) == (None if variable == "summary" else own.get(variable))
    assert len(attention.declared(name, "swatch")) == 3
    assert attention.declared(name, "modes") == own.get("modes") and attention.declared(name, "variants_") is None


def test_no_two_mechanisms_look_alike() -> None:
    swatches = [attention.declared(name, "swatch") for name in attention.names()]
    assert len({(marker, dash) for _, marker, dash in swatches}) == len(swatches)


def test_what_a_mechanism_declares_is_read_without_a_framework() -> None:
    code = "import sys; from attnlab import attention; print(attention.declared('msla', 'selects'), *sys.modules)"
    words = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert words[0] == "top_k" and "attnlab.attention" in words and not {"torch", "attnlab.attention.msla"} & {*words}


def test_somebody_elses_mechanism_is_read_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "attnlab_somebodys" / "inner"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    text = """
        raise RuntimeError("imported")
        class Other: swatch = (9, 9, 9)
        class Config(mha.Config):
            swatch: ClassVar[tuple[int, int, int]] = (1, 2, 3)
            source = caches = "é"
            formula = "a" + str(1)
            breaks: tuple[str, ...]
            rank: int = 4
        """
    (package / "good.py").write_text(textwrap.dedent(text), "utf-8")
    (package / "torn.py").write_text("class Config(:")
    (package / "bare.py").write_text("Config = 3")
    (tmp_path / "attnlab_alone.py").write_text("class Config:\n    swatch = (4, 5, 6)")
    monkeypatch.syspath_prepend(tmp_path)
    places = {name: f"attnlab_somebodys.inner.{name}" for name in ("good", "torn", "bare", "absent")}
    places |= {"alone": "attnlab_alone", "nowhere": "attnlab_nowhere", "no_package": "attnlab_alone.inner"}
    points = {f"their_{name}": EntryPoint(name, place, "attnlab.attention") for name, place in places.items()}
    monkeypatch.setattr(attention, "_others", lambda: points)
    found = {name: attention.declared(f"their_{name}", "swatch") for name in places}
    assert found == dict.fromkeys(places) | {"good": (1, 2, 3), "alone": (4, 5, 6)}
    more = [attention.declared("their_good", word) for word in ("source", "caches", "formula", "breaks", "rank")]
    assert more == ["é", "é", None, None, 4]
    for label in ("their_unknown", "mha+mla", "", ".."):
        assert attention.declared(label, "swatch") is None


def test_only_rows_can_be_taken_back() -> None:
    assert Mine().rewinds and Mine().relative
    assert Mine(spec=replace(ROWS, beside={"x": ROWS, "y": ROWS})).rewinds
    for spoilt in (replace(ROWS, keep=3), replace(ROWS, state={"s": (2,)})):
        assert not Mine(spec=spoilt).rewinds
        assert not Mine(spec=replace(ROWS, beside={"x": ROWS, "y": spoilt})).rewinds


@pytest.mark.parametrize("value", [Mask(), ROWS, RopeScaling(), Mine()])
def test_what_a_mechanism_says_of_itself_stays_as_it_is(value: object) -> None:
    first = fields(value)[0].name  # type: ignore[arg-type]
    with pytest.raises(FrozenInstanceError):
        setattr(value, first, getattr(value, first))


def test_options_of_rope_scaling_and_of_mechanisms_are_given_by_name() -> None:
    for kind, first in ((RopeScaling, "yarn"), (AttentionConfig, 64)):
        with pytest.raises(TypeError, match="positional"):
            kind(first)


@pytest.mark.parametrize("variable", ["source", "swatch", "breaks"])
def test_a_class_variable_is_no_option(variable):
    with pytest.raises(
        UserError, match=rf"unknown option of mla '{variable}': expected one of bias, d_model, .*kv_rank"
    ):
        attention.config("mla", **{variable: "x"})
