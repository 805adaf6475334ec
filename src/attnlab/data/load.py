"""A corpus by the name of its source."""

from __future__ import annotations

import re
from pathlib import Path

from ..config import DataConfig
from ..errors import UserError
from .corpus import Corpus
from .endless import Endless
from .mixture import Mixture
from .shards import Prepared
from .texts import SHAKESPEARE, from_texts, read_texts, shakespeare
from .tokenizer import CharTokenizer
from .tokenizer import tokenizer as named_tokenizer

ONE_PART = re.compile(r"([0-9.]+)\*(.+?)(?=\+[0-9.]+\*|$)\+?")  # of a mixture: a number, * and a source


def load(config: DataConfig) -> Corpus:
    """The corpus that `config.source` names: "shakespeare"; "text:PATH", a UTF-8 file or a folder of them;
    "prepared:DIR", what `attnlab prepare` made; a mixture, "0.7*prepared:A+0.3*text:B"; or "task:NAME"."""
    if config.source.startswith("task:"):
        return Endless.of(config)
    found = list(ONE_PART.finditer(config.source))
    if not found or "".join(part.group() for part in found) != config.source:
        return _one(config, config.source)
    parts = [_one(config, part[2]) for part in found]
    return Mixture.of(config.source, parts, [_weight(part[1], config.source) for part in found])


def _weight(text: str, source: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not weight > 0:
        raise UserError(f"the weight {text} in the mixture {source!r} is not a number above 0; give one such as 0.5")
    return weight


def _one(config: DataConfig, source: str) -> Corpus:
    kind, _, path = source.partition(":")
    if kind == "prepared" and path:
        return _prepared(config, source, Prepared.open(path))
    if kind == "text" and path:
        texts = read_texts(Path(path).expanduser())
    elif source == SHAKESPEARE:
        texts = [shakespeare()]
    else:
        raise UserError(
            f"data source {source!r} is unknown; allowed are {SHAKESPEARE!r}, 'text:PATH' (a UTF-8 file or a folder of "
            "such files), 'prepared:DIR' (what attnlab prepare made), mixtures such as '0.7*prepared:A+0.3*text:B' "
            "and, alone, 'task:NAME'"
        )
    made = None if config.tokenizer in ("auto", CharTokenizer.kind) else named_tokenizer(config.tokenizer)
    return from_texts(texts, source, config.val_fraction, made, config.pack)


def _prepared(config: DataConfig, source: str, folder: Prepared) -> Corpus:
    made, asked = folder.tokenizer, config.tokenizer
    if asked == CharTokenizer.kind:
        fits = made.kind == asked
    else:
        fits = asked == "auto" or named_tokenizer(asked).fingerprint == made.fingerprint
    if not fits:
        raise UserError(
            f"{source!r} was prepared with another tokenizer than data.tokenizer {asked!r}; leave that at auto, or "
            "prepare the text again with it"
        )
    if "val" not in folder.splits:
        raise UserError(
            f"{source!r} has no validation part (it has {', '.join(folder.splits)}); prepare it again with one"
        )
    return Corpus(source, made, folder.split("train"), folder.split("val"), config.pack)
