"""nanoGPT's folders: train.bin and val.bin in uint16, and meta.pkl, which is read without running what is in it."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import regular, unreadable
from .bpe import BPETokenizer, gpt2
from .tokenizer import CharTokenizer, Tokenizer, tokenizer

META_BYTES = 1 << 24  # largest meta.pkl that is read; nanoGPT's has a few thousand bytes


class PlainUnpickler(pickle.Unpickler):
    """A reader of numbers, strings and containers. It refuses all that would have to be imported."""

    def find_class(self, module: str, name: str) -> Any:
        """Raise UserError: nothing is imported."""
        raise UserError(f"asks for {module}.{name}")


def manifest(path: Path) -> dict[str, Any]:
    """Return the manifest that such a folder would have; it has no "format". UserError where it is no such folder."""
    files = {split: path / f"{split}.bin" for split in ("train", "val")}
    found = {split: file for split, file in files.items() if file.exists()}
    if "train" not in found:
        why = "has neither manifest.json nor train.bin" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {why}, so it is not a prepared corpus; give the --out folder of 'attnlab prepare'")
    splits = {}
    for split, file in found.items():
        size = file.stat().st_size
        if size % 2:
            raise UserError(f"{file} has {size} bytes, which are no whole number of 2-byte ids: it was cut short")
        splits[split] = {"tokens": size // 2, "shards": [{"file": file.name, "tokens": size // 2}]}
    return {"layout": "nanogpt", "dtype": "<u2", "splits": splits}


def tokenizer_of(path: Path) -> Tokenizer:
    """Return the folder's tokenizer: its tokenizer.json, or else by nanoGPT's own rule.

    That rule: characters where there is a meta.pkl, GPT-2's where there is none.
    """
    if (path / "tokenizer.json").exists():
        return tokenizer(path)
    meta = path / "meta.pkl"
    return CharTokenizer(read_meta(meta)) if meta.exists() else gpt2()


def read_meta(path: Path) -> str:
    """Return the characters of nanoGPT's meta.pkl, in the order of their ids. Nothing in the file is run."""
    regular(path)
    try:
        if path.stat().st_size > META_BYTES:
            raise UserError("is larger than such a file can be")
        meta = PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        letters = {int(i): str(letter) for i, letter in meta["itos"].items()}
        if not letters:
            raise UserError("has no letters")
        chars = "".join(letters[i] for i in range(meta["vocab_size"]))
        if list(chars) != sorted(set(chars)) or len(chars) != len(letters):
            raise UserError("has an alphabet that is not in order")
    except UserError as error:
        raise UserError(f"{path} {error}: only nanoGPT's own layout is read; put a tokenizer.json beside it") from None
    except PermissionError as error:
        raise UserError(unreadable(path, error)) from None
    except Exception:  # a pickle can fail in any way
        raise UserError(
            f"{path} is not nanoGPT's meta.pkl (vocab_size, itos, stoi); put a tokenizer.json beside it"
        ) from None
    return chars


def write_meta(path: Path, made: Tokenizer) -> None:
    """Write what nanoGPT's train.py reads (vocab_size) and, for characters, its sample.py (stoi, itos).

    For GPT-2's tokenizer write nothing: nanoGPT takes a folder without the file to have that one.
    """
    if isinstance(made, BPETokenizer) and made.is_gpt2:
        return
    meta: dict[str, Any] = {"vocab_size": made.vocab_size}
    if isinstance(made, CharTokenizer):
        meta["itos"] = dict(enumerate(made.chars))
        meta["stoi"] = {letter: i for i, letter in enumerate(made.chars)}
    path.write_bytes(pickle.dumps(meta))
