"""prepare goes on with, and removes, only what it made."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from attnlab.cli import main as cli
from attnlab.data.prepare import Recipe, prepare
from attnlab.data.shards import Prepared
from attnlab.errors import UserError


def text(folder: Path, content: str = "to be or not to be " * 60) -> str:
    (folder / "text.txt").write_text(content)
    return f"text:{folder / 'text.txt'}"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "mine",
    [{"notes.txt": "mine"}, {"state.json": "[1]"}, {"state.json": '{"a": 1}', "x": ""}, {"train-00000.bin": "ab"}],
)
@pytest.mark.parametrize("source", ["right", "missing", "empty"])
def test_a_folder_of_somebody_is_left_as_it_is(mine: dict[str, str], source: str, tmp_path: Path) -> None:
    folder = tmp_path / "out.unfinished"
    folder.mkdir()
    for name, content in mine.items():
        (folder / name).write_text(content)
    before = contents(folder)
    given = {"right": text(tmp_path), "missing": f"text:{tmp_path / 'nowhere'}", "empty": text(tmp_path)}[source]
    if source == "empty":
        (tmp_path / "text.txt").write_text("")
    with pytest.raises(UserError, match="was not made by attnlab prepare: move it elsewhere, or name another folder"):
        prepare(Recipe(source=given, tokenizer="byte"), tmp_path / "out")
    assert contents(folder) == before and not (tmp_path / "out").exists()


def test_what_stands_there_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for make in (lambda path: path.write_text("x"), lambda path: path.symlink_to("real")):
        make(tmp_path / "out.unfinished")
        with pytest.raises(UserError, match=r"out\.unfinished is in the way: move it elsewhere"):
            prepare(Recipe(source=text(tmp_path), tokenizer="byte"), tmp_path / "out")
        (tmp_path / "out.unfinished").unlink()
    for name in (".", "..", "/"):
        with pytest.raises(UserError, match=r"is no name for a new folder|is not a prepared corpus"):
            prepare(Recipe(source=text(tmp_path), tokenizer="byte"), name)


def test_a_refusal_leaves_nothing_of_ours(tmp_path: Path) -> None:
    source = text(tmp_path, "")
    with pytest.raises(UserError, match="has no text in it"):
        prepare(Recipe(source=source, tokenizer="byte"), tmp_path / "deep" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_what_was_put_into_it_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is right until it is encoded: it then is found to have none."""

    def drop(event: object) -> None:
        (tmp_path / "out.unfinished" / "notes.txt").write_text("mine")
        raise UserError("the text is gone")

    with pytest.raises(UserError, match="the text is gone"):
        prepare(Recipe(source=text(tmp_path), tokenizer="byte"), tmp_path / "out", progress=drop)
    assert set(contents(tmp_path / "out.unfinished")) - {".lock"} == {"notes.txt"}


def test_hidden_files_of_others_are_kept(tmp_path: Path) -> None:
    begun = tmp_path / "out.unfinished"
    begun.mkdir()
    recipe = Recipe(source=text(tmp_path), tokenizer="byte")
    state = {"plan": json.loads(json.dumps(vars(recipe))), "splits": {}, "command": ""}
    (begun / "state.json").write_text(json.dumps(state))
    (begun / ".git").mkdir()
    (begun / ".git" / "config").write_text("mine")
    prepare(recipe, tmp_path / "out")
    assert (tmp_path / "out" / ".git" / "config").read_text() == "mine"
    assert {".lock", "state.json"}.isdisjoint(os.listdir(tmp_path / "out"))


def test_a_whole_folder_of_another_recipe_is_not_taken(tmp_path: Path) -> None:
    """Killed when the manifest was written, and before the folder got its name."""
    recipe = Recipe(source=text(tmp_path), tokenizer="byte")
    prepare(recipe, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "out.unfinished")
    before = contents(tmp_path / "out.unfinished")
    with pytest.raises(UserError, match=r"out\.unfinished holds another corpus, which is whole"):
        prepare(Recipe(source=text(tmp_path), tokenizer="char"), tmp_path / "out")
    assert contents(tmp_path / "out.unfinished") == before
    assert prepare(recipe, tmp_path / "out").verify() is None


@pytest.mark.parametrize("name", ["../stolen.bin", "/etc/hostname", "a/../../x"])
@pytest.mark.parametrize("what", ["shard", "index"])
def test_a_manifest_names_files_of_its_own_folder(name: str, what: str, tmp_path: Path) -> None:
    prepare(Recipe(source=text(tmp_path), tokenizer="byte"), tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    split = manifest["splits"]["train"]
    place = split["shards"][0] if what == "shard" else split["index"]
    (tmp_path / "stolen.bin").write_bytes((tmp_path / "out" / place["file"]).read_bytes())
    place["file"] = name
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json names .*, which is no file in its own folder"):
        Prepared.open(tmp_path / "out")


@pytest.mark.skipif(os.name != "posix", reason="other systems have no named pipes")
def test_pipes_are_no_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    sources = [f"{kind}:{tmp_path / 'pipe'}" for kind in ("text", "jsonl", "parquet")]
    for words in (
        *(["prepare", source, "--tokenizer", "byte", "--out", str(tmp_path / "out")] for source in sources),
        ["train", "quick", "--data", sources[0], "--out", str(tmp_path / "out")],
        ["tokenizer", "train", sources[0], "--out", str(tmp_path / "out")],
        ["infer", str(tmp_path / "pipe")],
    ):
        assert cli.main(words) == 2
        assert "pipe is a named pipe, and reading it may never end: give a regular file" in capsys.readouterr().err
    os.mkfifo(tmp_path / "meta.pkl")
    (tmp_path / "train.bin").write_bytes(b"\1\0" * 50)
    with pytest.raises(UserError, match=r"meta\.pkl is a named pipe"):
        Prepared.open(tmp_path).tokenizer  # noqa: B018
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []
