"""A recipe: all that decides the bytes of a prepared folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import UserError
from ..ranges import Fraction, Long, check_fields


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides the bytes of a prepared folder. UserError where two fields contradict each other."""

    source: str  # of the training part; see `sources.open_source`
    val: str | None = None  # source of the validation part; None: the source's own part, or its end
    test: str | None = None  # source of the test part; None: the source's own part, if it has one
    tokenizer: str | None = None  # char, byte, gpt2 or a path; None: that of a known source, or gpt2
    documents: str | None = None  # a rule of `document_rules`; None: the source's own
    val_fraction: Fraction | None = None  # share of the documents; None: the source's own, or 0.1
    max_tokens: Long | None = None  # tokens of the training part: stop after the document that reaches it; None: all
    max_documents: Long | None = None  # documents of the training part; None: all
    shard_tokens: Long = 100_000_000  # tokens in one file
    layout: Literal["shards", "nanogpt"] = "shards"
    end: bool = True  # put a token after each document, where the tokenizer has one
    revision: str | None = None  # of the source on the hub; None: the newest

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("source", "val", "test", "tokenizer", "revision"):
            if getattr(self, name) == "":
                raise UserError(f"--{name} is '': name one, or leave it out")
        if self.val_fraction is not None and self.val is not None:
            raise UserError("--val and --val-fraction both say what to validate on: give one of them")
