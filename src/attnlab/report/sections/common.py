"""Helpers that several sections share: the frame of a section, the place of a figure, names and verdicts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...contrasts import verdict_in_words
from ...formatting import NONE, words
from ...results import RunResult, TaskResult
from .. import figures
from ..html import Html, tag
from ..results_folder import Findings
from ..style import Look, swatch

Figures = dict[str, list[figures.View]]  # name of a figure -> its views; a section adds what its `plot` names
VERDICTS = {"better": "▼", "worse": "▲", "equal": "=", "undecided": "?", "baseline": "◆", "too few seeds": "·"}


def frame(anchor: str, title: str, *content: Any) -> Html:
    """Return a section of the page: its heading, to which `#anchor` links, and its content."""
    return tag(
        "section", tag("h2", title, id=f"{anchor}-title"), *content, id=anchor, aria_labelledby=f"{anchor}-title"
    )


def missing(found: Findings, file: str, what: str) -> Html:
    """Return the line that stands for a section without data: `what` is missing, and the command that writes `file`."""
    return tag("p", f"{what}: ", tag("code", found.how_to_make(file)), " makes it.", class_="missing")


def plot(views: list[figures.View], name: str, label: str) -> Html:
    """Return the place of figure `name`. The page's script draws the figure, its buttons and its legend there."""
    return tag(
        "figure",
        tag("div", class_="views", role="group", aria_label="What to show") if len(views) > 1 else None,
        tag("div", class_="plot", id=f"plot-{name}", data_figure=name, role="img", aria_label=label),
        tag("div", class_="legend", role="group", aria_label="Show or hide"),
        tag("figcaption", views[0].caption),
    )


def named(mechanism: str, look: dict[str, Look]) -> Html:
    """Return a mechanism's swatch and name."""
    return tag("span", swatch(look[mechanism]), mechanism, class_="name")


def judged(verdict: str, margin: float) -> str:
    """Return the sign of a verdict on losses, and the verdict in words."""
    return f"{VERDICTS.get(verdict, '')} {verdict_in_words(verdict, margin)}"


def ending(cell: RunResult | TaskResult) -> str:
    """Return the status of a run, and the number of attempts where there were several."""
    if isinstance(cell, RunResult) and cell.attempts > 1:
        return f"{cell.status} after {cell.attempts} attempts"
    return cell.status


def unfinished(runs: Iterable[tuple[str, RunResult | TaskResult]]) -> Html | None:
    """Return the list of the runs that did not finish, or None. `runs`: (size or task or "", run) for every run."""
    lines = []
    for where, cell in runs:
        if cell.status == "done":
            continue
        name = ", ".join(filter(None, (cell.mechanism, f"seed {cell.seed}", where)))
        lines.append(tag("li", tag("b", name), f" {ending(cell)}", f": {cell.error}" if cell.error else "."))
    return failures("Runs that did not finish", lines)


def failures(title: str, lines: list[Html]) -> Html | None:
    """Return a titled list of failures, or None where there are none."""
    return tag("div", tag("h3", title), tag("ul", lines), class_="failures") if lines else None


def without_cache(mechanisms: list[str]) -> str:
    """Return the sentence about mechanisms that an axis of cache sizes leaves out; empty where there are none."""
    if not mechanisms:
        return ""
    keep = "keeps" if len(mechanisms) == 1 else "keep"
    return f" {words(mechanisms)} {keep} no cache, which this axis cannot show."


def plainly(value: Any) -> str:
    """Return a value of a JSON file as text: {"a": [1, 2000]} is "a 1, 2,000"."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {plainly(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plainly, value))
    if value is None:
        return NONE
    whole = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if whole else str(value)
