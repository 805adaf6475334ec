"""Train mechanisms on the same data with paired seeds, and say what can be told apart.

A comparison is a folder. Each run in it has a folder of its own, named after its config, so that the same command skips
what is finished, goes on with what was interrupted and tries again what failed. A synthetic task is one more preset,
whose runs are also examined; a size is the preset with other layers and another width. Engines make the runs.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from . import data
from .config import RunConfig
from .data.tasks import Task, task_of
from .engines import Call, Engine, Kind, Local, Needs, Outcome
from .errors import UserError, need
from .evaluation.exam import examine
from .files import alone, read_json, write_bytes, write_json
from .heads import value_sizes, watch, whole
from .inference.text import sample_run
from .laws import check_mechanism
from .match import Matched, What, match
from .model import parameters
from .presets import Options, variant
from .progress import Progress
from .results import FORMAT, LawResult, RunResult, TaskResult, environment
from .runs.folder import RunFolder, load_model
from .stats import paired
from .training.train import resolve, train

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

BASELINE = "mha"  # where it is compared; else the first
EXTRAS = ("laws", "samples", "attention")  # what is found out about the trained models, each in a file; also: "heads"
WINDOW = 32  # tokens whose attention is kept
SAMPLE = 240  # tokens of text


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


def compare(
    preset: RunConfig,
    mechanisms: Sequence[str],
    seeds: int | Sequence[int],
    out: str | Path,
    match: What = "none",
    *,
    sizes: Sequence[str] = (),
    tasks: Sequence[RunConfig] = (),
    engine: Kind = Local(),  # noqa: B008
    jobs: int | None = None,
    threads: int | None = None,
    gpus: int | None = None,
    options: Options | None = None,
    command: str = "",
    extras: Sequence[str] = EXTRAS,
    console: Console | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train what is not trained yet, `jobs` runs side by side, and write what is known into the folder `out`.

    `seeds` is how many, from the preset's on, or which. At a seed all mechanisms see the same batches. `match` is what
    they are made equal in, within 1 %. `options` are Config fields by mechanism. `threads` and `gpus` are those of each
    run. `sizes`, such as "4x128", are LAYERSxWIDTH: everything is compared within each.
    `tasks` are presets of synthetic tasks: on each, each mechanism is trained with the same seeds, and then examined.
    Returns what compare.json holds, which is rewritten after each run; the `extras`, such as laws.json, follow the
    last one. A run that the machine may have spoilt is made once more. One that fails is reported, does not stop the
    others, and is tried again by the next call. Ctrl-C finishes the steps under way, saves, and raises
    `KeyboardInterrupt`, or leaves Slurm's jobs alone; the same call goes on from there, also where this process died.
    """
    need("accelerate", "train")
    out = Path(out)
    work = sweep(preset, mechanisms, seeds, out, match, sizes=sizes, tasks=tasks, options=options)
    cells = work.cells
    known = {cell.folder: result for cell in cells if (result := cell.result()) is not None}
    todo = [cell for cell in cells if not cell.finished()]
    progress = _progress(sum(cell.config.train.steps for cell in todo), console, quiet)
    share = {"jobs": jobs, "threads": threads, "gpus": gpus}
    opened = engine.open(Needs(runs=len(todo), folder=out, device=preset.train.device, say=progress.say, **share))
    command = command or default_command(work, out)
    started = environment()

    def write() -> dict[str, Any]:
        found = summarize(work.main, known) | {"command": command, "environment": started}
        found["tasks"] = [summarize_task(each, known) for each in (*work.sizes, *work.tasks) if each.task]
        found["sizes"] = [summarize_size(each, known) for each in work.sizes if each.size]
        write_json(out / "compare.json", found)
        return found

    with ExitStack() as stack:
        stack.enter_context(opened)
        _make(out)
        stack.enter_context(alone(out, "compares in", patience=1.0))
        found = write()
        stack.enter_context(progress)
        for cell in cells:
            if cell not in todo:
                progress.say(f"{cell}: {_words(known[cell.folder])}, finished before")
        attempts: Counter[Cell] = Counter()

        def tell(number: int, outcome: Outcome, value: Any) -> None:
            nonlocal found
            cell = todo[number]
            if outcome == "start":
                attempts[cell] += 1
                progress.begin(str(cell), cell.config.train.steps)
            elif outcome == "event":
                progress.update(str(cell), value)
            elif outcome == "note":
                progress.say(f"{cell}: {value}")
            elif outcome == "again":
                progress.end(str(cell), f"failed, and is tried once more: {value}")
            else:
                if outcome == "done" and attempts[cell] > 1:
                    cell.count(attempts[cell])
                result = cell.failed(value) if outcome == "failed" else cell.result()
                if result is not None:
                    known[cell.folder] = replace(result, attempts=max(result.attempts, attempts[cell]))
                progress.end(str(cell), _words(result))
                found = write()

        try:
            opened.run([cell.call for cell in todo], tell)
            write_extras(work.main, out, opened, progress, extras)
        except KeyboardInterrupt as stop:
            done = sum(result.status == "done" for result in known.values())
            left = f"; {stop}" if str(stop) else ""
            raise KeyboardInterrupt(
                f"stopped; {done} of {len(cells)} runs in {out} are finished{left}; the same command goes on from there"
            ) from None
    return found


def foresee(work: Sweep, out: Path, engine: Kind, needs: Mapping[str, Any]) -> str:
    """What `compare` would do, in words; nothing is trained or written."""
    todo = [cell for cell in work.cells if not cell.finished()]
    opened = engine.open(Needs(runs=len(todo), folder=out, **needs))
    lines = [
        f"{cell}: {parameters(cell.config.model):,} parameters, {cell.config.train.steps:,} steps" for cell in todo
    ]
    runs = f"{len(todo)} of {len(work.cells)} runs are to be trained"
    return "\n".join([*lines, f"{runs} {opened.describe([cell.call for cell in todo])}" if todo else f"{runs}"])


def with_device(config: RunConfig, device: str) -> RunConfig:
    return replace(config, train=replace(config.train, device=device))


def train_cell(config: RunConfig, folder: Path, report: Any) -> None:
    with alone(folder, "trains into"):
        train(config, folder, resume=True, progress=report)
        if task_of(config.data):
            write_json(folder / "task.json", examine(folder).to_dict())


Known = Mapping[Path, RunResult]  # by run folder


def summarize(work: Plan, known: Known) -> dict[str, Any]:
    """compare.json, without the command that made it."""
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


def summarize_size(work: Plan, known: Known) -> dict[str, Any]:
    """What compare.json says about one size: all that it says about the largest."""
    model = work.cells[0].config.model
    shape = {"size": work.size, "n_layers": model.n_layers, "d_model": model.d_model, "n_heads": model.n_heads}
    about = summarize(work, known)
    return shape | {name: about[name] for name in ("matched", "cells", "summary")}


def summarize_task(work: Plan, known: Known) -> dict[str, Any]:
    """What compare.json says about a task: accuracies at the context, and their differences to the baseline's."""
    assert work.task is not None
    cells = [cell.answers(known[cell.folder]) for cell in work.cells if cell.folder in known]
    wrong: dict[str, dict[int, float]] = {label: {} for label in work.mechanisms}
    for cell in cells:
        if cell.accuracy is not None:
            wrong[cell.mechanism][cell.seed] = 1 - cell.accuracy
    rows = []
    for row in differences(wrong, work.baseline, "wrong"):
        share, difference, interval = row.pop("wrong"), row["difference"], row["interval"]
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
    """A row per mechanism: its mean validation loss, and how it differs from the baseline's."""
    losses: dict[str, dict[int, float]] = {label: {} for label in mechanisms}
    for cell in cells:
        if cell.status == "done" and cell.val_loss is not None:
            losses[cell.mechanism][cell.seed] = cell.val_loss
    return differences(losses, baseline, "val_loss")


def differences(losses: Mapping[str, Mapping[int, float]], baseline: str, name: str) -> list[dict[str, Any]]:
    """A row per mechanism of `losses`, which holds them by mechanism and seed: the mean, and the difference to the
    baseline over the seeds that both have finished, as a mean with a 95 % interval and in words."""
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


def table(found: Mapping[str, Any]) -> RenderableType:
    """compare.json for a terminal."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    cells = [RunResult.from_dict(cell) for cell in found["cells"]]
    view = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")  # fits 80 columns
    view.add_column("mechanism", no_wrap=True)
    for title in ("val loss", f"to {found['baseline']} ± 95 %", "", "size", "cache", "tok/s"):
        view.add_column(title, justify="left" if not title else "right", no_wrap=True)
    for row in found["summary"]:
        own = [cell for cell in cells if cell.mechanism == row["mechanism"] and cell.status == "done"]
        color = {"better": "green", "worse": "red", "baseline": "dim"}.get(row["verdict"], "yellow")
        difference = "" if row["difference"] is None else f"{row['difference']:+.4f}"
        if row["interval"]:
            difference += f" ± {(row['interval'][1] - row['interval'][0]) / 2:.4f}"
        rates = [cell.tokens_per_s for cell in own if cell.tokens_per_s]
        view.add_row(
            f"[bold]{escape(row['mechanism'])}",
            "" if row["val_loss"] is None else f"{row['val_loss']:.4f}",
            difference,
            f"[{color}]{row['verdict']}",
            f"{own[0].parameters / 1e6:,.2f}M" if own else "",
            f"{own[0].cache_bytes / 1024:,.0f}K" if own else "",
            f"{fmean(rates):,.0f}" if rates else "",
        )
    seeds, context = len(found["seeds"]), max((cell.context for cell in cells), default=0)
    notes = [f"[dim]{seeds} paired seeds; cache of one sequence of {context} tokens; Student's intervals over seeds."]
    notes += [f"[dim]{escape(label)}: {escape(change['text'])}" for label, change in found["matched"].items()]
    failed = [cell for cell in cells if cell.status == "failed"]
    notes += [_lost(cell) for cell in failed]
    below: list[RenderableType] = []
    if found["sizes"]:
        notes.insert(0, f"[dim]The largest size, {found['size']}.")
        below += ["", *size_table(found["sizes"], found["size"])]
    if found["tasks"]:
        below += ["", *task_table(found["tasks"], found["baseline"])]
    return Group(view, "", *notes, *below)


def _lost(cell: RunResult, size: str = "") -> str:
    from rich.markup import escape

    who = " ".join(filter(None, (f"{cell.mechanism} s{cell.seed}", size)))
    return f"[red]{escape(who)} failed{' twice' if cell.attempts > 1 else ''}: {escape(cell.error)}"


def _grid(
    title: str, columns: Sequence[Mapping[str, Any]], name: str, cell: Callable[[Mapping[str, Any]], str]
) -> Table:
    """A row for each mechanism, a column for each of several comparisons."""
    from rich.markup import escape
    from rich.table import Table

    view = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    view.add_column(title, no_wrap=True)
    for column in columns:
        view.add_column(column[name], justify="right", no_wrap=True)
    for rows in zip(*(column["summary"] for column in columns), strict=True):
        view.add_row(f"[bold]{escape(rows[0]['mechanism'])}", *map(cell, rows))
    return view


def _marked(row: Mapping[str, Any], name: str, form: str, signs: Mapping[str, str], scale: float = 1) -> str:
    """A number and the sign of its verdict."""
    return "" if row[name] is None else f"{form.format(scale * row[name])} {signs.get(row['verdict'], '?')}"


def size_table(sizes: Sequence[Mapping[str, Any]], main: str) -> list[RenderableType]:
    """Losses, a column for each size."""
    view = _grid("val loss", sizes, "size", lambda row: _marked(row, "val_loss", "{:.4f}", LOSS_SIGNS))
    notes: list[RenderableType] = [
        "[dim]▼ ▲: lower, higher at that size, 95 % interval of the paired difference; ≈: not distinguishable; "
        "?: too few seeds."
    ]
    cells = [
        (each["size"], RunResult.from_dict(cell)) for each in sizes if each["size"] != main for cell in each["cells"]
    ]
    return [view, "", *notes, *(_lost(cell, size) for size, cell in cells if cell.status == "failed")]


LOSS_SIGNS = {"better": "[green]▼", "worse": "[red]▲", "baseline": " ", "not distinguishable": "[yellow]≈"}
SIGNS = {"better": "[green]▲", "worse": "[red]▼", "baseline": " ", "not distinguishable": "[yellow]≈"}


def task_table(tasks: Sequence[Mapping[str, Any]], baseline: str) -> list[RenderableType]:
    """Accuracies, a column for each task."""
    from rich.markup import escape

    view = _grid("accuracy, %", tasks, "task", lambda row: _marked(row, "accuracy", "{:.1f}", SIGNS, 100))
    view.add_row("[dim]chance", *(f"[dim]{100 * task['chance']:.1f}  " for task in tasks))
    contexts = " or ".join(dict.fromkeys(str(task["context"]) for task in tasks))
    notes = [
        f"[dim]Held-out questions in {contexts} tokens. ▲ ▼: better, worse than {escape(baseline)}, 95 % interval of "
        "the paired difference; ≈: not distinguishable; ?: too few seeds."
    ]
    widths: dict[str, list[str]] = {}
    for task in tasks:
        for label, change in task["matched"].items():
            widths.setdefault(f"{label}: {change['text']}", []).append(task["task"])
    notes += [f"[dim]{escape(text)} ({', '.join(names)})" for text, names in widths.items()]
    for task in tasks:
        for cell in task["cells"]:
            if cell["status"] == "failed":
                who = f"{cell['mechanism']} s{cell['seed']} {task['task']}"
                notes.append(f"[red]{escape(who)} failed: {escape(cell['error'])}")
    return [view, "", *notes]


def write_extras(work: Plan, out: Path, engine: Engine, progress: Progress, files: Sequence[str] = EXTRAS) -> None:
    """The laws of every mechanism, a sample and attention maps of each one's first finished run, and, where they are
    asked for, the heads of every finished run. A file that is newer than all those runs stays as it is."""
    done = [cell for cell in work.cells if (result := cell.result()) is not None and result.status == "done"]
    first = {cell.label: cell for cell in reversed(done)}
    names = dict.fromkeys(name for label in work.mechanisms for name in label.split("+"))
    runs = {label: (label, cell.seed, cell.folder) for label, cell in first.items()}
    wanted: dict[str, dict[str, Call]] = {
        "laws": {name: Call(laws_of, (name,)) for name in names},
        "samples": {label: Call(sample_of, arguments) for label, arguments in runs.items()},
        "attention": {label: Call(attention_of, arguments) for label, arguments in runs.items()},
        "heads": {str(cell): Call(heads_of_run, (cell.label, cell.seed, cell.folder)) for cell in done},
    }
    newest = max((_changed(cell.folder / "result.json") for cell in done), default=0.0)
    order = [*work.mechanisms, *(name for name in names if name not in work.mechanisms)]
    stale = [file for file in files if not _fresh(out / f"{file}.json", newest, order)]
    calls = [(file, whose, call) for file in stale for whose, call in wanted[file].items()]
    entries: dict[str, list[dict[str, Any]]] = {file: [] for file in stale}

    def tell(number: int, outcome: Outcome, value: Any) -> None:
        file, whose, _ = calls[number]
        if outcome == "done":
            entries[file] += value
        elif outcome == "failed":
            progress.say(f"{file} of {whose}: {value}")

    if calls:
        progress.say(f"looking into what was trained: {', '.join(stale)}")
    engine.run([call for _, _, call in calls], tell)
    for file, own in entries.items():
        own.sort(key=lambda entry: (order.index(entry["mechanism"]), entry.get("seed", 0)))
        write_bytes(out / f"{file}.json", (json.dumps(own, allow_nan=False) + "\n").encode())


def _fresh(path: Path, newest: float, mechanisms: Sequence[str]) -> bool:
    return _changed(path) > newest and {entry["mechanism"] for entry in read_json(path)} <= set(mechanisms)


def _changed(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def heads_of_run(label: str, seed: int, folder: Path, report: Any = None) -> list[dict[str, Any]]:
    """What each head attends to, copies and is needed for; over training too, where checkpoints were kept."""
    steps = RunFolder.open(folder).steps()
    found = whole(load_model(folder)[0], run=folder if len(steps) > 2 else None)
    return [{"mechanism": label, "seed": seed} | found]


def laws_of(name: str, report: Any = None) -> list[dict[str, Any]]:
    """Every law, put to the mechanism."""
    return [LawResult.to_dict(result) for result in check_mechanism(name)]


def sample_of(label: str, seed: int, folder: Path, report: Any = None) -> list[dict[str, Any]]:
    """How the run goes on from the first held-out tokens, no further than it was trained."""
    config = RunFolder.open(folder).config
    count = min(24, max(1, config.model.context // 4))
    prompt = RunFolder.open(folder).tokenizer().decode(data.load(config.data).val.read(0, count).tolist())
    length = min(SAMPLE, config.model.context - count) if config.model.positions == "learned" else SAMPLE
    if length < 1:
        return []
    found = sample_run(folder, [prompt], length, temperature=0.8, seed=seed, device="cpu")
    return [{"mechanism": label, "seed": seed, "prompt": prompt, "text": found.texts[0]}]


@torch.inference_mode()
def attention_of(label: str, seed: int, folder: Path, report: Any = None) -> list[dict[str, Any]]:
    """What each head of each layer looks at, in a held-out window, and how large each token's value is to it. A layer
    that attends to no token has no heads."""
    model, config = load_model(folder)
    length = min(WINDOW, config.model.context)
    tokens = data.load(config.data).windows(1, length).x
    with watch(model) as seen:
        model(tokens)
    patterns = [layer.pattern()[0].tolist() if layer.maps else [] for layer in seen]
    layers = [[[[_three_digits(w) for w in row] for row in head] for head in heads] for heads in patterns]
    sizes = [None if size is None else size[0].tolist() for size in value_sizes(model, seen)]
    values = [None if size is None else [[float(f"{v:.3g}") for v in head] for head in size] for size in sizes]
    tokenizer = RunFolder.open(folder).tokenizer()
    words = [tokenizer.decode([token]) for token in tokens[0].tolist()]
    if not any(layers):
        return []
    return [{"mechanism": label, "seed": seed, "tokens": words, "layers": layers, "values": values}]


def _three_digits(weight: float) -> float:
    return float(f"{weight:.3g}") if weight >= 1e-5 else 0.0


def default_command(work: Sweep, out: Path) -> str:
    main = work.main
    words = f"attnlab compare {main.preset} --mechanisms {','.join(main.mechanisms)} --seeds {len(main.seeds)}"
    sizes = f" --sizes {','.join(each.size for each in work.sizes)}" if main.size else ""
    return f"{words}{sizes} --match {main.match} --out {out}"


def _make(out: Path) -> None:
    try:
        (out / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}): name a folder that you may write to") from None


def _progress(total: int, console: Console | None, quiet: bool) -> Progress:
    from rich.console import Console

    return Progress(total, console=Console(quiet=True) if quiet else console)


def _words(result: RunResult | None) -> str:
    """A run in one line."""
    if result is None:
        return "interrupted before its first step"
    if result.status == "failed":
        return f"failed: {result.error}"
    loss = "" if result.val_loss is None else f"val loss {result.val_loss:.4f}"
    rate = "" if result.tokens_per_s is None else f"{result.tokens_per_s:,.0f} tokens/s"
    told = ", ".join(filter(None, (loss, rate, f"{result.seconds:.0f} s")))
    return told if result.status == "done" else f"interrupted and saved after step {result.steps}: {told}"
