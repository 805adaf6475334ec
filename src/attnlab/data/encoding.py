"""Text, encoded by several workers at once, in its own order.

block  text as a source reads it (`document_rules`)
piece  a document, or the part of a long one that is encoded at once
unit   several pieces that one worker encodes

How text is cut into blocks, pieces and units changes no id.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import NamedTuple, TypeVar

import numpy as np

from ..errors import UserError
from .document_rules import TextBlock
from .tokenizer import Tokenizer

PIECE = 1 << 16  # characters of a long document in one piece
UNIT = 1 << 18  # characters in one unit
TEXT = ("bytes", "characters", "unknown")  # what is counted of a text: bytes of UTF-8, and characters that no id says

T = TypeVar("T")
R = TypeVar("R")


class TextPiece(NamedTuple):
    """A part of a document."""

    text: str
    first: bool  # of its document
    last: bool  # of its document
    done: int  # how much of the split had been read by then; see `TextBlock`


class TextPlace(NamedTuple):
    """A place in a split, to go on reading from."""

    documents: int  # read whole
    characters: int  # read of the next document


class Unit(NamedTuple):
    """Pieces that one worker encodes at once."""

    pieces: list[TextPiece]
    document: int  # number of the document that the first piece belongs to, from 0
    at: TextPlace  # after the last piece

    @property
    def done(self) -> int:
        """The part of the split that had been read by then; see `TextBlock`."""
        return self.pieces[-1].done


def pieces_of(blocks: Iterable[TextBlock], seam: re.Pattern[str] | None, read: int = 0) -> Iterator[TextPiece]:
    """Yield documents, long ones in pieces of about PIECE characters.

    seam: where text may be cut, see `Tokenizer`; None: nowhere. read: characters to leave out at the beginning.
    """
    held: list[str] = []  # text of the document that is in no piece yet
    first = not read
    for block in blocks:
        held.append(block.text[read:])
        read = max(read - len(block.text), 0)
        if seam is None and not block.last:
            continue
        text = "".join(held)
        begin = 0
        for end in _cuts(text, seam):
            yield TextPiece(text[begin:end], first, False, block.done)
            first = False
            begin = end
        held = [text[begin:]]
        if block.last:
            yield TextPiece(text[begin:], first, True, block.done)
            held = []
            first = True


def _cuts(text: str, seam: re.Pattern[str] | None) -> Iterator[int]:
    """Yield where to cut `text`: at the first seam after PIECE characters, while so many are left."""
    at = 0
    while seam and len(text) - at > PIECE:
        found = seam.search(text, at + PIECE)
        if found is None:
            return
        at = found.start()
        yield at


def units_of(pieces: Iterable[TextPiece], at: TextPlace) -> Iterator[Unit]:
    """Yield units of about UNIT characters. `at` is where the first piece stands."""
    unit: list[TextPiece] = []
    size = 0
    begin = at.documents
    for piece in pieces:
        unit.append(piece)
        size += len(piece.text) + 1
        at = TextPlace(at.documents + 1, 0) if piece.last else TextPlace(at.documents, at.characters + len(piece.text))
        if size >= UNIT:
            yield Unit(unit, begin, at)
            unit = []
            size = 0
            begin = at.documents
    if unit:
        yield Unit(unit, begin, at)


class Encoded(NamedTuple):
    """A unit and its ids."""

    unit: Unit
    ids: np.ndarray  # int32 [n]
    starts: np.ndarray  # which of them begin a document, int64
    before: np.ndarray  # TEXT of the unit before each of those documents, int64 [documents 3]
    text: np.ndarray  # TEXT of the whole unit, int64 [3]
    lost: Counter[str]  # characters that no id says, and how many of each


def encode_unit(tokenizer: Tokenizer, end: int | None, unit: Unit) -> Encoded:
    """Return a unit with its ids.

    end: the id to put after each document; None: none. A document without text is no document. UserError names the
    document that cannot be encoded.
    """
    rows = [np.empty(0, np.int32)]
    starts = []
    before = [np.empty((0, len(TEXT)), np.int64)]
    text = np.zeros(len(TEXT), np.int64)
    lost: Counter[str] = Counter()
    tokens = 0
    document = unit.document
    for piece in unit.pieces:
        empty_document = piece.first and piece.last and not piece.text
        if not empty_document:
            try:
                ids = tokenizer.encode_array(piece.text)
            except UserError as error:
                raise UserError(f"document {document + 1}: {error}") from None
            missing = tokenizer.lost(piece.text, ids)
            if piece.last and end is not None:
                ids = np.append(ids, np.int32(end))
            if piece.first and len(ids):
                starts.append(tokens)
                before.append(text[None])
            lost += missing
            text = text + np.array([len(piece.text.encode()), len(piece.text), missing.total()])
            rows.append(ids)
            tokens += len(ids)
        if piece.last:
            document += 1
    return Encoded(unit, np.concatenate(rows), np.array(starts, np.int64), np.concatenate(before), text, lost)


def in_order(pool: Executor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Yield `function` of each item, in their order, with no more than `ahead` results waiting."""
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
