"""A prepared corpus, made from text: every document is encoded and ended by the end-of-document token (`shards`).

The bytes do not depend on the number of workers, nor on how often the work was interrupted. Until the folder is whole,
it has ".unfinished" after its name and a state.json. That says how far the files on the disk are right, and the same
command goes on from there. However long the text, memory holds a few pieces of it.

A part that the source does not have is cut from the end of its training part: the last `val_fraction` of the documents
validate, or of the tokens where there is one document. The manifest says which rule made each part.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from ..files import LOCK, check_free, checksum, expanded, full_disk, locked, naming, read_json, write_json
from ..ranges import Count, checked
from ..results import environment
from ..unfinished import clean, sync_folder
from .document_rules import EACH, RULES, TextBlock, first_documents, is_delimiter
from .encoding import TextPlace, Unit, encode_unit, in_order, pieces_of, units_of
from .nanogpt import write_meta
from .recipe import Recipe
from .schemas import PreparedState
from .shards import FORMAT, SPLITS, UNFINISHED, Prepared, SplitWriter, dtype_of
from .sources import Source, Split, open_source
from .text_counts import MovingText, described_text
from .tokenizer import CharTokenizer, Tokenizer, from_json, tokenizer
from .tokens import Tokens
from .unfinished_folder import check_own, remove_prepared

EVERY = 10.0  # seconds between two states on the disk
COPY = 1 << 20  # tokens that are copied at a time
KNOWN_LOST = 100  # unknown characters that the state keeps, the most frequent ones

Event = Mapping[str, Any]  # split, done, of (None where unknown), unit, and tokens_per_s where text is encoded


@checked
def prepare(
    recipe: Recipe,
    out: str | Path,
    *,
    command: str = "",
    workers: Count | None = None,
    progress: Callable[[Event], None] = lambda event: None,
) -> Prepared:
    """Make the folder `out`, go on with it, or, where it is whole already, read it again and compare every byte.

    command: kept in the manifest. workers: threads that encode; None: one for each core. progress: gets Events.
    UserError where the text cannot be read, or where `out` is made by another recipe.
    """
    out = expanded(out)
    if (out / "manifest.json").exists():
        return _again(recipe, out, progress)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not a prepared corpus; name a new or an empty folder")
    check_free(out)
    folder = out.with_name(out.name + UNFINISHED)
    check_own(folder)
    busy = f"another attnlab prepare is at work in {folder}; wait for it, or end it first"
    full = f"the disk is full: free space and run the same command again, which goes on from what {folder} holds"
    with locked(folder, busy, patience=0.0), full_disk(full):
        check_own(folder)  # now that no other process works in it
        clean(folder)
        if not (folder / "manifest.json").exists():
            _make(folder, recipe, command, workers or os.cpu_count() or 1, progress)
        elif read_json(folder / "manifest.json")["plan"] != asdict(recipe):
            raise UserError(f"{folder} holds another corpus, which is whole; give it another name, or delete it")
        for rest in ("state.json", LOCK):
            (folder / rest).unlink(missing_ok=True)
        os.replace(folder, out)
        sync_folder(out.parent)
    return Prepared.open(out)


def _make(folder: Path, recipe: Recipe, command: str, workers: int, progress: Callable[[Event], None]) -> None:
    """Write what is still missing in a folder. A UserError before anything is done that is worth going on from leaves
    nothing of ours in it."""
    work = _Work(folder, recipe, workers, progress)
    try:
        work.run(command)
    except UserError:
        if not work.state["splits"]:
            remove_prepared(folder)
        raise


def _again(recipe: Recipe, out: Path, progress: Callable[[Event], None]) -> Prepared:
    held = Prepared.open(out)
    if held.manifest["plan"] != asdict(recipe):
        raise UserError(f"{out} holds another corpus ({held.manifest['command']}); delete it or name another folder")
    _compare(recipe, held.tokenizer, out)
    held.verify(lambda file, done, of: progress({"split": "comparing", "done": done, "of": of, "unit": "files"}))
    return held


def _compare(recipe: Recipe, held: Tokenizer, folder: Path) -> None:
    """Raise UserError where the recipe's tokenizer is a file that has changed."""
    if not recipe.tokenizer or recipe.tokenizer == CharTokenizer.kind:
        return
    now = tokenizer(recipe.tokenizer)
    if now.fingerprint != held.fingerprint or now.end != held.end:
        raise UserError(
            f"{folder} was made with another tokenizer than {recipe.tokenizer} is now; bring the old one back, or "
            "delete the folder"
        )


class _Parts(NamedTuple):
    """All splits to prepare, and the rule that made each."""

    source: Source  # of the training part
    splits: dict[str, Split]
    rules: dict[str, str]


class _End(NamedTuple):
    """The end of the training part, which becomes the validation part."""

    start: int  # the first of its tokens
    documents: np.ndarray  # where its documents begin, counted from `start`
    kept: int  # number of documents that stay in the training part
    rule: str


class _Work:
    """An unfinished folder, and its state: what state.json holds, on the disk or not yet."""

    def __init__(self, folder: Path, recipe: Recipe, workers: int, progress: Callable[[Event], None]):
        self.folder = folder
        self.recipe = recipe
        self.workers = workers
        self.progress = progress
        self.state: dict[str, Any] = {"plan": asdict(recipe), "splits": {}}
        if (folder / "state.json").exists():
            self.state = read_json(folder / "state.json", PreparedState, "delete the folder to begin again")
            if self.state["plan"] != asdict(recipe):
                raise UserError(
                    f"{folder} was begun by another command ({self.state['command']}); run that one again to go on, or "
                    "delete the folder"
                )

    def run(self, command: str) -> None:
        """Write all that is still missing, the manifest last."""
        self.state["command"] = self.state.get("command", command)
        write_json(self.folder / "state.json", self.state)  # says whose folder this is
        source, splits, rules = self.open_sources()
        self.tokenizer = self.make_tokenizer(source, splits)
        self.dtype = dtype_of(self.tokenizer.vocab_size)
        if self.recipe.layout == "nanogpt" and self.dtype.itemsize > 2:
            raise UserError(f"nanoGPT's files hold ids below 65,536 and this tokenizer has {self.tokenizer.vocab_size}")
        for name in sorted(splits):  # test, train, val
            self.fill(name, splits[name])
        if "val" not in splits:
            fraction = source.val_fraction if self.recipe.val_fraction is None else self.recipe.val_fraction
            rules["train"] = "the source's own, but for its end"
            rules["val"] = self.cut(fraction)
        self.finish(rules)

    # reading

    def open_sources(self) -> _Parts:
        """Open all sources. UserError where one has changed since the folder was begun."""
        known = self.state.get("sources", {})
        revision = self.recipe.revision or known.get("train", {}).get("revision")
        main = open_source(self.recipe.source, self.recipe.documents, revision)
        if self.recipe.revision and main.about["kind"] != "hf":
            raise UserError(f"--revision is of a data set on the hub, and {self.recipe.source} is none; leave it out")
        splits = dict(main.splits)
        if self.recipe.val_fraction is not None and "val" in splits:
            if main.uncut is None:
                raise UserError(f"{self.recipe.source} has a validation part of its own; leave --val-fraction out")
            splits = {"train": main.uncut}
        rules = dict.fromkeys(splits, "the source's own")
        abouts = {"train": dict(main.about)}
        for name, given in (("val", self.recipe.val), ("test", self.recipe.test)):
            if given is not None:
                other = open_source(given, self.recipe.documents)
                splits[name] = other.splits.get(name, other.splits["train"])
                abouts[name] = dict(other.about)
                rules[name] = f"all of {given}"
        if self.state["splits"] and abouts != known:
            raise UserError(
                f"{self.recipe.source} has changed since {self.folder} was begun; delete that folder to begin again"
            )
        self.state["sources"] = abouts
        return _Parts(main, splits, rules)

    def make_tokenizer(self, source: Source, splits: Mapping[str, Split]) -> Tokenizer:
        """Return the tokenizer, and write it; where the work goes on, read the one that was written."""
        path = self.folder / "tokenizer.json"
        name = self.recipe.tokenizer or source.tokenizer
        if path.exists() and self.state["splits"]:
            with naming(path, "delete the folder to begin again"):
                held = from_json(read_json(path))
            _compare(self.recipe, held, self.folder)
            return held
        made: Tokenizer = self.alphabet(splits) if name == CharTokenizer.kind else tokenizer(name)
        write_json(path, made.to_json(), indent=None)
        return made

    def alphabet(self, splits: Mapping[str, Split]) -> CharTokenizer:
        """Return all characters of all splits: the text is read once for them, and once more to be encoded."""
        letters: set[str] = set()
        for name, split in splits.items():
            characters = 0
            limit = self.token_limit(name)
            for block in self.limited(name, split.read(0)):
                letters.update(block.text)
                characters += len(block.text)
                event = {"split": f"characters of {name}", "done": block.done, "of": split.total, "unit": split.unit}
                self.progress(event)
                if block.last and characters >= limit:
                    break
        return CharTokenizer("".join(sorted(letters)))

    def limited(self, name: str, blocks: Iterator[TextBlock], read: int = 0) -> Iterator[TextBlock]:
        """Return the blocks of as many documents as the recipe allows. read: documents that were read before."""
        if name != "train" or self.recipe.max_documents is None:
            return blocks
        return first_documents(blocks, self.recipe.max_documents - read)

    def token_limit(self, name: str) -> int:
        """Return the number of tokens at which a split ends."""
        return self.recipe.max_tokens if name == "train" and self.recipe.max_tokens else sys.maxsize

    # writing

    def writer(self, name: str) -> SplitWriter:
        """Return a writer that goes on where the state says that the split stands."""
        written = self.state["splits"].get(name, {}).get("written")
        counts = not self.tokenizer.complete
        return SplitWriter(self.folder, name, self.dtype, self.recipe.shard_tokens, self.recipe.layout, written, counts)

    def save(self, name: str, writer: SplitWriter, at: TextPlace, *, whole: bool) -> None:
        """Bring the files to the disk, and then the state that describes them."""
        self.state["splits"][name] = {"written": writer.commit(), "at": at, "whole": whole}
        write_json(self.folder / "state.json", self.state)

    def fill(self, name: str, split: Split) -> None:
        """Read, encode and write one split, from where the state says it stands."""
        held = self.state["splits"].get(name, {"at": (0, 0), "whole": False})
        if held["whole"]:
            return
        end = self.tokenizer.end if self.recipe.end else None
        limit = self.token_limit(name)
        at = TextPlace(*held["at"])
        blocks = self.limited(name, split.read(at.documents), at.documents)
        units = units_of(pieces_of(blocks, self.tokenizer.seam, at.characters), at)
        with closing(self.writer(name)) as writer, ThreadPoolExecutor(self.workers) as pool:
            before = writer.tokens
            began = time.monotonic()
            saved = began
            encoded = in_order(pool, lambda unit: encode_unit(self.tokenizer, end, unit), units, ahead=2 * self.workers)
            for unit, ids, starts, texts, text, lost in encoded:
                beyond = np.flatnonzero(starts + writer.tokens >= limit)  # documents that begin behind the limit
                if len(beyond):
                    ids = ids[: starts[beyond[0]]]
                    text = texts[beyond[0]]
                    starts = starts[: beyond[0]]
                writer.add(ids, starts, texts[: len(starts)], text)
                self.note_lost(name, lost)
                at = unit.at
                now = time.monotonic()
                self.tell(name, split, unit, writer, (writer.tokens - before) / max(now - began, 1e-9))
                if len(beyond):
                    break
                if now - saved >= EVERY:
                    self.save(name, writer, at, whole=False)
                    saved = now
            if not writer.tokens:
                raise UserError(f"the {name} part of {self.recipe.source} has no text in it; give one that has")
            self.check_delimiter(name, writer.documents)
            self.save(name, writer, at, whole=True)

    def note_lost(self, name: str, lost: Counter[str]) -> None:
        """Add to the state which characters the tokenizer did not know."""
        if lost:
            held = Counter(self.state.setdefault("lost", {}).get(name, {})) + lost
            self.state["lost"][name] = dict(held.most_common(KNOWN_LOST))

    def check_delimiter(self, name: str, documents: int) -> None:
        """Raise UserError where documents are what stands between delimiters, and the text to train on has none."""
        rule = self.recipe.documents
        limited = self.recipe.max_documents or self.recipe.max_tokens
        if name == "train" and documents == 1 and not limited and rule is not None and is_delimiter(rule):
            raise UserError(
                f"{rule!r} is nowhere in {self.recipe.source}: give --documents a delimiter that is in it, or one of "
                f"{', '.join([EACH, *RULES])}"
            )

    def tell(self, name: str, split: Split, unit: Unit, writer: SplitWriter, rate: float) -> None:
        """Send an event, counted in what ends the split: tokens, documents, or what the source is read in."""
        event: dict[str, Any] = {"split": name, "done": unit.done, "of": split.total, "unit": split.unit}
        if name == "train" and self.recipe.max_tokens:
            event |= {"done": writer.tokens, "of": self.recipe.max_tokens, "unit": "tokens"}
        elif name == "train" and self.recipe.max_documents:
            event |= {"done": unit.at.documents, "of": self.recipe.max_documents, "unit": "documents"}
        self.progress(event | {"tokens_per_s": rate})

    def cut(self, fraction: float) -> str:
        """Copy the end of the training part into a validation part. Return the rule that made it.

        The state then says where the training part ends; `finish` cuts its files off there.
        """
        if "val" in self.state["splits"]:
            return self.state["splits"]["val"]["rule"]
        train = self.state["splits"]["train"]["written"]
        tokens = train["tokens"]
        end = self.end_of(train, fraction)
        if not 0 < end.start < tokens:
            raise UserError(
                f"{self.recipe.source} has {tokens} tokens, too few to keep some for validation; give --val SOURCE"
            )
        row = Tokens([np.memmap(self.folder / shard["file"], self.dtype, "r") for shard in train["shards"]])
        moving = MovingText.of(self.folder, train, end.kept)
        with closing(self.writer("val")) as writer:
            for at in range(0, tokens - end.start, COPY):
                ids = row.read(end.start + at, min(end.start + at + COPY, tokens)).numpy()
                begins = end.documents[(end.documents >= at) & (end.documents < at + COPY)]
                writer.add(ids, begins - at, *moving.of_next(len(begins)))
            self.state["splits"]["val"] = {"written": writer.commit(), "whole": True, "rule": end.rule}
        self.state["splits"]["train"]["written"] = {**train, "tokens": end.start, "documents": end.kept, **moving.left}
        if "train" in self.state.get("lost", {}):
            self.state["lost"]["val"] = self.state["lost"]["train"]
        write_json(self.folder / "state.json", self.state)
        return end.rule

    def end_of(self, train: Mapping[str, Any], fraction: float) -> _End:
        """Return the last `fraction` of the documents, at least one; of a single document, of the tokens."""
        documents = train["documents"]
        if documents <= 1:
            start = int(train["tokens"] * (1 - fraction))
            rule = f"the last {fraction:g} of the tokens, because there is one document"
            return _End(start, np.zeros(1, np.int64), 1, rule)
        starts = np.memmap(self.folder / "train.documents.bin", "<i8", "r")
        moved = max(int(documents * fraction), 1)
        start = int(starts[-moved])
        rule = f"the last {moved} of {documents} documents"
        return _End(start, starts[-moved:] - start, documents - moved, rule)

    def finish(self, rules: Mapping[str, str]) -> None:
        """Write the manifest, last of all files."""
        splits = {}
        for name in (name for name in SPLITS if name in rules):
            with closing(self.writer(name)) as writer:  # cuts off what no longer belongs to the split
                index = {"file": writer.index.name, "sha256": checksum(writer.index).hexdigest()}
                splits[name] = {**writer.commit(), "index": index, "rule": rules[name]}
                if "text" in splits[name]:
                    splits[name] |= described_text(writer, self.state.get("lost", {}).get(name, {}))
        if self.recipe.layout == "nanogpt":
            write_meta(self.folder / "meta.pkl", self.tokenizer)
        made = self.tokenizer
        manifest = {
            "format": FORMAT,
            "plan": self.state["plan"],
            "sources": self.state["sources"],
            "tokenizer": {
                "kind": made.kind,
                "vocab_size": made.vocab_size,
                "end": made.end if self.recipe.end else None,
                "fingerprint": made.fingerprint,
            },
            "dtype": self.dtype.str,
            "shard_tokens": self.recipe.shard_tokens,
            "layout": self.recipe.layout,
            "splits": splits,
            "command": self.state["command"],
            "environment": environment(),
        }
        write_json(self.folder / "manifest.json", manifest)
