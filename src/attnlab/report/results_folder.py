"""Findings of a results folder. Every file in it is optional; one that is damaged is left out, and named."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from struct import pack
from typing import Any

from ..config import ModelConfig
from ..contrasts import MARGIN, Intervals
from ..errors import UserError
from ..files import read_json
from ..results import FORMAT, BenchRecord, LawResult, RunResult, TaskResult
from .judge import Judge

FILES = ("compare.json", "laws.json", "bench.json", "samples.json", "attention.json", "heads.json")


@dataclass(frozen=True)
class AttentionMaps:
    """The attention of one model on one text: layers, then heads, then a matrix of queries by keys."""

    mechanism: str
    seed: int
    tokens: list[str]
    shape: tuple[int, int]  # queries, keys
    layers: list[list[str]]  # each matrix as base64 of little-endian uint16, 65535 for a weight of 1
    # layers, then heads: the length of what each token's value adds to the residual stream; None: not measured
    values: list[list[list[float]] | None] = field(default_factory=list)


@dataclass(frozen=True)
class Standing:
    """One mechanism in a comparison: its mean over seeds, and how it differs from the baseline."""

    mechanism: str
    n: int = 0  # finished runs
    val_loss: float | None = None  # mean over seeds, nats per token
    difference: float | None = None  # to the baseline, mean over paired seeds, nats per token
    interval: tuple[float, float] | None = None  # of the difference; all of a comparison hold with 95 % confidence
    verdict: str = "too few seeds"  # better, worse, equal, undecided, baseline
    by: str | None = None  # kind of the interval: pooled or pairwise


@dataclass(frozen=True)
class Trial:
    """One synthetic task: its runs, and the rows of their paired differences."""

    task: str
    tests: str  # what it asks, a sentence
    chance: float  # the accuracy that the current token alone allows, from 0 to 1
    context: int  # tokens of the longest sequences trained on
    matched: dict[str, str]  # mechanism -> the width that gave way, in words
    cells: list[TaskResult]
    summary: list[dict[str, Any]]  # a row per mechanism, as in compare.json
    statistics: dict[str, Any]  # how they were judged


@dataclass(frozen=True)
class Findings:
    """Everything that a folder holds. Empty where a file is missing."""

    folder: str  # its name
    cells: list[RunResult] = field(default_factory=list)
    standings: list[Standing] = field(default_factory=list)
    compare: dict[str, Any] = field(default_factory=dict)  # compare.json without its cells
    tasks: list[Trial] = field(default_factory=list)
    sizes: dict[str, Findings] = field(default_factory=dict)  # runs and standings of each size; `cells` are the largest
    laws: list[LawResult] = field(default_factory=list)
    bench: list[BenchRecord] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    attention: list[AttentionMaps] = field(default_factory=list)
    heads: list[dict[str, Any]] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)  # a sentence about each file that was left out

    @property
    def baseline(self) -> str:
        """The mechanism that others are compared with; a decoder's default where the folder names none."""
        return str(self.compare.get("baseline") or ModelConfig().mechanisms[0])

    @property
    def statistics(self) -> dict[str, Any]:
        """The choices and numbers behind the verdicts, as in compare.json."""
        found: dict[str, Any] = self.compare.get("statistics") or {}
        return found

    @property
    def margin(self) -> float:
        """The difference that does not matter, nats per token."""
        return finite_number(self.statistics.get("margin")) or MARGIN

    @property
    def mechanisms(self) -> list[str]:
        """Every mechanism that any file names, in the order of the comparison."""
        named = list(map(str, self.compare.get("mechanisms") or []))
        for records in (self.cells, self.laws, self.bench, self.attention):
            named += [record.mechanism for record in records]
        named += [str(x.get("mechanism")) for x in self.samples]
        return list(dict.fromkeys(named))

    def done(self, mechanism: str) -> list[RunResult]:
        """Return the finished runs with a loss, by seed."""
        own = [c for c in self.cells if c.mechanism == mechanism and c.status == "done"]
        return sorted((c for c in own if finite_number(c.val_loss) is not None), key=lambda cell: cell.seed)

    def mean(self, mechanism: str, name: str) -> float | None:
        """Return the mean of a field over the finished runs that have it, or None."""
        values = [x for cell in self.done(mechanism) if (x := finite_number(getattr(cell, name))) is not None]
        return fmean(values) if values else None

    def standing(self, mechanism: str) -> Standing | None:
        """Return the mechanism's row of the comparison, or None."""
        return next((s for s in self.standings if s.mechanism == mechanism), None)

    def how_to_make(self, file: str) -> str:
        """Return the command that writes `file`: a comparison writes all but bench.json, which the demo adds."""
        if file == "bench.json":
            return f"attnlab demo --out {self.folder}"
        return str(self.compare.get("command") or f"attnlab compare quick --out {self.folder}")


def finite_number(value: Any) -> float | None:
    """Return the value as a float, or None where it is missing, NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def read_results(path: Path, intervals: Intervals | None = None, margin: float | None = None) -> Findings:
    """Return what the folder `path` holds. `UserError` where it is missing, or has no results that are whole.

    Where `intervals` or `margin` is given, the mechanisms are judged anew by it.
    """
    if not path.exists():
        raise UserError(f"there is no folder {path}: give the folder that attnlab compare or attnlab demo wrote")
    if not path.is_dir():
        raise UserError(f"{path} is a file: give the folder that attnlab compare or attnlab demo wrote")

    damaged: list[str] = []

    def load(name: str, parse: Callable[[Any], Any]) -> Any:
        try:
            return guarded(path / name, parse) if (path / name).exists() else None
        except UserError as error:
            damaged.append(str(error))
            return None

    compare = load("compare.json", lambda data: _compare(data, intervals, margin))
    runs = [] if compare else [load(str(file.relative_to(path)), _cell) for file in _runs(path)]
    cells = compare.pop("cells") if compare else [cell for cell in runs if cell is not None]
    standings = compare.pop("summary") if compare else _means(cells)
    found = Findings(
        folder=path.resolve().name,
        cells=cells,
        standings=standings,
        tasks=compare.pop("tasks") if compare else [],
        sizes=compare.pop("sizes") if compare else {},
        compare=compare or {},
        laws=load("laws.json", lambda data: [LawResult.from_dict(x) for x in data]) or [],
        bench=load("bench.json", lambda data: [BenchRecord.from_dict(x) for x in data]) or [],
        samples=load("samples.json", lambda data: [dict(x) | {"text": str(x["text"])} for x in data]) or [],
        attention=load("attention.json", lambda data: [_maps(x) for x in data]) or [],
        heads=load("heads.json", lambda data: [_heads(x) for x in data]) or [],
        damaged=damaged,
    )
    if not found.mechanisms and damaged:
        raise UserError(damaged[0])
    if not found.mechanisms:
        files = ", ".join(FILES)
        raise UserError(f"{path} holds no results (no run, none of {files}): give a folder that attnlab compare wrote")
    return found


def guarded(file: Path, parse: Callable[[Any], Any]) -> Any:
    """Return what `parse` makes of a file's JSON. `UserError` with its name where it is not what this version reads."""
    data = read_json(file)
    try:
        return parse(data)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{file} does not hold what this version reads ({error}): delete it and run its command again"
        ) from None


def _compare(data: dict[str, Any], intervals: Intervals | None, margin: float | None) -> dict[str, Any]:
    if (version := data.get("format")) != FORMAT:
        raise UserError(f"its format is {version!r}, this version reads {FORMAT}: run the comparison again")
    for name in ("mechanisms", "seeds"):
        if not isinstance(data.get(name, []), list):
            raise ValueError(f"{name} is not a list")
    matched = data.get("matched") or {}
    for name, value in {"matched": matched, "environment": data.get("environment") or {}, **matched}.items():
        if not isinstance(value, dict):
            raise ValueError(f"{name} is not an object")
    judge = Judge(data, intervals, margin)
    cells = [_cell(cell) for cell in data.get("cells", [])]
    tasks = [_trial(trial, judge) for trial in data.get("tasks") or []]
    sizes = {}
    for each in data.get("sizes") or []:
        own = list(map(_cell, each["cells"]))
        rows, statistics = judge.losses(each["summary"], each, own)
        about = {"baseline": data.get("baseline"), "statistics": statistics}
        sizes[str(each["size"])] = Findings("", own, _standings(rows), about)
    rows, statistics = judge.losses(data.get("summary", []), data, cells)
    standings = _standings(rows) or _means(cells)
    return data | {"cells": cells, "summary": standings, "tasks": tasks, "sizes": sizes, "statistics": statistics}


def _standings(rows: list[dict[str, Any]]) -> list[Standing]:
    return [Standing(**{k: x[k] for k in Standing.__dataclass_fields__ if k in x}) for x in rows]


def _trial(data: dict[str, Any], judge: Judge) -> Trial:
    """Check an entry as far as the figures rely on it."""
    cells = [TaskResult.from_dict(cell) for cell in data["cells"]]
    for cell in cells:
        for point in cell.lengths:
            [float(point[name]) for name in ("length", "accuracy", "cache_bytes")]
        if any(len(point) != 3 for point in cell.depths):
            raise ValueError("a point of depths is not [length, depth, accuracy]")
    summary, statistics = judge.tasks([dict(row) for row in data["summary"]], data, cells)
    matched = {str(mechanism): str(change["text"]) for mechanism, change in (data.get("matched") or {}).items()}
    return Trial(
        task=str(data["task"]),
        tests=str(data["tests"]),
        chance=float(data["chance"]),
        context=int(data["context"]),
        matched=matched,
        cells=cells,
        summary=summary,
        statistics=statistics,
    )


def _cell(data: dict[str, Any]) -> RunResult:
    cell = RunResult.from_dict(data)
    if any(len(point) != 2 for point in (*cell.curve, *cell.train_curve)):
        raise ValueError("a point of a curve is not [step, loss]")
    return cell


def _runs(path: Path) -> list[Path]:
    """The results of the finished runs of a comparison that was stopped, or of a single run."""
    return [file for file in (path / "result.json", *sorted(path.glob("runs/*/result.json"))) if file.exists()]


def _means(cells: list[RunResult]) -> list[Standing]:
    found = Findings(folder="", cells=cells)
    return [Standing(m, len(found.done(m)), found.mean(m, "val_loss")) for m in found.mechanisms]


def _maps(data: dict[str, Any]) -> AttentionMaps:
    matrices = [head for layer in data["layers"] for head in layer]
    if not matrices or not matrices[0]:
        raise ValueError("an entry has no attention matrix")
    shape = len(matrices[0]), len(matrices[0][0])

    def packed(matrix: list[list[float]]) -> str:
        flat = [round(65535 * min(max(finite_number(x) or 0.0, 0.0), 1.0)) for row in matrix for x in row]
        if len(matrix) != shape[0] or any(len(row) != shape[1] for row in matrix):
            raise ValueError("its attention matrices differ in shape")
        return b64encode(pack(f"<{len(flat)}H", *flat)).decode()

    tokens = [str(token) for token in data["tokens"]]
    if len(tokens) != shape[0]:
        raise ValueError(f"{len(tokens)} tokens for {shape[0]} rows of attention")
    layers = [[packed(head) for head in layer] for layer in data["layers"]]
    values = data.get("values") or [None] * len(layers)
    for heads, sizes in zip(data["layers"], values, strict=True):
        if sizes and [len(head) for head in sizes] != [shape[1]] * len(heads):
            raise ValueError("sizes of values and attention matrices differ in shape")
    return AttentionMaps(str(data["mechanism"]), int(data.get("seed", 0)), tokens, shape, layers, values)


def _heads(data: dict[str, Any]) -> dict[str, Any]:
    """Check an entry as far as the figures rely on it."""
    scores, marked = data["scores"]["scores"], data["scores"]["marked"]
    for name in ("induction", "previous token", "copying"):
        for row in scores[name]:
            [float(value) for value in row]
    if [len(row) for row in marked["induction"]] != [len(row) for row in scores["induction"]]:
        raise ValueError("marks and scores differ in shape")
    if "emergence" in data:
        curve = data["emergence"]
        lengths = {len(curve["steps"]), len(curve["first_half"]), len(curve["second_half"])}
        if len(lengths | {len(by_step) for by_step in curve["scores"].values()}) != 1:
            raise ValueError("the curves differ in length")
    return data | {"mechanism": str(data["mechanism"]), "seed": int(data["seed"])}
