"""Costs: parameters, cache and FLOPs of each mechanism, as bars."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...formatting import count, size
from ..findings import Findings
from ..html import Html, table, tag
from ..style import Look
from .common import Figures, frame, missing, named


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    measures: list[tuple[str, str, Callable[[float | None], str]]] = [
        ("parameters", "parameters", count),
        ("cache_bytes", "cache", size),
        ("floats_per_token", "floats / token", count),
        ("flops_per_token", "FLOPs / token", count),
    ]
    mechanisms = [m for m in found.mechanisms if found.done(m)]
    if not mechanisms:
        return frame("costs", "What each mechanism costs", missing(found, "compare.json", "No finished run here"))
    means = {name: {m: found.mean(m, name) for m in mechanisms} for name, *_ in measures}
    rows = []
    for m in mechanisms:
        row: list[Any] = [named(m, look)]
        for name, _, shown in measures:
            most = max((x or 0.0 for x in means[name].values()), default=0.0)
            share = 100 * (means[name][m] or 0.0) / most if most else 0.0
            row.append(
                tag("span", shown(means[name][m]), class_="bar", style=f"--w:{share:.1f}%;--c:var(--c{look[m].slot})")
            )
        rows.append(row)
    caption = (
        "Parameters of the whole model; cache of one sequence at full context; floats that each further token adds to "
        "the cache (0 for a ring that is full or a fixed state); FLOPs of one token's forward pass. Bars are shares of "
        "the largest."
    )
    return frame(
        "costs",
        "What each mechanism costs",
        table(caption, ["mechanism", *(title for _, title, _ in measures)], rows, left=5),
    )
