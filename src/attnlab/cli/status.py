"""The command status: how far a run is, and when each of its processes was last heard from."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from ..formatting import known
from ..ranges import Positive
from ..terminal import tables
from .options import Json

if TYPE_CHECKING:
    from ..results import RunResult
    from ..runs.folder import RunFolder

SILENT = "no sign of life"


def status(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    *,
    after: Annotated[Positive, arg(metavar="SECONDS")] = 60.0,
    json_: Json = False,
) -> int:
    """Show how far a run is, and when each of its processes was last heard from.

    Exit code: 0, or 1 where a process is not heard from in a run that is not done.

    Args:
        run: A run folder: the --out of attnlab train.
        after: How long a process may be silent. One that compiles or validates for longer needs more.
        json_: Print one JSON object.
    """
    found = status_of(run, after)
    if json_:
        print(json.dumps(asdict(found), indent=1))
    else:
        show(found)
    silent = any(rank.silent for rank in found.ranks)
    return int(silent and found.status != "done")


@dataclass(frozen=True)
class Rank:
    """One process of a run, as its heartbeat shows it."""

    rank: int
    step: int | None  # steps done; None here and below: it was never heard
    host: str | None
    pid: int | None
    seconds: float | None  # since it was last heard
    silent: bool  # for longer than --after, or never heard


@dataclass(frozen=True)
class Status:
    """The state of a run."""

    name: str
    mechanism: str
    status: str  # running, done, interrupted, failed, or no sign of life
    error: str  # why it failed
    step: int  # steps done
    steps: int  # of the whole run
    checkpoint: int | None  # step of the newest; None: there is none
    loss: float | None  # the last one, nats per token
    val_loss: float | None  # the last one
    ranks: list[Rank]


def status_of(run: Path, after: float) -> Status:
    """Return the state of the run in a folder. Raises `UserError` where there is none.

    `after`: seconds of silence after which a process counts as silent.
    """
    from ..runs.folder import RunFolder

    folder = RunFolder.open(run)
    ranks = ranks_of(run, after)
    ended = result_of(folder)
    if ended is not None:
        word = ended.status
    else:
        word = SILENT if all(rank.silent for rank in ranks) else "running"
    records = folder.metrics()
    checkpoint = folder.newest()
    steps = [rank.step for rank in ranks if rank.step is not None]
    if ended is not None:
        steps = [ended.steps]
    elif not steps:
        steps = [checkpoint or 0, *(record["step"] for record in records[-1:])]
    return Status(
        name=folder.config.name,
        mechanism=folder.config.mechanism,
        status=word,
        error="" if ended is None else ended.error,
        step=max(steps),
        steps=folder.config.train.steps,
        checkpoint=checkpoint,
        loss=last(records, "loss"),
        val_loss=last(records, "val_loss"),
        ranks=ranks,
    )


def ranks_of(run: Path, after: float) -> list[Rank]:
    """Return the processes of a run by rank. Rank 0 is there in every run, even if it was never heard."""
    from ..runs.heartbeat import beats, stale

    found = beats(run) or [None]
    silent = stale(run, after)
    now = time.time()
    ranks = []
    for number, beat in enumerate(found):
        if beat is None:
            ranks.append(Rank(number, None, None, None, None, True))
        else:
            seconds = max(0.0, now - beat["time"])  # the clock of its machine may be ahead of this one's
            ranks.append(Rank(number, beat["step"], beat["host"], beat["pid"], seconds, number in silent))
    return ranks


def result_of(folder: RunFolder) -> RunResult | None:
    """Return how the run ended; None: it has not ended, or was resumed since."""
    result = folder.result()
    if result is None or result.status == "done":
        return result
    metrics = folder.path / "metrics.jsonl"
    written = (folder.path / "result.json").stat().st_mtime_ns
    resumed = metrics.exists() and metrics.stat().st_mtime_ns > written  # a run writes its result last
    return None if resumed else result


def last(records: list[dict[str, Any]], name: str) -> float | None:
    """Return the last number of this name; None: there is none."""
    return next((record[name] for record in reversed(records) if record.get(name) is not None), None)


def show(found: Status) -> None:
    """Print the state of a run: three lines, and a table of its processes."""
    screen = tables.console()
    checkpoint = "no checkpoint" if found.checkpoint is None else f"newest checkpoint {found.checkpoint:,}"
    lines = [
        f"{found.name}, {found.mechanism}: {found.status}{f' ({found.error})' if found.error else ''}",
        f"step {found.step:,} of {found.steps:,}, {checkpoint}",
        f"loss {known(found.loss)}, val loss {known(found.val_loss)}",
    ]
    screen.print(*lines, sep="\n", markup=False, soft_wrap=True)
    table = tables.columns(rank="right", step="right", host="left", pid="right", last_heard="left")
    ended = found.status == "done"  # its processes have nothing more to say
    for rank in found.ranks:
        if rank.seconds is None:
            table.add_row(str(rank.rank), "", "", "", "never")
        else:
            heard = f"{rank.seconds:,.0f} s ago"
            if rank.silent and not ended:
                heard += f", {SILENT}"
            table.add_row(str(rank.rank), f"{rank.step:,}", rank.host, str(rank.pid), heard)
    screen.print("", table)
