"""Verdicts on the runs that are known: the contents of compare.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..results import FORMAT, RunResult
from ..stats import paired
from .grid import Grid
from .match import Matched

Known = Mapping[Path, RunResult]  # by run folder


def summarize(work: Grid, known: Known) -> dict[str, Any]:
    """The contents of compare.json, without the command that made it."""
    cells = [known[cell.folder] for cell in work.cells if cell.folder in known]
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
        "summary": verdicts(cells, work.mechanisms, work.baseline),
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
    return shape | {name: about[name] for name in ("matched", "cells", "summary")}


def summarize_task(work: Grid, known: Known) -> dict[str, Any]:
    """The entry of a task in compare.json: accuracies at the context, and their differences to the baseline's."""
    assert work.task is not None
    cells = [cell.answers(known[cell.folder]) for cell in work.cells if cell.folder in known]
    wrong: dict[str, dict[int, float]] = {label: {} for label in work.mechanisms}
    for cell in cells:
        if cell.accuracy is not None:
            wrong[cell.mechanism][cell.seed] = 1 - cell.accuracy
    rows = []
    for row in differences(wrong, work.baseline, "wrong"):
        share = row.pop("wrong")
        difference = row["difference"]
        interval = row["interval"]
        row["accuracy"] = None if share is None else 1 - share
        row["difference"] = None if difference is None else -difference  # of accuracies: more is better
        row["interval"] = None if interval is None else [-interval[1], -interval[0]]
        rows.append(row)
    return {
        "task": " ".join(filter(None, (work.task.name, work.size))),
        "tests": work.task.tests,
        "chance": work.task.chance,
        "context": work.cells[0].config.model.context,
        "matched": {label: _matched(found, work.match) for label, found in work.matched.items()},
        "cells": [cell.to_dict() for cell in cells],
        "summary": rows,
    }


def verdicts(cells: Sequence[RunResult], mechanisms: Sequence[str], baseline: str) -> list[dict[str, Any]]:
    """Return a row per mechanism: its mean validation loss (nats), and the difference to the baseline's."""
    losses: dict[str, dict[int, float]] = {label: {} for label in mechanisms}
    for cell in cells:
        if cell.status == "done" and cell.val_loss is not None:
            losses[cell.mechanism][cell.seed] = cell.val_loss
    return differences(losses, baseline, "val_loss")


def differences(losses: Mapping[str, Mapping[int, float]], baseline: str, name: str) -> list[dict[str, Any]]:
    """Return a row per mechanism of `losses`, which holds a number by mechanism and seed.

    A row has the mean as `name`. It has the difference to the baseline over the seeds that both have finished: the
    mean, the 95 % interval, and the verdict in words.
    """
    rows = []
    for label, own in losses.items():
        row: dict[str, Any] = {"mechanism": label, "n": len(own), name: fmean(own.values()) if own else None}
        if label == baseline:
            rows.append(row | {"difference": None, "interval": None, "verdict": "baseline"})
            continue
        shared = sorted(own.keys() & losses[baseline].keys())
        found = paired([own[seed] for seed in shared], [losses[baseline][seed] for seed in shared])
        row["difference"] = found.mean if shared else None
        row["interval"] = None if found.interval is None else list(found.interval)
        rows.append(row | {"verdict": found.verdict})
    return rows
