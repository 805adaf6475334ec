"""Which runs a comparison has: mechanisms, seeds, sizes and tasks, each run in a folder of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..data.tasks import Task, task_of
from ..errors import UserError
from ..evaluation.exam import examine
from ..files import alone, read_json, write_json
from ..model import parameters
from ..presets import Options, variant
from ..results import RunResult, TaskResult
from ..runs.folder import RunFolder
from ..training.train import resolve, train
from .engines import Call
from .match import Matched, What, match

BASELINE = "mha"  # where it is compared; else the first


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a comparison."""

    label: str
    seed: int
    config: RunConfig
    folder: Path
    size: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (f"{self.label} s{self.seed}", self.size, self.task.name if self.task else "")))

    @property
    def call(self) -> Call:
        return Call(train_cell, (self.config, self.folder), self.folder)

    @property
    def task(self) -> Task | None:
        return task_of(self.config.data)

    def result(self) -> RunResult | None:
        """What is known of it: of a finished, interrupted or diverged run, or of none."""
        if not (self.folder / "result.json").exists():
            return None
        try:
            found = RunFolder.open(self.folder).result()
        except UserError:
            return None  # training will say what is wrong with the folder
        return None if found is None else replace(found, mechanism=self.label)

    def finished(self) -> bool:
        """Trained to the end and, on a task, examined."""
        result = self.result()
        return result is not None and result.status == "done" and (not self.task or self.exam.exists())

    @property
    def exam(self) -> Path:
        return self.folder / "task.json"

    def answers(self, known: RunResult) -> TaskResult:
        """What the exam of a run on a task found, or why there is none."""
        if known.status == "done" and self.exam.exists():
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
        config = self.config
        known = self.result() or RunResult(
            name=self.label, mechanism=self.label, seed=self.seed, key=config.key, context=config.model.context
        )
        return replace(known, status="failed", error=error)

    def count(self, attempts: int) -> None:
        """Write into the run's result how many it took."""
        run = RunFolder.open(self.folder)
        if (found := run.result()) is not None:
            run.write_result(replace(found, attempts=attempts))


@dataclass(frozen=True)
class Plan:
    preset: str
    mechanisms: list[str]
    seeds: list[int]
    baseline: str
    match: str
    matched: dict[str, Matched]
    cells: list[Cell]  # seed by seed, so that whatever is finished compares
    task: Task | None
    size: str = ""


def sized(preset: RunConfig, size: str) -> RunConfig:
    """`preset` with LAYERSxWIDTH, as "4x128", or LAYERSxWIDTHxHEADS. Heads keep their size unless they are counted, and
    a feed-forward width that the preset gives grows with the width."""
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


def plan(
    preset: RunConfig,
    mechanisms: Sequence[str],
    seeds: int | Sequence[int],
    out: str | Path,
    match_what: What = "none",
    options: Options | None = None,
    size: str = "",
) -> Plan:
    """Every run of one size, with the free width solved. Raises `UserError` before anything is trained or written."""
    labels = list(dict.fromkeys(mechanisms))
    chosen = list(range(preset.seed, preset.seed + seeds)) if isinstance(seeds, int) else list(seeds)
    if not labels or not chosen:
        raise UserError(f"there are {len(labels)} mechanisms and {len(chosen)} seeds: give at least one of each")
    preset = resolve(sized(preset, size) if size else preset)[0]
    configs = {label: variant(preset, label, options) for label in labels}
    baseline = BASELINE if BASELINE in labels else labels[0]
    matched: dict[str, Matched] = {}
    for label, config in configs.items():
        parameters(config.model)  # builds it, on the meta device: what does not fit together is refused here
        if label != baseline:
            configs[label], found = match(config, configs[baseline], match_what)
            matched |= {label: found} if found else {}
    cells = []
    for seed in chosen:
        for label, config in configs.items():
            config = replace(config, seed=seed)
            cells.append(Cell(label, seed, config, Path(out) / "runs" / f"{label}-s{seed}-{config.key}", size))
    return Plan(preset.name, labels, chosen, baseline, match_what, matched, cells, task_of(preset.data), size)


@dataclass(frozen=True)
class Sweep:
    """Every run of a comparison: the plans by size, and those of tasks."""

    sizes: list[Plan]  # the largest last; without sizes: the preset as it is
    tasks: list[Plan]

    @property
    def main(self) -> Plan:
        """What the comparison is about first: the largest size."""
        return self.sizes[-1]

    @property
    def cells(self) -> list[Cell]:
        """Those of one folder once: sizes may come to the same."""
        return list({cell.folder: cell for each in (*self.sizes, *self.tasks) for cell in each.cells}.values())


def sweep(
    preset: RunConfig,
    mechanisms: Sequence[str],
    seeds: int | Sequence[int],
    out: str | Path,
    match: What = "none",
    *,
    sizes: Sequence[str] = (),
    tasks: Sequence[RunConfig] = (),
    options: Options | None = None,
) -> Sweep:
    """Every run of `compare`, planned. Raises `UserError` before anything is trained or written."""
    plans = [plan(preset, mechanisms, seeds, out, match, options, size) for size in dict.fromkeys(sizes or ("",))]
    others = [
        plan(with_device(task, preset.train.device), mechanisms, plans[0].seeds, out, match, options)
        for task in tasks
        if task.data != preset.data  # which are examined already
    ]
    return Sweep(sorted(plans, key=lambda each: parameters(each.cells[0].config.model)), others)


def with_device(config: RunConfig, device: str) -> RunConfig:
    return replace(config, train=replace(config.train, device=device))


def train_cell(config: RunConfig, folder: Path, report: Any) -> None:
    with alone(folder, "trains into"):
        train(config, folder, resume=True, progress=report)
        if task_of(config.data):
            write_json(folder / "task.json", examine(folder).to_dict())


def default_command(work: Sweep, out: Path) -> str:
    main = work.main
    words = f"attnlab compare {main.preset} --mechanisms {','.join(main.mechanisms)} --seeds {len(main.seeds)}"
    sizes = f" --sizes {','.join(each.size for each in work.sizes)}" if main.size else ""
    return f"{words}{sizes} --match {main.match} --out {out}"
