"""Spread over seeds in a comparison, and intervals of many differences to one baseline that hold together.

A comparison is a complete block design: seeds are blocks, mechanisms are treatments. The loss of mechanism j with seed
i is block i + treatment j + error. The errors of a mechanism have one spread; the residuals show whether all have the
same one.

**pooled**: the variance of an error is the residual mean square over all M mechanisms and S seeds, with (M - 1)(S - 1)
degrees of freedom, and the quantile is Dunnett's (1955, 1964) for M - 1 comparisons with one control. Together they
hold with 95 % confidence where spreads are equal.

**pairwise**: each interval rests on its own S differences, by Student's t with S - 1 degrees and Šidák's correction
(1967). Together they hold whatever the spreads are, and they are wider: 3.3 times with 3 seeds and 8 mechanisms.

**auto**, the default, is pooled with two guards and a test, for a test alone is blind with so few seeds. With 3 seeds
and 10 mechanisms of which the baseline spreads 3 times as much as the others, pooled intervals hold in 77 % of
comparisons, with the test alone in 87 %, with the guards too in 93 %. An interval is never narrower than

1. the plain 95 % t interval of its own pairs: each interval by itself holds whatever the spreads are;
2. Dunnett's with the mean variance of the paired differences, in all of which the baseline's spread counts.

The test asks of each mechanism whether its residuals spread more than those of the others: F, exact under equal spreads
(Russell and Bradley 1958), with Bonferroni's correction, at the 25 % that Bancroft (1964) recommends for such a
preliminary test. Where it says yes, and with two seeds, from which nothing can be told about spreads, all intervals
are pairwise. The whole procedure holds in 94 to 97 % of comparisons where spreads are equal or differ twofold, and in
93 to 98 % where one mechanism, the baseline or half of them spread 3 to 10 times as much, or as little
(tests/test_spread.py).

Numbers are arrays of NumPy with any leading dimensions, so that thousands of comparisons can be simulated at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from .errors import need
from .ranges import Count, Fraction, Probability, checked
from .stats import t_quantile

if TYPE_CHECKING:
    import numpy as np

CONFIDENCE = 0.95  # of all intervals of a comparison together
UNEQUAL = 0.25  # the residuals' p-value below which spreads are taken to differ


@cache
@checked
def dunnett_quantile(confidence: Fraction, comparisons: Count, degrees: Count, correlation: Probability = 0.5) -> float:
    """Return the c with P(|T_j| <= c for all j) = confidence, T multivariate t with equal correlations.

    The correlation is 0.5 where each mean has as many runs as the baseline's. Gauss-Legendre quadrature over the
    spread's quantiles and the common part of the T_j: no random numbers, six digits.
    """
    import numpy as np

    special = need("scipy.special", "stats")
    optimize = need("scipy.optimize", "stats")
    nodes, weights = np.polynomial.legendre.leggauss(128)
    level = (nodes + 1) / 2
    spread = np.sqrt(2 * special.gammaincinv(degrees / 2, level**2) / degrees)  # of chi over sqrt(degrees)
    common = 9 * nodes
    share = 4.5 * weights * np.exp(-(common**2) / 2) * math.sqrt(2 / math.pi)
    shift = math.sqrt(correlation) * common
    own = math.sqrt(1 - correlation)

    def excess(c: float) -> float:
        reach = c * spread[:, None]
        inside = special.ndtr((reach - shift) / own) - special.ndtr((-reach - shift) / own)
        return float((weights * level) @ (inside**comparisons @ share)) - confidence

    top = t_quantile(1 - (1 - confidence) / comparisons, degrees)  # Bonferroni's is never smaller
    return float(optimize.brentq(excess, 0.0, 1.01 * top, xtol=1e-9))


@checked
def sidak_quantile(confidence: Fraction, comparisons: Count, degrees: Count) -> float:
    """Return Student's t at which `comparisons` intervals hold together, however they are correlated."""
    return t_quantile(confidence ** (1 / comparisons), degrees)


@dataclass(frozen=True)
class Spread:
    """The residual variation of complete blocks. `...` are the table's leading dimensions."""

    seeds: int
    square: np.ndarray  # ...: the residual mean square
    own: np.ndarray  # ... M-1: variance of each mechanism's differences to the baseline
    p: np.ndarray  # ... M: the chance of residuals that spread so much more than the others', where all spread alike
    ratio: np.ndarray  # ... M: the standard deviation of a mechanism's residuals over that of the others

    @property
    def degrees(self) -> int:
        """The degrees of freedom of the residual mean square."""
        return self.own.shape[-1] * (self.seeds - 1)

    @property
    def unequal(self) -> np.ndarray:
        """Whether pooling is not fair, or cannot be shown to be: ...

        Two mechanisms have one difference, and pooling is the same as not pooling.
        """
        mechanisms = self.own.shape[-1] + 1
        found: np.ndarray = self.p.min(-1) * mechanisms < UNEQUAL
        return found | (self.seeds < 3 and mechanisms > 2)


def spread_of(table: np.ndarray) -> Spread:
    """Return the residual variation of losses: ... S M, the baseline first, S and M at least 2."""
    import numpy as np

    special = need("scipy.special", "stats")
    seeds, mechanisms = table.shape[-2:]
    residual = table - table.mean(-2, keepdims=True)
    residual = residual - residual.mean(-1, keepdims=True)
    own_square = (residual**2).sum(-2)
    total = own_square.sum(-1)
    own = (table[..., 1:] - table[..., :1]).var(-2, ddof=1)
    square = total / ((mechanisms - 1) * (seeds - 1))
    if mechanisms == 2:
        return Spread(seeds, square, own, np.ones_like(own_square), np.ones_like(own_square))
    part = own_square * mechanisms / (mechanisms - 1)  # a chi square with S - 1 degrees, apart from the rest
    rest = np.maximum(total[..., None] - part, 0) / ((mechanisms - 2) * (seeds - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        f = np.where(part > 0, part / (seeds - 1) / rest, 0.0)
    p = special.fdtrc(seeds - 1, (mechanisms - 2) * (seeds - 1), f)
    return Spread(seeds, square, own, p, np.sqrt(f))


def guarded_widths(spread: Spread, own: np.ndarray, pairs: np.ndarray, quantile: float) -> np.ndarray:
    """Return half widths of pooled intervals with both guards: ... M-1, of means over `pairs` differences.

    own: variance of each mechanism's own differences, ... M-1.
    """
    import numpy as np

    special = need("scipy.special", "stats")
    together = np.maximum(2 * spread.square, spread.own.mean(-1))[..., None]
    plain = special.stdtrit(pairs - 1, (1 + CONFIDENCE) / 2)
    return np.maximum(quantile * np.sqrt(together / pairs), plain * np.sqrt(own / pairs))


def half_widths(table: np.ndarray) -> np.ndarray:
    """Return the half width of each difference's interval, as `auto` chooses it: ... M-1, of losses ... S M."""
    import numpy as np

    spread = spread_of(table)
    many = spread.own.shape[-1]
    pairs = np.full(many, spread.seeds)
    pooled = guarded_widths(spread, spread.own, pairs, dunnett_quantile(CONFIDENCE, many, spread.degrees))
    pairwise = sidak_quantile(CONFIDENCE, many, spread.seeds - 1) * np.sqrt(spread.own / spread.seeds)
    return np.where(spread.unequal[..., None], pairwise, pooled)
