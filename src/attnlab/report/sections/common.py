"""What several sections share: the frame of a section, the place of a figure, names and verdicts."""

from __future__ import annotations

from typing import Any

from ...formatting import NONE
from ...results import RunResult
from .. import figures
from ..findings import Findings
from ..html import Html, tag
from ..style import Look, swatch

Figures = dict[str, list[figures.View]]


def frame(anchor: str, title: str, *content: Any) -> Html:
    return tag(
        "section", tag("h2", title, id=f"{anchor}-title"), *content, id=anchor, aria_labelledby=f"{anchor}-title"
    )


def missing(found: Findings, file: str, what: str) -> Html:
    return tag("p", f"{what}: ", tag("code", found.how_to_make(file)), " makes it.", class_="missing")


def plot(views: list[figures.View], name: str, label: str) -> Html:
    """A place for a figure; the script draws it, its buttons and its legend."""
    return tag(
        "figure",
        tag("div", class_="views", role="group", aria_label="What to show") if len(views) > 1 else None,
        tag("div", class_="plot", id=f"plot-{name}", data_figure=name, role="img", aria_label=label),
        tag("div", class_="legend", role="group", aria_label="Show or hide"),
        tag("figcaption", views[0].caption),
    )


def named(mechanism: str, look: dict[str, Look]) -> Html:
    return tag("span", swatch(look[mechanism]), mechanism, class_="name")


VERDICTS = {"better": "▼", "worse": "▲", "not distinguishable": "≈", "baseline": "◆", "too few seeds": "?"}


def ending(cell: RunResult) -> str:
    return f"{cell.status} after {cell.attempts} attempts" if cell.attempts > 1 else cell.status


def plainly(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {plainly(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plainly, value))
    return (
        NONE
        if value is None
        else f"{value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else str(value)
    )
