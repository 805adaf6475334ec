"""Intervals that hold together: Dunnett's quantiles, the guards, the test, and how often all of it holds."""

from __future__ import annotations

import math
from statistics import variance

import numpy as np
import pytest
from scipy import stats as scipy_stats

from attnlab import spread as module
from attnlab.errors import UserError
from attnlab.spread import CONFIDENCE, dunnett_quantile, guarded_widths, half_widths, sidak_quantile, spread_of
from attnlab.stats import t_quantile

# Dunnett (1964), table II: two-sided, joint confidence 95 %, for 1 to 9 comparisons with one control.
TABLE = {
    5: (2.57, 3.03, 3.29, 3.48, 3.62, 3.73, 3.82, 3.90, 3.97),
    10: (2.23, 2.57, 2.76, 2.89, 2.99, 3.07, 3.14, 3.19, 3.24),
    20: (2.09, 2.38, 2.54, 2.65, 2.73, 2.80, 2.86, 2.90, 2.95),
}


@pytest.mark.parametrize("degrees", TABLE)
def test_quantiles_are_dunnetts_table(degrees):
    found = [dunnett_quantile(0.95, many, degrees) for many in range(1, 10)]
    assert found == pytest.approx(TABLE[degrees], abs=0.0051)


@pytest.mark.parametrize("degrees", [1, 2, 3, 8, 40, 5000])
def test_one_comparison_is_students(degrees):
    assert dunnett_quantile(0.95, 1, degrees) == pytest.approx(t_quantile(0.95, degrees), rel=1e-5)
    assert sidak_quantile(0.95, 1, degrees) == pytest.approx(t_quantile(0.95, degrees))


@pytest.mark.parametrize(("many", "degrees", "correlation"), [(2, 4, 0.5), (3, 12, 0.2), (2, 30, 0.0)])
def test_quantiles_are_those_of_the_multivariate_t(many, degrees, correlation):
    """SciPy integrates the density at random points, to three digits or so."""
    shape = np.full((many, many), correlation) + (1 - correlation) * np.eye(many)
    law = scipy_stats.multivariate_t(shape=shape, df=degrees, seed=1)
    reach = np.full(many, dunnett_quantile(0.9, many, degrees, correlation))
    assert law.cdf(reach, lower_limit=-reach) == pytest.approx(0.9, abs=1e-3)


def test_corrections_widen_in_order():
    for many in (2, 5, 9):
        plain, dunnett, sidak = t_quantile(0.95, 8), dunnett_quantile(0.95, many, 8), sidak_quantile(0.95, many, 8)
        assert plain < dunnett < dunnett_quantile(0.95, many, 8, 0.1) < sidak < t_quantile(1 - 0.05 / many, 8)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [((0.0, 2, 3), "confidence is 0.0"), ((0.95, 0, 3), "comparisons is 0"), ((0.95, 2, 0), "degrees is 0")],
)
def test_impossible_quantiles_are_refused(arguments, what):
    with pytest.raises(UserError, match=what):
        dunnett_quantile(*arguments)


def test_residuals_of_a_small_table_by_hand():
    table = np.array([[1.0, 2.0, 4.0], [2.0, 2.0, 5.0], [3.0, 5.0, 6.5]])
    rows, columns = table.mean(1, keepdims=True), table.mean(0)
    residual = table - rows - columns + table.mean()
    found = spread_of(table)
    assert found.degrees == 4 and found.square == pytest.approx((residual**2).sum() / 4)
    assert found.own == pytest.approx([variance([1.0, 0.0, 2.0]), variance([3.0, 3.0, 3.5])])
    total = (residual**2).sum()
    for place in range(3):
        part = (residual[:, place] ** 2).sum() * 3 / 2
        ratio = (part / 2) / ((total - part) / 2)
        assert found.ratio[place] ** 2 == pytest.approx(ratio)
        assert found.p[place] == pytest.approx(scipy_stats.f.sf(ratio, 2, 2))


@pytest.mark.parametrize(("seeds", "mechanisms"), [(3, 3), (3, 8), (5, 4)])
def test_the_test_of_spreads_is_exact_for_each_mechanism(seeds, mechanisms):
    """Under equal spreads its p-values are uniform."""
    draw = np.random.default_rng(seeds * mechanisms)
    p = spread_of(draw.standard_normal((20_000, seeds, mechanisms))).p
    for level in (0.01, 0.1, 0.5):
        assert (p < level).mean(0) == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / 20_000))


def test_pooling_is_refused_where_spreads_differ_and_where_two_seeds_cannot_tell():
    draw = np.random.default_rng(2)
    alike = draw.standard_normal((4000, 4, 6))
    assert spread_of(alike).unequal.mean() == pytest.approx(module.UNEQUAL, abs=0.03)
    for place in (0, 4):
        apart = alike.copy()
        apart[..., place] *= 30
        assert spread_of(apart).unequal.mean() > 0.99
    assert spread_of(alike[:, :2]).unequal.all()
    assert not spread_of(alike[:, :2, :2]).unequal.any() and not spread_of(alike[:, :, :2]).unequal.any()


def test_runs_that_do_not_vary_are_alike():
    table = np.ones((3, 4)) + np.arange(3)[:, None]
    found = spread_of(table)
    assert found.square == 0 and not found.unequal and half_widths(table) == pytest.approx(0)
    table[1, 2] += 0.5
    assert spread_of(table).p.argmin() == 2 and spread_of(table).unequal


def test_two_mechanisms_have_students_interval():
    draw = np.random.default_rng(8)
    table = draw.standard_normal((50, 4, 2)) * [1.0, 5.0]
    own = (table[..., 1] - table[..., 0]).std(-1, ddof=1)
    assert half_widths(table)[:, 0] == pytest.approx(t_quantile(0.95, 3) * own / 2)


def test_pooled_intervals_are_dunnetts_unless_a_guard_widens_them():
    draw = np.random.default_rng(4)
    table = draw.standard_normal((500, 4, 5))
    found = spread_of(table)
    quantile = dunnett_quantile(CONFIDENCE, 4, 12)
    half = guarded_widths(found, found.own, np.full(4, 4), quantile)
    textbook = quantile * np.sqrt(2 * found.square / 4)[:, None] * np.ones(4)
    plain = t_quantile(CONFIDENCE, 3) * np.sqrt(found.own / 4)
    shared = quantile * np.sqrt(found.own.mean(-1) / 4)[:, None] * np.ones(4)
    assert half == pytest.approx(np.maximum(np.maximum(textbook, plain), shared))
    assert 0.2 < np.isclose(half, textbook).mean() < 0.6
    own = sidak_quantile(CONFIDENCE, 4, 3) * np.sqrt(found.own / 4)
    chosen = np.where(found.unequal[:, None], own, half)
    assert half_widths(table) == pytest.approx(chosen)


def spreads(kind, factor, mechanisms):
    """Standard deviations of runs, the baseline's first."""
    found = np.ones(mechanisms)
    if kind == "baseline":
        found[0] = factor
    elif kind == "one":
        found[-1] = factor
    elif kind == "half":
        found[mechanisms // 2 :] = factor
    elif kind == "all":
        found = np.geomspace(1, factor, mechanisms)
    return found


def coverage(draw, scale, seeds, comparisons):
    """The share of simulated comparisons in which every interval holds the true difference, which is 0."""
    losses = draw.standard_normal((comparisons, seeds, len(scale))) * scale + draw.standard_normal((seeds, 1)) * 9
    differences = (losses[..., 1:] - losses[..., :1]).mean(1)
    return (np.abs(differences) <= half_widths(losses)).all(-1).mean()


ERROR = 0.0055  # three standard errors of a share of 0.95 among 14,000
MILD = [("equal", 1), ("baseline", 2), ("one", 2), ("half", 2), ("half", 3), ("all", 2), ("all", 3), ("all", 1 / 3)]
GROSS = [("baseline", 3), ("baseline", 1 / 3), ("one", 5), ("one", 10), ("half", 10), ("all", 10)]


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
@pytest.mark.parametrize(("kind", "factor"), [*MILD, *GROSS])
def test_all_intervals_of_a_comparison_hold_together(kind, factor, seeds):
    """In 94 to 97 % of comparisons; where spreads are grossly unequal, in 93 to 97.7 %."""
    low, high = (0.94, 0.97) if (kind, factor) in MILD else (0.93, 0.977)
    draw = np.random.default_rng(seeds)
    for mechanisms in (2, 3, 4, 6, 8, 10):
        found = coverage(draw, spreads(kind, factor, mechanisms), seeds, 14_000)
        assert low - ERROR <= found <= high + ERROR, (mechanisms, found)


def test_pooling_without_guards_does_not_hold():
    """The reason for them, as spread.py says it."""
    draw = np.random.default_rng(0)
    losses = draw.standard_normal((14_000, 3, 10)) * spreads("baseline", 3, 10)
    found = spread_of(losses)
    pooled = (dunnett_quantile(CONFIDENCE, 9, 18) * np.sqrt(2 * found.square / 3))[:, None]
    pairwise = sidak_quantile(CONFIDENCE, 9, 2) * np.sqrt(found.own / 3)
    differences = np.abs((losses[..., 1:] - losses[..., :1]).mean(1))
    assert (differences <= pooled).all(-1).mean() == pytest.approx(0.77, abs=0.015)
    tested = np.where(found.unequal[:, None], pairwise, pooled)
    assert (differences <= tested).all(-1).mean() == pytest.approx(0.87, abs=0.015)
    assert (differences <= half_widths(losses)).all(-1).mean() == pytest.approx(0.93, abs=0.01)
