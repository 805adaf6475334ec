"""A long row of token ids, in one array or in several, that says where its documents begin.

In memory (`Tokens.of`) or memory-mapped (`shards.Prepared`), it is read in the same two ways: one stretch of
neighbouring tokens, or many windows at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, quoted
from ..ranges import Size, check_value

DocumentStarts = np.ndarray | Callable[[], np.ndarray] | None  # where each begins; see `Tokens`
UNKNOWN = -1  # bytes of a text
DIGESTED = 1 << 20  # tokens that are hashed at a time


class Tokens:
    """A row of token ids. Its `parts` follow one another, and a window may cross from one into the next.

    documents: where each document begins; a function where finding out takes long; None: the row is one document.
    digest: identifies the contents; computed from them if empty. text_bytes: of the text that became these ids; None:
    as many as they are decoded to; UNKNOWN: nobody knows, and the ids do not say all of it.
    """

    def __init__(
        self,
        parts: Sequence[np.ndarray],
        documents: DocumentStarts = None,
        digest: str = "",
        text_bytes: int | None = None,
    ):
        self.parts = list(parts)
        self.text_bytes = text_bytes
        self._documents = documents
        self._digest = digest
        self._rows = [np.asarray(part) for part in self.parts]  # a memory map costs more to cut than an array
        self._edges = np.cumsum([0, *map(len, self.parts)])  # where each part begins, and where the last one ends

    @classmethod
    def of(
        cls,
        ids: Tensor | np.ndarray | Sequence[int],
        documents: DocumentStarts = None,
        text_bytes: int | None = None,
    ) -> Tokens:
        """Return a row in memory. `UserError` where `ids` are no whole numbers in a row."""
        check_value("text_bytes", text_bytes, Size | None)
        starts = np.zeros(1, int) if documents is None or callable(documents) else np.asarray(documents)
        if starts.ndim != 1 or not len(starts) or starts.dtype.kind not in "iu":
            raise UserError(f"documents is {quoted(documents)}: give where each document begins, or None")
        row = ids.numpy() if isinstance(ids, Tensor) else np.asarray(ids)
        if row.ndim != 1 or not (np.issubdtype(row.dtype, np.integer) or not len(row)):
            raise UserError(f"ids is {quoted(ids)}: give token ids in one row")
        return cls([row], documents, text_bytes=text_bytes)

    def __len__(self) -> int:
        return int(self._edges[-1])

    def read(self, start: int, stop: int) -> Tensor:
        """Return the tokens from `start` to `stop` - 1, int64 [stop - start]. IndexError outside the row."""
        return torch.from_numpy(self._read(start, stop).astype(np.int64))

    def gather(self, starts: np.ndarray, length: int) -> Tensor:
        """Return the windows of `length` tokens that begin at `starts`, in that order: int64 [n length].

        IndexError where one leaves the row.
        """
        starts = np.asarray(starts, np.int64)
        if len(starts) and not (0 <= starts.min() and starts.max() + length <= len(self)):
            raise IndexError(f"a window of {length} tokens leaves the row of {len(self)}")
        out = np.empty((len(starts), length), np.int64)
        parts = np.searchsorted(self._edges, starts, "right") - 1
        ends = self._edges[parts + 1].tolist() if len(starts) else []
        places = (starts - self._edges[parts]).tolist()
        for row, (start, end, part, at) in enumerate(zip(starts.tolist(), ends, parts.tolist(), places, strict=True)):
            inside = start + length <= end
            out[row] = self._rows[part][at : at + length] if inside else self._read(start, start + length)
        return torch.from_numpy(out)

    @cached_property
    def documents(self) -> np.ndarray:
        """The places where documents begin: int64, ascending, the first at 0."""
        found = self._documents() if callable(self._documents) else self._documents
        starts = np.zeros(1, np.int64) if found is None else np.asarray(found, np.int64)
        assert starts[0] == 0 and (np.diff(starts) > 0).all(), "documents begin at 0 and ascend"
        assert starts[-1] <= len(self), "a document begins after the last token"
        return starts

    @cached_property
    def digest(self) -> str:
        """The sha256 of the ids (as little-endian int32) and of where documents begin, unless one was given."""
        if self._digest:
            return self._digest
        digest = hashlib.sha256()
        for part in self.parts:
            for at in range(0, len(part), DIGESTED):
                digest.update(part[at : at + DIGESTED].astype("<i4").data)
        digest.update(self.documents.astype("<i8").data)
        return digest.hexdigest()

    def _read(self, start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} leave the row of {len(self)}")
        first, last = np.searchsorted(self._edges, [start, max(stop - 1, start)], "right") - 1
        pieces = [
            self.parts[part][max(start - self._edges[part], 0) : stop - self._edges[part]]
            for part in range(first, min(last + 1, len(self.parts)))
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)
