"""Special tokens, as the files of a folder declare them: by name or by id, one or several.

tokenizer_config.json and special_tokens_map.json name the token that ends a text, generation_config.json and
config.json list the ids at which a model stops. A folder may have any of these files. The post-processor of
tokenizer.json says which tokens stand before a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..files import read_json

FILES = (  # file, field: whatever comes first says what ends a document
    ("tokenizer_config.json", "eos_token"),
    ("special_tokens_map.json", "eos_token"),
    ("generation_config.json", "eos_token_id"),
    ("config.json", "eos_token_id"),
)


def ends_of(folder: Path) -> list[str | int]:
    """Return the tokens that end a text, the one that ends a document first; empty where nothing declares one."""
    found: list[str | int] = []
    for file, field in FILES:
        if (folder / file).is_file():
            held = read_json(folder / file)
            found += tokens_in(held.get(field) if isinstance(held, dict) else None)
    return list(dict.fromkeys(found))


def tokens_in(said: Any) -> Iterator[str | int]:
    """Yield the tokens of a field: a name, an id, {"content": name}, or a list of these."""
    if isinstance(said, dict):
        said = said.get("content")
    if isinstance(said, list):
        for each in said:
            yield from tokens_in(each)
    elif isinstance(said, str) or (isinstance(said, int) and not isinstance(said, bool)):
        yield said


def starts_of(tokenizers: Any, pieces: Iterable[str]) -> tuple[int, ...]:
    """Return the ids that the post-processor of `tokenizers`, a `Tokenizer` of that package, puts before a text.

    One of `pieces`, the first that has ids of its own, is the text.
    """
    for text in pieces:
        if tokenizers.encode(text, add_special_tokens=False).ids:
            whole = tokenizers.encode(text)
            return tuple(whole.ids[: whole.special_tokens_mask.index(0)])
    return ()
