"""Rows of whole documents.

A row has `context` places; a place is an input token with its target, the token after it. The last token of a document
is only a target, so n + 1 tokens take n places. A document that takes more places than the context is cut into pieces
of that size, each of which goes on where the one before ended.

piece   a document, or the part of a long one, that lies in one row
front   1 where a document ends with a token of its own, else 0. With 1 that token stands in front of the next document
        too, so that its first token is predicted.
stretch neighbouring tokens of the corpus

The pieces of a very long document are shortened by a few places here and there, one context in all. So they begin at
every remainder of division by the context, and not always at the same place of a period that the text may have.

Pieces fill rows in the order of the corpus, and a piece that does not fit begins the next row (next-fit). So a row is
one stretch of the corpus, and known by where it begins.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .order import GOLDEN, stratified
from .tokens import Tokens

BLOCK = 1 << 18  # documents looked at together
LONG = 16  # pieces of a document of which some are shortened: that takes one piece more, at most a sixteenth


class Rows(NamedTuple):
    """Inputs, targets and the document of each place, int64 [rows context]; after the last piece 0, -1 and -1."""

    x: np.ndarray
    y: np.ndarray
    documents: np.ndarray


def row_starts(documents: np.ndarray, tokens: int, context: int, front: int) -> np.ndarray:
    """Return where in a corpus of `tokens` tokens each row begins, int64 [rows]; empty if there is nothing to predict.

    documents: where each document begins, ascending.
    """
    begun: list[np.ndarray] = []
    # the pieces not in a finished row yet; those of the row that is still open are replaced by one as long as all
    starts = np.zeros(0, np.int64)
    sizes = np.zeros(0, np.int64)
    for at in range(0, len(documents), BLOCK):
        begins = np.asarray(documents[at : at + BLOCK + 1])
        lengths = np.diff(begins, append=tokens) if at + BLOCK >= len(documents) else np.diff(begins)
        begins = begins[: len(lengths)]
        first_inputs = np.maximum(begins - front, 0)
        more_starts, more_sizes = _pieces(first_inputs, begins + lengths - 1 - first_inputs, context)
        starts = np.concatenate([starts, more_starts])
        sizes = np.concatenate([sizes, more_sizes])
        if not len(starts):
            continue
        firsts = _first_pieces(sizes, context)
        begun.append(starts[firsts[:-1]])
        last = firsts[-1]
        starts = starts[last : last + 1]
        sizes = sizes[last:].sum(keepdims=True)
    return np.concatenate([*begun, starts])


def _first_pieces(sizes: np.ndarray, context: int) -> list[int]:
    """Return which pieces begin a row, ascending; the last of these rows is still open."""
    filled = np.cumsum(sizes)
    following = np.searchsorted(filled, filled - sizes + context, "right").tolist()  # the first that does not fit
    firsts = [0]
    while following[firsts[-1]] < len(sizes):
        firsts.append(following[firsts[-1]])
    return firsts


def _pieces(begins: np.ndarray, places: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where each piece begins and how many places it takes. A document with nothing to predict has none.

    begins, places: of the documents.
    """
    begins = begins[places > 0]
    places = places[places > 0]
    count = -(-places // context)  # pieces of each document
    count += count >= LONG
    pieces = np.repeat(count, count)  # of the document that a piece is of
    number = np.arange(len(pieces)) - np.repeat(count.cumsum() - count, count)  # of a piece, in its document
    begin = np.repeat(begins, count)
    done = number * context - _shortened(begin, number, pieces, context)
    left = np.repeat(places, count) - done  # of the document's places
    begun = left > 0  # the last of a long document may have nothing left
    ends = np.append(number[1:] == 0, True)
    sizes = np.where(ends, left, np.diff(done, append=0))
    return (begin + done)[begun], np.minimum(sizes, left)[begun]


def _shortened(begin: np.ndarray, number: np.ndarray, pieces: np.ndarray, context: int) -> np.ndarray:
    """Return the places that all pieces before each one lack, int64 [pieces]: 0 unless its document is long."""
    moved = np.flatnonzero((pieces > LONG) & (number > 0))
    key = begin[moved].astype(np.uint64) * GOLDEN
    found = np.zeros(len(number), np.int64)
    found[moved] = stratified(number[moved].astype(np.uint64), pieces[moved], context, key).astype(np.int64)
    return found


def read_rows(tokens: Tokens, begun: np.ndarray, rows: np.ndarray, context: int, front: int) -> Rows:
    """Return these rows of a corpus. begun: from `row_starts`; rows: their numbers, [rows]."""
    ends = np.append(begun, len(tokens))
    first = ends[rows]
    last = ends[rows + 1]

    # a stretch around each row, all equally long, so that they are an array: it holds the row and its targets
    length = min(int((last - first).max(initial=0)) + 1, len(tokens))
    start = np.minimum(first, len(tokens) - length)
    ids = tokens.gather(start, length).numpy()
    targets = np.roll(ids, -1, 1)
    begins = _begins(tokens.documents, start + front, length)
    document = begins[:, :-1].cumsum(1)

    # the tokens of it that are inputs: those of the row, but the last of the corpus and, without a front, of a document
    place = start[:, None] + np.arange(length)
    taken = (place >= first[:, None]) & (place < last[:, None]) & (place < len(tokens) - 1)
    if not front:
        taken &= ~begins[:, 1:]

    # they move together to the left end of the row
    row = np.nonzero(taken)[0]
    column = (taken.cumsum(1) - 1)[taken]
    shape = (len(rows), context)
    out = Rows(x=np.zeros(shape, np.int64), y=np.full(shape, -1, np.int64), documents=np.full(shape, -1, np.int64))
    out.x[row, column] = ids[taken]
    out.y[row, column] = targets[taken]
    out.documents[row, column] = document[taken]
    return out


def _begins(documents: np.ndarray, start: np.ndarray, length: int) -> np.ndarray:
    """Return whether a document begins at each token of a stretch, and right after it: bool [rows length + 1]."""
    low = np.searchsorted(documents, start)
    high = np.searchsorted(documents, start + length, "right")
    count = high - low
    row = np.repeat(np.arange(len(start)), count)
    number = np.arange(count.sum()) + np.repeat(low - (count.cumsum() - count), count)
    found = np.zeros((len(start), length + 1), bool)
    found[row, documents[number] - start[row]] = True
    return found
