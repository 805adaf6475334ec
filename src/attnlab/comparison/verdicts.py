"""Verdicts on the runs that are known: the contents of compare.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..contrasts import of_losses, of_tasks
from ..results import FORMAT, RunResult
from .grid import Grid
from .match import Matched

Known = Mapping[Path, RunResult]  # by run folder


def summarize(work: Grid, known: Known) -> dict[str, Any]:
    """The contents of compare.json, without the command that made it."""
    cells = [known[cell.folder] for cell in work.cells if cell.folder in known]
    rows, statistics = of_losses(cells, work.mechanisms, work.baseline, work.judging)
    return {
        "format": FORMAT,
        "preset": work.preset,
        "size": work.size,
        "mechanisms": work.mechanisms,
        "seeds": work.seeds,
        "baseline": work.baseline,
        "match": work.match,
        "matched": {label: _matched(found, work.match) for label, found in work.matched.items()},
        "cells": [cell.to_dict() for cell in cells],
        "summary": rows,
        "statistics": statistics,
    }


def _matched(found: Matched, what: str) -> dict[str, Any]:
    count = {"parameters": found.count} if what == "params" else {"cache_bytes": 4 * found.count}
    change = {"field": found.field, "from": found.before, "to": found.after}
    return change | count | {"off": found.off, "equal": found.equal, "text": str(found)}


def summarize_size(work: Grid, known: Known) -> dict[str, Any]:
    """The entry of one size in compare.json: the same fields as the largest size has at the top."""
    model = work.cells[0].config.model
    shape = {"size": work.size, "n_layers": model.n_layers, "d_model": model.d_model, "n_heads": model.n_heads}
    about = summarize(work, known)
    return shape | {name: about[name] for name in ("matched", "cells", "summary", "statistics")}


def summarize_task(work: Grid, known: Known) -> dict[str, Any]:
    """The entry of a task in compare.json: accuracies at the context, and their differences to the baseline's."""
    assert work.task is not None
    cells = [cell.answers(known[cell.folder]) for cell in work.cells if cell.folder in known]
    rows, statistics = of_tasks(cells, work.mechanisms, work.baseline, work.judging)
    return {
        "task": " ".join(filter(None, (work.task.name, work.size))),
        "tests": work.task.tests,
        "chance": work.task.chance,
        "context": work.cells[0].config.model.context,
        "matched": {label: _matched(found, work.match) for label, found in work.matched.items()},
        "cells": [cell.to_dict() for cell in cells],
        "summary": rows,
        "statistics": statistics,
    }
