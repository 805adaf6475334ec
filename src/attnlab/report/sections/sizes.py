"""A comparison at several sizes: loss, and what each mechanism gains or loses on the baseline, as models grow."""

from __future__ import annotations

import math
from typing import Any

from ...errors import need
from ...formatting import count, loss, signed
from ..figures import View, error_bars, figure, plain
from ..html import Html, join, table, tag
from ..results_folder import Findings, Standing
from ..style import MUTED, Look
from .common import Figures, frame, judged, named, plot, unfinished


def against_parameters(found: Findings, look: dict[str, Look]) -> list[View]:
    """Return loss, and its paired difference to the baseline, against parameters: a line for each mechanism."""
    losses = []
    gaps = []
    for mechanism in found.mechanisms:
        held = _held(found, mechanism)
        if held:
            losses.append(_loss_line(found, mechanism, look[mechanism], held))
        compared = [point for point in held if point[2].difference is not None]
        if compared:
            gaps.append(_gap_line(mechanism, look[mechanism], compared))
    views = []
    said = "each point is a size, its parameters those of the whole model"
    if losses:
        caption = f"Mean validation loss, lower is better; {said}. Bars reach from the lowest seed to the highest."
        y: dict[str, Any] = {"title": {"text": "validation loss (nats per token)"}}
        views.append(View("Validation", caption, figure(losses, _parameters(found), y)))
    if gaps:
        caption = (
            f"Validation loss minus that of {found.baseline} of the same size and seed; {said}. Below zero is better "
            f"than {found.baseline}. Bars are 95 % intervals, which hold together within a size; a bar that "
            "crosses zero tells nothing apart, and a point without one has too few seeds."
        )
        y = {"title": {"text": f"difference to {plain(found.baseline)} (nats per token)"}, "tickformat": "+.2f"}
        y |= {"zeroline": True, "zerolinecolor": MUTED[0], "zerolinewidth": 1}
        views.append(View(f"Difference to {found.baseline}", caption, figure(gaps, _parameters(found), y)))
    return views


Held = tuple[float, str, Standing]  # mean parameters, the size, how the mechanism stands there


def _held(found: Findings, mechanism: str) -> list[Held]:
    held = []
    for size, own in found.sizes.items():
        standing = own.standing(mechanism)
        parameters = own.mean(mechanism, "parameters")
        if standing and standing.val_loss is not None and parameters:
            held.append((parameters, size, standing))
    return held


def _loss_line(found: Findings, mechanism: str, style: Look, held: list[Held]) -> Any:
    means = [standing.val_loss or 0.0 for _, _, standing in held]
    ends = [_ends(found.sizes[size], mechanism) for _, size, _ in held]
    return _line(mechanism, style, held, means, ends, ".4f")


def _gap_line(mechanism: str, style: Look, held: list[Held]) -> Any:
    differences = [standing.difference or 0.0 for _, _, standing in held]
    intervals = [standing.interval or (d, d) for (_, _, standing), d in zip(held, differences, strict=True)]
    return _line(mechanism, style, held, differences, intervals, "+.4f")


def _ends(found: Findings, mechanism: str) -> tuple[float, float]:
    losses = [cell.val_loss or 0.0 for cell in found.done(mechanism)]
    return min(losses), max(losses)


def _line(
    mechanism: str,
    style: Look,
    points: list[Held],
    y: list[float],
    ends: list[tuple[float, float]],
    digits: str,
) -> Any:
    go = need("plotly.graph_objects", "report")
    error = error_bars(
        [high - value for value, (_, high) in zip(y, ends, strict=True)],
        [value - low for value, (low, _) in zip(y, ends, strict=True)],
        thickness=1.2,
    )
    return go.Scatter(
        x=[x for x, _, _ in points],
        y=y,
        name=plain(mechanism),
        legendgroup=mechanism,
        meta=mechanism,
        mode="lines+markers",
        line={"color": style.color, "width": 2, "dash": style.dash},
        marker={"symbol": style.marker, "size": 9},
        error_y=error if any(low < high for low, high in ends) else None,
        customdata=[[plain(size), *end] for (_, size, _), end in zip(points, ends, strict=True)],
        hovertemplate=f"<b>{plain(mechanism)}</b>, %{{customdata[0]}}, %{{x:,.3s}} parameters<br>%{{y:{digits}}} "
        f"(%{{customdata[1]:{digits}}} to %{{customdata[2]:{digits}}})<extra></extra>",
    )


def _parameters(found: Findings) -> dict[str, Any]:
    """Return the axis, with a tick at each size: at the baseline's parameters, or else at the first mechanism's."""
    ticks = {}
    for size, own in found.sizes.items():
        counts = [x for m in (found.baseline, *found.mechanisms) if (x := own.mean(m, "parameters"))]
        if counts:
            ticks[counts[0]] = f"{count(counts[0])}<br>{plain(size)}"
    pad = 0.15 * (math.log10(max(ticks)) - math.log10(min(ticks))) or 0.2
    return {
        "title": {"text": "parameters (log scale), and layers x width"},
        "type": "log",
        "tickvals": list(ticks),
        "ticktext": list(ticks.values()),
        "range": [math.log10(min(ticks)) - pad, math.log10(max(ticks)) + pad],
    }


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    """Return the section, and add its figure to `drawn`; empty where the comparison had one size."""
    if not found.sizes:
        return Html("")
    views = against_parameters(found, look)
    if views:
        drawn["sizes"] = views
    return frame(
        "sizes",
        "Sizes",
        plot(views, "sizes", "Loss against parameters, one line per mechanism") if views else None,
        _losses(found, look),
        unfinished((size, cell) for size, own in found.sizes.items() for cell in own.cells),
    )


def _losses(found: Findings, look: dict[str, Look]) -> Html:
    """Return the table: a row per mechanism, a column per size."""

    def cell(own: Findings, mechanism: str) -> Html:
        standing = own.standing(mechanism)
        if standing is None or standing.val_loss is None:
            return tag("span", "✗ no finished run", class_="bad")
        said = [tag("span", f"{count(own.mean(mechanism, 'parameters'))} parameters", class_="interval")]
        if mechanism != found.baseline:
            ends = standing.interval
            between = f" ({signed(ends[0])} to {signed(ends[1])})" if ends else ""
            said.append(tag("span", judged(standing.verdict, own.margin), class_="interval"))
            said.append(tag("span", f"{signed(standing.difference)}{between}", class_="interval"))
        return join([loss(standing.val_loss), *said])

    rows: list[list[Any]] = [
        [named(m, look), *(cell(own, m) for own in found.sizes.values())]
        for m in found.mechanisms
        if any(own.standing(m) for own in found.sizes.values())
    ]
    caption = (
        f"Mean validation loss over seeds, in nats per token; below, parameters, and the paired difference to "
        f"{found.baseline} of the same size with its 95 % interval."
    )
    return table(caption, ["mechanism", *found.sizes], rows)
