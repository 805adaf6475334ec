"""Several corpora of one tokenizer, read by weight."""

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
from .tokens import Tokens


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
        found = order.shares(np.arange(count), self.weights)
        return _merged(
            [(rows, p.windows(len(rows), context, split)) for p, (rows, _) in zip(self.parts, found, strict=True)]
        )

    def _samples(self, samples: np.ndarray, context: int, *key: int) -> Batch:
        found = zip(self.parts, order.shares(samples, self.weights), strict=True)
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
