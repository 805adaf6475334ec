"""Costs of each mechanism as bars: parameters, cache, FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...formatting import count, size
from ..html import Html, table, tag
from ..results_folder import Findings
from ..style import Look
from .common import Figures, frame, missing, named

MEASURES: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (  # field of a run, title, as people read it
    ("parameters", "parameters", count),
    ("cache_bytes", "cache", size),
    ("floats_per_token", "floats / token", count),
    ("flops_per_token", "FLOPs / token", count),
)


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    """Return the section; its bars are part of a table."""
    mechanisms = [m for m in found.mechanisms if found.done(m)]
    if not mechanisms:
        return frame("costs", "What each mechanism costs", missing(found, "compare.json", "No finished run here"))
    rows: list[list[Any]] = [[named(m, look)] for m in mechanisms]
    for name, _, shown in MEASURES:
        means = [found.mean(m, name) for m in mechanisms]
        most = max(mean or 0.0 for mean in means)
        for row, mechanism, mean in zip(rows, mechanisms, means, strict=True):
            share = 100 * (mean or 0.0) / most if most else 0.0
            style = f"--w:{share:.1f}%;--c:var(--c{look[mechanism].slot})"
            row.append(tag("span", shown(mean), class_="bar", style=style))
    caption = (
        "Parameters of the whole model; cache of one sequence at full context; floats that each further token adds to "
        "the cache (0 for a ring that is full or a fixed state); FLOPs of one token's forward pass. Bars are shares of "
        "the largest."
    )
    head = ["mechanism", *(title for _, title, _ in MEASURES)]
    return frame("costs", "What each mechanism costs", table(caption, head, rows, left=5))
