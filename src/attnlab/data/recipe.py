"""A recipe: all that decides the bytes of a prepared folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import UserError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides the bytes of a prepared folder. UserError where two fields contradict each other."""

    source: str  # of the training part; see `sources.open_source`
    val: str | None = None  # source of the validation part; None: the source's own part, or its end
    test: str | None = None  # source of the test part; None: the source's own part, if it has one
    tokenizer: str | None = None  # char, byte, gpt2 or a path; None: that of a known source, or gpt2
    documents: str | None = None  # a rule of `document_rules`; None: the source's own
    val_fraction: float | None = None  # share of the documents; None: the source's own, or 0.1
    max_tokens: int | None = None  # tokens of the training part: stop after the document that reaches it; None: all
    max_documents: int | None = None  # documents of the training part; None: all
    shard_tokens: int = 100_000_000  # tokens in one file
    layout: Literal["shards", "nanogpt"] = "shards"
    end: bool = True  # put a token after each document, where the tokenizer has one
    revision: str | None = None  # of the source on the hub; None: the newest

    def __post_init__(self) -> None:
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise UserError(f"--val-fraction is {self.val_fraction}: it must lie between 0 and 1")
        if self.val_fraction is not None and self.val is not None:
            raise UserError("--val and --val-fraction both say what to validate on: give one of them")
        for name in ("max_tokens", "max_documents", "shard_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
