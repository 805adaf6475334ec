"""Text to token ids and back. A tokenizer is a value: it travels with a run as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..spec import UserError


class CharTokenizer:
    """One token per character: id i is the i-th smallest code point of the text it was made from."""

    kind = "char"

    def __init__(self, chars: str):
        assert list(chars) == sorted(set(chars)), "characters must be distinct and in ascending order"
        self.chars = chars
        self._points = _code_points(chars)

    @classmethod
    def of(cls, text: str) -> CharTokenizer:
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        return len(self.chars)

    def encode_array(self, text: str) -> np.ndarray:
        """int32 ids, one per character. UserError names the first character that has no id."""
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
        return self.encode_array(text).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Ids at or above vocab_size (a model may have more rows than the text has characters) read as U+FFFD."""
        return "".join(self.chars[i] if 0 <= i < len(self.chars) else "\ufffd" for i in ids)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "chars": self.chars}


def from_json(data: Mapping[str, Any]) -> CharTokenizer:
    """The inverse of `to_json`."""
    if data.get("kind") != CharTokenizer.kind or not isinstance(data.get("chars"), str):
        raise UserError(f"tokenizer kind {data.get('kind')!r} is unknown; this version reads {CharTokenizer.kind!r}")
    return CharTokenizer(data["chars"])


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _sample(chars: str) -> str:
    shown = chars.strip()
    return repr(shown if len(shown) <= 100 else shown[:97] + "...")
