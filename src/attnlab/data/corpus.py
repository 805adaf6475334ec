"""A corpus: a long row of token ids to train on and one to validate on, read at places that (seed, step) alone decide.

Every unit of it, a window of the stream or a row of whole documents, is read once an epoch, in an order that nothing
has to remember (`sampler`). A mixture takes from several corpora by weight; each keeps to its own epochs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig
from ..errors import UserError
from . import packing, sampler
from .shards import Prepared
from .tokenizer import CharTokenizer, Tokenizer
from .tokenizer import tokenizer as named_tokenizer
from .tokens import Tokens

SHAKESPEARE = "shakespeare"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
ONE_PART = re.compile(r"([0-9.]+)\*(.+?)(?=\+[0-9.]+\*|$)\+?")  # of a mixture: a number, * and a source


class Batch(NamedTuple):
    """Inputs and targets, int64 [B T]; a target of -1 does not count."""

    x: Tensor
    y: Tensor
    documents: Tensor | None = None  # which document of its row a token belongs to, -1: padding; None: one per row

    def rows(self, start: int, stop: int) -> Batch:
        return self._each(lambda t: t[start:stop])

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda t: t.to(device))

    def counted(self) -> int:
        """Targets that count."""
        return int((self.y >= 0).sum())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(change(self.x), change(self.y), None if self.documents is None else change(self.documents))


@dataclass(frozen=True, eq=False)
class Corpus:
    source: str
    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    pack: str = "stream"  # or "documents"
    _plans: dict[tuple[str, int], np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of ids, documents, split and tokenizer: two runs with the same one saw the same data."""
        parts = self.tokenizer.fingerprint, self.train.digest, self.val.digest
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def check(self, context: int) -> None:
        """UserError unless both splits hold something to predict, and one whole window where it is read as a stream."""
        for name, split in (("training", "train"), ("validation", "val")):
            tokens = self.split(split)
            if len(tokens) < 2 or (self.pack == "documents" and not len(self._plan(split, context))):
                raise UserError(
                    f"the {name} part of {self.source!r} has {len(tokens)} tokens and nothing to predict; give "
                    "more text"
                )
            if self.pack == "stream" and len(tokens) <= context:
                raise UserError(
                    f"the {name} part of {self.source!r} has {len(tokens)} tokens, but one window of context {context} "
                    f"needs {context + 1}; give more text or a context of at most {len(tokens) - 1}"
                )

    def batch(self, seed: int, step: int, batch_size: int, context: int, rank: int = 0, world: int = 1) -> Batch:
        """The rows of step `step` (from 0) that process `rank` of `world` reads; all of them make up the same global
        batch of `batch_size` rows, whatever their number.

        A pure function of its arguments: step 1000 needs no steps before it. A process takes neighbouring rows, as an
        accumulated part does, so that each has its share of a mixture, which takes its corpora in turn.
        """
        self.check(context)
        first, last = (step * batch_size + batch_size * part // world for part in (rank, rank + 1))
        return self._samples(np.arange(first, last), context, seed)

    def windows(self, count: int, context: int, split: str = "val") -> Batch:
        """Always the same `count` rows, spread evenly from the first token of a split to the last."""
        self.check(context)
        last = self._size(split, context) - 1
        return self._rows(np.linspace(0, last, count).astype(np.int64), context, split)

    def split(self, name: str) -> Tokens:
        return {"train": self.train, "val": self.val}[name]

    def _samples(self, samples: np.ndarray, context: int, *key: int) -> Batch:
        """Training rows by their numbers in the endless order that belongs to `key`."""
        keys = sampler.key_of(*key).repeat(len(samples))
        if self.pack == "stream":
            where = sampler.window_starts(samples, len(self.train), context, keys)
        else:
            where = sampler.units(samples, self._size("train", context), keys)[0].astype(np.int64)
        return self._rows(where, context, "train")

    def _size(self, split: str, context: int) -> int:
        """How many places there are to read a row at."""
        return len(self.split(split)) - context if self.pack == "stream" else len(self._plan(split, context))

    def _rows(self, where: np.ndarray, context: int, split: str) -> Batch:
        tokens = self.split(split)
        if self.pack == "documents":
            read = packing.read(tokens, self._plan(split, context), where, context, self._front(split))
            return Batch(*map(torch.from_numpy, read))
        both = tokens.gather(where, context + 1)
        return Batch(both[:, :-1].contiguous(), both[:, 1:].contiguous())

    def _plan(self, split: str, context: int) -> np.ndarray:
        if (split, context) not in self._plans:
            tokens = self.split(split)
            self._plans[split, context] = packing.plan(tokens.documents, len(tokens), context, self._front(split))
        return self._plans[split, context]

    def _front(self, split: str) -> int:
        """Whether a token that ends one document stands in front of the next: the first two tell."""
        tokens = self.split(split)
        second = int(tokens.documents[:2][-1])
        return int(second > 0 and tokens.read(second - 1, second).item() == self.tokenizer.end)


@dataclass(frozen=True, eq=False, kw_only=True)
class Mixture(Corpus):
    """Several corpora of one tokenizer; `train` and `val` are theirs in a row, batches take from each by weight."""

    parts: tuple[Corpus, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, source: str, parts: Sequence[Corpus], weights: Sequence[float]) -> Mixture:
        first = parts[0]
        for other in parts[1:]:
            if other.tokenizer.fingerprint != first.tokenizer.fingerprint:
                raise UserError(
                    f"{first.source!r} and {other.source!r} were made with different tokenizers, and a mixture needs "
                    "one; prepare them with the same, or give data.tokenizer byte or gpt2 for texts"
                )
        return cls(
            source=source,
            tokenizer=first.tokenizer,
            train=_joined([part.train for part in parts]),
            val=_joined([part.val for part in parts]),
            pack=first.pack,
            parts=tuple(parts),
            weights=tuple(weights),
        )

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(" ".join(part.fingerprint for part in self.parts).encode()).hexdigest()

    def check(self, context: int) -> None:
        for part in self.parts:
            part.check(context)

    def windows(self, count: int, context: int, split: str = "val") -> Batch:
        """Always the same `count` rows, of each corpus by its weight."""
        found = sampler.shares(np.arange(count), self.weights)
        return _merged(
            [(rows, p.windows(len(rows), context, split)) for p, (rows, _) in zip(self.parts, found, strict=True)]
        )

    def _samples(self, samples: np.ndarray, context: int, *key: int) -> Batch:
        found = zip(self.parts, sampler.shares(samples, self.weights), strict=True)
        return _merged([(rows, part._samples(own, context, *key, i)) for i, (part, (rows, own)) in enumerate(found)])


def _joined(parts: Sequence[Tokens]) -> Tokens:
    """One row after another, without a copy of any."""
    starts = np.cumsum([0, *map(len, parts)])

    def documents() -> np.ndarray:
        return np.unique(np.concatenate([start + part.documents for start, part in zip(starts, parts, strict=False)]))

    return Tokens([array for part in parts for array in part.parts], documents)


def _merged(found: Sequence[tuple[np.ndarray, Batch]]) -> Batch:
    """Batches in one, each row in its place."""
    order = torch.from_numpy(np.argsort(np.concatenate([rows for rows, _ in found])))
    x, y, documents = zip(*(batch for _, batch in found), strict=True)
    packed = None if documents[0] is None else torch.cat(documents)[order]
    return Batch(torch.cat(x)[order], torch.cat(y)[order], packed)


def load(config: DataConfig) -> Corpus:
    """The corpus that `config.source` names: "shakespeare"; "text:PATH", a UTF-8 file or a folder of them;
    "prepared:DIR", what `attnlab prepare` made; a mixture, "0.7*prepared:A+0.3*text:B"; or "task:NAME"."""
    if config.source.startswith("task:"):
        from ..tasks import Endless

        return Endless.of(config)
    found = list(ONE_PART.finditer(config.source))
    if not found or "".join(part.group() for part in found) != config.source:
        return _one(config, config.source)
    parts = [_one(config, part[2]) for part in found]
    return Mixture.of(config.source, parts, [_weight(part[1], config.source) for part in found])


def _weight(text: str, source: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not weight > 0:
        raise UserError(f"the weight {text} in the mixture {source!r} is not a number above 0; give one such as 0.5")
    return weight


def _one(config: DataConfig, source: str) -> Corpus:
    kind, _, path = source.partition(":")
    if kind == "prepared" and path:
        return _prepared(config, source, Prepared.open(path))
    if kind == "text" and path:
        texts = read_texts(Path(path).expanduser())
    elif source == SHAKESPEARE:
        texts = [shakespeare()]
    else:
        raise UserError(
            f"data source {source!r} is unknown; allowed are {SHAKESPEARE!r}, 'text:PATH' (a UTF-8 file or a folder of "
            "such files), 'prepared:DIR' (what attnlab prepare made), mixtures such as '0.7*prepared:A+0.3*text:B' "
            "and, alone, 'task:NAME'"
        )
    made = None if config.tokenizer in ("auto", CharTokenizer.kind) else named_tokenizer(config.tokenizer)
    return from_texts(texts, source, config.val_fraction, made, config.pack)


def _prepared(config: DataConfig, source: str, folder: Prepared) -> Corpus:
    made, asked = folder.tokenizer, config.tokenizer
    if asked == CharTokenizer.kind:
        fits = made.kind == asked
    else:
        fits = asked == "auto" or named_tokenizer(asked).fingerprint == made.fingerprint
    if not fits:
        raise UserError(
            f"{source!r} was prepared with another tokenizer than data.tokenizer {asked!r}; leave that at auto, or "
            "prepare the text again with it"
        )
    if "val" not in folder.splits:
        raise UserError(
            f"{source!r} has no validation part (it has {', '.join(folder.splits)}); prepare it again with one"
        )
    return Corpus(source, made, folder.split("train"), folder.split("val"), config.pack)


def from_text(text: str, source: str = "text", val_fraction: float = 0.1) -> Corpus:
    """Characters as tokens; the first 1 - val_fraction of them train, the rest validate (nanoGPT's split)."""
    return from_texts([text], source, val_fraction)


def from_texts(
    texts: Sequence[str],
    source: str = "text",
    val_fraction: float = 0.1,
    tokenizer: Tokenizer | None = None,
    pack: str = "stream",
) -> Corpus:
    """The same for several documents, each ended by the tokenizer's end of document, if it has one."""
    made = tokenizer or CharTokenizer.of("".join(texts))
    end = [] if made.end is None else [np.array([made.end], np.int32)]
    pieces = [np.concatenate([made.encode_array(text), *end]) for text in texts]
    ids, starts = np.concatenate(pieces), np.cumsum([0, *map(len, pieces[:-1])])
    cut = int(len(ids) * (1 - val_fraction))
    val = np.unique(np.concatenate([[0], starts[starts > cut] - cut]))
    return Corpus(source, made, Tokens.of(ids[:cut], starts[starts < max(cut, 1)]), Tokens.of(ids[cut:], val), pack)


def read_text(path: Path) -> str:
    """The text of one file, or of every file under a folder (hidden ones left out) in the order of their paths."""
    return "".join(read_texts(path))


def read_texts(path: Path) -> list[str]:
    """The same, file by file."""
    if not path.exists():
        raise UserError(f"{path} does not exist; text:PATH needs a UTF-8 text file or a folder of such files")
    found = [path] if path.is_file() else sorted(visible_files(path), key=lambda file: file.relative_to(path).parts)
    texts = [text for text in map(_read_file, found) if text]
    if not texts:
        what = "is empty" if path.is_file() else f"has no text in it ({len(found)} files, all empty)"
        raise UserError(f"{path} {what}; give a UTF-8 text file or a folder of such files")
    # a file that lacks its last newline must not run into the next one's first word
    return [text if text.endswith("\n") else text + "\n" for text in texts[:-1]] + texts[-1:]


def visible_files(folder: Path) -> list[Path]:
    def hidden(path: Path) -> bool:
        return any(part.startswith(".") for part in path.relative_to(folder).parts)

    return [path for path in folder.rglob("*") if path.is_file() and not hidden(path)]


def _read_file(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); text:PATH needs readable UTF-8 text") from None
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start} (line {line}); "
            "save it as UTF-8, or take it out of the folder if it is not text"
        ) from None


@lru_cache(maxsize=1)
def shakespeare() -> str:
    content = (files(__package__) / "tinyshakespeare.txt").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHAKESPEARE_SHA256:
        raise UserError(
            f"the packaged tinyshakespeare.txt has sha256 {digest[:12]}... instead of {SHAKESPEARE_SHA256[:12]}...; "
            "install attnlab again (a checkout must not rewrite its line ends)"
        )
    return content.decode("utf-8")
