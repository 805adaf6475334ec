"""Synthetic tasks, in figures: accuracy against length, against the bytes of the cache, and by depth."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ...errors import need
from ...formatting import NONE, signed, size, words
from ...results import TaskResult
from ..figures import View, bytes_ticks, figure, plain
from ..findings import Findings, Trial
from ..html import Html, join, table, tag
from ..style import MUTED, Look
from .common import VERDICTS, Figures, frame, named, plot

BLUES = ("#f5f3ee", "#8ecdf5", "#0072b2", "#062238")  # from none to all, dark enough apart for anyone's eyes
SAID = {"better": "▲", "worse": "▼"}  # accuracies point the other way than losses


@dataclass(frozen=True)
class Place:
    """One mechanism at one length, over the seeds."""

    length: int
    accuracy: float
    low: float
    high: float
    cache_bytes: float


def places(trial: Trial, mechanism: str) -> list[Place]:
    """By rising length."""
    points = defaultdict(list)
    for cell in done(trial, mechanism):
        for point in cell.lengths:
            points[int(point["length"])].append(point)
    found = []
    for length, own in sorted(points.items()):
        shares = [float(point["accuracy"]) for point in own]
        cache = fmean(point["cache_bytes"] for point in own)
        found.append(Place(length, fmean(shares), min(shares), max(shares), cache))
    return found


def done(trial: Trial, mechanism: str) -> list[TaskResult]:
    return [cell for cell in trial.cells if cell.mechanism == mechanism and cell.status == "done"]


def against_length(found: Findings, look: dict[str, Look]) -> list[View]:
    """A view per task."""
    views = []
    for trial in found.tasks:
        lines = {m: own for m in found.mechanisms if (own := places(trial, m))}
        if not lines:
            continue
        lengths = sorted({place.length for own in lines.values() for place in own})
        x = {
            "title": {"text": "length of the sequence (tokens, log scale)"},
            "type": "log",
            "tickvals": lengths,
            "ticktext": [f"{length:,}" for length in lengths],
        }
        caption = (
            f"{trial.tests} Share of right answers on held-out sequences: mean over seeds, bars from the lowest seed "
            f"to the highest. The upright line is the longest length trained on, {trial.context} tokens; the level "
            f"one is chance, {100 * trial.chance:.1f} %: what the current token alone allows."
        )
        traces = [_line(m, look[m], own, [place.length for place in own]) for m, own in lines.items()]
        views.append(View(trial.task, caption, figure(traces, x, _percent(), shapes=_marks(trial))))
    return views


def against_cache(found: Findings, look: dict[str, Look]) -> list[View]:
    """A view per task; a mechanism's points are its lengths."""
    views = []
    for trial in found.tasks:
        own = {m: places(trial, m) for m in found.mechanisms}
        lines = {m: held for m, all_ in own.items() if (held := [place for place in all_ if place.cache_bytes])}
        none = [m for m, all_ in own.items() if all_ and m not in lines]
        if not lines:
            continue
        note = (
            f" {words(none)} {'keeps' if len(none) == 1 else 'keep'} no cache, which this axis cannot show."
            if none
            else ""
        )
        sizes = [place.cache_bytes for each in lines.values() for place in each]
        x = {"title": {"text": "cache of one sequence (log scale)"}, "type": "log", **bytes_ticks(sizes)}
        caption = (
            f"{trial.tests} The points of a line are lengths, the shortest leftmost; further left at equal height "
            f"remembers as much with less. Points above one another are a cache that no longer grows.{note}"
        )
        traces = [_line(m, look[m], each, [place.cache_bytes for place in each]) for m, each in lines.items()]
        views.append(View(trial.task, caption, figure(traces, x, _percent(), shapes=_marks(trial)[1:])))
    return views


def by_depth(found: Findings) -> list[View]:
    """A heat map per mechanism and task that has depths."""
    go = need("plotly.graph_objects", "report")
    views = []
    several = sum(any(cell.depths for cell in trial.cells) for trial in found.tasks) > 1
    for trial in found.tasks:
        for mechanism in found.mechanisms:
            shares: dict[tuple[float, int], list[float]] = defaultdict(list)
            for cell in done(trial, mechanism):
                for length, depth, accuracy in cell.depths:
                    shares[depth, int(length)].append(100 * accuracy)
            if not shares:
                continue
            depths, lengths = (sorted(set(axis)) for axis in zip(*shares, strict=True))
            heat = go.Heatmap(
                x=[f"{length:,}" for length in lengths],
                y=[f"{100 * depth:.0f}" for depth in depths],
                z=[[fmean(shares[d, n]) if (d, n) in shares else None for n in lengths] for d in depths],
                zmin=0,
                zmax=100,
                xgap=1,
                ygap=1,
                colorscale=[[i / (len(BLUES) - 1), color] for i, color in enumerate(BLUES)],
                texttemplate="%{z:.0f}",
                hovertemplate="depth %{y} %, %{x} tokens: %{z:.1f} % right<extra></extra>",
                colorbar={"title": {"text": "right (%)"}, "thickness": 10, "outlinewidth": 0, "len": 0.8},
            )
            caption = (
                f"{mechanism}: {trial.tests} Share of right answers by where they lie, 0 % at the start of the "
                f"sequence, and by its length; trained up to {trial.context} tokens. Chance is "
                f"{100 * trial.chance:.1f} %."
            )
            x = {"title": {"text": "length of the sequence (tokens)"}, "type": "category", "showgrid": False}
            y = {"title": {"text": "depth of the answer (% of the haystack)"}, "type": "category", "showgrid": False}
            name = f"{trial.task}, {mechanism}" if several else mechanism
            views.append(View(name, caption, figure([heat], x, y | {"autorange": "reversed"})))
    return views


def _line(mechanism: str, style: Look, own: list[Place], x: list[float] | list[int]) -> Any:
    go = need("plotly.graph_objects", "report")
    spread = any(place.high > place.low for place in own)
    error = {
        "type": "data",
        "symmetric": False,
        "array": [100 * (place.high - place.accuracy) for place in own],
        "arrayminus": [100 * (place.accuracy - place.low) for place in own],
        "thickness": 1,
        "width": 3,
    }
    return go.Scatter(
        x=x,
        y=[100 * place.accuracy for place in own],
        name=plain(mechanism),
        legendgroup=mechanism,
        meta=mechanism,
        mode="lines+markers",
        line={"color": style.color, "width": 2, "dash": style.dash},
        marker={"symbol": style.marker, "size": 8},
        error_y=error if spread else None,
        customdata=[[place.length, size(place.cache_bytes), 100 * place.low, 100 * place.high] for place in own],
        hovertemplate=f"<b>{plain(mechanism)}</b>, %{{customdata[0]:,d}} tokens<br>%{{y:.1f}} % right "
        "(%{customdata[2]:.1f} to %{customdata[3]:.1f})<br>cache %{customdata[1]}<extra></extra>",
    )


def _percent() -> dict[str, Any]:
    return {"title": {"text": "right answers (%)"}, "range": [-3, 103]}


def _marks(trial: Trial) -> list[dict[str, Any]]:
    """The length trained on, and chance."""
    line = {"color": MUTED[0], "width": 1, "dash": "dot"}
    upright = {"xref": "x", "yref": "paper", "x0": trial.context, "x1": trial.context, "y0": 0, "y1": 1}
    level = {"xref": "paper", "yref": "y", "x0": 0, "x1": 1, "y0": 100 * trial.chance, "y1": 100 * trial.chance}
    return [{"type": "line", "layer": "below", "line": line} | where for where in (upright, level)]


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    """Empty where the comparison had no tasks."""
    if not found.tasks:
        return Html("")
    figures: tuple[tuple[str, list[View], str, str], ...] = (
        ("tasks", against_length(found, look), "By length", "Accuracy against length, one line per mechanism"),
        ("memory", against_cache(found, look), "By cache", "Accuracy against cache bytes, one line per mechanism"),
        ("depth", by_depth(found), "By depth", "Heat map of accuracy, depth down, length across"),
    )
    content: list[Any] = []
    for name, views, title, label in figures:
        if views:
            drawn[name] = views
            content += [tag("h3", title), plot(views, name, label)]
    lost = [
        tag(
            "li",
            tag("b", f"{c.mechanism}, seed {c.seed}, {t.task}"),
            f" {c.status}",
            f": {c.error}" if c.error else ".",
        )
        for t in found.tasks
        for c in t.cells
        if c.status != "done"
    ]
    widths = [f"{mechanism} in {t.task} ({change})" for t in found.tasks for mechanism, change in t.matched.items()]
    return frame(
        "tasks",
        "Synthetic tasks",
        scores(found, look),
        tag("div", tag("h3", "Runs that did not finish"), tag("ul", lost), class_="failures") if lost else None,
        tag("p", f"Widths solved for {words(widths)}.", class_="note") if widths else None,
        *content,
    )


def scores(found: Findings, look: dict[str, Look]) -> Html:
    """A row per mechanism, a column per task."""

    def cell(trial: Trial, mechanism: str) -> Html:
        row = next((row for row in trial.summary if row.get("mechanism") == mechanism), {})
        verdict, interval = str(row.get("verdict") or "too few seeds"), row.get("interval")
        if row.get("accuracy") is None:
            return tag("span", "✗ no finished run", class_="bad")
        exact = fmean(c.exact or 0.0 for c in done(trial, mechanism))
        said = [tag("span", f"whole sequences {_share(exact)}", class_="interval")]
        if mechanism != found.baseline:
            between = f" ({_points(interval[0])} to {_points(interval[1])})" if interval else ""
            sign = SAID.get(verdict, VERDICTS.get(verdict, ""))
            said.append(tag("span", f"{sign} {verdict} {_points(row.get('difference'))}{between}", class_="interval"))
        return join([_share(row["accuracy"]), *said])

    mechanisms = [m for m in found.mechanisms if any(c.mechanism == m for t in found.tasks for c in t.cells)]
    rows: list[list[Any]] = [[named(m, look), *(cell(trial, m) for trial in found.tasks)] for m in mechanisms]
    rows.append(["chance", *(_share(trial.chance) for trial in found.tasks)])
    contexts = words((f"{n:,}" for n in dict.fromkeys(trial.context for trial in found.tasks)), "or")
    caption = (
        f"Right answers in {contexts} tokens, mean over seeds; below, sequences without a mistake, and the paired "
        f"difference to {found.baseline} in percentage points with its 95 % interval. Chance is what the current token "
        "alone allows."
    )
    return table(caption, ["mechanism", *(trial.task for trial in found.tasks)], rows)


def _share(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f} %"


def _points(value: float | None) -> str:
    return NONE if value is None else signed(100 * value, 1)
