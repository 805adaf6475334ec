"""Text corpora. `load(DataConfig(...))` gives a Corpus; tinyshakespeare comes with the package (see PROVENANCE.md)."""

from .bpe import BPETokenizer
from .corpus import Batch, Corpus
from .load import load
from .shards import Prepared
from .texts import SHAKESPEARE_SHA256, from_text, from_texts, read_text
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
