"""A checkpoint of a run: files of tensors, a state, and the commit that lists them.

    model.safetensors      weights; model.rank-00001.safetensors and so on when several processes hold parts of them
    optimizer.safetensors  states of the optimizers; the same
    state.json             how far the run is
    commit.json            step, and the size and checksum of every file above; written last

A folder is a checkpoint once it has its commit.json. A file holds whole tensors, or pieces of flattened ones (`Piece`),
which `Stored` puts together again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

from safetensors.torch import save
from torch import Tensor

from ..files import checksum, parse_json, regular
from ..ranges import LARGEST, Range, Size
from ..unfinished import sync_folder
from .processes import Processes
from .tensors import Piece, on_host

COMMIT = "commit.json"
PLACE = re.compile(r"\.?step-[0-9]{8,}")  # the name of a checkpoint's folder; with a dot while it is being written
OURS = re.compile(r"(model|optimizer)(\.rank-[0-9]{5,})?\.safetensors|state\.json|commit\.json")  # the files in it
FileFacts = dict[str, Any]  # what the commit says of a file: bytes and sha256


class Checkpoint(NamedTuple):
    """The content of a checkpoint."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]  # by "<optimizer>/<parameter>/<field>"
    state: dict[str, Any]  # of state.json


def make_anew(folder: Path) -> None:
    """Make an empty folder, in place of what a killed run left there."""
    remove_own(folder)
    folder.mkdir()


def remove_own(folder: Path) -> None:
    """Remove a folder of a checkpoint that is none, but nothing in it that no run writes, and then not the folder."""
    with suppress(OSError):
        for file in folder.iterdir():
            if OURS.fullmatch(file.name):
                file.unlink()
        folder.rmdir()


class Facts(TypedDict):
    """The words of commit.json on a file."""

    bytes: Annotated[int, Range(0, LARGEST)]
    sha256: str


class Commit(TypedDict):
    """The content of commit.json."""

    step: Size
    files: dict[str, Facts]


def committed(path: Path, step: int) -> dict[str, FileFacts]:
    """Return the files that the commit.json at `path` lists. Raises `ValueError` where it is not that of `step`, and
    where it names files that no run writes, or not all that a checkpoint needs."""
    held = parse_json("it", regular(path).read_bytes(), Commit, "it was changed")
    if held["step"] != step:
        raise ValueError(f"it is of step {held['step']}")
    files: dict[str, FileFacts] = held["files"]
    needed = {"model.safetensors", "optimizer.safetensors", "state.json"}
    foreign = sorted(name for name in files if not OURS.fullmatch(name))
    if foreign or not needed <= set(files):
        raise ValueError(f"it names {foreign[0]!r}" if foreign else "it does not name all files")
    return files


def write_pieces(
    folder: Path, model: Mapping[str, Piece], optimizer: Mapping[str, Piece], processes: Processes
) -> dict[str, FileFacts]:
    """Write the tensors that this process holds. Returns the facts of each file, by its name.

    The first process writes its files even if they are empty.
    """
    written = {}
    for what, pieces in (("model", model), ("optimizer", optimizer)):
        if processes.first or pieces:
            name = f"{what}.safetensors" if processes.first else f"{what}.rank-{processes.rank:05d}.safetensors"
            parts = {key: (p.start, p.shape) for key, p in pieces.items() if tuple(p.data.shape) != p.shape}
            content = save(
                {k: on_host(p.data) for k, p in pieces.items()}, {"pieces": json.dumps(parts)} if parts else None
            )
            written[name] = write_file(folder / name, content)
    return written


def commit(half: Path, place: Path, step: int, state: Mapping[str, Any], files: dict[str, FileFacts]) -> None:
    """Add state.json and commit.json to the folder `half`, then give it the name `place`. Both reach the disk."""
    files["state.json"] = write_file(half / "state.json", _line({"step": step, **state}))
    write_file(half / COMMIT, _line({"step": step, "files": files}))
    sync_folder(half)
    drop(place)
    os.replace(half, place)
    sync_folder(place.parent)


def drop(place: Path) -> None:
    """Remove a checkpoint, its commit first."""
    (place / COMMIT).unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)


def write_file(path: Path, content: bytes) -> FileFacts:
    """Write a file to the disk. Returns its facts."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def check_file(path: Path, facts: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless the file is what was written, by its facts."""
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise ValueError(f"it has {size} bytes of {facts['bytes']}")
    if checksum(path).hexdigest() != facts["sha256"]:
        raise ValueError("its checksum is wrong")


def _line(value: Any) -> bytes:
    return (json.dumps(value) + "\n").encode()


def is_foreign(file: Path, tokenizer: bytes) -> bool:
    """Return whether a file is of no run, so that the folder cannot become one.

    A run that was killed while it began may leave hidden files, and the `tokenizer` that is to be written.
    """
    if file.name == "tokenizer.json" and regular(file).is_file():
        return file.read_bytes() not in (b"", tokenizer)
    return not file.name.startswith(".")
