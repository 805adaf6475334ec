"""A prepared corpus: a folder of token ids as plain numbers, memory-mapped, so that opening one takes no time.

    manifest.json              what it is and where it came from; written last, so a folder that has it is whole
    tokenizer.json             how its text became ids
    train-00000.bin ...        uint16 (uint32 above 65,536 ids), little-endian, `shard_tokens` ids in each but the last
    train.documents.bin        int64: where each document of the split begins
    train.text.bin             3 int64 for each document: bytes, characters, and characters that no id says, of the text
                               before it; only where the tokenizer cannot say every text

and the same for val and test. A folder of nanoGPT's (train.bin, val.bin, perhaps meta.pkl) is read too, and written:
there each split is one file of uint16. Checksums of all files stand in the manifest.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import UserError, choose, quoted
from ..files import checksum, expanded, path_within, read_json, regular
from ..ranges import check_value, checked
from ..results import Tell
from . import nanogpt
from .encoding import TEXT
from .schemas import Manifest
from .tokenizer import Tokenizer, tokenizer
from .tokens import UNKNOWN, Tokens

FORMAT = 1
AGAIN = "prepare it again"
SPLITS = ("train", "val", "test")
UNFINISHED = ".unfinished"  # after the folder's name, until it is whole
CHUNK = 1 << 20  # bytes or tokens that are read at a time


def file_name(split: str, number: int, layout: str) -> str:
    """Return the name of a shard's file."""
    return f"{split}.bin" if layout == "nanogpt" else f"{split}-{number:05d}.bin"


def dtype_of(vocab_size: int) -> np.dtype:
    """Return the type of numbers that ids are written as."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


# reading


@dataclass(frozen=True)
class Prepared:
    """An opened folder. Sizes and the tokenizer agree with the manifest; `verify` reads every byte."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    @checked
    def open(cls, folder: str | Path) -> Prepared:
        """Open a folder. UserError where there is none, or where it is unfinished, cut short or contradicts itself."""
        path = expanded(folder)
        if not path.name:
            raise UserError(f"folder is {quoted(str(folder))}: give the --out folder of 'attnlab prepare'")
        if not (path / "manifest.json").exists():
            if path.with_name(path.name + UNFINISHED).exists():
                raise UserError(
                    f"{path} is not finished: run the attnlab prepare that began it again, and it will go on"
                )
            return cls(path, nanogpt.manifest(path))
        file = path / "manifest.json"
        manifest = read_json(file, dict, AGAIN)
        found = manifest.get("format")
        if found != FORMAT:
            raise UserError(f"{path} has format {quoted(found)}, but this version reads format {FORMAT}; {AGAIN}")
        try:
            check_value(str(file), manifest, Manifest)
        except UserError as error:
            raise UserError(f"{error}; {AGAIN}") from None
        opened = cls(path, manifest)
        opened._compare()
        return opened

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits it has, of SPLITS."""
        return tuple(self.manifest["splits"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids. UserError where the folder has another one."""
        if "format" not in self.manifest:
            return nanogpt.tokenizer_of(self.path)
        found = tokenizer(self.path)
        if found.fingerprint != self.manifest["tokenizer"]["fingerprint"]:
            raise UserError(
                f"{self.path / 'tokenizer.json'} is not the tokenizer that made these ids (the manifest has another "
                "fingerprint); bring the old file back, or prepare the folder again"
            )
        return found

    def split(self, name: str) -> Tokens:
        """Return one split, memory-mapped. UserError names the splits there are."""
        split = self.manifest["splits"][choose(f"split of {self.path}", name, self.splits)]
        dtype = np.dtype(self.manifest["dtype"])
        parts = [
            np.memmap(self.path / shard["file"], dtype, "r") if shard["tokens"] else np.empty(0, dtype)
            for shard in split["shards"]
        ]
        if "index" not in split:
            return Tokens(parts, lambda: _starts_after(parts, self.tokenizer.end))
        sums = [shard["sha256"] for shard in [*split["shards"], split["index"]]]
        digest = hashlib.sha256(" ".join(sums).encode()).hexdigest()
        text = (split["text"] or {}).get("bytes", UNKNOWN) if "text" in split else None
        return Tokens(parts, lambda: self._documents(split), digest, text)

    def verify(self, progress: Tell = lambda what, done, of: None) -> None:
        """Read every byte. UserError names the file whose checksum the manifest does not have."""
        splits = self.manifest["splits"].values()
        files = [
            file for split in splits for file in [*split["shards"], split.get("index", {}), split.get("texts", {})]
        ]
        known = [(self.path / file["file"], file["sha256"]) for file in files if "sha256" in file]
        for number, (path, expected) in enumerate(known):
            progress(path.name, number, len(known))
            if checksum(path).hexdigest() != expected:
                raise UserError(f"{path} has changed since it was written; prepare the folder again")

    def _documents(self, split: Mapping[str, Any]) -> np.ndarray:
        index = self.path / split["index"]["file"]
        documents = np.fromfile(index, "<i8")
        if documents[0] != 0 or not (np.diff(documents) > 0).all() or documents[-1] > split["tokens"]:
            raise UserError(f"{index} is damaged; prepare the folder again")
        return documents

    def _compare(self) -> None:
        width = np.dtype(self.manifest["dtype"]).itemsize
        for name, split in self.manifest["splits"].items():
            if sum(shard["tokens"] for shard in split["shards"]) != split["tokens"]:
                raise UserError(
                    f"{self.path / 'manifest.json'} says that {name} has {split['tokens']} tokens, but its shards have "
                    f"{sum(shard['tokens'] for shard in split['shards'])}; prepare the folder again"
                )
            sizes = {shard["file"]: shard["tokens"] * width for shard in split["shards"]}
            rows = {split["index"]["file"]: split["documents"] * 8}
            if "texts" in split:
                rows[split["texts"]["file"]] = split["documents"] * 8 * len(TEXT)
            for file, expected in {**sizes, **rows}.items():
                path = regular(path_within(self.path, file, self.path / "manifest.json"))
                held = path.stat().st_size if path.exists() else None
                if held != expected:
                    why = "is missing" if held is None else f"has {held} bytes, and the manifest says {expected}"
                    raise UserError(f"{path} {why}; bring the whole file back, or prepare the folder again")
        self.tokenizer  # noqa: B018


def _starts_after(parts: list[np.ndarray], end: int | None) -> np.ndarray:
    """Return where documents begin in a row that says so only by the token `end`; None: it is one document."""
    starts = [np.zeros(1, np.int64)]
    at = 0
    length = sum(map(len, parts))
    for part in parts if end is not None else []:
        for first in range(0, len(part), CHUNK):
            ends = np.flatnonzero(part[first : first + CHUNK] == end)
            starts.append(at + first + ends + 1)
        at += len(part)
    found = np.concatenate(starts)
    return found[(found < length) | (found == 0)]


# writing


class SplitWriter:
    """A writer that appends to the files of one split.

    state: what an earlier writer's `commit` returned, to go on from there. Everything behind it is cut off; so are
    tokens and documents where the state's counts were lowered. counts: write down how much text there was before each
    document, because its ids do not say all of it.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: np.dtype,
        shard_tokens: int,
        layout: str,
        state: Any = None,
        counts: bool = False,
    ):
        state = state or {"tokens": 0, "documents": 0, "shards": [], **({"text": [0] * len(TEXT)} if counts else {})}
        self.folder = folder
        self.split = split
        self.dtype = dtype
        self.layout = layout
        self.shard_tokens = shard_tokens if layout == "shards" else sys.maxsize
        self.tokens: int = state["tokens"]
        self.documents: int = state["documents"]
        self.index = folder / f"{split}.documents.bin"
        self._whole = state["shards"][: self.tokens // self.shard_tokens]
        self._held = 0  # tokens in the shard being written
        self._shard: BinaryIO | None = None
        self._starts = _cut_to(self.index, self.documents * 8)
        self.texts = folder / f"{split}.text.bin"
        self.text = state.get("text")  # of all documents; None: it is not counted, or not known
        self._texts = _cut_to(self.texts, self.documents * 8 * len(TEXT)) if counts else None
        if self.tokens % self.shard_tokens:
            try:
                self._open(self.tokens % self.shard_tokens)
            except UserError:
                self.close()
                raise
        self._remove_shards_behind()

    def _remove_shards_behind(self) -> None:
        number = len(self._whole) if self._shard is None else len(self._whole) + 1
        while self.layout == "shards" or number == 0:  # nanoGPT's layout has one file
            path = self.folder / file_name(self.split, number, self.layout)
            if not path.exists():
                return
            path.unlink()
            number += 1

    def add(
        self, ids: np.ndarray, starts: np.ndarray, before: np.ndarray | None = None, text: np.ndarray | None = None
    ) -> None:
        """Append token ids. starts: which of them, counted from the first of `ids`, begin a document.

        before, text: of the text of these ids, TEXT before each of those documents, and of all; None: it is not known.
        """
        _write(self._starts, (starts + self.tokens).astype("<i8"))
        if self._texts is not None:
            known = self.text is not None and before is not None and text is not None
            rows = (before + np.array(self.text)) if known else np.full((len(starts), len(TEXT)), -1)
            _write(self._texts, rows.astype("<i8"))
            self.text = (text + np.array(self.text)).tolist() if known else None
        self.documents += len(starts)
        self.tokens += len(ids)
        while len(ids):
            if self._shard is None:
                self._open(0)
            now, ids = np.split(ids, [self.shard_tokens - self._held])
            data = now.astype(self.dtype)
            _write(self._shard, data)
            self._digest.update(data)
            self._held += len(now)
            if self._held == self.shard_tokens:
                self._whole.append(self._close())

    def commit(self) -> dict[str, Any]:
        """Bring all that was added to the disk. Return the state: enough to go on from, and part of the manifest."""
        for file in filter(None, (self._starts, self._shard, self._texts)):
            os.fsync(file.fileno())
        shards = [*self._whole, *([self._entry()] if self._shard else [])]
        text = {} if self._texts is None else {"text": self.text}
        return {"tokens": self.tokens, "documents": self.documents, "shards": shards, **text}

    def close(self) -> None:
        """Close the files."""
        for file in filter(None, (self._starts, self._shard, self._texts)):
            file.close()

    def _open(self, held: int) -> None:
        path = self.folder / file_name(self.split, len(self._whole), self.layout)
        self._shard = _cut_to(path, held * self.dtype.itemsize)
        self._held = held
        self._digest = checksum(path)

    def _entry(self) -> dict[str, Any]:
        file = file_name(self.split, len(self._whole), self.layout)
        return {"file": file, "tokens": self._held, "sha256": self._digest.hexdigest()}

    def _close(self) -> dict[str, Any]:
        assert self._shard is not None
        os.fsync(self._shard.fileno())
        self._shard.close()
        entry = self._entry()
        self._shard = None
        self._held = 0
        return entry


def _cut_to(path: Path, size: int) -> BinaryIO:
    """Open a file with its first `size` bytes, ready for more; unbuffered, so that a full disk is noticed at once."""
    file = open(path, "r+b" if path.exists() else "w+b", buffering=0)
    if file.seek(0, os.SEEK_END) < size:
        file.close()
        raise UserError(f"{path} is shorter than when it was left; delete the unfinished folder and begin again")
    file.truncate(size)
    file.seek(size)
    return file


def _write(file: BinaryIO | None, data: np.ndarray) -> None:
    assert file is not None
    left = memoryview(data.tobytes())
    while left:
        left = left[file.write(left) :]
