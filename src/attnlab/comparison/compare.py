"""Train mechanisms on the same data with paired seeds, and say what can be told apart.

A comparison is a folder. Each run in it has a folder of its own, named after its config, so that the same command skips
what is finished, goes on with what was interrupted and tries again what failed. A synthetic task is one more preset,
whose runs are also examined; a size is the preset with other layers and another width. Engines make the runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import RunConfig
from ..errors import UserError, need
from ..files import alone, write_json
from ..model import parameters
from ..presets import Options
from ..results import RunResult, environment
from ..terminal.progress import Progress
from .engines import Kind, Local, Needs, Outcome
from .extras import EXTRAS, write_extras
from .grid import Cell, Sweep, default_command, sweep
from .match import What
from .verdicts import summarize, summarize_size, summarize_task

if TYPE_CHECKING:
    from rich.console import Console


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
