"""Building blocks of figures, made with plotly in light colours; the page turns them dark."""

from __future__ import annotations

import html
import json
import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..errors import need
from ..formatting import size
from .results_folder import finite_number
from .style import GROUND, INK, MUTED, RULE, Look

FONT = 'ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'


@dataclass(frozen=True)
class View:
    """One way to look at a figure: its button's name, how to read it, and the plotly figure as JSON."""

    name: str
    caption: str
    figure: dict[str, Any]


def figure(
    traces: list[Any], x: dict[str, Any], y: dict[str, Any], hovermode: str = "closest", **layout: Any
) -> dict[str, Any]:
    """Return a plotly figure as JSON: traces on two titled axes, and the layout that all figures share."""
    go = need("plotly.graph_objects", "report")
    axis = {
        "gridcolor": RULE[0],
        "linecolor": RULE[0],
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": RULE[0],
        "ticklen": 4,
        "automargin": True,
        "title_standoff": 8,
        "title_font_size": 12,
        "tickfont_size": 11,
    }
    made = go.Figure(
        traces,
        go.Layout(
            template="none",
            showlegend=False,
            margin={"l": 56, "r": 14, "t": 10, "b": 44},
            paper_bgcolor=GROUND[0],
            plot_bgcolor="rgba(0,0,0,0)",
            font={"family": FONT, "size": 12, "color": MUTED[0]},
            hoverlabel={
                "bgcolor": GROUND[0],
                "bordercolor": RULE[0],
                "font": {"family": FONT, "color": INK[0], "size": 12},
                "align": "left",
            },
            xaxis=axis | x,
            yaxis=axis | y,
            hovermode=hovermode,
            **layout,
        ),
    )
    found: dict[str, Any] = json.loads(made.to_json())
    return found


def plain(text: str) -> str:
    """Return text that plotly shows as it is: it would read tags."""
    return html.escape(text, quote=False)


Series = list[tuple[float, float, float, float]]  # step, mean, lowest, highest


def steps_axis(series: dict[str, Series], *, late: bool = False) -> dict[str, Any]:
    """Return the axis of steps; `late` leaves out the first quarter, whose height would flatten the rest."""
    last = max(s[-1][0] for s in series.values())
    first = 0.235 if late else -0.015  # a share of the last step
    bounds = [last * first, last * 1.015] if last else None
    return {"title": {"text": "training step"}, "showgrid": False, "hoverformat": ",d", "range": bounds}


def over_seeds(lines: list[list[list[float]]]) -> Series:
    """Return the mean and the range of lines of [step, value], one a seed, at the steps that every seed has."""
    if not lines:
        return []
    tables = [{step: y for step, value in line if (y := finite_number(value)) is not None} for line in lines]
    steps = sorted(set.intersection(*(set(t) for t in tables)))
    columns = [(step, [t[step] for t in tables]) for step in steps]
    return [(step, fmean(values), min(values), max(values)) for step, values in columns]


def bands(series: dict[str, Series], look: dict[str, Look], digits: str) -> list[Any]:
    """Return a line for each mechanism, and a band from lowest to highest where they differ; bands come first.

    `digits` is how plotly writes a value, such as ":.4f".
    """
    ranges = []
    lines = []
    for mechanism, points in series.items():
        spread = any(low != high for _, _, low, high in points)
        if spread:
            ranges.append(_band(mechanism, points, look[mechanism]))
        lines.append(_line(mechanism, points, look[mechanism], digits, spread))
    return [*ranges, *lines]


def _band(mechanism: str, points: Series, style: Look) -> Any:
    go = need("plotly.graph_objects", "report")
    steps, _, lows, highs = (list(column) for column in zip(*points, strict=True))
    return go.Scatter(
        x=steps + steps[::-1],
        y=highs + lows[::-1],
        fill="toself",
        fillcolor=style.band,
        mode="lines",
        line={"width": 0, "color": style.color},
        hoverinfo="skip",
        legendgroup=mechanism,
        meta=mechanism,
    )


def _line(mechanism: str, points: Series, style: Look, digits: str, spread: bool) -> Any:
    go = need("plotly.graph_objects", "report")
    said = f" (%{{customdata[0]{digits}}} to %{{customdata[1]{digits}}})" if spread else ""
    return go.Scatter(
        x=[step for step, _, _, _ in points],
        y=[mean for _, mean, _, _ in points],
        name=plain(mechanism),
        mode="lines+markers",
        customdata=[(low, high) for _, _, low, high in points],
        line={"color": style.color, "dash": style.dash, "width": 2},
        marker={"symbol": style.marker, "size": 6, "maxdisplayed": 6},
        hovertemplate=f"%{{y{digits}}}{said}",
        legendgroup=mechanism,
        meta=mechanism,
    )


def error_bars(up: list[float], down: list[float], thickness: float = 1) -> dict[str, Any]:
    """Return bars that reach `up` above the points and `down` below them, as plotly's error_y."""
    return {
        "type": "data",
        "symmetric": False,
        "array": up,
        "arrayminus": down,
        "thickness": thickness,
        "width": 3,
    }


def bytes_ticks(values: list[float]) -> dict[str, Any]:
    """Return the ticks and the range of a logarithmic axis of bytes: at most seven ticks, all powers of two."""
    low = math.floor(math.log2(min(values)))
    high = math.ceil(math.log2(max(values)))
    ticks = [2**i for i in range(low, high + 1, max(1, (high - low) // 6))]
    pad = 0.25 * math.log10(2)
    bounds = [math.log10(min(values)) - pad, math.log10(max(values)) + 3 * pad]
    return {"tickvals": ticks, "ticktext": [size(tick) for tick in ticks], "range": bounds}
