"""Verdicts: which intervals decide them, what they say, and what is said of them."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from attnlab import contrasts as module
from attnlab.contrasts import (
    Judging,
    contrasts,
    needed,
    of_losses,
    of_tasks,
    seeds_needed,
    sentences,
    verdict_in_words,
    verdict_on,
)
from attnlab.errors import UserError
from attnlab.results import RunResult, TaskResult
from attnlab.spread import dunnett_quantile, sidak_quantile, spread_of
from attnlab.stats import t_quantile


@pytest.mark.parametrize(
    ("interval", "word"),
    [
        (None, "too few seeds"),
        ((-0.3, -0.1), "better"),
        ((-0.3, 0.0), "undecided"),  # touches 0
        ((-0.3, 0.1), "undecided"),
        ((0.0, 0.3), "undecided"),
        ((0.1, 0.3), "worse"),
        ((-0.009, 0.009), "equal"),
        ((-0.01, 0.005), "undecided"),  # touches the margin
        ((-0.005, 0.01), "undecided"),
        ((0.002, 0.009), "equal"),  # a difference that does not matter
        ((0.002, 0.011), "worse"),
        ((-0.011, -0.002), "better"),
    ],
)
def test_verdicts(interval, word):
    assert verdict_on(interval, 0.01) == word


def test_verdicts_in_words():
    assert verdict_in_words("equal", 0.01) == "equal within 0.01"
    assert verdict_in_words("equal", 0.0125) == "equal within 0.0125"
    assert verdict_in_words("better", 0.01) == "better"
    assert verdict_in_words("not distinguishable", 0.01) == "undecided", "of an earlier version"


def runs(seeds=4, spread=0.002, seed=1, **differences):
    """Losses by mechanism and seed; the baseline is `base`."""
    draw = random.Random(seed)
    blocks = [2 + draw.gauss(0, 0.1) for _ in range(seeds)]
    return {
        name: {i: blocks[i] + difference + draw.gauss(0, spread) for i in range(seeds)}
        for name, difference in {"base": 0.0, **differences}.items()
    }


def judged(losses, **choices):
    rows, about = contrasts(losses, "base", Judging(**choices))
    json.dumps([rows, about], allow_nan=False)
    return {row["mechanism"]: row for row in rows}, about


def test_pooled_intervals_are_dunnetts():
    losses = runs(a=-0.1, b=0.0, c=0.1)
    rows, about = judged(losses, intervals="pooled")
    names = list(losses)
    means = {name: sum(own.values()) / 4 for name, own in losses.items()}
    blocks = [sum(losses[name][i] for name in names) / 4 for i in range(4)]
    middle = sum(blocks) / 4
    square = sum((losses[n][i] - means[n] - blocks[i] + middle) ** 2 for n in names for i in range(4)) / 9
    half = dunnett_quantile(0.95, 3, 9) * math.sqrt(2 * square / 4)
    for name in "abc":
        difference = means[name] - means["base"]
        assert rows[name]["difference"] == pytest.approx(difference)
        assert rows[name]["interval"] == rows[name]["pooled"] == pytest.approx([difference - half, difference + half])
    assert about["pool"]["degrees"] == 9 and about["pool"]["mean_square"] == pytest.approx(square)
    assert (about["by"], about["comparisons"], about["margin"]) == ("pooled", 3, 0.01)
    assert [rows[name]["verdict"] for name in names] == ["baseline", "better", "equal", "worse"]
    assert "4 mechanisms and 4 seeds (9 degrees of freedom" in about["why"] and "own pairs" not in about["why"]


def test_pairwise_intervals_are_students_with_sidaks_correction():
    losses = runs(a=-0.1, b=0.02)
    rows, about = judged(losses, intervals="pairwise")
    for name in "ab":
        pairs = [losses[name][i] - losses["base"][i] for i in range(4)]
        mean = sum(pairs) / 4
        spread = math.sqrt(sum((x - mean) ** 2 for x in pairs) / 3)
        half = sidak_quantile(0.95, 2, 3) * spread / 2
        assert rows[name]["interval"] == rows[name]["pairwise"] == pytest.approx([mean - half, mean + half])
        assert rows[name]["by"] == about["by"] == "pairwise" and rows[name]["pooled"]
    assert about["why"] == "Each interval rests on its own pairs (Student's t, Šidák's correction)."


def test_auto_is_pooled_and_never_narrower():
    rows, about = judged(runs(seeds=5, a=-0.1, b=0.0, c=0.1, d=0.3))
    assert about["by"] == "pooled" and "no interval is narrower" in about["why"]
    for name in "abcd":
        (low, high), (inner, outer) = rows[name]["interval"], rows[name]["pooled"]
        assert low <= inner < outer <= high and rows[name]["by"] == "pooled"
        own = rows[name]["pairwise"][1] - rows[name]["difference"]
        plain = own * t_quantile(0.95, 4) / sidak_quantile(0.95, 4, 4)
        assert high - rows[name]["difference"] >= plain * (1 - 1e-9)


def test_auto_is_pairwise_where_one_spreads_more_and_names_it():
    losses = runs(a=0.0, b=0.0, c=0.0)
    losses["b"][2] += 1.0
    rows, about = judged(losses)
    assert all(rows[name]["interval"] == rows[name]["pairwise"] for name in "abc") and about["by"] == "pairwise"
    assert about["pool"]["widest"] == "b" and about["pool"]["p"] < 0.001 and about["pool"]["ratio"] > 20
    assert about["why"].startswith("The runs of b spread ") and "pooling is not fair" in about["why"]
    assert judged(losses, intervals="pooled")[1]["by"] == "pooled", "who asks for it gets it"
    table = np.array([[losses[name][i] for name in losses] for i in range(4)])
    assert about["pool"]["p"] == pytest.approx(4 * spread_of(table).p.min()) and about["pool"]["p"] > 0
    noisy = runs(a=0.0, b=0.0, c=0.0)
    noisy["base"][1] += 1.0
    assert judged(noisy)[1]["why"].startswith("The runs of base spread ")


def test_a_mechanism_that_alone_varies_is_named():
    losses = {name: {i: float(i) for i in range(3)} for name in ("base", "a", "b")}
    losses["b"] |= {0: 0.5, 1: 0.5}
    assert judged(losses)[1]["why"].startswith("The runs of b alone spread (p = 0), so each interval rests on")


def test_two_seeds_are_not_pooled():
    rows, about = judged(runs(seeds=2, a=0.1, b=0.2))
    assert about["by"] == rows["a"]["by"] == "pairwise" and about["why"].startswith("Two seeds cannot show")
    assert judged(runs(seeds=2, a=0.1))[1]["by"] == "pooled", "two mechanisms have one difference: both are the same"


def test_one_seed_judges_nothing():
    rows, about = judged(runs(seeds=1, a=0.1, b=0.2))
    assert rows["a"]["difference"] == pytest.approx(0.1, abs=0.02)
    assert rows["a"]["interval"] is rows["a"]["by"] is about["by"] is about["pool"] is about["seeds_needed"] is None
    assert (
        rows["a"]["verdict"] == "too few seeds" and about["why"] == "" and sentences(about, list(rows.values())) == []
    )


def test_a_mechanism_that_lacks_seeds_rests_on_its_own_pairs():
    losses = runs(seeds=4, a=0.0, b=0.1, c=0.2)
    del losses["c"][1], losses["c"][3]
    rows, about = judged(losses)
    assert about["pool"]["mechanisms"] == ["base", "a", "b"] and about["pool"]["seeds"] == [0, 1, 2, 3]
    assert rows["c"]["by"] == "pairwise" and rows["c"]["pooled"] is None and rows["c"]["n"] == 2
    assert "c lacks seeds, where own pairs decide." in about["why"]
    half = rows["c"]["interval"][1] - rows["c"]["difference"]
    pairs = [losses["c"][i] - losses["base"][i] for i in (0, 2)]
    assert half == pytest.approx(sidak_quantile(0.95, 3, 1) * abs(pairs[0] - pairs[1]) / 2)
    assert half == pytest.approx(rows["c"]["pairwise"][1] - rows["c"]["difference"])


def test_the_pool_is_the_larger_of_the_complete_blocks():
    """Where most lack the last seed, it is left out of the residuals, and counts in the mean of the one that has it."""
    losses = runs(seeds=4, a=0.0, b=0.1, c=0.2)
    for name in "bc":
        del losses[name][3]
    rows, about = judged(losses, intervals="pooled")
    assert about["pool"]["mechanisms"] == ["base", "a", "b", "c"] and about["pool"]["seeds"] == [0, 1, 2]
    halves = {name: rows[name]["interval"][1] - rows[name]["difference"] for name in "abc"}
    assert halves["b"] == halves["c"] and halves["a"] / halves["b"] == pytest.approx(math.sqrt(3 / 4))
    assert rows["a"]["difference"] == pytest.approx(sum(losses["a"][i] - losses["base"][i] for i in range(4)) / 4)
    quantile = about["pool"]["quantile"]
    assert quantile == dunnett_quantile(0.95, 3, 6, 0.375) > dunnett_quantile(0.95, 3, 6)


def test_the_pool_has_the_most_degrees_of_freedom():
    losses = runs(seeds=5, a=0.0, b=0.1, c=0.2, d=0.3, e=0.4)
    for name in "cde":
        del losses[name][0], losses[name][4]
    pool = judged(losses)[1]["pool"]
    assert pool["mechanisms"] == ["base", *"abcde"] and pool["seeds"] == [1, 2, 3] and pool["degrees"] == 10
    for name in "cde":
        del losses[name][1]
    pool = judged(losses)[1]["pool"]
    assert pool["mechanisms"] == ["base", "a", "b"] and pool["degrees"] == 8


def test_seeds_that_only_one_has_pair_with_nothing():
    losses = runs(seeds=3, a=0.0, b=0.1)
    losses["a"][7] = 9.0
    losses["base"][8] = 9.0
    rows, about = judged(losses)
    assert rows["a"]["n"] == 4 and about["pool"]["seeds"] == [0, 1, 2] and abs(rows["a"]["difference"]) < 0.01


def test_runs_that_are_all_the_same_are_equal():
    losses = {name: dict.fromkeys(range(3), 2.0) for name in ("base", "a", "b")}
    rows, about = judged(losses)
    assert rows["a"]["interval"] == [0, 0] and rows["a"]["verdict"] == "equal" and about["seeds_needed"] == 2


def test_the_margin_decides():
    losses = runs(seeds=5, spread=0.001, a=0.02, b=0.0)
    assert [judged(losses, margin=m)[0]["a"]["verdict"] for m in (0.001, 0.01, 0.1)] == ["worse", "worse", "equal"]
    assert judged(losses, margin=1e-6)[0]["b"]["verdict"] == "undecided"
    for margin in (0, -1, math.nan, math.inf):
        with pytest.raises(UserError, match="margin is"):
            Judging(margin=margin)
    with pytest.raises(UserError, match="unknown intervals 'holm'"):
        Judging("holm")


@pytest.mark.parametrize("kind", ["auto", "pooled", "pairwise"])
def test_seeds_that_are_needed_are_the_fewest(kind):
    for variance, comparisons in ((1e-6, 7), (1.5e-5, 3), (1e-4, 1), (1e-4, 7), (4e-4, 3)):
        seeds = seeds_needed(variance, comparisons, 0.01, kind) or 0  # 0, which no answer is: more than are ever named
        assert seeds >= 2

        def short(n, variance=variance, comparisons=comparisons):
            degrees = (1 if kind == "pairwise" else comparisons) * (n - 1)
            quantile = (sidak_quantile if kind == "pairwise" else dunnett_quantile)(0.95, comparisons, degrees)
            if kind == "auto":
                quantile = max(quantile, t_quantile(0.95, n - 1))
            return (quantile + t_quantile(0.6, degrees)) * math.sqrt(variance / n) - 0.01

        assert short(seeds) <= 0
        assert seeds == 2 or short(seeds - 1) > 0
    spreads = [seeds_needed(x, 4, 0.01, kind) for x in (0.0, 1e-6, 1e-4, 1e-3, 1e-2)]
    assert spreads[0] == 2 and all(a <= b for a, b in pairwise(spreads))
    assert seeds_needed(1.0, 4, 0.01, kind) is None


def test_seeds_are_named_up_to_ten_thousand():
    """One comparison with so many seeds is normal: (1.96 + 0.84)**2 times the variance over the squared margin."""
    for variance, kind in ((0.1273, "pooled"), (0.1273, "pairwise"), (0.1273, "auto")):
        assert 9_980 < (seeds_needed(variance, 1, 0.01, kind) or 0) <= 10_000
        assert seeds_needed(0.1276, 1, 0.01, kind) is None and seeds_needed(0.4, 1, 0.01, kind) is None


def test_rows_of_losses():
    """Runs that did not finish, or have no loss, or are of no mechanism that is compared, count nowhere."""
    about = {"name": "r", "key": "k"}
    cells = [
        RunResult(mechanism=m, seed=s, val_loss=x + s, **about) for m, x in (("base", 1.0), ("a", 1.5)) for s in (0, 1)
    ]
    cells += [
        RunResult(mechanism="a", seed=2, val_loss=9.0, status="interrupted", **about),
        RunResult(mechanism="base", seed=2, val_loss=None, **about),
        RunResult(mechanism="other", seed=0, val_loss=9.0, **about),
    ]
    rows, statistics = of_losses(cells, ["base", "a", "none"], "base", Judging(margin=0.6))
    assert [(row["mechanism"], row["n"], row["val_loss"]) for row in rows] == [
        ("base", 2, 1.5), ("a", 2, 2.0), ("none", 0, None),
    ]  # fmt: skip
    assert rows[1]["difference"] == 0.5 and rows[1]["verdict"] == "equal" and statistics["margin"] == 0.6
    assert rows[2]["difference"] is None and rows[2]["verdict"] == "too few seeds"


def test_rows_of_answers_are_better_where_more_are_right():
    share = {"base": (0.5, 0.6, 0.7, 0.8), "a": (0.61, 0.7, 0.81, 0.9), "b": (0.5, 0.602, 0.7, 0.8), "c": (0.1,)}
    cells = [
        TaskResult(task="t", mechanism=m, seed=s, key="k", accuracy=x)
        for m, own in share.items()
        for s, x in enumerate(own)
    ]
    cells += [TaskResult(task="t", mechanism=m, seed=9, key="k", accuracy=x) for m, x in (("a", None), ("other", 0.5))]
    found, statistics = of_tasks(cells, [*share, "none"], "base", Judging("auto", 5.0))
    rows = {row["mechanism"]: row for row in found}
    assert [row["verdict"] for row in found] == ["baseline", "better", "equal", *["too few seeds"] * 2]
    assert rows["a"]["accuracy"] == pytest.approx(0.755) and rows["a"]["difference"] == pytest.approx(0.105)
    assert rows["c"]["difference"] == pytest.approx(-0.4) and rows["none"]["accuracy"] is None
    assert rows["none"]["difference"] is rows["base"]["difference"] is rows["c"]["interval"] is None
    for name in ("interval", "pooled", "pairwise"):
        low, high = rows["a"][name]
        assert low < 0.105 < high and low + high == pytest.approx(0.21)
    assert statistics["margin"] == module.MARGIN == 0.01, "that of the losses, in nats, is for losses"
    cells[0] = replace(cells[0], accuracy=None)
    assert of_tasks(cells, [*share], "base", Judging())[0][0]["n"] == 3


def test_what_is_said_of_the_seeds():
    rows, about = judged(runs(seeds=3, spread=0.02, a=0.0, b=0.01))
    said = sentences(about, list(rows.values()))
    assert said[0].startswith("All intervals together hold with 95 % confidence. ")
    assert said[1] == f"To see 0.01 nats you need about {about['seeds_needed']:,} seeds."
    assert needed(about | {"seeds_needed": None}) == "To see 0.01 nats you need more than 10,000 seeds."
    assert needed({"margin": 0.01}) == "" and module.MOST_SEEDS == 10_000
    rows, about = judged(runs(seeds=5, spread=1e-4, a=0.0))
    assert len(sentences(about, list(rows.values()))) == 1, "nothing is left to be decided"
