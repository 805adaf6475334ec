"""A run folder: what training writes, and what everything that uses a trained model reads.

    run.json               what the run is: format, config, key, data fingerprint, environment
    tokenizer.json         the tokenizer of its text
    metrics.jsonl          one record per line, written during training
    step-00000500/         a checkpoint (`checkpoint.py`)
    result.json            the result, once training has ended

Files are safetensors and JSON, so that opening one runs no foreign code. `RunFolder` is the only writer of these files.
Others write beside them: `heartbeat.py` heartbeat/, `training/trackers.py` track/, a comparison task.json, and
`files.alone` .lock. Others also read them: the report reads result.json without torch, and the engines of a comparison
read the lines that are added to metrics.jsonl.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .. import data
from ..config import RunConfig, differing, from_dict, to_dict
from ..device import find_device
from ..errors import UserError
from ..files import disk_errors, naming, parse_json, read_json, regular, unreadable, write_bytes, write_json
from ..model import Decoder
from ..ranges import Size, check_value, checked
from ..results import FORMAT, RunResult, environment
from ..unfinished import clean
from .checkpoint import (
    COMMIT,
    PLACE,
    Checkpoint,
    check_file,
    commit,
    committed,
    drop,
    is_foreign,
    make_anew,
    remove_own,
    write_pieces,
)
from .metrics import add_record, is_regular, keep_records, read_records
from .processes import ONE_PROCESS, Processes
from .schemas import About, CheckpointState
from .tensors import Piece, Stored, load_weights, weights, whole_piece

T = TypeVar("T")
OTHER = "name another checkpoint with --checkpoint"  # what to do about one that cannot be read


class RunFolder:
    """One run folder; `create`, `open` or `resume` returns it."""

    def __init__(
        self, path: str | Path, config: RunConfig, about: Mapping[str, Any], processes: Processes = ONE_PROCESS
    ):
        self.path = Path(path)
        self.config = config
        self.about = about  # run.json
        self.processes = processes  # of the run; the first one writes what is not divided among them

    @classmethod
    def create(
        cls, path: str | Path, config: RunConfig, corpus: data.Corpus, processes: Processes = ONE_PROCESS
    ) -> RunFolder:
        """Make the folder, with run.json and tokenizer.json in it. `UserError` when it holds anything else already."""
        path = Path(path)
        processes.agree(lambda: cls._create(path, config, corpus) if processes.first else None)
        return cls.open(path, processes)

    @classmethod
    def _create(cls, path: Path, config: RunConfig, corpus: data.Corpus) -> None:
        if (path / "run.json").exists():
            held = cls.open(path)
            if held.config.key == config.key:
                raise UserError(f"{path} already holds this run; add --resume to go on with it, or name another folder")
            raise UserError(
                f"{path} holds another run ({differing(held.config, config)}); delete this one or name another"
            )
        tokenizer = (json.dumps(corpus.tokenizer.to_json()) + "\n").encode()
        if path.is_file() or (path.is_dir() and any(is_foreign(file, tokenizer) for file in path.iterdir())):
            raise UserError(f"{path} exists and is not a run folder; name a new or an empty folder")
        made = not path.exists()
        own = not (path / "tokenizer.json").exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path} cannot be made ({error.strerror}); name a folder that you may write to") from None
        about = {
            "format": FORMAT,
            "key": config.key,
            "config": to_dict(config),
            "data": {
                "fingerprint": corpus.fingerprint,
                "vocab_size": corpus.vocab_size,
                "order": corpus.order,
            },
            "environment": environment(),
            "threads": torch.get_num_threads(),
        }
        try:
            write_bytes(path / "tokenizer.json", tokenizer)
            write_json(path / "run.json", about)  # last: a folder that has it is complete
        except BaseException:
            if own:
                (path / "tokenizer.json").unlink(missing_ok=True)
            if made:
                path.rmdir()
            raise

    @classmethod
    @checked
    def open(cls, path: str | Path, processes: Processes = ONE_PROCESS) -> RunFolder:
        """Return the folder of an existing run. `UserError` when there is none, or another version wrote it."""
        path = Path(path)
        if not (path / "run.json").is_file():
            why = "has no run.json" if path.is_dir() else "does not exist"
            raise UserError(f"{path} {why}, so it is not a run folder; give the --out folder of 'attnlab train'")
        about = read_json(path / "run.json", dict, "take the file that was there, or train again into another folder")
        found = about.get("format")
        if found != FORMAT or isinstance(found, bool):
            raise UserError(
                f"{path} is a run folder of format {found}, but this version reads format {FORMAT}; "
                "use the attnlab that wrote it, or train again into another folder"
            )
        with naming(path / "run.json", "train again into another folder"):
            check_value("it", about, About)
            config = from_dict(RunConfig, about["config"])
        return cls(path, config, about, processes)

    @classmethod
    def resume(
        cls,
        path: str | Path,
        config: RunConfig,
        corpus: data.Corpus,
        processes: Processes = ONE_PROCESS,
        goes_on: Callable[[RunFolder, RunConfig], bool] = lambda folder, config: False,
    ) -> RunFolder:
        """`open` the folder if it holds this run, `create` it if it holds none. `UserError` if it holds another.

        `goes_on` says whether the run that it holds may go on with other `train.steps`; the folder is then changed.
        """
        if not any(processes.gather((Path(path) / "run.json").exists())):
            return cls.create(path, config, corpus, processes)
        folder = cls.open(path, processes)
        changes = folder.config.key != config.key
        if changes and not processes.agree(lambda: goes_on(folder, config)):
            raise UserError(
                f"{path} holds another run ({differing(folder.config, config)}); "
                "resume with the config it began with, or name another folder"
            )
        if folder.about["data"]["fingerprint"] != corpus.fingerprint:
            raise UserError(
                f"the text of {corpus.source!r} is not what {path} was trained on; bring the old text back, or name "
                "another folder"
            )
        folder.check_order(corpus)
        if changes:
            processes.agree(lambda: folder._change_steps(config) if processes.first else None)
            return cls.open(path, processes)
        return folder

    def _change_steps(self, config: RunConfig) -> None:
        """Write down that the run has other `train.steps`, and drop what was only recorded because it was over."""
        train = self.config.train
        keep_records(self.path / "metrics.jsonl", lambda record: is_regular(record, train))
        write_json(self.path / "run.json", {**self.about, "key": config.key, "config": to_dict(config)})
        (self.path / "result.json").unlink(missing_ok=True)

    def check_order(self, corpus: data.Corpus) -> None:
        """Raise `UserError` where the run was begun with another order of its data than that of this version."""
        if self.about["data"].get("order", 1) != corpus.order:
            raise UserError(
                f"{self.path} was begun by an attnlab that reads text in another order, so this one would read some of "
                "it twice and some never: go on with that attnlab, or begin another folder"
            )

    def tokenizer(self) -> data.Tokenizer:
        """Return the tokenizer of the run's text."""
        path = self.path / "tokenizer.json"
        with naming(path, "take the one that was there, or train again into another folder"):
            return data.from_json(read_json(path))

    def log(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl; a number that is not finite becomes null. Only the first process writes."""
        if self.processes.first:
            add_record(self.path / "metrics.jsonl", record)

    def metrics(self) -> list[dict[str, Any]]:
        """Return every whole record; a last line that a crash cut short is left out."""
        return read_records(self.path / "metrics.jsonl")

    def forget_after(self, step: int) -> None:
        """Drop the records of steps after `step`, which a resumed run makes again.

        Files that a crash left incomplete are dropped too, and old checkpoints that it left.
        """
        if self.processes.first:
            self._forget_after(step)
        self.processes.wait()

    def _forget_after(self, step: int) -> None:
        clean(self.path)
        for folder in sorted(self.path.iterdir()):
            if PLACE.fullmatch(folder.name) and folder.is_dir() and not (folder / COMMIT).exists():
                remove_own(folder)
        self._tidy()
        keep_records(self.path / "metrics.jsonl", lambda record: record["step"] <= step)

    def save(self, step: int, model: nn.Module, optimizer: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `step`, when one process holds everything. Returns its folder."""
        pieces = {name: whole_piece(tensor) for name, tensor in weights(model).items()}
        return self.save_pieces(step, pieces, {name: whole_piece(tensor) for name, tensor in optimizer.items()}, state)

    def save_pieces(
        self,
        step: int,
        model: Mapping[str, Piece],
        optimizer: Mapping[str, Piece],
        state: Mapping[str, Any],
    ) -> Path:
        """Write the checkpoint of `step`, whole or not at all. Returns its folder.

        Each process gives the pieces that it holds. Old checkpoints are then dropped: all but the newest `train.keep`
        and the `best`.
        """
        processes = self.processes
        place = self._place(step)
        half = self.path / f".{place.name}"  # a name that `steps` does not list, until all of it is on the disk
        try:
            with disk_errors(place):
                processes.agree(lambda: make_anew(half) if processes.first else None)
                own = processes.agree(lambda: write_pieces(half, model, optimizer, processes))
                files = {name: about for each in processes.gather(own) for name, about in each.items()}
                processes.agree(lambda: commit(half, place, step, state, files) if processes.first else None)
        finally:
            if processes.first and half.exists():
                remove_own(half)
        if processes.first:
            self._tidy()
        return place

    def _tidy(self) -> None:
        """Drop the checkpoints that `train.keep` does not keep."""
        keep = self.config.train.keep
        spare = self.steps()[:-keep] if keep else []
        best = self.best() if spare else None
        for step in spare:
            if step != best:
                drop(self._place(step))

    def best(self) -> int | None:
        """Return the step with the least validation loss, of those with a checkpoint; None without such a step."""
        losses = {record["step"]: record["val_loss"] for record in self.metrics() if record.get("val_loss") is not None}
        return min(
            (step for step in self.steps() if step in losses), key=lambda step: (losses[step], step), default=None
        )

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints, in ascending order. `UserError` where one may not be looked into."""
        found = []
        for place in self.path.iterdir() if self.path.is_dir() else ():
            if PLACE.fullmatch(place.name) and not place.name.startswith("."):
                try:
                    (place / COMMIT).lstat()
                except OSError as error:
                    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                        continue
                    raise UserError(unreadable(place, error, OTHER)) from None
                found.append(int(place.name.removeprefix("step-")))
        return sorted(found)

    def newest(self) -> int | None:
        """Return the step of the newest checkpoint; None without one."""
        return max(self.steps(), default=None)

    def load(self, step: int | None = None, device: str | torch.device = "cpu") -> Checkpoint:
        """Return the checkpoint of `step` (None: the newest). `UserError` names the file that is damaged."""
        step = self._known(step)
        model = self.stored(step, "model")
        optimizer = self.stored(step, "optimizer")
        return Checkpoint(step, model.all(device), optimizer.all(device), self.state(step))

    def load_weights(self, step: int | None = None, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """Return the weights of the checkpoint of `step` (None: the newest), by name."""
        return self.stored(step, "model").all(device)

    def state(self, step: int | None = None) -> dict[str, Any]:
        """Return what state.json of the checkpoint of `step` (None: the newest) says."""
        step = self._known(step)
        path = self._place(step) / "state.json"
        self._check(step, [path.name])
        read = partial(parse_json, "it", kind=CheckpointState, remedy="it was changed")
        return self._whole(step, path, lambda: read(regular(path).read_bytes()))

    def stored(
        self, step: int | None = None, what: Literal["model", "optimizer"] = "model", processes: Processes = ONE_PROCESS
    ) -> Stored:
        """Return the tensors of a checkpoint, unread. Their checksums are verified; several processes share this."""
        step = self._known(step)
        names = [name for name in self._files(step) if name.startswith(f"{what}.")]
        processes.agree(lambda: self._check(step, names[processes.rank :: processes.size]))
        files = [self._place(step) / name for name in names]
        return self._whole(step, files[0], lambda: Stored(files))

    def _files(self, step: int) -> dict[str, dict[str, Any]]:
        path = self._place(step) / COMMIT
        return self._whole(step, path, lambda: committed(path, step))

    def _check(self, step: int, names: Iterable[str]) -> None:
        files = self._files(step)
        for name in names:
            path = self._place(step) / name
            self._whole(step, path, partial(check_file, path, files[name]))

    def write_result(self, result: RunResult) -> None:
        """Write result.json. Only the first process writes."""
        if self.processes.first:
            write_json(self.path / "result.json", result.to_dict())

    def discard(self) -> None:
        """Remove the files of a run that came to nothing, and the folder where nothing else is in it."""
        if self.processes.first:
            for name in ("result.json", "metrics.jsonl", "tokenizer.json", "run.json"):
                (self.path / name).unlink(missing_ok=True)
            for beat in self.path.glob("heartbeat/rank-*.json"):
                beat.unlink(missing_ok=True)
            for place in (self.path / "heartbeat", self.path):
                with suppress(OSError):
                    place.rmdir()
        self.processes.wait()

    def result(self) -> RunResult | None:
        """Return the result of the run; None before there is one."""
        path = self.path / "result.json"
        if not path.exists():
            return None
        found = read_json(path)
        with naming(path, "delete it, and add --resume to the command that made it"):
            return RunResult.from_dict(found)

    def _place(self, step: int) -> Path:
        return self.path / f"step-{step:08d}"

    def _known(self, step: int | None) -> int:
        """Return `step`, or the newest one for None. `UserError` when it has no checkpoint."""
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.path} has no checkpoint yet; train it for train.save_every steps first")
        if step is not None and step not in steps:
            raise UserError(f"{self.path} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
        return steps[-1] if step is None else step

    def _whole(self, step: int, path: Path, read: Callable[[], T]) -> T:
        """Return what `read` returns. `UserError` when it finds that the file `path` is damaged."""
        try:
            return read()
        except UserError:
            raise
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
                raise UserError(unreadable(path, error, OTHER)) from None
            why = f"it has no {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
            why = "it is missing" if isinstance(error, FileNotFoundError) else why
            earlier = [other for other in self.steps() if other < step]
            way = (
                f"delete the folder {path.parent.name} to go on from step {earlier[-1]}, which is there"
                if earlier
                else "there is no earlier one; train again into another folder"
            )
            raise UserError(f"the checkpoint file {path} is damaged ({why}); {way}") from None


@checked
def load_model(
    path: str | Path, step: Size | None = None, device: str | torch.device = "cpu"
) -> tuple[Decoder, RunConfig]:
    """Return the trained model of a run folder and the config of its run.

    The model is in evaluation mode, with float32 weights. `step` None: of the newest checkpoint.
    """
    place = find_device(device) if isinstance(device, str) else device
    folder = RunFolder.open(path)
    with torch.random.fork_rng([]):  # initial weights are overwritten; the caller's random state stays as it was
        model = Decoder(folder.config.model)
    load_weights(model, folder.load_weights(step), folder.path)
    return model.to(place).eval(), folder.config
