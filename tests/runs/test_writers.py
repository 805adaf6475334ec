"""A run folder has one writer, which touches nothing that is not a run's; what cannot be read is not called damaged."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model, tiny_run, tiny_training

from attnlab import data
from attnlab.cli import main as cli
from attnlab.comparison import grid
from attnlab.config import RunConfig
from attnlab.errors import UserError
from attnlab.files import alone
from attnlab.runs import checkpoint
from attnlab.runs import folder as run_folder
from attnlab.runs.folder import RunFolder, load_model
from attnlab.training.train import train

POSIX = pytest.mark.skipif(os.name != "posix", reason="Windows has no locks of this kind")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    home = tmp_path_factory.mktemp("text")
    return tiny_run(
        home, model=tiny_model(n_layers=1), train=tiny_training(steps=4, eval_every=2, save_every=2, keep=0)
    )


@pytest.fixture(scope="module")
def trained(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    train(config, out)
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def unfinished(run: Path) -> Path:
    """The run as it was after its second step."""
    shutil.rmtree(run / "step-00000004")
    (run / "result.json").unlink()
    return run


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Another holds the lock of the folder."""
    ready, done = threading.Event(), threading.Event()

    def hold() -> None:
        with alone(folder, "trains in"):
            ready.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@POSIX
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("begun", ["new", "begun", "done"])
def test_a_second_process_is_refused(begun: str, resume: bool, config: RunConfig, run: Path, tmp_path: Path) -> None:
    folder = {"new": lambda: tmp_path / "new", "begun": lambda: unfinished(run), "done": lambda: run}[begun]()
    with held(folder):
        before = contents(folder)
        with pytest.raises(UserError, match=r"another process trains in .*: wait until it has ended, or stop it"):
            train(config, folder, resume=resume, patience=0.0)
        assert contents(folder) == before
    assert train(config, folder, resume=begun != "new", patience=0.0).status == "done"


@POSIX
def test_cells_of_a_comparison_wait(config: RunConfig, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert grid.PATIENCE >= 60
    monkeypatch.setattr(grid, "PATIENCE", 0.3)
    with held(run), pytest.raises(UserError, match="another process trains in"):
        grid.train_cell(config, run, lambda event: None)
    waited = threading.Timer(0.5, lambda: None)
    monkeypatch.setattr(grid, "PATIENCE", 30.0)
    holding = held(unfinished(run))
    holding.__enter__()
    waited.function = lambda: holding.__exit__(None, None, None)
    waited.start()
    grid.train_cell(config, run, lambda event: None)
    waited.join()
    assert RunFolder.open(run).newest() == 4


@POSIX
def test_a_run_that_cannot_begin_leaves_nothing(config: RunConfig, tmp_path: Path) -> None:
    too_long = replace(config, model=replace(config.model, context=5000))
    with pytest.raises(UserError, match="context"):
        train(too_long, tmp_path / "a" / "b" / "run")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a run folder"):
        train(config, tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"notes.txt": b"mine"}


def test_a_tokenizer_of_mine_is_not_replaced(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"kind": "byte"}')
    with pytest.raises(UserError, match="is not a run folder; name a new or an empty folder"):
        train(config, tmp_path)
    assert contents(tmp_path) == {"tokenizer.json": b'{"kind": "byte"}'}
    written = json.dumps(data.load(config.data).tokenizer.to_json()) + "\n"
    (tmp_path / "tokenizer.json").write_text(written)  # as by a run that was killed there
    assert train(config, tmp_path).status == "done"


def test_going_on_removes_nothing_that_no_run_wrote(config: RunConfig, run: Path) -> None:
    unfinished(run)
    mine = [
        "step-notes/x.txt",
        ".step-backup/x.txt",
        ".keep.json.old/x.txt",
        "step-00000003/notes.txt",
        "step-00000009",
    ]
    for name in mine:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    half = [run / "step-00000003" / "model.safetensors", run / ".step-00000004" / "state.json"]
    half[1].parent.mkdir()
    for path in half:
        path.write_text("half of it")
    assert train(config, run, resume=True).status == "done"
    assert {name for name in mine if (run / name).read_text() == "mine"} == set(mine)
    assert not any(path.exists() for path in half) and not half[1].parent.exists()
    assert RunFolder.open(run).steps() == [2, 4]


def test_only_whole_names_are_checkpoints(run: Path) -> None:
    for name in ("step-٣", "step-0000006", "step-7", "step-", "step-x", "step-00000008.bak", ".step-00000009"):
        shutil.copytree(run / "step-00000004", run / name)
    (run / "step-00000010").write_text("a file")
    (run / "step-00000012").symlink_to("step-00000012")
    assert RunFolder.open(run).steps() == [2, 4]


def test_a_checkpoint_under_another_name_is_refused(run: Path) -> None:
    shutil.copytree(run / "step-00000002", run / "step-00000006")
    with pytest.raises(UserError, match=r"step-00000006/commit.json is damaged \(it is of step 2\)"):
        load_model(run)


@pytest.mark.parametrize("name", ["../../text.txt", "/etc/hostname", "sub/../../x", 7])
def test_a_commit_names_files_of_its_own_folder(name: Any, run: Path) -> None:
    path = run / "step-00000004" / "commit.json"
    held = json.loads(path.read_text())
    key = f"model.{name}" if name == "../../text.txt" else name
    held["files"] = {"state.json": held["files"]["state.json"], key: {"bytes": 0, "sha256": ""}}
    path.write_text(json.dumps(held))
    with pytest.raises(UserError, match=r"no file in its own folder|is damaged"):
        RunFolder.open(run).load()


FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EIO)


@pytest.mark.parametrize("number", FORBIDDEN)
def test_what_may_not_be_read_is_not_damaged(number: int, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = checkpoint.check_file

    def refuse(path: Path, facts: Any) -> None:
        if path.parent.name == "step-00000004":
            raise OSError(number, os.strerror(number), str(path))
        honest(path, facts)

    monkeypatch.setattr(run_folder, "check_file", refuse)
    with pytest.raises(UserError) as told:
        load_model(run)
    said = str(told.value)
    assert f"safetensors cannot be read ({os.strerror(number)}): make it readable" in said
    assert "damaged" not in said and "delete" not in said
    assert load_model(run, 2)


def test_a_newest_checkpoint_that_may_not_be_looked_into_is_not_passed_over(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = Path.lstat

    def refuse(self: Path) -> os.stat_result:
        if self.parent.name == "step-00000004":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return honest(self)

    monkeypatch.setattr(Path, "lstat", refuse)
    with pytest.raises(UserError, match=r"step-00000004 cannot be read \(Permission denied\): make it readable, or"):
        RunFolder.open(run).newest()
    assert cli.main(["sample", str(run), "--tokens", "3"]) == 2
    assert "step-00000004 cannot be read (Permission denied)" in capsys.readouterr().err


@POSIX
def test_pipes_in_a_run_folder_end_it(config: RunConfig, run: Path) -> None:
    unfinished(run)
    for name in ("metrics.jsonl", "step-00000002/state.json", "run.json", "tokenizer.json"):
        (run / name).rename(run / "kept")
        os.mkfifo(run / name)
        with pytest.raises(UserError, match=r"named pipe|it has 0 bytes|has no run.json"):
            train(config, run, resume=True) if name != "tokenizer.json" else RunFolder.open(run).tokenizer()
        (run / name).unlink()
        (run / "kept").rename(run / name)


@pytest.mark.parametrize(("value", "said"), [("nan", "NaN or infinity in"), ("inf", "NaN or infinity in")])
def test_weights_that_are_not_finite_are_named(
    value: str, said: str, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = RunFolder.open(run)
    model = load_model(run)[0]
    name = next(name for name, _ in model.named_parameters() if "norm" in name)
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[-1] = float(value)
    folder.save(8, model, {}, folder.state())
    text = f"text:{tmp_path / 'text.txt'}"
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 40)
    for words in (
        ["sample", str(run), "--tokens", "2"],
        ["infer", str(run), "--tokens", "2"],
        ["eval", str(run), "--data", text],
        ["heads", str(run), "--sequences", "2"],
        ["convert", str(run), "--to", "mla", "--data", text, "--out", str(tmp_path / "out")],
        ["export", str(run), "--out", str(tmp_path / "out")],
    ):
        assert cli.main(words) == 2, words
        err = capsys.readouterr().err
        assert said in err and name in err and err.count("attnlab: ") == 1, err
    assert not (tmp_path / "out").exists()
    assert cli.main(["sample", str(run), "--tokens", "2", "--checkpoint", "4"]) == 0


def test_weights_of_another_kind_are_named(run: Path) -> None:
    model = load_model(run)[0]
    tensors = RunFolder.open(run).load_weights()
    name = next(iter(tensors))
    with pytest.raises(UserError, match=rf"the checkpoint has {name} in int32, and weights are floating-point numbers"):
        run_folder.load_weights(model, tensors | {name: tensors[name].to(torch.int32)})
