"""A comparison at several sizes: loss, and what each mechanism gains or loses on the baseline, as models grow."""

from __future__ import annotations

import math
from typing import Any

from ...errors import need
from ...formatting import count, loss, signed
from ..figures import View, figure, plain
from ..findings import Findings, Standing
from ..html import Html, join, table, tag
from ..style import MUTED, Look
from .common import VERDICTS, Figures, ending, frame, named, plot


def against_parameters(found: Findings, look: dict[str, Look]) -> list[View]:
    """Loss, and its paired difference to the baseline, against parameters: a line for each mechanism."""
    lines, gaps = [], []
    for mechanism in found.mechanisms:
        points = [
            (found.sizes[size].mean(mechanism, "parameters"), size, standing)
            for size in found.sizes
            if (standing := found.sizes[size].standing(mechanism)) and standing.val_loss is not None
        ]
        held = [(x, size, standing) for x, size, standing in points if x]
        if not held:
            continue
        ends = [_ends(found.sizes[size], mechanism) for _, size, _ in held]
        means = [standing.val_loss or 0.0 for _, _, standing in held]
        lines.append(_line(mechanism, look[mechanism], held, means, ends, ".4f"))
        told = [point for point in held if point[2].difference is not None]
        if told:
            differences = [standing.difference or 0.0 for _, _, standing in told]
            intervals = [standing.interval or (d, d) for (_, _, standing), d in zip(told, differences, strict=True)]
            gaps.append(_line(mechanism, look[mechanism], told, differences, intervals, "+.4f"))
    views = []
    said = "each point is a size, its parameters those of the whole model"
    if lines:
        caption = f"Mean validation loss, lower is better; {said}. Bars reach from the lowest seed to the highest."
        y: dict[str, Any] = {"title": {"text": "validation loss (nats per token)"}}
        views.append(View("Validation", caption, figure(lines, _parameters(found), y)))
    if gaps:
        caption = (
            f"Validation loss minus that of {found.baseline} of the same size and seed; {said}. Below zero is better "
            f"than {found.baseline}. Bars are 95 % intervals (Student's t over the paired seeds); a bar that crosses "
            "zero tells nothing apart, and a point without one has too few seeds."
        )
        y = {"title": {"text": f"difference to {plain(found.baseline)} (nats per token)"}, "tickformat": "+.2f"}
        y |= {"zeroline": True, "zerolinecolor": MUTED[0], "zerolinewidth": 1}
        views.append(View(f"Difference to {found.baseline}", caption, figure(gaps, _parameters(found), y)))
    return views


def _ends(found: Findings, mechanism: str) -> tuple[float, float]:
    losses = [cell.val_loss or 0.0 for cell in found.done(mechanism)]
    return min(losses), max(losses)


def _line(
    mechanism: str,
    style: Look,
    points: list[tuple[float, str, Standing]],
    y: list[float],
    ends: list[tuple[float, float]],
    digits: str,
) -> Any:
    go = need("plotly.graph_objects", "report")
    error = {
        "type": "data",
        "symmetric": False,
        "array": [high - value for value, (_, high) in zip(y, ends, strict=True)],
        "arrayminus": [value - low for value, (low, _) in zip(y, ends, strict=True)],
        "thickness": 1.2,
        "width": 3,
    }
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
    """The axis, with a tick at each size: where the baseline is, or else whoever is there."""
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
    """Empty where the comparison had one size."""
    if not found.sizes:
        return Html("")
    views = against_parameters(found, look)
    if views:
        drawn["sizes"] = views
    lost = [
        tag(
            "li", tag("b", f"{c.mechanism}, seed {c.seed}, {size}"), f" {ending(c)}", f": {c.error}" if c.error else "."
        )
        for size, own in found.sizes.items()
        for c in own.cells
        if c.status != "done"
    ]
    return frame(
        "sizes",
        "Sizes",
        plot(views, "sizes", "Loss against parameters, one line per mechanism") if views else None,
        losses(found, look),
        tag("div", tag("h3", "Runs that did not finish"), tag("ul", lost), class_="failures") if lost else None,
    )


def losses(found: Findings, look: dict[str, Look]) -> Html:
    """A row per mechanism, a column per size."""

    def cell(own: Findings, mechanism: str) -> Html:
        standing = own.standing(mechanism)
        if standing is None or standing.val_loss is None:
            return tag("span", "✗ no finished run", class_="bad")
        said = [tag("span", f"{count(own.mean(mechanism, 'parameters'))} parameters", class_="interval")]
        if mechanism != found.baseline:
            ends = standing.interval
            between = f" ({signed(ends[0])} to {signed(ends[1])})" if ends else ""
            said.append(tag("span", f"{VERDICTS.get(standing.verdict, '')} {standing.verdict}", class_="interval"))
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
