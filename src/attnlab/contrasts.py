"""Verdicts on mechanisms that are compared with one baseline over the same seeds: the one place where they are made.

spread.py has the statistics. compare.json, the tables of the terminal and the report say what `contrasts` returns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

from .errors import need
from .formatting import words
from .ranges import Count, NotNegative, Positive, check_fields, checked
from .results import RunResult, TaskResult
from .spread import CONFIDENCE, Spread, dunnett_quantile, guarded_widths, sidak_quantile, spread_of
from .stats import Paired, paired, t_quantile

Intervals = Literal["auto", "pooled", "pairwise"]
Verdict = Literal["better", "worse", "equal", "undecided", "too few seeds"]

MARGIN = 0.01  # a difference that does not matter: nats per token, or share of right answers
POWER = 0.8  # the chance to see a difference that is there, of the number of seeds that is named
MOST_SEEDS = 10_000  # that are ever named


@dataclass(frozen=True)
class Judging:
    """The choices behind verdicts."""

    intervals: Intervals = "auto"
    margin: Positive = MARGIN  # a smaller difference does not matter

    def __post_init__(self) -> None:
        check_fields(self)


def verdict_on(interval: Sequence[float] | None, margin: float) -> Verdict:
    """Return the result in words, for a loss: lower is better.

    Equal means that the whole interval is nearer to 0 than `margin`: two one-sided tests, each at half of what the
    interval leaves over. That comes first, because a difference within the margin does not matter. An interval that
    touches 0, or the margin, decides nothing.
    """
    if interval is None:
        return "too few seeds"
    low, high = interval
    if -margin < low and high < margin:
        return "equal"
    if high < 0:
        return "better"
    return "worse" if low > 0 else "undecided"


def verdict_in_words(word: str, margin: float) -> str:
    """Return a verdict for people: "equal" names the margin. Files of earlier versions say "not distinguishable"."""
    return f"equal within {margin:g}" if word == "equal" else word.replace("not distinguishable", "undecided")


@dataclass(frozen=True)
class Pool:
    """The complete blocks among the runs of a comparison, and what their residuals say."""

    mechanisms: list[str]  # without the baseline
    seeds: list[int]
    spread: Spread
    quantile: float  # Dunnett's, for all comparisons that are judged

    def half(self, found: Paired) -> float:
        """Return the half width of the pooled interval of a mean difference, without guards."""
        return self.quantile * math.sqrt(2 * float(self.spread.square) / found.n)

    def guarded(self, found: Paired) -> float:
        """Return the half width of the pooled interval with both guards."""
        import numpy as np

        own = np.array([found.variance])
        return float(guarded_widths(self.spread, own, np.array([found.n]), self.quantile)[0])

    def fairness(self, baseline: str) -> dict[str, Any]:
        """Return the mechanism whose residuals spread most beside the others', by how much, and the p-value."""
        names = [baseline, *self.mechanisms]
        place = int(self.spread.p.argmin())
        ratio = float(self.spread.ratio[place])
        return {
            "widest": names[place],
            "ratio": ratio if math.isfinite(ratio) else None,
            "p": min(1.0, float(self.spread.p[place]) * len(names)),
        }


def contrasts(
    losses: Mapping[str, Mapping[int, float]],
    baseline: str,
    judging: Judging = Judging(),
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a row per mechanism of `losses` (a number by mechanism and seed), and how they were judged, for JSON.

    A row has the difference to the baseline over the seeds that both have: its mean; `interval`, which decides the
    verdict, and `by`, its kind; and both kinds, `pooled` (no guards) and `pairwise`. A mechanism that lacks seeds of
    the others is left out of the pool where that makes the pool larger; its interval is pairwise.
    """
    base = losses[baseline]
    shared = {label: sorted(own.keys() & base.keys()) for label, own in losses.items() if label != baseline}
    found = {label: paired([losses[label][s] for s in own], [base[s] for s in own]) for label, own in shared.items()}
    judged = [label for label in found if found[label].n > 1]
    pool = _pool(losses, baseline, {label: shared[label] for label in judged})
    pooling = judging.intervals != "pairwise" and pool is not None
    if judging.intervals == "auto" and pool is not None:
        pooling = not pool.spread.unequal
    rows = []
    for label, own in losses.items():
        row: dict[str, Any] = {"mechanism": label, "n": len(own), "difference": None, "interval": None, "by": None}
        row |= {"pooled": None, "pairwise": None, "verdict": "baseline"}
        if label != baseline:
            row["difference"] = found[label].mean if found[label].n else None
            if label in judged:
                inside = pool if pool is not None and label in pool.mechanisms else None
                row |= _intervals(found[label], len(judged), inside, pooling, judging)
            row["verdict"] = verdict_on(row["interval"], judging.margin)
        rows.append(row)
    return rows, _about(judging, pool, pooling, baseline, {label: found[label] for label in judged})


def _intervals(found: Paired, comparisons: int, pool: Pool | None, pooling: bool, judging: Judging) -> dict[str, Any]:
    """Return both kinds of interval, and the one that decides. `pool`: None where the mechanism is not in it."""
    half = sidak_quantile(CONFIDENCE, comparisons, found.n - 1) * math.sqrt(found.variance / found.n)
    pairwise = _around(found, half)
    if pool is None:
        return {"pairwise": pairwise, "interval": pairwise, "by": "pairwise"}
    both = {"pairwise": pairwise, "pooled": _around(found, pool.half(found))}
    if not pooling:
        return both | {"interval": pairwise, "by": "pairwise"}
    wide = pool.guarded(found) if judging.intervals == "auto" else pool.half(found)
    return both | {"interval": _around(found, wide), "by": "pooled"}


def _around(found: Paired, half: float) -> list[float]:
    return [found.mean - half, found.mean + half]


def _pool(losses: Mapping[str, Mapping[int, float]], baseline: str, shared: Mapping[str, Sequence[int]]) -> Pool | None:
    """Return the complete blocks with most degrees of freedom, or None where no two seeds are shared.

    `shared`: the seeds that each mechanism has with the baseline. Means over those and more seeds do not depend on the
    residuals of the blocks.
    """
    import numpy as np

    best: tuple[list[str], list[int]] = ([], [])
    for least in sorted({len(own) for own in shared.values()}):
        labels = [label for label, own in shared.items() if len(own) >= least]
        seeds = sorted(set.intersection(*(set(shared[label]) for label in labels)))
        if len(seeds) > 1 and len(labels) * (len(seeds) - 1) > len(best[0]) * (len(best[1]) - 1):
            best = (labels, seeds)
    labels, seeds = best
    if not labels:
        return None
    spread = spread_of(np.array([[losses[label][seed] for label in (baseline, *labels)] for seed in seeds]))
    counts = [len(shared[label]) for label in labels]
    correlation = 0.5 * min(counts) / max(counts)  # of two means over other numbers of seeds: at least this
    quantile = dunnett_quantile(CONFIDENCE, len(shared), spread.degrees, correlation)
    return Pool(labels, seeds, spread, quantile)


def _about(
    judging: Judging, pool: Pool | None, pooling: bool, baseline: str, found: Mapping[str, Paired]
) -> dict[str, Any]:
    """Return how a comparison was judged, for compare.json."""
    about: dict[str, Any] = {
        "intervals": judging.intervals,
        "margin": judging.margin,
        "confidence": CONFIDENCE,
        "comparisons": len(found),
        "by": None,
        "why": "",
        "pool": None,
        "seeds_needed": None,
    }
    if not found:
        return about
    about |= {"by": "pairwise", "why": _why(judging, pool, pooling, baseline, list(found))}
    variance = fmean(each.variance for each in found.values())
    kind: Intervals = "pairwise"
    if pool is not None:
        about["pool"] = {
            "mechanisms": [baseline, *pool.mechanisms],
            "seeds": pool.seeds,
            "mean_square": float(pool.spread.square),
            "degrees": pool.spread.degrees,
            "quantile": pool.quantile,
            **pool.fairness(baseline),
        }
        if pooling:
            about["by"] = "pooled"
            kind = judging.intervals
            variance = max(2 * float(pool.spread.square), float(pool.spread.own.mean()))
    return about | {"seeds_needed": seeds_needed(variance, len(found), judging.margin, kind)}


def _why(judging: Judging, pool: Pool | None, pooling: bool, baseline: str, judged: Sequence[str]) -> str:
    """Return a sentence on the kind of the intervals."""
    own = "each interval rests on its own pairs"
    if pool is None or judging.intervals == "pairwise":
        return f"{own[0].upper()}{own[1:]} (Student's t, Šidák's correction)."
    if pooling:
        lacking = [label for label in judged if label not in pool.mechanisms]
        lack = "lacks" if len(lacking) == 1 else "lack"
        alone = f"; {words(lacking)} {lack} seeds, where own pairs decide" if lacking else ""
        guards = ", and no interval is narrower than its own pairs allow" if judging.intervals == "auto" else ""
        degrees = f"{pool.spread.degrees} degree{'s' * (pool.spread.degrees != 1)} of freedom"
        return (
            f"The spread is pooled over {len(pool.mechanisms) + 1} mechanisms and {len(pool.seeds)} seeds "
            f"({degrees}, Dunnett's correction){guards}{alone}."
        )
    if len(pool.seeds) < 3:
        return f"Two seeds cannot show whether all mechanisms spread alike, so {own}: take three seeds or more."
    fairness = pool.fairness(baseline)
    spread = (
        "alone spread" if fairness["ratio"] is None else f"spread {fairness['ratio']:.1f} times as much as the others"
    )
    return f"The runs of {fairness['widest']} {spread} (p = {fairness['p']:.2g}), so {own}: pooling is not fair."


def sentences(statistics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return how a comparison was judged, for people: the kind of the intervals, and the seeds that would decide."""
    if not any(row["interval"] for row in rows):
        return []
    said = [f"All intervals together hold with 95 % confidence. {statistics['why']}"]
    if any(row["verdict"] == "undecided" for row in rows):
        said.append(needed(statistics))
    return said


def needed(statistics: Mapping[str, Any]) -> str:
    """Return how many seeds would decide; "" where that is not known."""
    if "seeds_needed" not in statistics:
        return ""
    seeds = statistics["seeds_needed"]
    many = f"more than {MOST_SEEDS:,}" if seeds is None else f"about {seeds:,}"
    return f"To see {statistics['margin']:g} nats you need {many} seeds."


@checked
def seeds_needed(variance: NotNegative, comparisons: Count, margin: Positive, intervals: Intervals) -> int | None:
    """Return the seeds that show a difference of `margin` with 80 % probability, or None: more than 10,000.

    variance: of one paired difference, the same for all. `intervals`: "auto" where they are pooled and guarded.
    """
    special = need("scipy.special", "stats")

    def enough(seeds: int) -> bool:
        degrees = seeds - 1 if intervals == "pairwise" else comparisons * (seeds - 1)
        if intervals == "pairwise":
            quantile = sidak_quantile(CONFIDENCE, comparisons, degrees)
        else:
            quantile = dunnett_quantile(CONFIDENCE, comparisons, degrees)
        if intervals == "auto":
            quantile = max(quantile, t_quantile(CONFIDENCE, seeds - 1))
        reach = quantile + float(special.stdtrit(degrees, POWER))
        return reach * math.sqrt(variance / seeds) <= margin

    low, high = 1, 2
    while not enough(high):
        low, high = high, 2 * high
        if low > MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high if high <= MOST_SEEDS else None


Judged = tuple[list[dict[str, Any]], dict[str, Any]]  # a row per mechanism, and how they were judged


def of_losses(cells: Sequence[RunResult], mechanisms: Sequence[str], baseline: str, judging: Judging) -> Judged:
    """Return the rows of runs by validation loss, nats: `val_loss`, the mean over seeds, and the differences."""
    losses: dict[str, dict[int, float]] = {label: {} for label in mechanisms}
    for cell in cells:
        if cell.status == "done" and cell.val_loss is not None and cell.mechanism in losses:
            losses[cell.mechanism][cell.seed] = cell.val_loss
    rows, about = contrasts(losses, baseline, judging)
    for row in rows:
        own = losses[row["mechanism"]]
        row["val_loss"] = fmean(own.values()) if own else None
    return rows, about


def of_tasks(cells: Sequence[TaskResult], mechanisms: Sequence[str], baseline: str, judging: Judging) -> Judged:
    """Return the rows of answers: `accuracy`, the mean over seeds, and the differences of accuracies; more is better.

    The margin is one point in a hundred, whatever that of the losses is.
    """
    wrong: dict[str, dict[int, float]] = {label: {} for label in mechanisms}
    for cell in cells:
        if cell.accuracy is not None and cell.mechanism in wrong:
            wrong[cell.mechanism][cell.seed] = 1 - cell.accuracy
    rows, about = contrasts(wrong, baseline, replace(judging, margin=MARGIN))
    for row in rows:
        own = wrong[row["mechanism"]]
        row["accuracy"] = 1 - fmean(own.values()) if own else None
        row["difference"] = None if row["difference"] is None else -row["difference"]
        for name in ("interval", "pooled", "pairwise"):
            row[name] = row[name] and [-row[name][1], -row[name][0]]
    return rows, about
