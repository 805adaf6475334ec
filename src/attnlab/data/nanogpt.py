"""nanoGPT's folders: train.bin and val.bin in uint16, and meta.pkl, which is read without running what is in it."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from ..errors import UserError
from .bpe import BPETokenizer, gpt2
from .tokenizer import CharTokenizer, Tokenizer, tokenizer

META = 1 << 24  # bytes; nanoGPT's meta.pkl has a few thousand


class PlainUnpickler(pickle.Unpickler):
    """Numbers, strings and containers; anything that would have to be imported is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise UserError(f"asks for {module}.{name}")


def manifest(path: Path) -> dict[str, Any]:
    """What the manifest of such a folder would say; it has no "format"."""
    found = {split: path / f"{split}.bin" for split in ("train", "val") if (path / f"{split}.bin").exists()}
    if "train" not in found:
        why = "has neither manifest.json nor train.bin" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {why}, so it is not a prepared corpus; give the --out folder of 'attnlab prepare'")
    splits = {}
    for split, file in found.items():
        if (size := file.stat().st_size) % 2:
            raise UserError(f"{file} has {size} bytes, which are no whole number of 2-byte ids: it was cut short")
        splits[split] = {"tokens": size // 2, "shards": [{"file": file.name, "tokens": size // 2}]}
    return {"layout": "nanogpt", "dtype": "<u2", "splits": splits}


def tokenizer_of(path: Path) -> Tokenizer:
    """Characters where there is a meta.pkl, GPT-2's where there is none: nanoGPT's own rule."""
    meta = path / "meta.pkl"
    if (path / "tokenizer.json").exists():
        return tokenizer(path)
    return CharTokenizer(read_meta(meta)) if meta.exists() else gpt2()


def read_meta(path: Path) -> str:
    """The characters of nanoGPT's meta.pkl, in the order of their ids. Nothing in the file is run."""
    try:
        if path.stat().st_size > META:
            raise UserError("is larger than such a file can be")
        meta = PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        letters = {int(i): str(letter) for i, letter in meta["itos"].items()}
        chars = "".join(letters[i] for i in range(meta["vocab_size"]))
        if list(chars) != sorted(set(chars)) or len(chars) != len(letters):
            raise UserError("has an alphabet that is not in order")
    except UserError as error:
        raise UserError(f"{path} {error}: only nanoGPT's own layout is read; put a tokenizer.json beside it") from None
    except Exception:  # a pickle can fail in any way
        raise UserError(
            f"{path} is not nanoGPT's meta.pkl (vocab_size, itos, stoi); put a tokenizer.json beside it"
        ) from None
    return chars


def write_meta(path: Path, made: Tokenizer) -> None:
    """What nanoGPT's train.py reads (vocab_size) and, for characters, its sample.py (stoi, itos); nothing for GPT-2's
    tokenizer, which is what it takes a folder without the file to have."""
    if isinstance(made, BPETokenizer) and made.is_gpt2:
        return
    meta: dict[str, Any] = {"vocab_size": made.vocab_size}
    if isinstance(made, CharTokenizer):
        meta["itos"] = dict(enumerate(made.chars))
        meta["stoi"] = {letter: i for i, letter in enumerate(made.chars)}
    path.write_bytes(pickle.dumps(meta))
