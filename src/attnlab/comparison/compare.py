"""Training of mechanisms on the same data with paired seeds.

A comparison is a folder. Each run in it has a folder of its own, named after its config. So the same command skips what
is finished, resumes what was interrupted, and tries again what failed. A synthetic task is one more preset, whose runs
are also examined. A size is the preset with other layers and another width. Engines make the runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..costs.fits import check_step
from ..errors import UserError, need
from ..files import alone, write_json
from ..model import parameters
from ..ranges import checked
from ..results import RunResult, environment
from ..training.schedule import cautions
from .engines import Engine, EngineOptions, Local, Needs, Outcome, Share
from .extras import EXTRAS, write_extras
from .grid import Cell, Comparison, Sweep, default_command, sweep
from .progress import ComparisonProgress, Show, Silent
from .verdicts import summarize, summarize_size, summarize_task


@checked
def compare(
    comparison: Comparison,
    out: str | Path,
    *,
    engine: EngineOptions = Local(),  # noqa: B008
    share: Share = Share(),  # noqa: B008
    command: str = "",
    extras: Sequence[str] = EXTRAS,
    show: Show = Silent,
) -> dict[str, Any]:
    """Return what compare.json holds, after training what is not trained yet into the folder `out`.

    `engine` makes the runs, and `share` says how many side by side, and what each gets. compare.json is rewritten after
    each run. The `extras`, such as laws.json, follow the last run. `command` is what compare.json says made it ("": one
    that would). `show` makes the display of progress.

    A run that the machine may have spoilt is made once more. One that fails is reported, does not stop the others, and
    is tried again by the next call. Ctrl-C finishes the steps under way, saves, and raises `KeyboardInterrupt`, or
    leaves Slurm's jobs alone. The same call resumes from there, also where this process was killed. Raises `UserError`
    before anything is trained or written.
    """
    need("accelerate", "train")
    need("scipy", "stats")
    out = Path(out)
    work = sweep(comparison, out)
    if isinstance(engine, Local):
        for config in {(cell.size, cell.label): cell.config for cell in work.cells if not cell.finished()}.values():
            check_step(config)
    runs = Runs(work, out, command or default_command(work, out))
    progress = show(sum(cell.config.train.steps for cell in runs.todo))
    opened = engine.open(_needs(comparison, runs.todo, out, share, progress))
    with opened:
        _make(out)
        with alone(out, "compares in", patience=1.0):
            runs.write()
            with progress:
                runs.make(opened, progress, extras)
    return runs.found


def foresee(comparison: Comparison, out: Path, engine: EngineOptions, share: Share = Share()) -> str:  # noqa: B008
    """Return what `compare` would do, in words; nothing is trained or written."""
    cells = sweep(comparison, out).cells
    todo = [cell for cell in cells if not cell.finished()]
    opened = engine.open(_needs(comparison, todo, out, share, Silent()))
    lines = [
        f"{cell}: {parameters(cell.config.model):,} parameters, {cell.config.train.steps:,} steps" for cell in todo
    ]
    lines += [f"note: {caution}" for caution in _cautions(todo)]
    runs = f"{len(todo)} of {len(cells)} runs are to be trained"
    return "\n".join([*lines, f"{runs} {opened.describe([cell.call for cell in todo])}" if todo else runs])


def _cautions(cells: Sequence[Cell]) -> list[str]:
    """Sentences about the schedules of runs, each once."""
    return list(dict.fromkeys(caution for cell in cells for caution in cautions(cell.config.train)))


def _needs(
    comparison: Comparison, todo: Sequence[Cell], out: Path, share: Share, progress: ComparisonProgress
) -> Needs:
    device = comparison.preset.train.device
    return Needs(runs=len(todo), folder=out, device=device, say=progress.say, **vars(share))


class Runs:
    """The runs of a comparison: which are still to be made, and what is known of the others."""

    def __init__(self, work: Sweep, out: Path, command: str) -> None:
        self.work = work
        self.out = out
        self.cells = work.cells
        self.known = {cell.folder: result for cell in self.cells if (result := cell.result()) is not None}
        self.todo = [cell for cell in self.cells if not cell.finished()]
        self.attempts: Counter[Cell] = Counter()  # how often each was begun by this call
        self.about = {"command": command, "environment": environment()}
        self.found: dict[str, Any] = {}  # compare.json
        self.progress: ComparisonProgress = Silent()

    def write(self) -> None:
        """Write compare.json: what is known so far."""
        work = self.work
        found = summarize(work.main, self.known) | self.about
        found["tasks"] = [summarize_task(each, self.known) for each in (*work.sizes, *work.tasks) if each.task]
        found["sizes"] = [summarize_size(each, self.known) for each in work.sizes if each.size]
        write_json(self.out / "compare.json", found)
        self.found = found

    def make(self, engine: Engine, progress: ComparisonProgress, extras: Sequence[str]) -> None:
        """Make the runs that are not finished, then the extras. `KeyboardInterrupt` says how many runs are finished."""
        self.progress = progress
        for caution in _cautions(self.todo):
            progress.say(caution)
        for cell in self.cells:
            if cell not in self.todo:
                progress.say(f"{cell}: {_words(self.known[cell.folder])}, finished before")
        try:
            engine.run([cell.call for cell in self.todo], self.hear)
            write_extras(self.work.main, self.out, engine, progress, extras)
        except KeyboardInterrupt as stop:
            done = sum(result.status == "done" for result in self.known.values())
            left = f"; {stop}" if str(stop) else ""
            raise KeyboardInterrupt(
                f"stopped; {done} of {len(self.cells)} runs in {self.out} are finished{left}; "
                "the same command goes on from there"
            ) from None

    def hear(self, number: int, outcome: Outcome, value: Any) -> None:
        """Show what an engine says of a run, and write down how the run ended."""
        cell = self.todo[number]
        name = str(cell)
        if outcome == "start":
            self.attempts[cell] += 1
            self.progress.begin(name, cell.config.train.steps)
        elif outcome == "event":
            self.progress.update(name, value)
        elif outcome == "note":
            self.progress.say(f"{name}: {value}")
        elif outcome == "again":
            self.progress.end(name, f"failed, and is tried once more: {value}")
        else:
            self.close(cell, outcome, value)

    def close(self, cell: Cell, outcome: Outcome, value: Any) -> None:
        """Write down how a run ended: done, failed (`value` says why) or interrupted."""
        attempts = self.attempts[cell]
        if outcome == "done" and attempts > 1:
            cell.write_attempts(attempts)
        result = cell.failed(value) if outcome == "failed" else cell.result()
        if result is not None:
            self.known[cell.folder] = replace(result, attempts=max(result.attempts, attempts))
        self.progress.end(str(cell), _words(result))
        self.write()


def _make(out: Path) -> None:
    try:
        (out / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}): name a folder that you may write to") from None


def _words(result: RunResult | None) -> str:
    """A run in one line."""
    if result is None:
        return "interrupted before its first step"
    if result.status == "failed":
        return f"failed: {result.error}"
    loss = "" if result.val_loss is None else f"val loss {result.val_loss:.4f}"
    rate = "" if result.tokens_per_s is None else f"{result.tokens_per_s:,.0f} tokens/s"
    line = ", ".join(filter(None, (loss, rate, f"{result.seconds:.0f} s")))
    return line if result.status == "done" else f"interrupted and saved after step {result.steps}: {line}"
