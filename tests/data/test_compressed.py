"""Compressed text is read like text; what is cut short or damaged is refused in a sentence."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import json
import lzma
from collections.abc import Callable

import pytest

from attnlab import data
from attnlab.config import DataConfig
from attnlab.data.prepare import Recipe, prepare
from attnlab.errors import UserError

TEXT = "".join(f"line {n}: größer, and still a line\n" for n in range(700))


def zstd(content: bytes) -> bytes:
    if importlib.util.find_spec("compression") is not None:
        return importlib.import_module("compression.zstd").compress(content)
    return pytest.importorskip("pyarrow").compress(content, codec="zstd", asbytes=True)


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstd,
}


@pytest.mark.parametrize("ending", PACK)
def test_compressed_text_is_text(tmp_path, ending, monkeypatch):
    monkeypatch.setattr("attnlab.data.sources.BLOCK", 501)  # characters and lines cross the edges of blocks
    (tmp_path / "plain").mkdir()
    (tmp_path / "packed").mkdir()
    records = "".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines())
    for name, content in (("a.txt", f"\ufeff{TEXT}"), ("b.txt", "the end")):
        (tmp_path / "plain" / name).write_text(content)
        packed = PACK[ending](content.encode()) + (PACK[ending](b"") if name == "b.txt" else b"")
        (tmp_path / "packed" / f"{name}{ending}").write_bytes(packed)
    (tmp_path / "plain" / "c.jsonl").write_text(records)
    half = len(records.encode()) // 2
    parts = [records.encode()[:half], records.encode()[half:]]  # two streams in one file
    (tmp_path / "packed" / f"c.jsonl{ending}").write_bytes(b"".join(map(PACK[ending], parts)))
    for kind in ("text", "jsonl"):
        made = []
        for name in ("plain", "packed"):
            recipe = Recipe(source=f"{kind}:{tmp_path / name}", tokenizer="byte", val_fraction=0.2)
            prepare(recipe, tmp_path / f"{name}-{kind}")
            made.append((tmp_path / f"{name}-{kind}" / "train-00000.bin").read_bytes())
        assert made[0] == made[1]
    one, other = (data.load(DataConfig(source=f"text:{tmp_path / name}")) for name in ("plain", "packed"))
    assert one.fingerprint == other.fingerprint


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_a_file_that_is_cut_short_or_damaged(tmp_path, ending, kind):
    records = "".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines())
    whole = PACK[ending]((TEXT if kind == "text" else records).encode())
    path = tmp_path / f"a.{'txt' if kind == 'text' else kind}{ending}"
    for content in (whole[: len(whole) // 2], whole[:-1], b"this is no archive" * 9):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path.name} is damaged or was cut short"):
            prepare(Recipe(source=f"{kind}:{path}", tokenizer="byte"), tmp_path / "out")
        if kind == "text":
            with pytest.raises(UserError, match="is damaged or was cut short"):
                data.load(DataConfig(source=f"text:{path}"))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
