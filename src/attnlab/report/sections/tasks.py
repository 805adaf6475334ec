"""Synthetic tasks: accuracy against length, against the bytes of the cache, and by depth."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ...contrasts import MARGIN
from ...errors import need
from ...formatting import NONE, signed, size, words
from ...results import TaskResult
from ..figures import View, bytes_ticks, error_bars, figure, plain
from ..html import Html, join, table, tag
from ..results_folder import Findings, Trial
from ..style import MUTED, Look
from .common import VERDICTS, Figures, frame, named, plot, unfinished, without_cache

BLUES = ("#f5f3ee", "#8ecdf5", "#0072b2", "#062238")  # from none to all, dark enough apart for anyone's eyes
SIGNS = VERDICTS | {"better": "▲", "worse": "▼"}  # more accuracy is better, and less loss


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    """Return the section, and add its figures to `drawn`; empty where the comparison had no tasks."""
    if not found.tasks:
        return Html("")
    figures: tuple[tuple[str, list[View], str, str], ...] = (
        ("tasks", against_length(found, look), "By length", "Accuracy against length, one line per mechanism"),
        ("memory", against_cache(found, look), "By cache", "Accuracy against cache bytes, one line per mechanism"),
        ("depth", depth_maps(found), "By depth", "Heat map of accuracy, depth down, length across"),
    )
    content: list[Any] = []
    for name, views, title, label in figures:
        if views:
            drawn[name] = views
            content += [tag("h3", title), plot(views, name, label)]
    widths = [f"{mechanism} in {t.task} ({change})" for t in found.tasks for mechanism, change in t.matched.items()]
    return frame(
        "tasks",
        "Synthetic tasks",
        _scores(found, look),
        unfinished((trial.task, cell) for trial in found.tasks for cell in trial.cells),
        tag("p", f"Widths solved for {words(widths)}.", class_="note") if widths else None,
        *content,
    )


@dataclass(frozen=True)
class AtLength:
    """One mechanism at one length, over the seeds. Accuracies are shares, from 0 to 1."""

    length: int  # tokens of a sequence
    accuracy: float  # mean over seeds
    low: float  # of the seeds
    high: float
    cache_bytes: float  # of one sequence, mean over seeds


def places(trial: Trial, mechanism: str) -> list[AtLength]:
    """Return the mechanism's places, by rising length."""
    points = defaultdict(list)
    for cell in done(trial, mechanism):
        for point in cell.lengths:
            points[int(point["length"])].append(point)
    found = []
    for length, own in sorted(points.items()):
        shares = [float(point["accuracy"]) for point in own]
        cache = fmean(point["cache_bytes"] for point in own)
        found.append(AtLength(length, fmean(shares), min(shares), max(shares), cache))
    return found


def done(trial: Trial, mechanism: str) -> list[TaskResult]:
    """Return the finished runs of a mechanism on a task."""
    return [cell for cell in trial.cells if cell.mechanism == mechanism and cell.status == "done"]


def against_length(found: Findings, look: dict[str, Look]) -> list[View]:
    """Return accuracy against length, a view per task."""
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
    """Return accuracy against cache bytes, a view per task; a mechanism's points are its lengths."""
    views = []
    for trial in found.tasks:
        own = {m: places(trial, m) for m in found.mechanisms}
        lines = {m: held for m, all_ in own.items() if (held := [place for place in all_ if place.cache_bytes])}
        none = [m for m, all_ in own.items() if all_ and m not in lines]
        if not lines:
            continue
        sizes = [place.cache_bytes for each in lines.values() for place in each]
        x = {"title": {"text": "cache of one sequence (log scale)"}, "type": "log", **bytes_ticks(sizes)}
        caption = (
            f"{trial.tests} The points of a line are lengths, the shortest leftmost; further left at equal height "
            f"remembers as much with less. Points above one another are a cache that no longer grows."
            f"{without_cache(none)}"
        )
        traces = [_line(m, look[m], each, [place.cache_bytes for place in each]) for m, each in lines.items()]
        views.append(View(trial.task, caption, figure(traces, x, _percent(), shapes=_marks(trial)[1:])))
    return views


def depth_maps(found: Findings) -> list[View]:
    """Return heat maps of accuracy by depth and length, one per mechanism and task that has depths."""
    views = []
    several = sum(any(cell.depths for cell in trial.cells) for trial in found.tasks) > 1
    for trial in found.tasks:
        for mechanism in found.mechanisms:
            shares = _shares(trial, mechanism)
            if shares:
                name = f"{trial.task}, {mechanism}" if several else mechanism
                views.append(_depth_view(name, trial, mechanism, shares))
    return views


def _shares(trial: Trial, mechanism: str) -> dict[tuple[float, int], float]:
    """Return (depth, length) -> right answers in percent, mean over seeds."""
    shares: dict[tuple[float, int], list[float]] = defaultdict(list)
    for cell in done(trial, mechanism):
        for length, depth, accuracy in cell.depths:
            shares[depth, int(length)].append(100 * accuracy)
    return {place: fmean(values) for place, values in shares.items()}


def _depth_view(name: str, trial: Trial, mechanism: str, shares: dict[tuple[float, int], float]) -> View:
    go = need("plotly.graph_objects", "report")
    depths = sorted({depth for depth, _ in shares})
    lengths = sorted({length for _, length in shares})
    heat = go.Heatmap(
        x=[f"{length:,}" for length in lengths],
        y=[f"{100 * depth:.0f}" for depth in depths],
        z=[[shares.get((depth, length)) for length in lengths] for depth in depths],
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
    return View(name, caption, figure([heat], x, y | {"autorange": "reversed"}))


def _line(mechanism: str, style: Look, own: list[AtLength], x: list[float] | list[int]) -> Any:
    go = need("plotly.graph_objects", "report")
    spread = any(place.high > place.low for place in own)
    error = error_bars(
        [100 * (place.high - place.accuracy) for place in own],
        [100 * (place.accuracy - place.low) for place in own],
    )
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
    """Return two lines: upright at the length trained on, and level at chance."""
    line = {"color": MUTED[0], "width": 1, "dash": "dot"}
    upright = {"xref": "x", "yref": "paper", "x0": trial.context, "x1": trial.context, "y0": 0, "y1": 1}
    level = {"xref": "paper", "yref": "y", "x0": 0, "x1": 1, "y0": 100 * trial.chance, "y1": 100 * trial.chance}
    return [{"type": "line", "layer": "below", "line": line} | where for where in (upright, level)]


def _scores(found: Findings, look: dict[str, Look]) -> Html:
    """Return the table: a row per mechanism, a column per task."""
    mechanisms = [m for m in found.mechanisms if any(c.mechanism == m for t in found.tasks for c in t.cells)]
    rows: list[list[Any]] = []
    for mechanism in mechanisms:
        rows.append([named(mechanism, look), *(_score(found, trial, mechanism) for trial in found.tasks)])
    rows.append(["chance", *(_share(trial.chance) for trial in found.tasks)])
    contexts = words((f"{n:,}" for n in dict.fromkeys(trial.context for trial in found.tasks)), "or")
    caption = (
        f"Right answers in {contexts} tokens, mean over seeds; below, sequences without a mistake, and the paired "
        f"difference to {found.baseline} in percentage points with its 95 % interval. Chance is what the current token "
        "alone allows."
    )
    return table(caption, ["mechanism", *(trial.task for trial in found.tasks)], rows)


def _score(found: Findings, trial: Trial, mechanism: str) -> Html:
    row = next((row for row in trial.summary if row.get("mechanism") == mechanism), {})
    if row.get("accuracy") is None:
        return tag("span", "✗ no finished run", class_="bad")
    exact = fmean(c.exact or 0.0 for c in done(trial, mechanism))
    said = [tag("span", f"whole sequences {_share(exact)}", class_="interval")]
    if mechanism != found.baseline:
        interval = row.get("interval")
        verdict = str(row.get("verdict") or "too few seeds")
        between = f" ({_points(interval[0])} to {_points(interval[1])})" if interval else ""
        sign = SIGNS.get(verdict, "")
        if verdict == "equal":
            verdict = f"equal within {100 * MARGIN:g}"
        said.append(tag("span", f"{sign} {verdict} {_points(row.get('difference'))}{between}", class_="interval"))
    return join([_share(row["accuracy"]), *said])


def _share(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f} %"


def _points(value: float | None) -> str:
    return NONE if value is None else signed(100 * value, 1)
