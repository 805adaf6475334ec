"""HTML that is escaped: every child that is not `Html` is text."""

from __future__ import annotations

import html
import json
from typing import Any


class Html(str):
    """Markup that may be written as it is."""


def tag(element: str, *children: Any, **attributes: Any) -> Html:
    """Return an element: `tag("p", "a < b", class_="note")`.

    In names of attributes `_` is a hyphen, at their end it is nothing. None and False leave an attribute out.
    """
    written = "".join(
        f" {name.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{element}{written}>{join(children)}</{element}>")


def join(children: Any, between: str = "") -> Html:
    """Return text, markup and nested lists of these, one after the other; None is nothing."""
    parts = []
    for child in children:
        if isinstance(child, Html):
            parts.append(str(child))
        elif isinstance(child, list | tuple):
            parts.append(str(join(child)))
        elif child is not None:
            parts.append(html.escape(str(child)))
    return Html(html.escape(between).join(parts))


def table(caption: Any, head: list[Any], rows: list[list[Any]], *, left: int = 1, marked: tuple[int, ...] = ()) -> Html:
    """Return a table in a box that scrolls by itself.

    The first `left` columns are words, the others numbers. `marked` are the numbers of the rows to highlight.
    """

    def side(column: int) -> str | None:
        return None if column < left else "num"

    def line(number: int, row: list[Any]) -> Html:
        first = tag("th", row[0], scope="row")
        rest = [tag("td", cell, class_=side(column)) for column, cell in enumerate(row) if column]
        return tag("tr", first, rest, class_="marked" if number in marked else None)

    header = tag("tr", [tag("th", cell, scope="col", class_=side(column)) for column, cell in enumerate(head)])
    body = [line(number, row) for number, row in enumerate(rows)]
    inside = tag("table", tag("caption", caption), tag("thead", header), tag("tbody", body))
    return tag("div", inside, class_="scroll", tabindex=0, role="region", aria_label=str(caption).partition(".")[0])


def script_json(data: Any) -> Html:
    """Return JSON for a script element, which no text inside it can end; NaN and infinities are null."""
    return Html(json.dumps(finite(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


def finite(data: Any) -> Any:
    """Return JSON data with None for NaN and infinities."""
    if isinstance(data, float):
        return data if abs(data) < float("inf") else None
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return data
