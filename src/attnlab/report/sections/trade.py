"""Quality against cost: loss against cache bytes and speed, with the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ...errors import need
from ...formatting import size, words
from ..figures import View, bytes_ticks, error_bars, figure, plain
from ..html import Html
from ..results_folder import Findings, finite_number
from ..style import INK, MUTED, Look
from .common import Figures, frame, missing, plot, without_cache

# Labels of points. All lengths are shares of the figure's width (x) or height (y).
SIDES = {  # side of the point -> from the point to the middle of its label; the first of equals is taken
    "top right": (0.07, 0.06),
    "bottom right": (0.07, -0.06),
    "middle left": (-0.09, 0.0),
    "middle right": (0.09, 0.0),
}
LABEL_WIDTH = 0.14  # two labels that are further apart do not touch
LABEL_HEIGHT = 0.07
EDGE = 0.06  # a label on the side of the figure's edge needs this much room
CUT_OFF = 0.2  # what a label without that room costs: as much as a fifth of a label that covers another


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    """Return the section, and add its figure to `drawn`."""
    views = trade_views(found, look)
    if not views:
        return frame("trade", "Quality against cost", missing(found, "compare.json", "No finished run here"))
    drawn["trade"] = views
    label = "Validation loss against cache size or speed, one point per mechanism, with the Pareto front"
    return frame("trade", "Quality against cost", plot(views, "trade", label))


@dataclass(frozen=True)
class Point:
    """One mechanism: a cost, and its loss over seeds."""

    mechanism: str
    x: float  # the cost
    loss: float  # mean over seeds, nats per token
    low: float  # of the seeds
    high: float


def points(found: Findings, cost: Mapping[str, float | None]) -> list[Point]:
    """Return a point for each mechanism that has a cost and a finished run."""
    placed = []
    for mechanism, x in cost.items():
        losses = [y for c in found.done(mechanism) if (y := finite_number(c.val_loss)) is not None]
        if losses and x is not None:
            placed.append(Point(mechanism, x, fmean(losses), min(losses), max(losses)))
    return placed


def front(placed: list[Point], *, smaller: bool) -> list[Point]:
    """Return the points that no other beats on both axes, by rising x. `smaller`: less x is better; else more is."""
    best = math.inf
    kept: list[Point] = []
    for point in sorted(placed, key=lambda p: (p.x if smaller else -p.x, p.loss)):
        if point.loss < best:
            best = point.loss
            kept.append(point)
    return sorted(kept, key=lambda p: p.x)


@dataclass(frozen=True)
class Cost:
    """A cost that loss is drawn against: bytes on a logarithmic axis, less is better; or tokens a second, more is."""

    view: str  # name of its button
    title: str  # of its axis
    in_bytes: bool  # else tokens per second
    note: str = ""  # last sentence of the caption, with a blank before it


def trade_views(found: Findings, look: dict[str, Look]) -> list[View]:
    """Return loss against cache bytes, training speed, and decoding speed where it was measured."""
    context = max((c.context for c in found.cells), default=0)
    caches = {m: found.mean(m, "cache_bytes") for m in found.mechanisms}
    note = without_cache([m for m, x in caches.items() if x == 0 and found.done(m)])
    cache = Cost("Cache size", f"cache per sequence of {context:,} tokens (log scale)", True, note)
    training = Cost("Training speed", "training speed (tokens per second)", False)
    longest, fastest = _decoding_speeds(found)
    decoding = Cost(
        "Decoding speed",
        f"decoding speed with {longest:,} tokens held (tokens per second)",
        False,
        " Where a mechanism has several ways to decode, the fastest one is shown.",
    )
    drawn = (
        (cache, points(found, {m: x for m, x in caches.items() if x})),
        (training, points(found, {m: found.mean(m, "tokens_per_s") for m in found.mechanisms})),
        (decoding, points(found, fastest)),
    )
    return [_against(cost, placed, look) for cost, placed in drawn if placed]


def _decoding_speeds(found: Findings) -> tuple[int, dict[str, float]]:
    """Return the longest context that was measured, and the best tokens per second of each mechanism there."""
    measured = [
        r for r in found.bench if r.kind == "decode" and finite_number(r.tokens_per_s) and found.done(r.mechanism)
    ]
    longest = max((r.context for r in measured), default=0)
    fastest: dict[str, float] = {}
    for record in measured:
        if record.context == longest:
            fastest[record.mechanism] = max(fastest.get(record.mechanism, 0.0), record.tokens_per_s or 0.0)
    return longest, fastest


def _against(cost: Cost, placed: list[Point], look: dict[str, Look]) -> View:
    best = front(placed, smaller=cost.in_bytes)
    caption = (
        f"Further {'left' if cost.in_bytes else 'right'}, and lower, is better. Bars reach from the lowest seed to the "
        f"highest. The stepped line is the Pareto front: {words(p.mechanism for p in best)} "
        f"{'is' if len(best) == 1 else 'are'} not beaten on both axes by any "
        f"other mean; where bars overlap, the order may be luck.{cost.note}"
    )
    sides = label_sides(placed, logarithmic=cost.in_bytes)
    traces = [_front_line(best, cost)]
    traces += [_marker(point, side, cost, look[point.mechanism]) for point, side in zip(placed, sides, strict=True)]
    y = {"title": {"text": "validation loss (nats per token)"}}
    return View(cost.view, caption, figure(traces, _axis(cost, [p.x for p in placed]), y))


def _front_line(best: list[Point], cost: Cost) -> Any:
    go = need("plotly.graph_objects", "report")
    return go.Scatter(
        x=[p.x for p in best],
        y=[p.loss for p in best],
        mode="lines",
        hoverinfo="skip",
        name="Pareto front",
        line={"color": MUTED[0], "width": 1, "shape": "hv" if cost.in_bytes else "vh", "dash": "dot"},
    )


def _marker(point: Point, side: str, cost: Cost, style: Look) -> Any:
    go = need("plotly.graph_objects", "report")
    shown = size(point.x) if cost.in_bytes else f"{point.x:,.0f} tokens/s"
    error = error_bars([point.high - point.loss], [point.loss - point.low], thickness=1.2) | {"color": style.color}
    return go.Scatter(
        x=[point.x],
        y=[point.loss],
        mode="markers+text",
        name=plain(point.mechanism),
        text=[plain(point.mechanism)],
        textposition=side,
        textfont={"color": INK[0], "size": 12},
        cliponaxis=False,
        marker={"symbol": style.marker, "size": 11, "color": style.color},
        error_y=error if point.high > point.low else None,
        hovertemplate=f"<b>{plain(point.mechanism)}</b><br>loss {point.loss:.4f} "
        f"({point.low:.4f} to {point.high:.4f})<br>{shown}<extra></extra>",
        legendgroup=point.mechanism,
        meta=point.mechanism,
    )


def _axis(cost: Cost, values: list[float]) -> dict[str, Any]:
    title = {"title": {"text": cost.title}}
    if cost.in_bytes:
        return title | {"type": "log", **bytes_ticks(values)}
    low = min(values)
    high = max(values)
    room = 0.12 * (high - low) or 0.1 * high
    return title | {"range": [max(0.0, low - room), high + room], "tickformat": "~s", "nticks": 7}


def label_sides(placed: list[Point], *, logarithmic: bool) -> list[str]:
    """Return the side of each point where its label goes: the one of `SIDES` that is least crowded, point by point."""
    spots = _spots(placed, logarithmic)
    left = min(x for x, _ in spots)
    right = max(x for x, _ in spots)
    labels: list[tuple[float, float]] = []
    chosen = []
    for index, (x, y) in enumerate(spots):
        taken = [*labels, *spots[:index], *spots[index + 1 :]]
        costs = {}
        for side, (dx, dy) in SIDES.items():
            room = x - left if dx < 0 else right - x
            costs[side] = _crowding((x + dx, y + dy), taken) + (CUT_OFF if room < EDGE else 0.0)
        best = min(costs, key=costs.__getitem__)
        dx, dy = SIDES[best]
        labels.append((x + dx, y + dy))
        chosen.append(best)
    return chosen


def _spots(placed: list[Point], logarithmic: bool) -> list[tuple[float, float]]:
    """Return the places of the points, in units of the figure's width and height."""
    across = [math.log(p.x) if logarithmic else p.x for p in placed]
    width = (max(across) - min(across)) or 1.0
    height = (max(p.high for p in placed) - min(p.low for p in placed)) or 1.0
    return [(x / width, p.loss / height) for x, p in zip(across, placed, strict=True)]


def _crowding(label: tuple[float, float], taken: list[tuple[float, float]]) -> float:
    """Return how far a label covers others: 1 for each at the same place, 0 for each that it does not touch."""
    x, y = label
    return sum(max(0.0, 1 - abs(x - a) / LABEL_WIDTH) * max(0.0, 1 - abs(y - b) / LABEL_HEIGHT) for a, b in taken)
