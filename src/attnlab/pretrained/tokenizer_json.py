"""tokenizer.json of Hugging Face for our own tokenizers, written and read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import data
from ..data.bpe import END, byte_letters, byte_level
from ..data.tokenizer import ByteTokenizer, CharTokenizer, TokenizerFile, from_json, names_of
from ..errors import UserError
from ..ranges import check_value


def written(tokenizer: data.Tokenizer) -> dict[str, Any]:
    """Return the content of a tokenizer.json that gives the same ids.

    A character that ours does not know is an error there too, because no token stands for it.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return byte_level(byte_letters(), [], {END: tokenizer.end})
    if isinstance(tokenizer, CharTokenizer):
        words = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        vocabulary = {"vocab": {letter: i for i, letter in enumerate(tokenizer.chars)}, "unk_token": "<unknown>"}
        return {
            **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": words,
            "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", **vocabulary},
        }
    return tokenizer.to_json()


def parse_tokenizer(held: Any, ends: Sequence[str | int] = ()) -> data.Tokenizer:
    """Return the tokenizer in a tokenizer.json, one of ours where `written` made it.

    `ends`: the tokens that end a text, as files beside it declare them. Raises `UserError` for content that is no JSON
    object.
    """
    if not isinstance(held, Mapping):
        raise UserError("tokenizer.json is not a JSON object; take the file that came with the model")
    check_value("tokenizer.json", held, TokenizerFile)
    pieces = names_of((held.get("model") or {}).get("vocab", ()))
    letters = [piece for piece in pieces if isinstance(piece, str) and len(piece) == 1]
    own: tuple[data.Tokenizer, ...] = ByteTokenizer(), CharTokenizer("".join(sorted(letters)))
    return next((tokenizer for tokenizer in own if written(tokenizer) == held), None) or from_json(held, ends)


def config(tokenizer: data.Tokenizer) -> dict[str, Any]:
    """Return the content of a tokenizer_config.json."""
    held = written(tokenizer)
    end = next((token["content"] for token in held["added_tokens"] if token["id"] == tokenizer.end), None)
    named = {} if end is None else {"bos_token": end, "eos_token": end}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
