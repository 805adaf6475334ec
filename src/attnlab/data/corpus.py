"""A corpus: a long row of token ids to train on and one to validate on, read at places that (seed, step) alone decide.

Every unit of it, a window of the stream or a row of whole documents, is read once an epoch, in an order that nothing
has to remember (`sampler`). A mixture takes from several corpora by weight; each keeps to its own epochs.
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

from ..errors import UserError
from . import order, packing
from .tokenizer import Tokenizer
from .tokens import Tokens


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
        keys = order.key_of(*key).repeat(len(samples))
        if self.pack == "stream":
            where = order.window_starts(samples, len(self.train), context, keys)
        else:
            where = order.units(samples, self._size("train", context), keys)[0].astype(np.int64)
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
