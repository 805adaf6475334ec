"""Text corpora. `load(DataConfig(...))` gives a Corpus; tinyshakespeare comes with the package (see PROVENANCE.md)."""

from .bpe import BPETokenizer
from .corpus import SHAKESPEARE_SHA256, Corpus, from_text, load, read_text
from .tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, from_json, tokenizer
from .tokens import Tokens

__all__ = [
    "SHAKESPEARE_SHA256",
    "BPETokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "Corpus",
    "Tokenizer",
    "Tokens",
    "from_json",
    "from_text",
    "load",
    "read_text",
    "tokenizer",
]
