"""A run folder: its only reader and writer. Files are safetensors and JSON, so opening one runs no foreign code.

    run.json               what the run is: format, config, key, data fingerprint, environment
    tokenizer.json         how its text became ids
    metrics.jsonl          one record per line, as training goes
    step-00000500/         model.safetensors, optimizer.safetensors, state.json: written whole, or not there
    result.json            what came of it

A checkpoint that is there is whole; what else goes wrong is a `UserError` that names the file.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from . import data
from .config import RunConfig, from_dict, to_dict
from .model import Decoder
from .results import FORMAT, RunResult, environment, read_json, write_bytes, write_json
from .spec import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Checkpoint(NamedTuple):
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]  # "<optimizer>/<parameter>/<field>" -> tensor
    state: dict[str, Any]


class RunFolder:
    """`create` or `open` one; nothing is written but by the methods below."""

    def __init__(self, path: str | Path, config: RunConfig, about: Mapping[str, Any]):
        self.path = Path(path)
        self.config = config
        self.about = about  # run.json

    @classmethod
    def create(cls, path: str | Path, config: RunConfig, corpus: data.Corpus) -> RunFolder:
        """Make the folder, with run.json and tokenizer.json in it. UserError where it holds anything else already."""
        path = Path(path)
        if (path / "run.json").exists():
            held = cls.open(path)
            if held.config.key == config.key:
                raise UserError(f"{path} already holds this run; add --resume to go on with it, or name another folder")
            raise UserError(
                f"{path} holds another run ({_difference(held.config, config)}); delete this one or name another"
            )
        if path.is_file() or (path.is_dir() and any(map(_foreign, path.iterdir()))):
            raise UserError(f"{path} exists and is not a run folder; name a new or an empty folder")
        made = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path} cannot be made ({error.strerror}); name a folder that you may write to") from None
        about = {
            "format": FORMAT,
            "key": config.key,
            "config": to_dict(config),
            "data": {"fingerprint": corpus.fingerprint, "vocab_size": corpus.vocab_size},
            "environment": environment(),
        }
        try:
            write_json(path / "tokenizer.json", corpus.tokenizer.to_json(), indent=None)
            write_json(path / "run.json", about)  # last: a folder that has it is complete
        except BaseException:
            (path / "tokenizer.json").unlink(missing_ok=True)
            if made:
                path.rmdir()
            raise
        return cls(path, config, about)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """UserError where there is no run, or one that another version wrote."""
        path = Path(path)
        if not (path / "run.json").is_file():
            why = "has no run.json" if path.is_dir() else "does not exist"
            raise UserError(f"{path} {why}, so it is not a run folder; give the --out folder of 'attnlab train'")
        about = read_json(path / "run.json")
        found = about.get("format") if isinstance(about, dict) else None
        if found != FORMAT:
            raise UserError(
                f"{path} is a run folder of format {found}, but this version reads format {FORMAT}; "
                "use the attnlab that wrote it, or train again into another folder"
            )
        try:
            config = from_dict(RunConfig, about["config"])
        except (KeyError, TypeError):
            raise UserError(f"{path / 'run.json'} lacks parts of the config; train again into another folder") from None
        return cls(path, config, about)

    @classmethod
    def resume(cls, path: str | Path, config: RunConfig, corpus: data.Corpus) -> RunFolder:
        """`open` the folder if it holds this very run, `create` it if it holds none."""
        if not (Path(path) / "run.json").exists():
            return cls.create(path, config, corpus)
        folder = cls.open(path)
        if folder.config.key != config.key:
            raise UserError(
                f"{path} holds another run ({_difference(folder.config, config)}); "
                "resume with the config it began with, or name another folder"
            )
        if folder.about["data"]["fingerprint"] != corpus.fingerprint:
            raise UserError(
                f"the text of {corpus.source!r} is not what {path} was trained on; bring the old text back, or name "
                "another folder"
            )
        return folder

    def tokenizer(self) -> data.Tokenizer:
        return data.from_json(read_json(self.path / "tokenizer.json"))

    def log(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl; a number that is not finite becomes null."""
        line = json.dumps({k: _finite(v) for k, v in record.items()}, allow_nan=False) + "\n"
        path = self.path / "metrics.jsonl"
        with _disk_errors(path), open(path, "a", encoding="utf-8") as file:
            file.write(line)

    def metrics(self) -> list[dict[str, Any]]:
        """Every whole record; a last line that a crash cut short does not count."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        lines = path.read_text("utf-8").split("\n")[:-1]  # what follows the last newline is empty or cut short
        try:
            return [json.loads(line) for line in lines]
        except json.JSONDecodeError:
            raise UserError(f"{path} has a line that is not JSON; delete it and run again") from None

    def forget_after(self, step: int) -> None:
        """Drop the records of steps after `step`, which a resumed run does again, and what a crash left half-made."""
        for rest in (*self.path.glob(".step-*"), *self.path.glob(".*.json*.*")):
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
        if kept := [json.dumps(record) + "\n" for record in self.metrics() if record["step"] <= step]:
            write_bytes(self.path / "metrics.jsonl", "".join(kept).encode())
        else:
            (self.path / "metrics.jsonl").unlink(missing_ok=True)

    def save(self, step: int, model: nn.Module, optimizer: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `step`, whole or not at all, then drop all but the newest `train.keep`."""
        place = self._place(step)
        half = self.path / f".{place.name}"  # a name that `steps` does not see until all of it is on the disk
        try:
            with _disk_errors(place):
                shutil.rmtree(half, ignore_errors=True)
                half.mkdir()
                _write(half / "model.safetensors", save(weights(model)))
                _write(half / "optimizer.safetensors", save({k: _plain(v) for k, v in optimizer.items()}))
                _write(half / "state.json", (json.dumps({"step": step, **state}) + "\n").encode())
                shutil.rmtree(place, ignore_errors=True)
                os.replace(half, place)
                _sync(self.path)
        finally:
            shutil.rmtree(half, ignore_errors=True)
        for old in self.steps()[: -self.config.train.keep] if self.config.train.keep else []:
            shutil.rmtree(self._place(old), ignore_errors=True)
        return place

    def steps(self) -> list[int]:
        """The steps there are checkpoints of, in ascending order."""
        names = (folder.name.removeprefix("step-") for folder in self.path.glob("step-*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def newest(self) -> int | None:
        return max(self.steps(), default=None)

    def load(self, step: int | None = None, device: str | torch.device = "cpu") -> Checkpoint:
        """The checkpoint of `step` (None: the newest). UserError names the file that is damaged."""
        step = self._known(step)
        place = self._place(step)
        state = self._whole(step, place / "state.json", lambda path: json.loads(path.read_bytes()))
        model = self._tensors(step, "model", device)
        return Checkpoint(step, model, self._tensors(step, "optimizer", device), state)

    def load_weights(self, step: int | None = None, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        return self._tensors(self._known(step), "model", device)

    def write_result(self, result: RunResult) -> Path:
        return write_json(self.path / "result.json", result.to_dict())

    def result(self) -> RunResult | None:
        path = self.path / "result.json"
        return RunResult.from_dict(read_json(path)) if path.exists() else None

    def _place(self, step: int) -> Path:
        return self.path / f"step-{step:08d}"

    def _known(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.path} has no checkpoint yet; train it for train.save_every steps first")
        if step is not None and step not in steps:
            raise UserError(f"{self.path} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
        return steps[-1] if step is None else step

    def _tensors(self, step: int, name: str, device: str | torch.device) -> dict[str, Tensor]:
        def read(path: Path) -> dict[str, Tensor]:
            return load_file(path, device=str(device))

        return self._whole(step, self._place(step) / f"{name}.safetensors", read)

    def _whole(self, step: int, path: Path, read: Callable[[Path], Any]) -> Any:
        try:
            return read(path)
        except (SafetensorError, OSError, ValueError) as error:
            why = "it is missing" if isinstance(error, FileNotFoundError) else str(error).partition("\n")[0]
            earlier = [other for other in self.steps() if other < step]
            way = (
                f"delete the folder {path.parent.name} to go on from step {earlier[-1]}, which is there"
                if earlier
                else "there is no earlier one; train again into another folder"
            )
            raise UserError(f"the checkpoint file {path} is damaged ({why}); {way}") from None


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, a tensor that has two names (tied weights) under its first name only."""
    first: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    state = model.state_dict()
    for name, tensor in state.items():
        first.setdefault((tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride()), name)
    return {name: _plain(state[name]) for name in first.values()}


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `weights`. UserError where names or shapes are not this model's."""
    expected = weights(model)
    wrong = sorted(set(expected) ^ set(tensors)) or [n for n, t in tensors.items() if t.shape != expected[n].shape]
    if wrong:
        raise UserError(
            f"the checkpoint does not fit the model: names or shapes differ at {', '.join(wrong[:3])}; "
            "load it with the version and the mechanisms it was trained with"
        )
    model.load_state_dict(dict(tensors), strict=False)


def optimizer_tensors(model: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """What the optimizers remember, flat and by the names of the parameters: "adamw/blocks.0.attention.q/exp_avg"."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{label}/{names[id(parameter)]}/{field}": torch.as_tensor(value)
        for label, optimizer in optimizers.items()
        for parameter, memory in optimizer.state.items()
        for field, value in memory.items()
    }


def load_optimizer_tensors(
    model: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`; hyperparameters are the config's business, not the checkpoint's."""
    parameters = dict(model.named_parameters())
    for optimizer in optimizers.values():
        optimizer.state.clear()
    for key, value in tensors.items():
        label, name, field = key.split("/")
        if label not in optimizers or name not in parameters:
            raise UserError(
                f"the checkpoint's optimizer state names {name!r} of {label!r}, which this model lacks; "
                "load it with the version and the mechanisms it was trained with"
            )
        optimizers[label].state[parameters[name]][field] = value


def load_model(
    path: str | Path, step: int | None = None, device: str | torch.device = "cpu"
) -> tuple[Decoder, RunConfig]:
    """The trained model of a run folder, in evaluation mode, with float32 weights, and the config of its run."""
    folder = RunFolder.open(path)
    with torch.random.fork_rng(
        []
    ):  # the weights it is born with are overwritten, so the caller's numbers stay as they were
        model = Decoder(folder.config.model)
    load_weights(model, folder.load_weights(step))
    return model.to(device).eval(), folder.config


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """A full disk, in one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise UserError(
                f"cannot write {path}: the disk is full; free space and run the same command again with --resume"
            ) from None
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another folder") from None


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """The rename itself must reach the disk; only POSIX lets a folder be opened for that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _foreign(file: Path) -> bool:
    """Whether a file keeps a folder from becoming a run's: not what a run that was killed at once left there."""
    return not file.name.startswith(".") and file.name != "tokenizer.json"


def _difference(held: RunConfig, given: RunConfig) -> str:
    """The fields in which two configs differ, as the user would name them."""
    pairs = zip(_leaves(to_dict(held)), _leaves(to_dict(given)), strict=False)
    found = [f"{name} {old!r} there, {new!r} given" for (name, old), (_, new) in pairs if old != new and name != "name"]
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict) and name != "options":
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
