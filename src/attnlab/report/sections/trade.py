"""Quality against cost: loss against cache bytes and speed, with the Pareto front."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ...errors import need
from ...formatting import size, words
from ..figures import View, bytes_ticks, figure, plain
from ..findings import Findings, number
from ..html import Html
from ..style import INK, MUTED, Look
from .common import Figures, frame, missing, plot


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    views = trade_views(found, look)
    if not views:
        return frame("trade", "Quality against cost", missing(found, "compare.json", "No finished run here"))
    drawn["trade"] = views
    label = "Validation loss against cache size or speed, one point per mechanism, with the Pareto front"
    return frame("trade", "Quality against cost", plot(views, "trade", label))


@dataclass(frozen=True)
class Point:
    mechanism: str
    x: float
    loss: float
    low: float
    high: float


def points(found: Findings, cost: dict[str, float | None]) -> list[Point]:
    """Where each mechanism stands: its cost, and its loss with the range over seeds."""
    placed = []
    for mechanism, x in cost.items():
        losses = [y for c in found.done(mechanism) if (y := number(c.val_loss)) is not None]
        if losses and x is not None:
            placed.append(Point(mechanism, x, fmean(losses), min(losses), max(losses)))
    return placed


def front(placed: list[Point], *, smaller: bool) -> list[Point]:
    """The points that no other beats on both axes, by rising x. `smaller`: less x is better; else more is."""
    best = math.inf
    kept: list[Point] = []
    for point in sorted(placed, key=lambda p: (p.x if smaller else -p.x, p.loss)):
        if point.loss < best:
            best, kept = point.loss, [*kept, point]
    return sorted(kept, key=lambda p: p.x)


def trade_views(found: Findings, look: dict[str, Look]) -> list[View]:
    """Loss against cache bytes, training speed, and decoding speed where it was measured."""
    views = []
    context = max((c.context for c in found.cells), default=0)
    caches = {m: found.mean(m, "cache_bytes") for m in found.mechanisms}
    none = [m for m, x in caches.items() if x == 0 and found.done(m)]
    held = points(found, {m: x for m, x in caches.items() if x})
    if held:
        note = (
            f" {words(none)} {'keeps' if len(none) == 1 else 'keep'} no cache, which this axis cannot show."
            if none
            else ""
        )
        views.append(
            _against(
                held,
                look,
                "Cache size",
                f"cache per sequence of {context:,} tokens (log scale)",
                True,
                note,
                {"type": "log", **bytes_ticks([p.x for p in held])},
                ",.0f",
            )
        )
    speeds = points(found, {m: found.mean(m, "tokens_per_s") for m in found.mechanisms})
    if speeds:
        views.append(
            _against(speeds, look, "Training speed", "training speed (tokens per second)", False, "", {}, ",.0f")
        )
    decode = [r for r in found.bench if r.kind == "decode" and number(r.tokens_per_s) and found.done(r.mechanism)]
    if decode:
        longest = max(r.context for r in decode)
        fastest: dict[str, float | None] = {}
        for record in decode:
            if record.context == longest:
                fastest[record.mechanism] = max(fastest.get(record.mechanism) or 0.0, record.tokens_per_s or 0.0)
        note = " Where a mechanism has several ways to decode, the fastest one is shown."
        title = f"decoding speed with {longest:,} tokens held (tokens per second)"
        views.append(_against(points(found, fastest), look, "Decoding speed", title, False, note, {}, ",.0f"))
    return views


def _against(
    placed: list[Point],
    look: dict[str, Look],
    name: str,
    title: str,
    smaller: bool,
    note: str,
    axis: dict[str, Any],
    digits: str,
) -> View:
    go = need("plotly.graph_objects", "report")
    line = front(placed, smaller=smaller)
    best = f"{'left' if smaller else 'right'}, and lower"
    caption = (
        f"Further {best}, is better. Bars reach from the lowest seed to the highest. The stepped line is the Pareto "
        f"front: {words(p.mechanism for p in line)} {'is' if len(line) == 1 else 'are'} not beaten on both axes by any "
        f"other mean; where bars overlap, the order may be luck.{note}"
    )
    shape = "hv" if smaller else "vh"
    traces = [
        go.Scatter(
            x=[p.x for p in line],
            y=[p.loss for p in line],
            mode="lines",
            hoverinfo="skip",
            name="Pareto front",
            line={"color": MUTED[0], "width": 1, "shape": shape, "dash": "dot"},
        )
    ]
    for point, place in zip(placed, _places(placed, bool(axis)), strict=True):
        style = look[point.mechanism]
        shown = size(point.x) if smaller else f"{point.x:,.0f} tokens/s"
        error = {
            "array": [point.high - point.loss],
            "arrayminus": [point.loss - point.low],
            "thickness": 1.2,
            "width": 3,
        }
        traces.append(
            go.Scatter(
                x=[point.x],
                y=[point.loss],
                mode="markers+text",
                name=plain(point.mechanism),
                text=[plain(point.mechanism)],
                textposition=place,
                textfont={"color": INK[0], "size": 12},
                cliponaxis=False,
                marker={"symbol": style.marker, "size": 11, "color": style.color},
                error_y={"type": "data", "symmetric": False, "color": style.color} | error
                if point.high > point.low
                else None,
                hovertemplate=f"<b>{plain(point.mechanism)}</b><br>loss {point.loss:.4f} "
                f"({point.low:.4f} to {point.high:.4f})<br>{shown}<extra></extra>",
                legendgroup=point.mechanism,
                meta=point.mechanism,
            )
        )
    x = {"title": {"text": title}} | axis
    if not axis:
        low, high = min(p.x for p in placed), max(p.x for p in placed)
        room = 0.12 * (high - low) or 0.1 * high
        x |= {"range": [max(0.0, low - room), high + room], "tickformat": "~s", "nticks": 7}
    return View(name, caption, figure(traces, x, {"title": {"text": "validation loss (nats per token)"}}))


def _places(placed: list[Point], log: bool) -> list[str]:
    """Where each label goes: to the right, or to another side of its point where a neighbour's would lie."""
    across = [math.log(p.x) if log else p.x for p in placed]
    width = (max(across) - min(across)) or 1.0
    height = (max(p.high for p in placed) - min(p.low for p in placed)) or 1.0
    chosen: list[str] = []
    sides = {
        "top right": (0.07, 0.06),
        "bottom right": (0.07, -0.06),
        "middle left": (-0.09, 0.0),
        "middle right": (0.09, 0.0),
    }
    spots: list[tuple[float, float]] = [(x / width, p.loss / height) for x, p in zip(across, placed, strict=True)]
    labels: list[tuple[float, float]] = []
    for index, (x, y) in enumerate(spots):
        others = [*labels, *(spot for i, spot in enumerate(spots) if i != index)]

        def crowd(side: str, x: float = x, y: float = y, others: list[tuple[float, float]] = others) -> float:
            dx, dy = sides[side]
            room = x - min(across) / width if dx < 0 else max(across) / width - x
            near = sum(max(0.0, 1 - abs(x + dx - a) / 0.14) * max(0.0, 1 - abs(y + dy - b) / 0.07) for a, b in others)
            return near + (0.2 if room < 0.06 else 0.0)

        side = min(sides, key=crowd)
        labels.append((x + sides[side][0], y + sides[side][1]))
        chosen.append(side)
    return chosen
