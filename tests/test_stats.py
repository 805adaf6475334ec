from __future__ import annotations

import math
import random
from itertools import combinations
from statistics import fmean, variance

import pytest

from attnlab.stats import beyond, holm, paired, t_quantile, t_within, welch

TABLE = {  # two-sided critical values, as every textbook prints them
    (0.95, 1): 12.7062,
    (0.95, 2): 4.3027,
    (0.95, 3): 3.1824,
    (0.95, 4): 2.7764,
    (0.95, 7): 2.3646,
    (0.95, 10): 2.2281,
    (0.95, 30): 2.0423,
    (0.95, 120): 1.9799,
    (0.99, 1): 63.6567,
    (0.99, 5): 4.0321,
    (0.90, 6): 1.9432,
    (0.50, 3): 0.7649,
}


@pytest.mark.parametrize("confidence, degrees", TABLE)
def test_quantiles_are_the_tables(confidence, degrees):
    assert t_quantile(confidence, degrees) == pytest.approx(TABLE[confidence, degrees], abs=5e-5)


def test_the_distribution_tends_to_the_normal():
    assert t_within(1.96, 5001) == pytest.approx(math.erf(1.96 / math.sqrt(2)), abs=1e-4)


def area(t: float, degrees: int, parts: int = 400) -> float:
    """P(|T| <= t), from the density and Simpson's rule."""
    log_height = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)

    def density(x: float) -> float:
        return math.exp(log_height - (degrees + 1) / 2 * math.log1p(x * x / degrees))

    step = t / parts
    inner = sum((4 if k % 2 else 2) * density(k * step) for k in range(1, parts))
    return 2 * step / 3 * (density(0) + inner + density(t))


@pytest.mark.parametrize("degrees", [*range(1, 10), 16, 23])
def test_the_distribution_is_the_area_under_the_density(degrees):
    draw = random.Random(degrees)
    for t in (0.0, *(draw.uniform(0, 5) for _ in range(5))):
        assert t_within(t, degrees) == pytest.approx(area(t, degrees), abs=1e-8)
        if t:
            assert t_quantile(t_within(t, degrees), degrees) == pytest.approx(t, rel=1e-6)


@pytest.mark.parametrize("confidence, degrees", [(0.0, 3), (1.0, 3), (0.95, 0)])
def test_impossible_questions_are_refused(confidence, degrees):
    with pytest.raises(
        ValueError, match=r"confidence is [01]\.0: it must be above 0 and below 1|degrees is 0: it must be at least 1"
    ):
        t_quantile(confidence, degrees)


def test_the_interval_is_students():
    base = [1.50, 1.60, 1.55]
    found = paired([b + s for b, s in zip(base, [0.010, 0.011, 0.009], strict=True)], base)
    half = 4.3027 * 0.001 / 3**0.5
    assert found.n == 3 and found.mean == pytest.approx(0.01) and found.variance == pytest.approx(1e-6)
    assert found.interval == pytest.approx((0.01 - half, 0.01 + half), abs=1e-6)


def test_intervals_cover_the_truth_as_often_as_they_say():
    draw = random.Random(7)
    covered = 0
    for _ in range(2000):
        interval = paired([draw.gauss(0.3, 1.0) for _ in range(3)], [0.0] * 3).interval
        covered += interval is not None and interval[0] <= 0.3 <= interval[1]
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


def test_two_pairs_have_an_interval_and_fewer_have_none():
    two = paired([1.0, 1.5], [0.5, 0.75])  # differences 0.5 and 0.75: their mean's error is 0.125
    assert two.n == 2 and two.mean == 0.625
    assert two.interval == pytest.approx((0.625 - 12.7062 * 0.125, 0.625 + 12.7062 * 0.125), abs=1e-4)
    one = paired([1.5], [1.0])
    assert (one.n, one.mean, one.interval) == (1, 0.5, None) and math.isnan(one.variance)
    none = paired([], [])
    assert none.n == 0 and math.isnan(none.mean) and none.interval is None
    for ours, theirs in (([1.0, 2.0], [1.0]), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="give pairs"):
            paired(ours, theirs)


def above(t: float, degrees: int) -> float:
    """P(T >= t)."""
    return 0.5 - math.copysign(area(abs(t), degrees) / 2, t)


@pytest.mark.parametrize("sizes", [(2, 2), (2, 9), (9, 2), (5, 7), (13, 4)])
def test_welch_is_the_formula(sizes):
    """Written with variances and ratios, as in the paper, for samples of other sizes, spreads and signs."""
    draw = random.Random(sum(sizes) * sizes[0])
    for shift, spread in ((0.8, 1.0), (-0.8, 3.0), (0.3, 0.2), (2.0, 0.01)):
        ours = [draw.gauss(shift, 1.0) for _ in range(sizes[0])]
        theirs = [draw.gauss(0.1, spread) for _ in range(sizes[1])]
        a, b = variance(ours) / sizes[0], variance(theirs) / sizes[1]
        degrees = 1 / ((a / (a + b)) ** 2 / (sizes[0] - 1) + (b / (a + b)) ** 2 / (sizes[1] - 1))
        assert min(sizes) - 1 <= degrees <= sum(sizes) - 2
        expected = above((fmean(ours) - fmean(theirs)) / (a + b) ** 0.5, math.floor(degrees))
        assert welch(ours, theirs) == pytest.approx(expected, abs=1e-6)
        assert welch(theirs, ours) == pytest.approx(1 - expected, abs=1e-6)


def test_welch_where_a_sample_does_not_vary():
    """All degrees of freedom are then the other's, however small the numbers are; two constants differ or do not."""
    ours = [0.5, 1.25, -0.25, 1.0]
    expected = above(0.625 / math.sqrt(variance(ours) / 4), 3)
    for size in (1.0, 2.0**-300, 2.0**-400):  # whose fourth power is too small for a float
        assert welch([x * size for x in ours], [0.0] * 3) == pytest.approx(expected, abs=1e-6)
    assert welch([0.0, 1.0], [0.25] * 5) == pytest.approx(above(0.5, 1), abs=1e-6)
    assert welch([2.0] * 3, [1.0] * 2) == 0.0
    assert welch([1.0] * 3, [1.0] * 2) == welch([1.0] * 3, [2.0] * 2) == 1.0


def test_welch_does_not_depend_on_the_unit():
    """The fourth power of such differences is too small for a float; the degrees of freedom stay those of the formula:
    one, where the sample of two varies more."""
    ours, theirs = [0.25, 0.5, 0.25, 0.5, 0.25, 0.5], [0.0, 1.0]
    for tiny in (2.0**-300, 2.0**-400):
        for a, b in ((ours, theirs), (theirs, ours)):
            assert welch([x * tiny for x in a], [x * tiny for x in b]) == pytest.approx(welch(a, b), abs=1e-9)


@pytest.mark.parametrize("many", [2, 3, 6])
def test_beyond_is_the_tail_of_a_prediction(many):
    """Student's t with the groups' degrees of freedom; the value's own spread counts beside that of the mean."""
    draw = random.Random(many)
    for shift in (-1.5, 0.4, 3.0):
        groups = [[draw.gauss(0.2, 1.0) for _ in range(1 + number % 3)] for number in range(many)]
        values = [value for group in groups for value in group]
        t = (shift - sum(values) / len(values)) / math.sqrt(variance(values) * (1 + 1 / many))
        assert beyond(shift, groups) == pytest.approx(above(t, many - 1), abs=1e-6)
    same = [[0.5]] * many
    assert (beyond(0.6, same), beyond(0.5, same), beyond(0.4, same)) == (0.0, 1.0, 1.0)


@pytest.mark.parametrize("many", [0, 1, 2, 5, 7])
def test_holm_marks_what_no_set_of_tests_excuses(many):
    """Holm's procedure is the closed one: a test holds if in each set that it belongs to, the least p is at most alpha
    over the size of the set. Ties and values that are exactly on a bound are among those drawn."""
    draw, alpha, marks = random.Random(many), 0.05, 0
    bounds = [alpha / k for k in range(1, 8)]
    sets = [chosen for size in range(1, many + 1) for chosen in combinations(range(many), size)]
    for _ in range(60):
        p = [draw.choice([draw.choice(bounds), draw.uniform(0, 0.03), draw.uniform(0, 1)]) for _ in range(many)]
        held = [all(min(p[j] for j in s) <= alpha / len(s) for s in sets if i in s) for i in range(many)]
        assert holm(p, alpha) == held, p
        marks += sum(held)
    assert not many or 0 < marks < 60 * many


def test_holm_marks_more_than_one_bound_for_all():
    assert holm([0.03, 0.011, 0.5, 0.02], 0.05) == [False, True, False, False]
    assert holm([0.024, 0.016, 0.5, 0.0125], 0.05) == [True, True, False, True]  # 0.05 / 4, / 3, / 2, and 0.5 > 0.05
