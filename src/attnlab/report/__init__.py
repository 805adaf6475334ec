"""Report of a results folder: one HTML file that needs nothing else (`attnlab report DIR`).

The page asks the network for nothing: style, script and the plotting library are inside it, and its own policy forbids
the rest. Imports neither torch nor jax.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..contrasts import Intervals
from ..files import write_bytes
from ..ranges import Positive, checked
from .page import page, plotly_script
from .results_folder import read_results

__all__ = ["render", "write_report"]


@checked
def write_report(
    folder: str | Path,
    tell: Callable[[str], None] = lambda sentence: None,
    *,
    intervals: Intervals | None = None,
    margin: Positive | None = None,
) -> Path:
    """Write `folder`/report.html, whole or not at all, and return its path. `UserError` as in `render`.

    `tell` gets a sentence about each damaged file, which is left out; the page says the same. `intervals` and `margin`
    are those of the comparison where they are None.
    """
    found = read_results(Path(folder), intervals, margin)
    for sentence in found.damaged:
        tell(sentence)
    return write_bytes(Path(folder) / "report.html", page(found, plotly_script()).encode("utf-8", "replace"))


@checked
def render(folder: str | Path, *, intervals: Intervals | None = None, margin: Positive | None = None) -> str:
    """Return the report as one HTML document.

    A damaged file is left out, and named on the page. `UserError` where the folder is missing or has no results that
    are whole, or where plotly is not installed.
    """
    found = read_results(Path(folder), intervals, margin)
    return page(found, plotly_script()).encode("utf-8", "replace").decode()
