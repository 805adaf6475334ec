"""The command report: write the page of a results folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ..contrasts import Intervals
from ..ranges import Positive


def report(
    folder: Annotated[Positional[Path], arg(metavar="DIR")],
    *,
    intervals: Annotated[Intervals | None, arg(metavar="KIND")] = None,
    margin: Annotated[Positive | None, arg(metavar="NATS")] = None,
) -> int:
    """Write DIR/report.html, one file that opens offline.

    Args:
        folder: Where compare or demo left its results.
        intervals: Judge by other intervals than the comparison did: auto, pooled or pairwise.
        margin: Judge with another difference that does not matter, in nats.
    """
    from ..report import write_report

    def tell(sentence: str) -> None:
        print(f"attnlab: left out: {sentence}", file=sys.stderr)

    print(write_report(folder, tell, intervals=intervals, margin=margin))
    return 0
