"""The bytes of the text that tokens stand for."""

from __future__ import annotations

from ..data.tokenizer import Tokenizer
from ..data.tokens import Tokens

PIECE = 1 << 16  # tokens decoded at once


def holds(tokens: Tokens, token: int | None) -> bool:
    """Return whether a token is one of `tokens`."""
    return token is not None and any(bool((part == token).any()) for part in tokens.parts)


def text_bytes(tokenizer: Tokenizer, tokens: Tokens, start: int, stop: int) -> int:
    """Return the UTF-8 bytes of the text of these tokens, read in pieces that do not cut a character in two."""
    total = 0
    while start < stop:
        for end in range(min(start + PIECE, stop), min(start + PIECE + 3, stop) + 1):  # a character is 4 bytes at most
            text = tokenizer.decode(tokens.read(start, end).tolist())
            if not text.endswith("\ufffd"):
                break
        total += len(text.encode("utf-8", "surrogatepass"))
        start = end
    return total
