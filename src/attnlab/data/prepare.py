"""Text becomes a folder of token ids (`shards`): every document is encoded and ended by the end-of-document token.

What is written does not depend on the number of workers, nor on how often the work was interrupted: until it is whole,
the folder has ".unfinished" after its name and a state.json that says how far the disk is right, and the same command
goes on from there. Memory is that of a few pieces of text, however long the text.

The parts that a source does not have are cut from the end of its training part: the last `val_fraction` of the
documents validate, or of the tokens where there is one document. The manifest says which rule made each.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from ..errors import UserError
from ..files import checksum, full_disk, locked, read_json, write_json
from ..results import environment
from . import sources
from .nanogpt import write_meta
from .shards import FORMAT, SPLITS, UNFINISHED, Prepared, SplitWriter, dtype_of
from .sources import Block, Source, Split, open_source
from .tokenizer import CharTokenizer, Tokenizer, from_json, tokenizer
from .tokens import Tokens

PIECE = 1 << 16  # characters of a long document that are encoded at once
UNIT = 1 << 18  # characters that a worker takes at once
EVERY = 10.0  # seconds between two states on the disk
COPY = 1 << 20  # tokens

Progress = Callable[[Mapping[str, Any]], None]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What decides the bytes of a prepared folder."""

    source: str
    val: str | None = None  # a source of its own for validation
    test: str | None = None
    tokenizer: str | None = None  # char, byte, gpt2 or a path; None: what the source is known by, or gpt2
    documents: str | None = None  # a rule of `sources`; None: the source's own
    val_fraction: float | None = None  # None: the source's own, or 0.1
    max_tokens: int | None = None  # of the training source: stop after the document that reaches it
    max_documents: int | None = None
    shard_tokens: int = 100_000_000
    layout: Literal["shards", "nanogpt"] = "shards"
    end: bool = True  # a token after each document, where the tokenizer has one
    revision: str | None = None  # of the source, on the hub

    def __post_init__(self) -> None:
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise UserError(f"--val-fraction is {self.val_fraction}: it must lie between 0 and 1")
        if self.val_fraction is not None and self.val is not None:
            raise UserError("--val and --val-fraction both say what to validate on: give one of them")
        for name in ("max_tokens", "max_documents", "shard_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")


def prepare(
    plan: Plan,
    out: str | Path,
    *,
    command: str = "",
    workers: int | None = None,
    progress: Progress = lambda event: None,
) -> Prepared:
    """Make the folder `out`, go on with it, or, where it is whole already, read it again and compare every byte.

    `progress` gets dictionaries: split, done, of (None where unknown), unit, tokens_per_s.
    """
    out = Path(out).expanduser()
    if (out / "manifest.json").exists():
        return _again(plan, out, progress)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not a prepared corpus; name a new or an empty folder")
    folder = out.with_name(out.name + UNFINISHED)
    folder.mkdir(parents=True, exist_ok=True)
    busy = f"another attnlab prepare is at work in {folder}; wait for it, or end it first"
    full = f"the disk is full: free space and run the same command again, which goes on from what {folder} holds"
    with locked(folder, busy, patience=0.0), full_disk(full):
        if not (folder / "manifest.json").exists():
            try:
                _Work(folder, plan, workers or os.cpu_count() or 1, progress).run(command)
            except UserError:
                if not (folder / "state.json").exists():  # nothing was done that is worth going on from
                    shutil.rmtree(folder)
                raise
        for rest in (folder / "state.json", *folder.glob(".*")):  # the lock, and what an interruption left half-written
            rest.unlink(missing_ok=True)
        os.replace(folder, out)
    return Prepared.open(out)


def _again(plan: Plan, out: Path, progress: Progress) -> Prepared:
    held = Prepared.open(out)
    if held.manifest["plan"] != asdict(plan):
        raise UserError(f"{out} holds another corpus ({held.manifest['command']}); delete it or name another folder")
    _compare(plan, held.tokenizer, out)
    held.verify(lambda file, done, of: progress({"split": "comparing", "done": done, "of": of, "unit": "files"}))
    return held


def _compare(plan: Plan, held: Tokenizer, folder: Path) -> None:
    """UserError where the plan's tokenizer is a file that has changed."""
    if plan.tokenizer and plan.tokenizer != CharTokenizer.kind:
        if tokenizer(plan.tokenizer).fingerprint != held.fingerprint:
            raise UserError(
                f"{folder} was made with another tokenizer than {plan.tokenizer} is now; bring the old one back, or "
                "delete the folder"
            )


class _Work:
    """The unfinished folder, and what is known of it."""

    def __init__(self, folder: Path, plan: Plan, workers: int, progress: Progress):
        self.folder, self.plan, self.workers, self.progress = folder, plan, workers, progress
        self.state: dict[str, Any] = {"plan": asdict(plan), "splits": {}}
        if (folder / "state.json").exists():
            self.state = read_json(folder / "state.json")
            if self.state["plan"] != asdict(plan):
                raise UserError(
                    f"{folder} was begun by another command ({self.state['command']}); run that one again to go on, or "
                    "delete the folder"
                )

    def run(self, command: str) -> None:
        self.state["command"] = self.state.get("command", command)
        source, splits, rules = self.open_sources()
        self.tokenizer = self.make_tokenizer(source, splits)
        self.dtype = dtype_of(self.tokenizer.vocab_size)
        if self.plan.layout == "nanogpt" and self.dtype.itemsize > 2:
            raise UserError(f"nanoGPT's files hold ids below 65,536 and this tokenizer has {self.tokenizer.vocab_size}")
        for name in sorted(splits):  # test, train, val
            self.fill(name, splits[name])
        if "val" not in splits:
            rules["train"] = "the source's own, but for its end"
            rules["val"] = self.cut(source.val_fraction if self.plan.val_fraction is None else self.plan.val_fraction)
        self.finish(rules)

    # what is read

    def open_sources(self) -> tuple[Source, dict[str, Split], dict[str, str]]:
        """The source, all splits, and by which rule each came about."""
        known = self.state.get("sources", {})
        revision = self.plan.revision or known.get("train", {}).get("revision")
        main = open_source(self.plan.source, self.plan.documents, revision)
        if self.plan.revision and main.about["kind"] != "hf":
            raise UserError(f"--revision is of a data set on the hub, and {self.plan.source} is none; leave it out")
        splits, abouts = dict(main.splits), {"train": dict(main.about)}
        if self.plan.val_fraction is not None and "val" in splits:
            if main.uncut is None:
                raise UserError(f"{self.plan.source} has a validation part of its own; leave --val-fraction out")
            splits = {"train": main.uncut}
        rules = dict.fromkeys(splits, "the source's own")
        for name, given in (("val", self.plan.val), ("test", self.plan.test)):
            if given is not None:
                other = open_source(given, self.plan.documents)
                splits[name], abouts[name] = other.splits.get(name, other.splits["train"]), dict(other.about)
                rules[name] = f"all of {given}"
        if self.state["splits"] and abouts != known:
            raise UserError(
                f"{self.plan.source} has changed since {self.folder} was begun; delete that folder to begin again"
            )
        self.state["sources"] = abouts
        return main, splits, rules

    def make_tokenizer(self, source: Source, splits: Mapping[str, Split]) -> Tokenizer:
        path, name = self.folder / "tokenizer.json", self.plan.tokenizer or source.tokenizer
        if path.exists() and self.state["splits"]:
            held = from_json(read_json(path))
            _compare(self.plan, held, self.folder)
            return held
        made: Tokenizer = self.alphabet(splits) if name == CharTokenizer.kind else tokenizer(name)
        write_json(path, made.to_json(), indent=None)
        return made

    def alphabet(self, splits: Mapping[str, Split]) -> CharTokenizer:
        """All characters of all splits: the text is read once for them, and once more to be encoded."""
        letters: set[str] = set()
        for name, split in splits.items():
            characters = 0
            for block in self.limited(name, split.read(0)):
                letters.update(block.text)
                characters += len(block.text)
                event = {"split": f"characters of {name}", "done": block.done, "of": split.total, "unit": split.unit}
                self.progress(event)
                if name == "train" and block.last and characters >= (self.plan.max_tokens or sys.maxsize):
                    break
        return CharTokenizer("".join(sorted(letters)))

    def limited(self, name: str, blocks: Iterator[Block], read: int = 0) -> Iterator[Block]:
        if name != "train" or self.plan.max_documents is None:
            return blocks
        return sources.first(blocks, self.plan.max_documents - read)

    # what is written

    def writer(self, name: str) -> SplitWriter:
        written = self.state["splits"].get(name, {}).get("written")
        return SplitWriter(self.folder, name, self.dtype, self.plan.shard_tokens, self.plan.layout, written)

    def save(self, name: str, writer: SplitWriter, at: tuple[int, int], *, whole: bool) -> None:
        """The files reach the disk before the state that speaks of them."""
        self.state["splits"][name] = {"written": writer.commit(), "at": at, "whole": whole}
        write_json(self.folder / "state.json", self.state)

    def fill(self, name: str, split: Split) -> None:
        """Read, encode and write one split, from where the state says it stands."""
        held = self.state["splits"].get(name, {"at": (0, 0), "whole": False})
        if held["whole"]:
            return
        end = self.tokenizer.end if self.plan.end else None
        limit = self.plan.max_tokens if name == "train" and self.plan.max_tokens else sys.maxsize
        documents, characters = at = tuple(held["at"])
        blocks = self.limited(name, split.read(documents), documents)
        units = units_of(pieces_of(blocks, self.tokenizer.seam, characters), at)
        with closing(self.writer(name)) as writer, ThreadPoolExecutor(self.workers) as pool:
            began, before, saved = time.monotonic(), writer.tokens, time.monotonic()
            encoded = in_order(pool, lambda unit: encode(self.tokenizer, end, unit), units, ahead=2 * self.workers)
            for unit, ids, starts in encoded:
                if len(beyond := starts[starts + writer.tokens >= limit]):
                    ids, starts = ids[: beyond[0]], starts[starts < beyond[0]]
                writer.add(ids, starts)
                at = unit.at
                now = time.monotonic()
                self.tell(name, split, unit, writer, (writer.tokens - before) / max(now - began, 1e-9))
                if len(beyond):
                    break
                if now - saved >= EVERY:
                    self.save(name, writer, at, whole=False)
                    saved = now
            if not writer.tokens:
                raise UserError(f"the {name} part of {self.plan.source} has no text in it; give one that has")
            self.save(name, writer, at, whole=True)

    def tell(self, name: str, split: Split, unit: Unit, writer: SplitWriter, rate: float) -> None:
        """How far it is, counted in what ends it."""
        done, of, what = unit.done, split.total, split.unit
        if name == "train" and self.plan.max_documents:
            done, of, what = unit.at[0], self.plan.max_documents, "documents"
        if name == "train" and self.plan.max_tokens:
            done, of, what = writer.tokens, self.plan.max_tokens, "tokens"
        self.progress({"split": name, "done": done, "of": of, "unit": what, "tokens_per_s": rate})

    def cut(self, fraction: float) -> str:
        """Copy the end of the training part into one to validate on, and note where the first now ends. Returns the
        rule."""
        if "val" in self.state["splits"]:
            return self.state["splits"]["val"]["rule"]
        train = self.state["splits"]["train"]["written"]
        tokens, documents = train["tokens"], train["documents"]
        starts = np.memmap(self.folder / "train.documents.bin", "<i8", "r")
        if documents > 1:
            moved = max(int(documents * fraction), 1)
            kept, start = documents - moved, int(starts[-moved])
            begin, rule = starts[-moved:] - start, f"the last {moved} of {documents} documents"
        else:
            kept, start, begin = 1, int(tokens * (1 - fraction)), np.zeros(1, np.int64)
            rule = f"the last {fraction:g} of the tokens, because there is one document"
        if not 0 < start < tokens:
            raise UserError(
                f"{self.plan.source} has {tokens} tokens, too few to keep some for validation; give --val SOURCE"
            )
        row = Tokens([np.memmap(self.folder / shard["file"], self.dtype, "r") for shard in train["shards"]])
        with closing(SplitWriter(self.folder, "val", self.dtype, self.plan.shard_tokens, self.plan.layout)) as writer:
            for at in range(0, tokens - start, COPY):
                ids = row.read(start + at, min(start + at + COPY, tokens)).numpy()
                writer.add(ids, begin[(begin >= at) & (begin < at + COPY)] - at)
            self.state["splits"]["val"] = {"written": writer.commit(), "whole": True, "rule": rule}
        self.state["splits"]["train"]["written"] = {**train, "tokens": start, "documents": kept}
        write_json(self.folder / "state.json", self.state)
        return rule

    def finish(self, rules: Mapping[str, str]) -> None:
        """The manifest, last of all files."""
        splits = {}
        for name in (name for name in SPLITS if name in rules):
            with closing(self.writer(name)) as writer:  # which cuts off what no longer belongs to the split
                index = {"file": writer.index.name, "sha256": checksum(writer.index).hexdigest()}
                splits[name] = {**writer.commit(), "index": index, "rule": rules[name]}
        if self.plan.layout == "nanogpt":
            write_meta(self.folder / "meta.pkl", self.tokenizer)
        made = self.tokenizer
        manifest = {
            "format": FORMAT,
            "plan": self.state["plan"],
            "sources": self.state["sources"],
            "tokenizer": {
                "kind": made.kind,
                "vocab_size": made.vocab_size,
                "end": made.end if self.plan.end else None,
                "fingerprint": made.fingerprint,
            },
            "dtype": self.dtype.str,
            "shard_tokens": self.plan.shard_tokens,
            "layout": self.plan.layout,
            "splits": splits,
            "command": self.state["command"],
            "environment": environment(),
        }
        write_json(self.folder / "manifest.json", manifest)


# text in pieces, pieces in units, units to workers


class Piece(NamedTuple):
    text: str
    first: bool  # of its document
    last: bool
    done: int


class Unit(NamedTuple):
    """What a worker encodes at once."""

    pieces: list[Piece]
    document: int  # the number of the one that the first piece belongs to, from 0
    at: tuple[int, int]  # after it: documents read whole, and characters read of the next

    @property
    def done(self) -> int:
        return self.pieces[-1].done


def pieces_of(blocks: Iterable[Block], seam: re.Pattern[str] | None, read: int = 0) -> Iterator[Piece]:
    """Long documents in pieces of about PIECE characters, cut where it changes no id; without the first `read`
    characters."""
    held: list[str] = []
    first = not read
    for block in blocks:
        held.append(block.text[read:])
        read = max(read - len(block.text), 0)
        if seam is None and not block.last:
            continue
        text, at = "".join(held), 0
        while seam and len(text) - at > PIECE and (found := seam.search(text, at + PIECE)):
            yield Piece(text[at : found.start()], first, False, block.done)
            first, at = False, found.start()
        held = [text[at:]]
        if block.last:
            yield Piece(text[at:], first, True, block.done)
            held, first = [], True


def units_of(pieces: Iterable[Piece], at: tuple[int, int]) -> Iterator[Unit]:
    """About UNIT characters in each; `at` is where the first piece stands."""
    unit: list[Piece] = []
    size, (document, read) = 0, at
    begin = document
    for piece in pieces:
        unit.append(piece)
        size += len(piece.text) + 1
        document, read = (document + 1, 0) if piece.last else (document, read + len(piece.text))
        if size >= UNIT:
            yield Unit(unit, begin, (document, read))
            unit, size, begin = [], 0, document
    if unit:
        yield Unit(unit, begin, (document, read))


def encode(made: Tokenizer, end: int | None, unit: Unit) -> tuple[Unit, np.ndarray, np.ndarray]:
    """Ids, and where among them documents begin. A document without text is none."""
    rows, starts, at, document = [np.empty(0, np.int32)], [], 0, unit.document
    for piece in unit.pieces:
        if piece.text or not (piece.first and piece.last):
            try:
                ids = made.encode_array(piece.text)
            except UserError as error:
                raise UserError(f"document {document + 1}: {error}") from None
            if piece.last and end is not None:
                ids = np.append(ids, np.int32(end))
            if piece.first and len(ids):
                starts.append(at)
            rows.append(ids)
            at += len(ids)
        document += piece.last
    return unit, np.concatenate(rows), np.array(starts, np.int64)


def in_order(pool: Executor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """`map`, with no more than `ahead` results waiting."""
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
