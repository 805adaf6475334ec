from __future__ import annotations

import math
import random

import pytest

from attnlab.stats import paired, t_quantile, t_within

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


@pytest.mark.parametrize("confidence, degrees", [(0.0, 3), (1.0, 3), (0.95, 0)])
def test_impossible_questions_are_refused(confidence, degrees):
    with pytest.raises(ValueError, match="must lie in"):
        t_quantile(confidence, degrees)


def test_verdicts():
    base = [1.50, 1.60, 1.55]
    shift = [0.010, 0.011, 0.009]
    worse = paired([b + s for b, s in zip(base, shift, strict=True)], base)
    assert worse.verdict == "worse" and worse.mean == pytest.approx(0.01)
    assert worse.interval == pytest.approx((0.01 - 4.3027 * 0.001 / 3**0.5, 0.01 + 4.3027 * 0.001 / 3**0.5), abs=1e-6)
    assert paired([b - s for b, s in zip(base, shift, strict=True)], base).verdict == "better"
    assert paired([b + s for b, s in zip(base, [0.1, -0.1, 0.01], strict=True)], base).verdict == "not distinguishable"
    assert paired(base, base).verdict == "not distinguishable"
    assert paired([1.4], [1.5]).verdict == "too few seeds"
    assert paired([], []).n == 0


def test_intervals_cover_the_truth_as_often_as_they_say():
    draw = random.Random(7)
    covered = 0
    for _ in range(2000):
        interval = paired([draw.gauss(0.3, 1.0) for _ in range(3)], [0.0] * 3).interval
        covered += interval is not None and interval[0] <= 0.3 <= interval[1]
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)
