"""A corpus: a long row of token ids to train on and one to validate on, read at places that (seed, step) alone decide.

A corpus is read in units: windows of the stream, or rows of whole documents. Each unit is read once an epoch, in an
order that nothing has to remember (`order`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError, choose
from ..ranges import Count, Seed, Size, checked
from . import order, packing
from .tokenizer import Tokenizer
from .tokens import Tokens


class Batch(NamedTuple):
    """Inputs and targets, int64 [B T]; a target of -1 does not count."""

    x: Tensor
    y: Tensor
    documents: Tensor | None = None  # int64 [B T]: the token's document, -1: padding; None: each row is one document

    def rows(self, start: int, stop: int) -> Batch:
        """Return the rows from `start` to `stop` - 1."""
        return self._each(lambda t: t[start:stop])

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        return self._each(lambda t: t.to(device))

    def counted(self) -> int:
        """Return the number of targets that count."""
        return int((self.y >= 0).sum())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(change(self.x), change(self.y), None if self.documents is None else change(self.documents))


@dataclass(frozen=True, eq=False)
class Corpus:
    """Token ids to train and to validate on, with the tokenizer that made them."""

    source: str
    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    pack: str = "stream"  # windows of neighbouring tokens; "documents": rows of whole documents
    _row_starts: dict[tuple[str, int], np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def order(self) -> int:
        """The version of the order in which it is read."""
        return order.VERSION

    @property
    def vocab_size(self) -> int:
        """The number of ids of the tokenizer."""
        return self.tokenizer.vocab_size

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of ids, documents, split and tokenizer: two runs with the same one saw the same data."""
        parts = self.tokenizer.fingerprint, self.train.digest, self.val.digest
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @checked
    def check(self, context: Count) -> None:
        """Raise UserError unless both splits hold something to predict and, read as a stream, one whole window."""
        for name, split in (("training", "train"), ("validation", "val")):
            tokens = self.split(split)
            if len(tokens) < 2 or (self.pack == "documents" and not len(self.row_starts(split, context))):
                raise UserError(
                    f"the {name} part of {self.source!r} has {len(tokens)} tokens and nothing to predict; give "
                    "more text"
                )
            if self.pack == "stream" and len(tokens) <= context:
                raise UserError(
                    f"the {name} part of {self.source!r} has {len(tokens)} tokens, but one window of context {context} "
                    f"needs {context + 1}; give more text or a context of at most {len(tokens) - 1}"
                )

    @checked
    def batch(
        self, seed: Seed, step: Size, batch_size: Count, context: Count, rank: Size = 0, world: Count = 1
    ) -> Batch:
        """Return the rows that process `rank` of `world` reads in step `step`, which counts from 0.

        The processes of a step read the same `batch_size` rows together, whatever their number. The result is a pure
        function of the arguments: step 1000 needs no steps before it. A process takes neighbouring rows, as a part of
        an accumulated batch does, so that each has its share of a mixture, which takes its corpora in turn.
        """
        self.check(context)
        first = step * batch_size + batch_size * rank // world
        last = step * batch_size + batch_size * (rank + 1) // world
        return self.training_rows(np.arange(first, last), context, seed)

    @checked
    def windows(self, count: Count, context: Count, split: str = "val") -> Batch:
        """Return `count` rows, always the same, spread over all of a split: one from each of so many equal parts."""
        choose("split", split, ("train", "val"))
        self.check(context)
        return self._rows(order.spread_places(count, self._size(split, context)), context, split)

    @checked
    def split(self, name: str) -> Tokens:
        """Return "train" or "val"."""
        return {"train": self.train, "val": self.val}[choose("name", name, ("train", "val"))]

    def training_rows(self, samples: np.ndarray, context: int, *key: int) -> Batch:
        """Return training rows by their numbers `samples` in the endless order that belongs to `key`."""
        keys = order.key_of(*key).repeat(len(samples))
        if self.pack == "stream":
            where = order.window_starts(samples, len(self.train), context, keys)
        else:
            where = order.units(samples, self._size("train", context), keys)[0].astype(np.int64)
        return self._rows(where, context, "train")

    def row_starts(self, split: str, context: int) -> np.ndarray:
        """Return where in a split each row of whole documents begins, int64 [rows]; see `packing`."""
        if (split, context) not in self._row_starts:
            tokens = self.split(split)
            starts = packing.row_starts(tokens.documents, len(tokens), context, self._front(split))
            self._row_starts[split, context] = starts
        return self._row_starts[split, context]

    def _size(self, split: str, context: int) -> int:
        """Return the number of places to read a row at."""
        return len(self.split(split)) - context if self.pack == "stream" else len(self.row_starts(split, context))

    def _rows(self, where: np.ndarray, context: int, split: str) -> Batch:
        tokens = self.split(split)
        if self.pack == "documents":
            rows = packing.read_rows(tokens, self.row_starts(split, context), where, context, self._front(split))
            return Batch(*map(torch.from_numpy, rows))
        begins = np.minimum(where, len(tokens) - context - 1)
        both = tokens.gather(begins, context + 1)
        x = both[:, :-1].clone()  # contiguous() would leave two views of a single row
        y = both[:, 1:].clone()
        for row in np.flatnonzero(where > begins):  # a last window, which ends where the split does
            missing = int((where - begins)[row])
            x[row] = F.pad(x[row, missing:], (0, missing))
            y[row] = F.pad(y[row, missing:], (0, missing), value=-1)
        return Batch(x, y)

    def _front(self, split: str) -> int:
        """Return 1 where a token that ends one document stands in front of the next, else 0: the first two tell."""
        tokens = self.split(split)
        second = int(tokens.documents[:2][-1])
        return int(second > 0 and tokens.read(second - 1, second).item() == self.tokenizer.end)
