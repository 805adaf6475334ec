"""Table of `attnlab audit`: the laws, the counterexamples and the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..audit.result import Audit

COLORS = {"holds": "green", "broken": "bold red", "allowed": "yellow", "n/a": "dim"}


def table(audit: Audit) -> RenderableType:
    """Return a row per law that can be put to this class, then notes, counterexamples and the verdict."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    needs_interface = [r for r in audit.results if r.status == "n/a" and "needs attnlab's interface" in r.detail]
    not_decoded = [r for r in audit.results if r.status == "n/a" and "decoding was not tried" in r.detail]
    view = Table(title=f"The laws, put to {escape(audit.target)}", title_justify="left", show_lines=False)
    for column in ("law", "", "evidence"):
        view.add_column(column, overflow="fold", no_wrap=column != "evidence")
    for r in audit.results:
        if r not in needs_interface and r not in not_decoded:
            evidence = "see below" if r.status == "broken" else r.detail
            view.add_row(r.law, Text(r.status, COLORS[r.status]), Text(evidence, "dim" if r.status == "n/a" else ""))
    notes = list(audit.notes)
    if needs_interface:
        notes.append(
            f"{len(needs_interface)} laws more are for modules with attnlab's interface (positions, cache, mask)"
        )
    parts: list[RenderableType] = [view, *(Text(note, "dim") for note in notes)]
    for r in audit.results:
        if r.status == "broken":
            parts.append(Text.assemble("\n", (f"{r.law}: ", "bold red"), r.statement, f"\n  {r.detail}"))
    parts.append(Text(f"\n{audit.verdict}", "bold red" if audit.exit_code else "bold green"))
    return Group(*parts)
