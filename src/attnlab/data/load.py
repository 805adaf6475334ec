"""A corpus by the name of its source.

KINDS has a row for each kind of source. A mixture is no kind: it is several sources with their weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..config import DataConfig
from ..errors import UserError
from ..files import expanded
from ..ranges import checked
from .corpus import Corpus
from .endless import Endless
from .mixture import Mixture
from .shards import Prepared
from .sources import read_documents
from .texts import SHAKESPEARE, from_texts, read_texts, shakespeare
from .tokenizer import CharTokenizer, Tokenizer
from .tokenizer import tokenizer as named_tokenizer

ONE_PART = re.compile(r"([0-9.]+)\*(.+?)(?=\+[0-9.]+\*|$)\+?")  # of a mixture: a number, * and a source
MIXTURE = "0.7*prepared:A+0.3*text:B"  # an example, for error messages


@dataclass(frozen=True)
class SourceKind:
    """A kind of source, and the function that opens one of it."""

    form: str  # how such a source is written; capital letters stand for what the user fills in
    open: Callable[[DataConfig, str], Corpus]  # (config, source) -> its corpus
    meaning: str = ""  # of the capital letters, for error messages
    mixes: bool = True  # whether a mixture may have it as a part


@checked
def load(config: DataConfig) -> Corpus:
    """Return the corpus that `config.source` names: a source of one of the KINDS, or a mixture such as MIXTURE.

    UserError where the source is unknown or cannot be read, and where it does not fit the rest of `config`.
    """
    found = list(ONE_PART.finditer(config.source))
    if not found or "".join(part.group() for part in found) != config.source:
        return _open(config, config.source)
    parts = [_open(config, part[2], in_mixture=True) for part in found]
    if len(found) == 1:
        raise UserError(
            f"data source {config.source!r} is a mixture of one, whose weight means nothing: give {found[0][2]!r}, or "
            f"more parts, such as {MIXTURE!r}"
        )
    return Mixture.of(config.source, parts, [_weight(part[1], config.source) for part in found])


def _open(config: DataConfig, source: str, in_mixture: bool = False) -> Corpus:
    name, colon, _ = source.partition(":")
    kind = KINDS.get(name)
    if kind is None or bool(colon) != (":" in kind.form) or (in_mixture and not kind.mixes):
        raise _unknown(source)
    return kind.open(config, source)


def _unknown(source: str) -> UserError:
    mixing = [_described(kind) for kind in KINDS.values() if kind.mixes]
    alone = [_described(kind) for kind in KINDS.values() if not kind.mixes]
    return UserError(
        f"data source {source!r} is unknown; allowed are {', '.join(mixing)}, mixtures such as {MIXTURE!r} "
        f"and, alone, {', '.join(alone)}"
    )


def _described(kind: SourceKind) -> str:
    return f"{kind.form!r} ({kind.meaning})" if kind.meaning else repr(kind.form)


def _weight(text: str, source: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not weight > 0:
        raise UserError(f"the weight {text} in the mixture {source!r} is not a number above 0; give one such as 0.5")
    return weight


def _path(source: str) -> Path:
    """Return what follows the colon. UserError where nothing does."""
    path = source.partition(":")[2]
    if not path:
        raise _unknown(source)
    return expanded(path)


# one function per kind


def _shakespeare(config: DataConfig, source: str) -> Corpus:
    return _from_texts(config, source, [shakespeare()])


def _text(config: DataConfig, source: str) -> Corpus:
    return _from_texts(config, source, _texts(source))


def _texts(source: str) -> list[str]:
    return read_texts(_path(source))


def _records(config: DataConfig, source: str) -> Corpus:
    return _from_texts(config, source, _record_texts(source))


def _record_texts(source: str) -> list[str]:
    _path(source)  # there is one
    return read_documents(source)


def _from_texts(config: DataConfig, source: str, texts: list[str]) -> Corpus:
    own_alphabet = config.tokenizer in ("auto", CharTokenizer.kind)
    tokenizer = None if own_alphabet else named_tokenizer(config.tokenizer)
    return from_texts(texts, source, config.val_fraction, tokenizer, config.pack)


def _prepared(config: DataConfig, source: str) -> Corpus:
    folder = Prepared.open(_path(source))
    tokenizer = folder.tokenizer
    if not _fits(config.tokenizer, tokenizer):
        raise UserError(
            f"{source!r} was prepared with another tokenizer than data.tokenizer {config.tokenizer!r}; leave that at "
            "auto, or prepare the text again with it"
        )
    if "val" not in folder.splits:
        raise UserError(
            f"{source!r} has no validation part (it has {', '.join(folder.splits)}); prepare it again with one"
        )
    return Corpus(source, tokenizer, folder.split("train"), folder.split("val"), config.pack)


def _fits(asked: str, tokenizer: Tokenizer) -> bool:
    """Return whether `tokenizer`, with which a folder was prepared, is the one that was asked for."""
    if asked == CharTokenizer.kind:
        return tokenizer.kind == asked  # its alphabet is that of the text
    return asked == "auto" or named_tokenizer(asked).fingerprint == tokenizer.fingerprint


def _task(config: DataConfig, source: str) -> Corpus:
    return Endless.of(config)


KINDS = {
    SHAKESPEARE: SourceKind(SHAKESPEARE, _shakespeare),
    "text": SourceKind("text:PATH", _text, "a UTF-8 file or a folder of such files"),
    "jsonl": SourceKind("jsonl:PATH#FIELD", _records, "a file of JSON lines, or a folder of them; text without #FIELD"),
    "parquet": SourceKind("parquet:PATH#FIELD", _records, "the same of Parquet files"),
    "prepared": SourceKind("prepared:DIR", _prepared, "what attnlab prepare made"),
    "task": SourceKind("task:NAME", _task, mixes=False),
}
WHOLE: dict[str, Callable[[str], list[str]]] = {  # kinds without parts of their own -> the documents of a source
    "text": _texts,
    "jsonl": _record_texts,
    "parquet": _record_texts,
}
