"""The command report: write the page of a results folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


def report(folder: Annotated[Positional[Path], arg(metavar="DIR")]) -> int:
    """Write DIR/report.html, one file that opens offline.

    Args:
        folder: Where compare or demo left its results.
    """
    from ..report import write_report

    print(write_report(folder, lambda sentence: print(f"attnlab: left out: {sentence}", file=sys.stderr)))
    return 0
