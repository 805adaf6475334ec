"""Text corpora. `load(DataConfig(...))` gives a Corpus; tinyshakespeare comes with the package (see PROVENANCE.md)."""

from .bpe import BPETokenizer
from .corpus import SHAKESPEARE_SHA256, Batch, Corpus, from_text, from_texts, load, read_text
from .shards import Prepared
from .tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, from_json, tokenizer
from .tokens import Tokens

__all__ = [
    "SHAKESPEARE_SHA256",
    "BPETokenizer",
    "Batch",
    "ByteTokenizer",
    "CharTokenizer",
    "Corpus",
    "Prepared",
    "Tokenizer",
    "Tokens",
    "from_json",
    "from_text",
    "from_texts",
    "load",
    "read_text",
    "tokenizer",
]
