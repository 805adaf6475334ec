"""Record of how to reproduce the page: commands, machine, versions."""

from __future__ import annotations

from typing import Any

from ..html import Html, table, tag
from ..results_folder import Findings
from ..style import Look
from .common import Figures, frame, missing, plainly


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    """Return the section; it has no figure."""
    first = found.compare.get("command")
    commands = list(dict.fromkeys(c.command for c in found.cells if c.command))
    content: list[Any] = []
    if first:
        content += [
            tag("p", "The command that made this comparison:"),
            tag("pre", str(first), class_="command", tabindex=0),
        ]
    if commands:
        inside = tag("pre", "\n".join(commands), class_="command", tabindex=0)
        runs = "run" if len(commands) == 1 else "runs"
        content.append(tag("details", tag("summary", f"The {len(commands)} {runs} one by one"), inside))
    environment = dict(found.compare.get("environment") or {})
    packages = environment.pop("packages", None)
    rows: list[list[Any]] = [[k, plainly(v)] for k, v in environment.items()]
    rows += [[k, plainly(v)] for k, v in (packages.items() if isinstance(packages, dict) else ())]
    for name, title in (
        ("precision", "precision"),
        ("impl", "attention kernel"),
        ("threads", "threads"),
        ("device", "device"),
    ):
        values = sorted({str(getattr(c, name)) for c in found.cells if getattr(c, name)})
        rows += [[title, ", ".join(values)]] if values else []
    if rows:
        content.append(
            table("The machine and the versions that these numbers come from.", ["what", "value"], rows, left=2)
        )
    return frame("reproduce", "Reproduce", content or missing(found, "compare.json", "No record of a command here"))
