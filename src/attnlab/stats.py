"""Statistics of samples: paired intervals, Welch's t, predictions, Holm's correction. SciPy has the distributions.

contrasts.py has the statistics of a comparison, where many mechanisms face one baseline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from .errors import UserError, need
from .ranges import Count, Fraction, Share, checked


@checked
def t_within(t: float, degrees: Count) -> float:
    """Return P(|T| <= t) of Student's distribution, for t of at least 0."""
    return 1 - 2 * _beyond(t, degrees)


@checked
def t_quantile(confidence: Fraction, degrees: Count) -> float:
    """Return the t with P(|T| <= t) = confidence, so t_quantile(0.95, 2) = 4.303."""
    special = need("scipy.special", "stats")
    return float(special.stdtrit(degrees, (1 + confidence) / 2))


def _beyond(t: float, degrees: int) -> float:
    """Return P(T >= t) of Student's distribution."""
    special = need("scipy.special", "stats")
    return float(special.stdtr(degrees, -t))


@dataclass(frozen=True)
class Paired:
    """The mean of differences, one per seed, and the interval that holds the true mean at the given confidence."""

    n: int  # pairs
    mean: float
    variance: float  # of the differences; NaN for fewer than two pairs
    interval: tuple[float, float] | None  # None: fewer than two pairs say nothing about the spread


@checked
def paired(ours: Sequence[float], theirs: Sequence[float], confidence: Fraction = 0.95) -> Paired:
    """Compare ours[i] with theirs[i], where the runs of pair i have the same seed, and so the same order of data."""
    if len(ours) != len(theirs):
        raise UserError(f"ours has {len(ours)} numbers and theirs {len(theirs)}: give pairs")
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    if not differences:
        return Paired(0, math.nan, math.nan, None)
    mean = fmean(differences)
    if len(differences) < 2:
        return Paired(1, mean, math.nan, None)
    spread = stdev(differences)
    half = t_quantile(confidence, len(differences) - 1) * spread / math.sqrt(len(differences))
    return Paired(len(differences), mean, spread**2, (mean - half, mean + half))


@checked
def welch(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the one-sided p-value of Welch's test (1947) that the mean of `ours` is above that of `theirs`.

    The samples are independent and may have different spreads. The degrees of freedom are rounded down.
    """
    for name, sample in (("ours", ours), ("theirs", theirs)):
        if len(sample) < 2:
            raise UserError(f"{name} has {len(sample)} numbers: give two or more")
    spread = [stdev(sample) ** 2 / len(sample) for sample in (ours, theirs)]
    variance = sum(spread)
    difference = fmean(ours) - fmean(theirs)
    if variance == 0:
        return 0.0 if difference > 0 else 1.0
    degrees_of = [len(sample) - 1 for sample in (ours, theirs)]
    parts = sum(s**2 / n for s, n in zip(spread, degrees_of, strict=True))
    if parts == 0:  # the squares are too small for a float, and the shares of the variance are not
        parts = sum((s / variance) ** 2 / n for s, n in zip(spread, degrees_of, strict=True))
        degrees = max(1, int(1 / parts))
    else:
        degrees = max(1, int(variance**2 / parts))
    t = difference / math.sqrt(variance)
    return _beyond(t, degrees)


@checked
def beyond(value: float, groups: Sequence[Sequence[float]]) -> float:
    """Return the probability that one more value from such groups is at least as large as `value`, one-sided.

    Values of one group may depend on each other, so the degrees of freedom are the number of groups minus one. Two
    groups or more are needed.
    """
    if len(groups) < 2:
        raise UserError(f"groups has {len(groups)}: give two or more")
    values = [each for group in groups for each in group]
    mean = fmean(values)
    spread = stdev(values)
    if spread == 0:
        return 0.0 if value > mean else 1.0
    t = (value - mean) / (spread * math.sqrt(1 + 1 / len(groups)))
    return _beyond(t, len(groups) - 1)


@checked
def holm(p: Sequence[Share], alpha: Fraction) -> list[bool]:
    """Return which p-values are significant, where the chance of any false one is at most `alpha` (Holm 1979)."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    marked = [False] * len(p)
    for rank, i in enumerate(order):
        if p[i] > alpha / (len(p) - rank):
            break
        marked[i] = True
    return marked
