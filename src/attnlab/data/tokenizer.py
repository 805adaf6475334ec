"""A tokenizer: text to token ids and back. It is a value, and travels with a run as JSON."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np

from ..errors import UserError, quoted
from ..files import expanded, naming, read_json
from ..ranges import Size, check_value, checked
from .bpe import BPETokenizer, fingerprint_of, gpt2, text_of, utf8
from .declared import ends_of

ANYWHERE = re.compile("")
BYTES = {**{byte: bytes([byte]) for byte in range(256)}, 256: b""}


class Tokenizer(Protocol):
    """The interface of every tokenizer. Ids are 0 to vocab_size - 1."""

    @property
    def kind(self) -> str:
        """The kind of tokenizer, such as "char"."""

    @property
    def vocab_size(self) -> int:
        """The number of ids."""

    @property
    def end(self) -> int | None:
        """The id that ends a document; text never encodes to it."""

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids at which a text ends, `end` the first of them."""

    @property
    def starts(self) -> tuple[int, ...]:
        """The ids that stand before a text where a model reads it; `encode` leaves them out."""

    @property
    def unknown(self) -> int | None:
        """The id that stands for what has none; None: there is none."""

    @property
    def complete(self) -> bool:
        """Whether the ids of a text always say all of it."""

    @property
    def seam(self) -> re.Pattern[str] | None:
        """A pattern: where it matches, text may be cut in two without changing its ids. None: nowhere is known."""

    @property
    def fingerprint(self) -> str:
        """A sha256: two tokenizers with the same one give the same ids."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`. UserError where it has a character without one."""

    def encode_array(self, text: str) -> np.ndarray:
        """Return the same as an array, int32 [n]."""

    @checked
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, the inverse of `encode`; what is not whole text reads as U+FFFD."""

    def lost(self, text: str, ids: Sequence[int] | np.ndarray) -> Counter[str]:
        """Return the characters of `text` that its `ids` do not say, and how many of each; spaces do not count."""

    def to_json(self) -> dict[str, Any]:
        """Return the tokenizer as JSON, which `from_json` reads."""


class Complete:
    """A tokenizer whose ids say all of a text."""

    complete = True
    unknown = None
    starts = ()

    def lost(self, text: str, ids: Sequence[int] | np.ndarray) -> Counter[str]:
        """Return nothing: no character is lost."""
        return Counter()


class CharTokenizer(Complete):
    """A tokenizer with one token per character: id i is the i-th smallest code point of the text it was made from."""

    kind = "char"
    end = None
    ends = ()
    seam = ANYWHERE

    @checked
    def __init__(self, chars: str):
        if list(chars) != sorted(set(chars)):
            raise UserError(f"chars is {quoted(chars)}: give distinct characters in ascending order")
        self.chars = chars
        self._points = _code_points(chars)

    @classmethod
    @checked
    def of(cls, text: str) -> CharTokenizer:
        """Return the tokenizer that has the characters of `text`."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        """The number of characters."""
        return len(self.chars)

    def encode_array(self, text: str) -> np.ndarray:
        """Return ids, one per character: int32 [n]. UserError names the first character that has no id."""
        check_value("text", text, Any if isinstance(text, str) else str)
        points = _code_points(text)
        ids = np.minimum(np.searchsorted(self._points, points), max(len(self.chars) - 1, 0)).astype(np.int32)
        known = self._points[ids] == points if self.chars else np.zeros(len(points), bool)
        if not known.all():
            at = int(np.argmin(known))
            raise UserError(
                f"the character {text[at]!r} (number {at + 1} of the text) is not among the {self.vocab_size} "
                f"characters this model knows ({_sample(self.chars)}); leave it out or train on text that has it"
            )
        return ids

    def encode(self, text: str) -> list[int]:
        """Return the same as a list."""
        return self.encode_array(text).tolist()

    @checked
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. Ids that no character has read as U+FFFD: a model may have more rows."""
        ids = _whole(ids)
        return "".join(self.chars[i] if 0 <= i < len(self.chars) else "\ufffd" for i in ids)

    def to_json(self) -> dict[str, Any]:
        """Return the tokenizer as JSON, which `from_json` reads."""
        return {"kind": self.kind, "chars": self.chars}

    @cached_property
    def fingerprint(self) -> str:
        """A sha256: two tokenizers with the same one give the same ids."""
        return fingerprint_of(self.to_json())


def _whole(ids: Any) -> list[int]:
    """The ids as Python's numbers. UserError for anything else."""
    if getattr(ids, "ndim", 1) != 1:
        raise UserError(f"ids is {quoted(ids)}: give token ids in one row")
    try:
        return [operator.index(i) for i in ids]
    except TypeError:
        raise UserError(f"ids is {quoted(ids)}: give token ids, which are whole numbers") from None


class ByteTokenizer(Complete):
    """A tokenizer with one token per byte of UTF-8, and one that ends a document."""

    kind = "byte"
    vocab_size = 257
    end = 256
    ends = (256,)
    seam = ANYWHERE

    def encode_array(self, text: str) -> np.ndarray:
        """Return ids, one per byte: int32 [n]. UserError for half a surrogate pair, which UTF-8 has no bytes for."""
        return np.frombuffer(utf8(text), np.uint8).astype(np.int32)

    def encode(self, text: str) -> list[int]:
        """Return the same as a list."""
        return list(utf8(text))

    @checked
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`.

        The end of a document reads as nothing; ids without a byte, and bytes that are not UTF-8, as U+FFFD.
        """
        return text_of(BYTES, _whole(ids))

    def to_json(self) -> dict[str, Any]:
        """Return the tokenizer as JSON, which `from_json` reads."""
        return {"kind": self.kind}

    @cached_property
    def fingerprint(self) -> str:
        """A sha256: two tokenizers with the same one give the same ids."""
        return fingerprint_of(self.to_json())


class Added(TypedDict):
    """One token that is besides the model's own."""

    id: Size
    content: str
    special: bool


class Model(TypedDict):
    """The model of a tokenizer.json."""

    type: str
    vocab: dict[str, Size] | list[Any]
    merges: NotRequired[list[Any]]


class TokenizerFile(TypedDict, total=False):
    """The content of a tokenizer.json, as far as it is read here; our own kinds have `kind`, all others a `model`."""

    kind: str
    chars: str
    model: Model
    added_tokens: list[Added] | None
    normalizer: dict[str, Any] | None
    pre_tokenizer: dict[str, Any] | None
    post_processor: dict[str, Any] | None
    decoder: dict[str, Any] | None


@checked
def from_json(data: Mapping[str, Any], ends: Sequence[str | int] = ()) -> Tokenizer:
    """Return the tokenizer whose `to_json` gave `data`, or that of a tokenizer.json of Hugging Face's tokenizers.

    ends: the tokens that end a text, where `data` itself does not say. UserError where it is neither.
    """
    check_value("a tokenizer", data, TokenizerFile)
    if data.get("kind") == CharTokenizer.kind and "chars" in data:
        chars = data["chars"]
        if list(chars) != sorted(set(chars)):
            raise UserError("the characters of a tokenizer are not distinct and in ascending order")
        return CharTokenizer(chars)
    if data.get("kind") == ByteTokenizer.kind:
        return ByteTokenizer()
    if "model" in data:
        pieces = data["model"]["vocab"]
        paired = isinstance(pieces, Mapping) or all(isinstance(each, list) and len(each) == 2 for each in pieces)
        if not pieces or not paired or not all(isinstance(each, str) for each in names_of(pieces)):
            raise UserError("the vocabulary of a tokenizer is empty, or not one of pieces of text")
        return BPETokenizer(data, ends)
    raise UserError(
        f"tokenizer kind {quoted(data.get('kind'))} is unknown; this version reads 'char', 'byte' and the "
        "tokenizer.json of Hugging Face's tokenizers"
    )


def names_of(pieces: Mapping[str, Any] | Sequence[Any]) -> list[Any]:
    """Return the pieces of a vocabulary: the names of an object, or the first of each pair in a list."""
    return list(pieces) if isinstance(pieces, Mapping) else [each[0] for each in pieces]


@checked
def tokenizer(name: str | Path) -> Tokenizer:
    """Return a tokenizer by name: "byte", "gpt2", a tokenizer.json, or a folder that has one.

    Such folders are those of a run, of a corpus and of Hugging Face's; the files in it say which tokens end a text.
    UserError where there is none.
    """
    if name == "byte":
        return ByteTokenizer()
    if name == "gpt2":
        return gpt2()
    path = expanded(name)
    if path.is_dir():
        path /= "tokenizer.json"
    if not path.is_file():
        raise UserError(f"tokenizer {str(name)!r} is neither 'byte', 'gpt2', nor a tokenizer.json or a folder with one")
    remedy = "give a tokenizer.json of attnlab or of Hugging Face's tokenizers"
    data = read_json(path, dict, remedy)
    with naming(path, remedy):
        return from_json(data, ends_of(path.parent))


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _sample(chars: str) -> str:
    shown = chars.strip()
    return repr(shown if len(shown) <= 100 else shown[:97] + "...")
