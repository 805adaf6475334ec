"""Experiment trackers beside metrics.jsonl, by the libraries themselves.

Accelerate's wrappers cannot remove steps that are made twice. Its wrapper of TensorBoard writes the hyperparameters of
each resumed run into a run of its own.

    track/ids.json         the id and the name that this run has in every tracker
    track/tensorboard      event files; tensorboard --logdir FOLDER
    track/wandb            Weights & Biases; without credentials, or with WANDB_MODE=offline, for wandb sync
    track/trackio          a database; TRACKIO_DIR=FOLDER/track/trackio trackio show

A resumed run goes on in the same run of each tracker. TensorBoard's and trackio's records of the steps that it makes
again are removed; Weights & Biases ignores a step that it has already.
"""

from __future__ import annotations

import io
import os
import secrets
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import RunConfig, to_dict
from ..errors import UserError, choose, need
from ..files import read_json, write_json

PROJECT = "attnlab"
Say = Callable[[str], None]
Write = Callable[[dict[str, float], int], None]  # numbers by name, and the step they are of


@dataclass(frozen=True)
class TrackerRun:
    """The run as a tracker gets it at the start."""

    folder: Path  # of this tracker
    id: str  # of the run, the same in all trackers
    name: str
    config: dict[str, Any]
    after: int  # the last step whose records stay; -1: none do


class Trackers:
    """The open trackers. One that fails is dropped with a message; metrics.jsonl has everything."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.open: dict[str, tuple[Write, ExitStack]] = {}

    def begin(self, name: str, run: TrackerRun) -> None:
        """Open the tracker `name`."""
        stack = ExitStack()
        try:
            run.folder.mkdir(exist_ok=True)
            self.open[name] = stack.enter_context(TRACKERS[name](run)), stack
        except Exception as error:
            self._drop(name, error)

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Track the numbers of a record of metrics.jsonl, as train/loss, val/loss, ...; the rest of it is left out."""
        values = scalars(record)
        for name, (write, _) in list(self.open.items()) if values else []:
            try:
                write(values, step)
            except Exception as error:
                self._drop(name, error)

    def end(self, error: BaseException | None) -> None:
        """Close all trackers; `error` is the one that ended the run, if any."""
        for name, (_, stack) in list(self.open.items()):
            try:
                stack.__exit__(type(error) if error else None, error, None)
            except Exception as failure:
                if failure is not error:
                    self._drop(name, failure)
        self.open.clear()

    def _drop(self, name: str, error: Exception) -> None:
        why = str(error).partition("\n")[0] or type(error).__name__
        self.say(f"{name} fails ({why}): it is left out from here on, and metrics.jsonl goes on")
        if name in self.open:
            _, stack = self.open.pop(name)
            try:
                stack.close()
            except Exception:
                pass  # its failure was reported


@contextmanager
def open_trackers(
    names: Sequence[str], folder: str | Path, config: RunConfig, progress_step: int, say: Say | None = None
) -> Iterator[Trackers]:
    """Open the trackers `names` of the run in `folder`, which exists. Yields them.

    `progress_step`: the step of the checkpoint that the run goes on from; -1: it begins. Later steps that were tracked
    are made again. `say` gets the message about a tracker that fails; by default it goes to stderr. Raises `UserError`
    for an unknown tracker, and for one that is not installed.
    """
    check_trackers(names)
    trackers = Trackers(say or (lambda words: print(words, file=sys.stderr)))
    if not names:
        yield trackers
        return
    place = Path(folder).resolve() / "track"
    place.mkdir(exist_ok=True)
    if not (place / "ids.json").exists():
        id = secrets.token_hex(4)
        write_json(place / "ids.json", {"id": id, "name": f"{config.name}-{config.mechanism}-{id}"})
    ids = read_json(place / "ids.json", dict[str, str])
    if missing := {"id", "name"} - set(ids):
        raise UserError(
            f"{place / 'ids.json'} lacks {', '.join(sorted(missing))}; delete it, and the run is tracked anew"
        )
    for name in dict.fromkeys(names):
        trackers.begin(name, TrackerRun(place / name, ids["id"], ids["name"], to_dict(config), progress_step))
    try:
        yield trackers
    except BaseException as error:
        trackers.end(error)
        raise
    trackers.end(None)


def check_trackers(names: Sequence[str]) -> None:
    """Raise `UserError` for an unknown tracker, and for one that is not installed."""
    for name in names:
        choose("tracker", name, TRACKERS)
        need(name, "track")


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record, by the names that trackers show: train/..., val/..."""
    return {
        name.replace("val_", "val/", 1) if name.startswith("val_") else f"train/{name}": value
        for name, value in record.items()
        if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


@contextmanager
def _tensorboard(run: TrackerRun) -> Iterator[Write]:
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    with SummaryWriter(str(run.folder), purge_step=run.after + 1) as writer:
        for summary in hparams(_flat(run.config), {}):
            writer.file_writer.add_summary(summary)

        def write(values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        yield write


@contextmanager
def _wandb(run: TrackerRun) -> Iterator[Write]:
    """Track with Weights & Biases, which ignores steps before its last one.

    Without a network every resumed run has a folder of its own, and all have one id.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_CACHE_DIR", str(run.folder / "cache"))  # of its logs; else in the home folder
    import wandb

    mode: Any = os.environ.get("WANDB_MODE") or "online"
    if mode not in ("offline", "disabled") and not wandb.login(prompt=False, verify=False):
        mode = "offline"
    with wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=run.id,
        name=run.name,
        resume="allow",
        reinit="create_new",  # a run that the caller has open stays as it is
        mode=mode,
        dir=str(run.folder),
        config=run.config,
        settings=wandb.Settings(console="off", init_timeout=30, finish_timeout=60, finish_timeout_raises=True),
    ) as opened:
        yield lambda values, step: opened.log(values, step=step)


@contextmanager
def _trackio(run: TrackerRun) -> Iterator[Write]:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    with _trackio_folder(run.folder):
        database = SQLiteStorage.get_project_db_path(PROJECT)
        if database.exists():
            with closing(sqlite3.connect(database)) as connection, connection:
                connection.execute("DELETE FROM metrics WHERE step > ?", (run.after,))
        with redirect_stdout(io.StringIO()):  # it prints a greeting
            opened = trackio.init(PROJECT, name=run.name, resume="allow", config=run.config, embed=False)
        try:
            yield lambda values, step: opened.log(values, step=step)
        finally:
            with redirect_stdout(io.StringIO()):
                trackio.finish()


@contextmanager
def _trackio_folder(folder: Path) -> Iterator[None]:
    """Set trackio's folder in its modules: it reads TRACKIO_DIR on import only, and a process may train many runs."""
    users = [module for name, module in sys.modules.items() if name.partition(".")[0] == "trackio"]
    before = [(module, module.TRACKIO_DIR) for module in users if hasattr(module, "TRACKIO_DIR")]
    for module, _ in before:
        vars(module)["TRACKIO_DIR"] = folder
    try:
        yield
    finally:
        for module, earlier in before:
            vars(module)["TRACKIO_DIR"] = earlier


TRACKERS: dict[str, Callable[[TrackerRun], AbstractContextManager[Write]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def _flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return the fields by their full names, as TensorBoard takes them: numbers, strings and booleans."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{name}.")
        else:
            found[before + name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return found
