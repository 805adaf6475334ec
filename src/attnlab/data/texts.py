"""Text files as a corpus, and Shakespeare, which comes with the package."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import regular
from ..ranges import Fraction, checked
from .bpe import BPETokenizer
from .compressed import opened
from .corpus import Corpus
from .tokenizer import CharTokenizer, Tokenizer
from .tokens import Tokens

SHAKESPEARE = "shakespeare"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@checked
def from_text(text: str, source: str = "text", val_fraction: Fraction = 0.1) -> Corpus:
    """Return the corpus of one text, with characters as tokens.

    The first 1 - val_fraction of them train, the rest validate (nanoGPT's split).
    """
    return from_texts([text], source, val_fraction)


@checked
def from_texts(
    texts: Sequence[str],
    source: str = "text",
    val_fraction: Fraction = 0.1,
    tokenizer: Tokenizer | None = None,
    pack: str = "stream",
) -> Corpus:
    """Return the corpus of several documents. Each ends with the tokenizer's end of document, if it has one.

    tokenizer: characters if None. pack: "stream" or "documents", see `Corpus`.
    """
    if not len(texts):
        raise UserError("texts is empty: give at least one")
    if not any(texts):
        raise UserError("the text is empty: give one that has characters")
    made = tokenizer or CharTokenizer.of("".join(texts))
    end = [] if made.end is None else [np.array([made.end], np.int32)]
    documents = [np.concatenate([made.encode_array(text), *end]) for text in texts]
    ids = np.concatenate(documents)
    starts = np.cumsum([0, *map(len, documents[:-1])])
    cut = int(len(ids) * (1 - val_fraction))
    first: int | None = None
    rest: int | None = None
    if isinstance(made, BPETokenizer) and not made.complete:
        first, rest = _text_bytes(texts, starts, made, cut)
    train = Tokens.of(ids[:cut], starts[starts < max(cut, 1)], first)
    val = Tokens.of(ids[cut:], np.unique(np.concatenate([[0], starts[starts > cut] - cut])), rest)
    return Corpus(source, made, train, val, pack)


def _text_bytes(texts: Sequence[str], starts: np.ndarray, tokenizer: BPETokenizer, cut: int) -> tuple[int, int]:
    """Return the bytes of the text before the token `cut`, and from it on. starts: the first token of each text."""
    sizes = [len(text.encode()) for text in texts]
    number = int(np.searchsorted(starts, cut, "right")) - 1  # of the text that is cut
    place = tokenizer.place_of(texts[number], cut - int(starts[number]))
    before = sum(sizes[:number]) + len(texts[number][:place].encode())
    return before, sum(sizes) - before


@checked
def read_text(path: Path) -> str:
    """Return the text of one file, or of all files under a folder in the order of their paths, hidden ones left out.

    UserError where there is none, or where it is not UTF-8.
    """
    return "".join(read_texts(path))


def read_texts(path: Path) -> list[str]:
    """Return the same, file by file."""
    if not regular(path).exists():
        raise UserError(f"{path} does not exist; text:PATH needs a UTF-8 text file or a folder of such files")
    found = [path] if path.is_file() else sorted(visible_files(path), key=lambda file: file.relative_to(path).parts)
    texts = [text for text in map(_read_file, found) if text]
    if not texts:
        what = "is empty" if path.is_file() else f"has no text in it ({len(found)} files, all empty)"
        raise UserError(f"{path} {what}; give a UTF-8 text file or a folder of such files")
    # a file that lacks its last newline must not run into the next one's first word
    return [text if text.endswith("\n") else text + "\n" for text in texts[:-1]] + texts[-1:]


def visible_files(folder: Path) -> list[Path]:
    """Return the files under a folder, without those whose name or folder begins with a dot."""

    def hidden(path: Path) -> bool:
        return any(part.startswith(".") for part in path.relative_to(folder).parts)

    return [path for path in folder.rglob("*") if path.is_file() and not hidden(path)]


def _read_file(path: Path) -> str:
    with opened(path) as (stream, _):
        content = stream.read()
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start} (line {line}); "
            "save it as UTF-8, or take it out of the folder if it is not text"
        ) from None


@lru_cache(maxsize=1)
def shakespeare() -> str:
    """Return tinyshakespeare, which comes with the package. UserError where its file has changed."""
    content = (files(__package__) / "tinyshakespeare.txt").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHAKESPEARE_SHA256:
        raise UserError(
            f"the packaged tinyshakespeare.txt has sha256 {digest[:12]}... instead of {SHAKESPEARE_SHA256[:12]}...; "
            "install attnlab again (a checkout must not rewrite its line ends)"
        )
    return content.decode("utf-8")
