"""Rows of whole documents. A document's last token is only a target to it, so n + 1 tokens take n places; one that
takes more than the context is cut into pieces of that size, each going on where the one before ended.

Where documents end with a token of their own, the one before stands in `front` of each (1, else 0), so that its first
token is predicted too. Pieces fill rows in the order of the corpus, and what does not fit begins the next row
(next-fit): a row is one stretch of the corpus, known by its start alone.
"""

from __future__ import annotations

import numpy as np

from .tokens import Tokens

BLOCK = 1 << 18  # documents looked at together


def plan(documents: np.ndarray, tokens: int, context: int, front: int) -> np.ndarray:
    """int64: where in the corpus of `tokens` tokens each row of `context` places begins; empty if nothing is to learn.

    documents: where each document begins, ascending.
    """
    begun: list[np.ndarray] = []
    where = size = np.zeros(0, np.int64)  # of the pieces in the row that is still open: one suffices to stand for them
    for at in range(0, len(documents), BLOCK):
        begins = np.asarray(documents[at : at + BLOCK + 1])
        lengths = np.diff(begins, append=tokens) if at + BLOCK >= len(documents) else np.diff(begins)
        first_inputs = np.maximum(begins[: len(lengths)] - front, 0)
        more_where, more_size = _pieces(first_inputs, begins[: len(lengths)] + lengths - 1 - first_inputs, context)
        where, size = np.concatenate([where, more_where]), np.concatenate([size, more_size])
        if not len(where):
            continue
        filled = np.cumsum(size)
        following = np.searchsorted(filled, filled - size + context, "right").tolist()  # the first that does not fit
        first = [0]
        while (piece := following[first[-1]]) < len(where):
            first.append(piece)
        begun.append(where[first[:-1]])
        last = first[-1]
        where, size = where[last : last + 1], np.array([size[last:].sum()])
    return np.concatenate([*begun, where])


def _pieces(begins: np.ndarray, places: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each piece begins, and how many places it takes; documents with nothing to predict have none."""
    begins, places = begins[places > 0], places[places > 0]
    count = -(-places // context)
    number = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)  # of a piece, in its document
    return np.repeat(begins, count) + number * context, np.minimum(np.repeat(places, count) - number * context, context)


def read(tokens: Tokens, begun: np.ndarray, rows: np.ndarray, context: int, front: int) -> tuple[np.ndarray, ...]:
    """(x, y, documents) of these rows of a plan, int64 [rows context]; after the last piece 0, -1 and -1."""
    ends = np.append(begun, len(tokens))
    first, last = ends[rows], ends[rows + 1]
    length = min(int((last - first).max(initial=0)) + 1, len(tokens))
    start = np.minimum(first, len(tokens) - length)  # of a stretch that holds the row and its targets
    ids = tokens.gather(start, length).numpy()
    place = start[:, None] + np.arange(length)
    begins = _begins(tokens.documents, start + front, length)
    taken = (place >= first[:, None]) & (place < last[:, None]) & (place < len(tokens) - 1)
    if not front:
        taken &= ~begins[:, 1:]
    into = np.nonzero(taken)[0], (taken.cumsum(1) - 1)[taken]
    out = np.zeros((3, len(rows), context), np.int64)
    out[1:] = -1
    out[0][into] = ids[taken]
    out[1][into] = np.roll(ids, -1, 1)[taken]
    out[2][into] = begins[:, :-1].cumsum(1)[taken]
    return out[0], out[1], out[2]


def _begins(documents: np.ndarray, start: np.ndarray, length: int) -> np.ndarray:
    """bool [rows length + 1]: whether a document begins at this token of a stretch, or right after it."""
    low, high = np.searchsorted(documents, start), np.searchsorted(documents, start + length, "right")
    count = high - low
    row = np.repeat(np.arange(len(start)), count)
    number = np.arange(count.sum()) + np.repeat(low - (count.cumsum() - count), count)
    found = np.zeros((len(start), length + 1), bool)
    found[row, documents[number] - start[row]] = True
    return found
