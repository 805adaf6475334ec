"""Fairness: what was kept equal, and which width gave way for it."""

from __future__ import annotations

from typing import Any

from ...formatting import NONE, count, signed, size, words
from ..findings import Findings, number
from ..html import Html, table, tag
from ..style import Look
from .common import Figures, frame, missing, named, plainly


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    title = "What was kept equal"
    if not found.compare:
        return frame("fairness", title, missing(found, "compare.json", "No finished comparison here"))
    match = str(found.compare.get("match") or "none")
    said: list[Any] = [
        "Data, data order, batch size, steps and schedule are the same for all; runs with one seed form a pair. "
    ]
    flag = tag("code", f"--match {match}", class_="flag")
    if match not in ("params", "cache"):
        said += [
            "Widths are each mechanism's defaults (",
            flag,
            "), so parameters and caches differ: see the scoreboard.",
        ]
        return frame("fairness", title, tag("p", said))
    noun, key, shown = {"params": ("parameters", "parameters", count), "cache": ("caches", "cache_bytes", size)}[match]
    said += [f"Widths were solved so that {noun} agree with {found.baseline}'s within 1 % (", flag, ")."]
    rows: list[list[Any]] = []
    unequal = []
    for m, change in (found.compare.get("matched") or {}).items():
        before, after, off = change.get("from"), change.get("to"), number(change.get("off"))
        if change.get("equal") is False:
            unequal.append(str(m))
        field = str(change.get("field") or "nothing to change") if before != after else "nothing"
        name = named(m, look) if m in look else m
        share = NONE if off is None else f"{signed(100 * off, 1)} %"
        rows.append([name, field, plainly(before), plainly(after), shown(number(change.get(key))), share])
    if unequal:
        said.append(f" It could not be done for {words(unequal)}: no width comes nearer than the table says.")
    head = ["mechanism", "changed", "from", "to", noun, f"against {found.baseline}"]
    caption = f"The width that gave way, and how far {noun} are from {found.baseline}'s."
    return frame("fairness", title, tag("p", said), table(caption, head, rows, left=2) if rows else None)
