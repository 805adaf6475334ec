"""Fairness of the comparison: what was kept equal, and which width gave way for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...formatting import NONE, count, signed, size, words
from ..html import Html, table, tag
from ..results_folder import Findings, finite_number
from ..style import Look
from .common import Figures, frame, missing, named, plainly

EQUAL: dict[str, tuple[str, str, Callable[[float | None], str]]] = {  # --match -> noun, field, as people read it
    "params": ("parameters", "parameters", count),
    "cache": ("caches", "cache_bytes", size),
}


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    """Return the section; it has no figure."""
    title = "What was kept equal"
    if not found.compare:
        return frame("fairness", title, missing(found, "compare.json", "No finished comparison here"))
    match = str(found.compare.get("match") or "none")
    flag = tag("code", f"--match {match}", class_="flag")
    said: list[Any] = [
        "Data, data order, batch size, steps and schedule are the same for all; runs with one seed form a pair. "
    ]
    if match not in EQUAL:
        said += [
            "Widths are each mechanism's defaults (",
            flag,
            "), so parameters and caches differ: see the scoreboard.",
        ]
        return frame("fairness", title, tag("p", said))
    noun = EQUAL[match][0]
    said += [f"Widths were solved so that {noun} agree with {found.baseline}'s within 1 % (", flag, ")."]
    matched = found.compare.get("matched") or {}
    unequal = [str(m) for m, change in matched.items() if change.get("equal") is False]
    if unequal:
        said.append(f" It could not be done for {words(unequal)}: no width comes nearer than the table says.")
    head = ["mechanism", "changed", "from", "to", noun, f"against {found.baseline}"]
    caption = f"The width that gave way, and how far {noun} are from {found.baseline}'s."
    rows = [_row(m, change, match, look) for m, change in matched.items()]
    return frame("fairness", title, tag("p", said), table(caption, head, rows, left=2) if rows else None)


def _row(mechanism: str, change: dict[str, Any], match: str, look: dict[str, Look]) -> list[Any]:
    before = change.get("from")
    after = change.get("to")
    off = finite_number(change.get("off"))  # a share of the baseline's
    _, key, shown = EQUAL[match]
    return [
        named(mechanism, look) if mechanism in look else mechanism,
        "nothing" if before == after else str(change.get("field") or "nothing to change"),
        plainly(before),
        plainly(after),
        shown(finite_number(change.get(key))),
        NONE if off is None else f"{signed(100 * off, 1)} %",
    ]
