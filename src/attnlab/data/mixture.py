"""Several corpora of one tokenizer, read by weight. Each goes through its own epochs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ..errors import UserError
from . import order
from .corpus import Batch, Corpus
from .tokens import UNKNOWN, Tokens


@dataclass(frozen=True, eq=False, kw_only=True)
class Mixture(Corpus):
    """A corpus whose batches take rows from each of its parts by weight.

    `train` and `val` are those of the parts, one after another.
    """

    parts: tuple[Corpus, ...]
    weights: tuple[float, ...]  # one for each part; only their ratios count

    @classmethod
    def of(cls, source: str, parts: Sequence[Corpus], weights: Sequence[float]) -> Mixture:
        """Return the mixture. UserError where two parts have different tokenizers."""
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
        """The sha256 of the parts' fingerprints."""
        return hashlib.sha256(" ".join(part.fingerprint for part in self.parts).encode()).hexdigest()

    def check(self, context: int) -> None:
        """Raise UserError where a part does not hold what a corpus must hold."""
        for part in self.parts:
            part.check(context)

    def windows(self, count: int, context: int, split: str = "val") -> Batch:
        """Return `count` rows, always the same, of each part by its weight."""
        shares = order.shares(np.arange(count), self.weights)
        found = []
        for part, (rows, _) in zip(self.parts, shares, strict=True):
            found.append((rows, part.windows(len(rows), context, split)))
        return _merged(found)

    def training_rows(self, samples: np.ndarray, context: int, *key: int) -> Batch:
        """Return training rows by their numbers `samples` in the endless order that belongs to `key`."""
        shares = order.shares(samples, self.weights)
        found = []
        for number, (part, (rows, own)) in enumerate(zip(self.parts, shares, strict=True)):
            found.append((rows, part.training_rows(own, context, *key, number)))
        return _merged(found)


def _joined(parts: Sequence[Tokens]) -> Tokens:
    """Return one row after another as one, without a copy of any."""
    starts = np.cumsum([0, *map(len, parts)])

    def documents() -> np.ndarray:
        return np.unique(np.concatenate([start + part.documents for start, part in zip(starts, parts, strict=False)]))

    sizes = [part.text_bytes for part in parts]
    known = [size for size in sizes if size is not None]
    total = UNKNOWN if UNKNOWN in known or len(known) < len(sizes) else sum(known)
    text_bytes = total if known else None
    return Tokens([array for part in parts for array in part.parts], documents, text_bytes=text_bytes)


def _merged(found: Sequence[tuple[np.ndarray, Batch]]) -> Batch:
    """Return several batches as one. Each comes with the places of its rows."""
    places = torch.from_numpy(np.argsort(np.concatenate([rows for rows, _ in found])))
    x = torch.cat([batch.x for _, batch in found])
    y = torch.cat([batch.y for _, batch in found])
    documents = [batch.documents for _, batch in found if batch.documents is not None]
    return Batch(x[places], y[places], torch.cat(documents)[places] if documents else None)
