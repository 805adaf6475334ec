"""The grid of runs of a comparison: mechanisms by seeds, for each size and task, each run in a folder of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..contrasts import Judging
from ..data.tasks import Task, task_of
from ..errors import UserError
from ..evaluation.exam import examine
from ..files import PATIENCE, alone, naming, read_json, write_json
from ..model import parameters
from ..presets import BASELINE, Options, variant
from ..ranges import Runs, Seed, check_fields, checked
from ..results import RunResult, TaskResult
from ..runs.folder import RunFolder
from ..training.limits import resolve
from ..training.train import train
from .engines import Call
from .match import Matched, What, match


@dataclass(frozen=True)
class Comparison:
    """The mechanisms, seeds and sizes that are compared. At a seed all mechanisms see the same batches."""

    preset: RunConfig  # the run that all share
    mechanisms: Sequence[str]  # labels; a hybrid is written sliding+sliding+mla
    seeds: Runs | Sequence[Seed]  # how many, from the preset's on; or which
    match: What = "none"  # in which they are made equal, within 1 %
    sizes: Sequence[str] = ()  # LAYERSxWIDTH, such as "4x128", compared each by itself; none: the preset's
    tasks: Sequence[RunConfig] = ()  # presets of synthetic tasks, on which each mechanism is trained and examined too
    options: Options | None = None  # Config fields by mechanism; None: as the preset says
    judging: Judging = field(default_factory=Judging)  # kind of intervals, and what difference does not matter

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a comparison."""

    label: str  # of the mechanism
    seed: int
    config: RunConfig
    folder: Path
    size: str = ""  # LAYERSxWIDTH; "": the preset's

    def __str__(self) -> str:
        return " ".join(filter(None, (f"{self.label} s{self.seed}", self.size, self.task.name if self.task else "")))

    @property
    def call(self) -> Call:
        """The call that trains it, for an engine."""
        return Call(train_cell, (self.config, self.folder), self.folder)

    @property
    def task(self) -> Task | None:
        """The synthetic task that it is trained on; None: text."""
        return task_of(self.config.data)

    def result(self) -> RunResult | None:
        """The result of the run, finished or not; None: nothing is known yet."""
        if not (self.folder / "result.json").exists():
            return None
        try:
            found = RunFolder.open(self.folder).result()
        except UserError:
            return None  # training will say what is wrong with the folder
        return None if found is None else replace(found, mechanism=self.label)

    def finished(self) -> bool:
        """Return whether it was trained to the end and, on a task, examined."""
        result = self.result()
        return result is not None and result.status == "done" and (not self.task or self.exam.exists())

    @property
    def exam(self) -> Path:
        """The file with the answers of a run on a task."""
        return self.folder / "task.json"

    def answers(self, known: RunResult) -> TaskResult:
        """The result of the exam of a run on a task, or why there is none."""
        if known.status == "done" and self.exam.exists():
            with naming(self.exam):
                return replace(TaskResult.from_dict(read_json(self.exam)), mechanism=self.label)
        assert self.task is not None
        return TaskResult(
            task=self.task.name,
            mechanism=self.label,
            seed=self.seed,
            key=known.key,
            status="interrupted" if known.status == "done" else known.status,
            error=known.error,
            context=known.context,
            chance=self.task.chance,
        )

    def failed(self, error: str) -> RunResult:
        """The result of a run that failed, with what is known of it and the sentence `error`."""
        config = self.config
        known = self.result() or RunResult(
            name=self.label, mechanism=self.label, seed=self.seed, key=config.key, context=config.model.context
        )
        return replace(known, status="failed", error=error)

    def write_attempts(self, attempts: int) -> None:
        """Write into the run's result how many attempts it took."""
        with alone(self.folder, "trains in"):
            run = RunFolder.open(self.folder)
            if (found := run.result()) is not None:
                run.write_result(replace(found, attempts=attempts))


@dataclass(frozen=True)
class Grid:
    """The runs of one size on one task or text: every mechanism with every seed."""

    preset: str
    mechanisms: list[str]
    seeds: list[int]
    baseline: str  # the mechanism that the others are compared with
    match: str
    matched: dict[str, Matched]  # by mechanism, where a width was solved
    cells: list[Cell]  # seed by seed, so that the runs that are finished can be compared
    task: Task | None
    size: str = ""  # LAYERSxWIDTH; "": the preset's
    judging: Judging = field(default_factory=Judging)


@checked
def sized(preset: RunConfig, size: str) -> RunConfig:
    """Return `preset` with LAYERSxWIDTH, as "4x128", or LAYERSxWIDTHxHEADS. Raises `UserError` for anything else.

    Heads keep their size unless they are counted. A feed-forward width that the preset gives grows with the width.
    """
    model = preset.model
    parts = [int(part) for part in size.split("x")] if re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", size) else []
    if not parts:
        raise UserError(f"the size {size!r} is not LAYERSxWIDTH, such as 4x128, or LAYERSxWIDTHxHEADS, such as 4x128x8")
    layers, width, *given = parts
    of_head = model.head_dim or model.d_model // model.n_heads
    if not given and width % of_head:
        raise UserError(
            f"the size {size} is {width} wide, which heads of {of_head} do not fill: take a multiple of {of_head}, or "
            f"count the heads, as in {size}x{max(1, width // of_head)}"
        )
    heads = given[0] if given else width // of_head
    ff_dim = None if model.ff_dim is None else max(8, round(model.ff_dim * width / model.d_model / 8) * 8)
    head_dim = None if given else model.head_dim
    shape = replace(model, n_layers=layers, d_model=width, n_heads=heads, head_dim=head_dim, ff_dim=ff_dim)
    return replace(preset, model=shape)


def grid(comparison: Comparison, out: str | Path, size: str = "") -> Grid:
    """Return every run of one size, with the free width solved, for the folder `out`.

    Raises `UserError` before anything is trained or written.
    """
    preset, given = comparison.preset, comparison.seeds
    labels = list(dict.fromkeys(comparison.mechanisms))
    seeds = list(range(preset.seed, preset.seed + given)) if isinstance(given, int) else list(given)
    if not labels or not seeds:
        raise UserError(f"there are {len(labels)} mechanisms and {len(seeds)} seeds: give at least one of each")
    preset, corpus = resolve(sized(preset, size) if size else preset)
    configs = {label: variant(preset, label, comparison.options) for label in labels}
    baseline = BASELINE if BASELINE in labels else labels[0]
    matched: dict[str, Matched] = {}
    for label, config in configs.items():
        parameters(config.model)  # builds it, on the meta device: what does not fit together is refused here
        if label != baseline:
            configs[label], found = match(config, configs[baseline], comparison.match)
            matched |= {label: found} if found else {}
    cells = []
    for seed in seeds:
        for label, config in configs.items():
            config = replace(config, seed=seed)
            cells.append(Cell(label, seed, config, Path(out) / "runs" / f"{label}-s{seed}-{config.key}", size))
    for cell in cells:
        if cell.result() is not None:  # what is paired with it must read the same batches
            RunFolder.open(cell.folder).check_order(corpus)
    task = task_of(preset.data)
    match_ = comparison.match
    return Grid(preset.name, labels, seeds, baseline, match_, matched, cells, task, size, comparison.judging)


@dataclass(frozen=True)
class Sweep:
    """Every run of a comparison: the grids by size, and those of tasks."""

    sizes: list[Grid]  # the largest last; without sizes: the preset as it is
    tasks: list[Grid]

    @property
    def main(self) -> Grid:
        """The grid that compare.json is about first: the largest size."""
        return self.sizes[-1]

    @property
    def cells(self) -> list[Cell]:
        """All runs, those of one folder once: two sizes may give the same config."""
        return list({cell.folder: cell for each in (*self.sizes, *self.tasks) for cell in each.cells}.values())


def sweep(comparison: Comparison, out: str | Path) -> Sweep:
    """Return every run of `compare`. Raises `UserError` before anything is trained or written."""
    preset = comparison.preset
    grids = [grid(comparison, out, size) for size in dict.fromkeys(comparison.sizes or ("",))]
    tasks = [task for task in comparison.tasks if task.data != preset.data]  # else the sizes have it
    others = [
        grid(replace(comparison, preset=with_device(task, preset.train.device), seeds=grids[0].seeds), out)
        for task in tasks
    ]
    return Sweep(sorted(grids, key=lambda each: parameters(each.cells[0].config.model)), others)


def with_device(config: RunConfig, device: str) -> RunConfig:
    """Return `config`, to be trained on `device`."""
    return replace(config, train=replace(config.train, device=device))


def train_cell(config: RunConfig, folder: Path, report: Any) -> None:
    """Train a run into `folder`, and examine it where its data is a task; `report` is told of its events."""
    train(config, folder, resume=True, progress=report, patience=PATIENCE)
    if task_of(config.data):
        found = examine(folder).to_dict()
        with alone(folder, "trains in"):
            write_json(folder / "task.json", found)


def default_command(work: Sweep, out: Path) -> str:
    """Return a command that makes these runs."""
    main = work.main
    words = f"attnlab compare {main.preset} --mechanisms {','.join(main.mechanisms)} --seeds {len(main.seeds)}"
    sizes = f" --sizes {','.join(each.size for each in work.sizes)}" if main.size else ""
    return f"{words}{sizes} --match {main.match} --out {out}"
