"""Text corpora. `load(DataConfig(...))` gives a Corpus; tinyshakespeare comes with the package (see PROVENANCE.md)."""

from .corpus import SHAKESPEARE_SHA256, Corpus, from_text, load, read_text
from .tokenizer import CharTokenizer, from_json

__all__ = ["SHAKESPEARE_SHA256", "CharTokenizer", "Corpus", "from_json", "from_text", "load", "read_text"]
