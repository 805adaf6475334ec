"""A corpus: one long row of token ids, cut into train and validation, read at places that (seed, step) alone decide."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig
from ..spec import UserError
from .tokenizer import CharTokenizer

SHAKESPEARE = "shakespeare"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True, eq=False)
class Corpus:
    source: str
    tokenizer: CharTokenizer
    train: Tensor  # int32, 1-D
    val: Tensor  # int32, 1-D

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of ids, split and tokenizer: two runs with the same one saw the same data."""
        digest = hashlib.sha256(json.dumps(self.tokenizer.to_json(), sort_keys=True).encode())
        for split in (self.train, self.val):
            digest.update(len(split).to_bytes(8, "little"))
            digest.update(split.numpy().astype("<i4", copy=False).data)
        return digest.hexdigest()

    def check(self, context: int) -> None:
        """UserError unless both splits hold at least one window of `context` tokens and the token after it."""
        for name, split in (("training", self.train), ("validation", self.val)):
            if len(split) <= context:
                raise UserError(
                    f"the {name} part of {self.source!r} has {len(split)} tokens, but one window of context {context} "
                    f"needs {context + 1}; give more text or a context of at most {max(len(split) - 1, 0)}"
                )

    def batch(self, seed: int, step: int, batch_size: int, context: int) -> tuple[Tensor, Tensor]:
        """(x, y), int64 [B T], y one token ahead of x; windows start anywhere in the training part, as in nanoGPT.

        A pure function of its arguments: step 1000 needs no steps before it. The first rows of a larger batch are the
        rows of a smaller one.
        """
        self.check(context)
        # raw counter output, because NumPy promises that stream, but not its distributions, to be stable for ever
        raw = np.random.Philox(key=np.array([seed, step], np.uint64)).random_raw(batch_size)
        starts = raw % np.uint64(len(self.train) - context)
        return _gather(self.train, starts.astype(np.int64), context)

    def windows(self, count: int, context: int, split: str = "val") -> tuple[Tensor, Tensor]:
        """(x, y), int64 [count T]: always the same windows, spread evenly from the first token to the last."""
        self.check(context)
        tokens = {"train": self.train, "val": self.val}[split]
        return _gather(tokens, np.linspace(0, len(tokens) - context - 1, count).astype(np.int64), context)


def load(config: DataConfig) -> Corpus:
    """The corpus that `config.source` names: "shakespeare", or "text:PATH" for a UTF-8 file or a folder of them."""
    kind, _, path = config.source.partition(":")
    if kind == "text" and path:
        text = read_text(Path(path).expanduser())
    elif config.source == SHAKESPEARE:
        text = _shakespeare()
    else:
        raise UserError(
            f"data source {config.source!r} is unknown; allowed are {SHAKESPEARE!r} and 'text:PATH', where PATH is a "
            "UTF-8 file or a folder of such files"
        )
    return from_text(text, config.source, config.val_fraction)


def from_text(text: str, source: str = "text", val_fraction: float = 0.1) -> Corpus:
    """Characters as tokens; the first 1 - val_fraction of them train, the rest validate (nanoGPT's split)."""
    tokenizer = CharTokenizer.of(text)
    ids = torch.from_numpy(tokenizer.encode_array(text))
    cut = int(len(ids) * (1 - val_fraction))
    return Corpus(source, tokenizer, train=ids[:cut], val=ids[cut:])


def read_text(path: Path) -> str:
    """The text of one file, or of every file under a folder (hidden ones left out) in the order of their paths."""
    if not path.exists():
        raise UserError(f"{path} does not exist; text:PATH needs a UTF-8 text file or a folder of such files")
    found = [path] if path.is_file() else sorted(_visible_files(path), key=lambda file: file.relative_to(path).parts)
    texts = [text for text in map(_read_file, found) if text]
    if not texts:
        what = "is empty" if path.is_file() else f"has no text in it ({len(found)} files, all empty)"
        raise UserError(f"{path} {what}; give a UTF-8 text file or a folder of such files")
    # a file that lacks its last newline must not run into the next one's first word
    return "".join(text if text.endswith("\n") else text + "\n" for text in texts[:-1]) + texts[-1]


def _visible_files(folder: Path) -> list[Path]:
    def hidden(path: Path) -> bool:
        return any(part.startswith(".") for part in path.relative_to(folder).parts)

    return [path for path in folder.rglob("*") if path.is_file() and not hidden(path)]


def _read_file(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); text:PATH needs readable UTF-8 text") from None
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start} (line {line}); "
            "save it as UTF-8, or take it out of the folder if it is not text"
        ) from None


@lru_cache(maxsize=1)
def _shakespeare() -> str:
    content = (files(__package__) / "tinyshakespeare.txt").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHAKESPEARE_SHA256:
        raise UserError(
            f"the packaged tinyshakespeare.txt has sha256 {digest[:12]}... instead of {SHAKESPEARE_SHA256[:12]}...; "
            "install attnlab again (a checkout must not rewrite its line ends)"
        )
    return content.decode("utf-8")


def _gather(tokens: Tensor, starts: np.ndarray, context: int) -> tuple[Tensor, Tensor]:
    both = tokens.unfold(0, context + 1, 1)[torch.from_numpy(starts)].long()
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()
