"""The crossover of two modes of a mechanism: from where on one is faster than the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..config import RunConfig
from ..errors import UserError
from ..presets import Options, variant
from ..results import BenchRecord, Record, Tell
from .bench import measure_cases, modes_of, with_context
from .workloads import Case


@dataclass(frozen=True, kw_only=True)
class Crossover(Record):
    """The point at which one mode of a mechanism becomes faster than the other."""

    mechanism: str
    axis: str  # "context": tokens held while decoding; "queries": new tokens in a call
    modes: tuple[str, str]
    points: list[tuple[int, float, float]]  # place on the axis; ms of the first mode; ms of the second
    at: float | None  # place where the faster mode changes, interpolated on logarithmic axes; None: it does not change

    def __str__(self) -> str:
        first = self.points[0]
        last = self.points[-1]
        early, late = (self.modes[point[1] > point[2]] for point in (first, last))
        unit = {"context": "tokens held", "queries": "new tokens per call"}[self.axis]
        if self.at is None:
            return f"{self.mechanism}: {early} is faster at {first[0]} and at {last[0]} {unit}"
        return f"{self.mechanism}: {early} is faster up to {self.at:.0f} {unit}, {late} from there on"


def context_crossovers(records: Sequence[BenchRecord]) -> list[Crossover]:
    """Return, from decode records, the contexts at which a mechanism's first two modes take the same time."""
    times: dict[str, dict[str, dict[int, float]]] = {}
    for r in records:
        if r.kind == "decode" and r.mode and r.ms is not None:
            times.setdefault(r.mechanism, {}).setdefault(r.mode, {})[r.context] = r.ms
    return [_crossover(label, "context", ways) for label, ways in times.items() if len(ways) > 1]


def query_crossover(
    preset: RunConfig,
    label: str,
    context: int | None = None,
    queries: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    *,
    options: Options | None = None,
    repeats: int = 7,
    progress: Tell | None = None,
) -> Crossover:
    """Return the number of new tokens per call at which the other mode becomes faster, with `context` tokens held.

    Raises `UserError` for a mechanism with one mode, and for a case that cannot be measured.
    """
    config = with_context(variant(preset, label, options), context or preset.model.context)
    modes = modes_of(config, split=True)
    if len(modes) < 2:
        raise UserError(f"{label} is computed in one way only: name a mechanism with modes, such as mla")
    counts = [count for count in queries if count < config.model.context]
    cases = [Case("decode", label, mode, way, 1, 1, count) for count in counts for mode, way in modes]
    records = measure_cases(cases, None, repeats, progress or (lambda what, done, of: None))
    times: dict[str, dict[int, float]] = {}
    for case, record in zip(cases, records, strict=True):
        if record.ms is None:
            raise UserError(f"{case} cannot be measured: {record.error}")
        times.setdefault(case.mode, {})[case.queries] = record.ms
    return _crossover(label, "queries", times)


def _crossover(label: str, axis: str, times: dict[str, dict[int, float]]) -> Crossover:
    (first, a), (second, b) = list(times.items())[:2]
    points = [(x, a[x], b[x]) for x in sorted(a.keys() & b.keys())]
    at = None
    (_, *start), (_, *end) = points[0], points[-1]
    if (start[0] < start[1]) == (end[0] < end[1]):  # crossings in both directions are noise
        return Crossover(mechanism=label, axis=axis, modes=(first, second), points=points, at=None)
    for (x, *before), (y, *after) in pairwise(points):
        low, high = (math.log(p / q) for p, q in (before, after))
        if low * high <= 0 and low != high:
            at = math.exp(math.log(x) + (math.log(y) - math.log(x)) * low / (low - high))
    return Crossover(mechanism=label, axis=axis, modes=(first, second), points=points, at=at)
