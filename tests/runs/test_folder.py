from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from attnlab import attention, data
from attnlab.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from attnlab.errors import UserError
from attnlab.model import Decoder
from attnlab.results import RunResult
from attnlab.runs import checkpoint
from attnlab.runs import folder as run_folder
from attnlab.runs.folder import RunFolder
from attnlab.runs.processes import Processes
from attnlab.runs.tensors import Piece, Stored, load_weights, weights, whole_piece

CORPUS = data.from_text("to be or not to be, that is the question\n" * 20, "mine")
MODEL = ModelConfig(vocab_size=CORPUS.vocab_size, context=16, n_layers=1, d_model=16, n_heads=2)
CONFIG = RunConfig(name="tiny", model=MODEL, data=DataConfig(source="text:mine"))


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", CONFIG, CORPUS)


def fill(folder: RunFolder, *steps: int) -> nn.Module:
    model = nn.Linear(3, 2)
    for step in steps:
        folder.save(step, model, {"adamw/weight/exp_avg": torch.full((2, 3), float(step))}, {"seconds": 1.5})
    return model


def names(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


def test_create_and_open(folder):
    assert names(folder.path) == {"run.json", "tokenizer.json"}
    again = RunFolder.open(folder.path)
    assert again.config == CONFIG and again.about["data"]["fingerprint"] == CORPUS.fingerprint
    assert again.about["format"] == 1 and "python" in again.about["environment"]
    assert again.tokenizer().chars == CORPUS.tokenizer.chars
    assert again.result() is None and again.metrics() == [] and again.newest() is None
    with pytest.raises(UserError, match="no checkpoint yet"):
        again.load()


def test_save_and_load(folder):
    model = fill(folder, 5, 10, 15)
    assert folder.steps() == [10, 15] and folder.newest() == 15  # the newest two
    assert names(folder.path) == {"run.json", "tokenizer.json", "step-00000010", "step-00000015"}
    assert names(folder.path / "step-00000015") == {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "commit.json",
    }
    step, weights, optimizer, state = folder.load()
    assert step == 15 and state == {"step": 15, "seconds": 1.5}
    assert torch.equal(weights["weight"], model.weight) and torch.equal(weights["bias"], model.bias)
    assert optimizer["adamw/weight/exp_avg"].unique().tolist() == [15.0]
    assert folder.load(10).optimizer["adamw/weight/exp_avg"].unique().tolist() == [10.0]
    with pytest.raises(UserError, match="no checkpoint of step 5; it has 10, 15"):
        folder.load(5)


def test_metrics(folder):
    for step in range(1, 5):
        folder.log({"step": step, "loss": float("nan") if step == 4 else step / 3})
    assert folder.metrics()[2] == {"step": 3, "loss": 1.0} and folder.metrics()[3]["loss"] is None
    with open(folder.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # a crash
    assert [record["step"] for record in folder.metrics()] == [1, 2, 3, 4]
    (folder.path / ".step-00000004").mkdir()
    (folder.path / ".gitignore").touch()
    folder.forget_after(2)
    folder.log({"step": 3})
    assert [record["step"] for record in folder.metrics()] == [1, 2, 3]
    assert names(folder.path) == {"run.json", "tokenizer.json", "metrics.jsonl", ".gitignore"}
    (folder.path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"a line of .*metrics\.jsonl is not readable JSON"):
        folder.metrics()
    (folder.path / "metrics.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl lacks step"):
        folder.metrics()


def test_result(folder):
    result = RunResult(name="tiny", mechanism="mha", seed=0, key=CONFIG.key, curve=[[1, 2.5]])
    folder.write_result(result)
    assert folder.result() == result


@pytest.mark.parametrize("name", attention.names())
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_comes_back(tmp_path, name, tied):
    config = replace(CONFIG, model=replace(MODEL, mechanisms=(name,), tied=tied, context=32, ff="moe"))
    folder = RunFolder.create(tmp_path, config, CORPUS)
    model = Decoder(config.model).eval()
    folder.save(1, model, {}, {})
    random = torch.get_rng_state()
    again, found = run_folder.load_model(tmp_path)
    assert found == config and not again.training and torch.equal(torch.get_rng_state(), random)
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens)[0], model(tokens)[0])
    # a tied matrix is stored, and stays, one
    stored = sum(
        tensor.numel() for key, tensor in folder.load_weights().items() if key in dict(model.named_parameters())
    )
    assert stored == model.parameter_count() == again.parameter_count()


def test_tied_weights_under_two_names():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    one, other = Tied(), Tied()
    assert list(weights(one)) == ["embed.weight"]
    load_weights(other, weights(one))
    assert torch.equal(other.head.weight, one.embed.weight) and other.head.weight is other.embed.weight


def test_weights_of_another_model_are_refused():
    model = nn.Linear(3, 2)
    for tensors, said in (
        ({"weight": torch.zeros(2, 3)}, "bias"),
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, "weight"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "gate": torch.zeros(1)}, "gate"),
    ):
        with pytest.raises(UserError, match=f"does not fit the model: names or shapes differ at {said}"):
            load_weights(model, tensors)


def test_tensors_in_pieces(tmp_path):
    """Written whole or in stretches, by one or by three, whatever stretch is asked for comes back."""
    tensors = {"a": torch.randn(7, 3, 2), "b": torch.randn(5), "c": torch.tensor(3), "d": torch.empty(0, 4)}
    for cuts in ([], [0, 11], [1, 1, 40]):
        folder = RunFolder.create(tmp_path / f"in-{len(cuts) + 1}", CONFIG, CORPUS)
        ends = [0, *cuts, 42]
        place = folder.path / "step-00000003"
        folder.save_pieces(3, {name: whole_piece(tensor) for name, tensor in tensors.items()}, {}, {})
        files = []
        for number, (start, stop) in enumerate(pairwise(ends)):
            held = {"a": Piece(tensors["a"].flatten()[start:stop], start, (7, 3, 2))}
            held |= {name: whole_piece(tensors[name]) for name in "bcd"} if number == 0 else {}
            checkpoint.write_pieces(place, held, {}, Processes(rank=number, size=len(ends) - 1))
            files.append(place / (f"model.rank-{number:05d}.safetensors" if number else "model.safetensors"))
        stored = Stored(files)
        assert sorted(stored.names()) == [*"abcd"] and stored.shape("a") == (7, 3, 2)
        for name, tensor in tensors.items():
            assert torch.equal(stored.read(name), tensor)
        for start in range(0, 43, 5):
            for stop in range(start, 43, 3):
                assert torch.equal(stored.read("a", start, stop), tensors["a"].flatten()[start:stop])
        if cuts:
            with pytest.raises(ValueError, match="parts of a are missing"):
                Stored(files[:-1])


def cut(folder: Path, tensor: torch.Tensor, cuts: list[int], name: str = "a") -> list[Path]:
    """Files, in order, of the stretches of `tensor` between `cuts`, each written by a process of its own."""
    folder.mkdir()
    ends = [0, *cuts, tensor.numel()]
    for number, (start, stop) in enumerate(pairwise(ends)):
        held = {name: Piece(tensor.flatten()[start:stop], start, tuple(tensor.shape))}
        checkpoint.write_pieces(folder, held, {}, Processes(rank=number, size=len(ends) - 1))
    others = [folder / f"model.rank-{number:05d}.safetensors" for number in range(1, len(ends) - 1)]
    return [folder / "model.safetensors", *others]


@pytest.mark.parametrize("shape", [(13,), (3, 5), (5, 1, 3), (2, 3, 4)])
@pytest.mark.parametrize("cuts", [None, [4, 9], [1, 2, 12], [6, 6]])
def test_any_stretch_is_read_from_any_pieces(tmp_path, shape, cuts):
    """Numbers that tell where they are from: every beginning and end within, at the edge of and beyond a piece."""
    tensor = torch.arange(100, 100 + math.prod(shape)).view(shape)
    if cuts is None:  # in its own shape
        RunFolder.create(tmp_path / "run", CONFIG, CORPUS).save_pieces(1, {"a": whole_piece(tensor)}, {}, {})
        files = [tmp_path / "run" / "step-00000001" / "model.safetensors"]
    else:
        files = cut(tmp_path / "cut", tensor, cuts)
    for each in (files, files[::-1]):
        stored = Stored(each)
        assert stored.names() == ["a"] and stored.shape("a") == shape and torch.equal(stored.read("a"), tensor)
        assert torch.equal(stored.all()["a"], tensor)
        for start in range(tensor.numel() + 1):
            assert torch.equal(stored.read("a", start, tensor.numel()), tensor.flatten()[start:])
            for stop in range(start, tensor.numel()):
                found = stored.read("a", start, stop)
                assert found.dtype == torch.int64 and found.tolist() == list(range(100 + start, 100 + stop))


def test_a_piece_that_is_not_asked_for_is_not_opened(tmp_path):
    tensor = torch.randn(4, 5)
    files = cut(tmp_path / "cut", tensor, [3, 11])
    stored = Stored(files)
    files[1].unlink()
    assert torch.equal(stored.read("a", 0, 3), tensor.flatten()[:3])
    assert torch.equal(stored.read("a", 11, 17), tensor.flatten()[11:17])
    for start, stop in ((2, 4), (10, 12), (5, 6)):
        with pytest.raises(FileNotFoundError):
            stored.read("a", start, stop)


def test_pieces_that_are_missing_or_there_twice_are_noticed(tmp_path):
    tensor = torch.randn(4, 5)
    files = cut(tmp_path / "cut", tensor, [3, 11])
    assert torch.equal(Stored(files).read("a"), tensor)
    longer = cut(tmp_path / "longer", torch.randn(5, 5), [3, 20])  # the last five begin where all of `tensor` ends
    for wrong in (files[:2], files[1:], files[::2], [*files, files[1]], [longer[2], *files], longer[1:]):
        with pytest.raises(ValueError, match="parts of a are missing"):
            Stored(wrong)


def test_pieces_that_name_different_shapes_are_refused(tmp_path):
    """As many numbers, in another order: the file that is read last must not decide."""
    one, other = cut(tmp_path / "one", torch.randn(4, 6), [9]), cut(tmp_path / "other", torch.randn(6, 4), [9])
    for wrong in ([one[0], other[1]], [other[1], one[0]]):
        with pytest.raises(ValueError, match="parts of a are missing: its pieces are of tensors of several shapes"):
            Stored(wrong)


def test_each_process_writes_what_it_holds_and_says_so(tmp_path):
    """The first one's files are there though empty; a whole tensor needs no word on where it begins."""
    processes, piece = Processes(rank=2, size=3), whole_piece(nn.Linear(3, 2).weight)
    assert not piece.data.requires_grad and piece.start == 0 and piece.shape == (2, 3)
    part = Piece(torch.arange(5.0), 4, (3, 3))
    assert checkpoint.write_pieces(tmp_path, {}, {}, processes) == {} and not names(tmp_path)
    written = checkpoint.write_pieces(tmp_path, {}, {"b": part, "a": piece}, processes)
    assert set(written) == names(tmp_path) == {"optimizer.rank-00002.safetensors"}
    content = (tmp_path / "optimizer.rank-00002.safetensors").read_bytes()
    about = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert written["optimizer.rank-00002.safetensors"] == about
    with safe_open(tmp_path / "optimizer.rank-00002.safetensors", "pt") as opened:
        assert json.loads(opened.metadata()["pieces"]) == {"b": [4, [3, 3]]}
        assert torch.equal(opened.get_tensor("b"), part.data) and torch.equal(opened.get_tensor("a"), piece.data)
    assert set(checkpoint.write_pieces(tmp_path, {"a": piece}, {}, Processes())) == {
        "model.safetensors",
        "optimizer.safetensors",
    }
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        assert "pieces" not in (opened.metadata() or {})


def test_optimizer_state_of_another_model_is_refused(folder):
    fill(folder, 5)
    stored = folder.stored(5, "optimizer")
    assert list(stored.states({"adamw": None}, {"weight": torch.zeros(2, 3)})) == [
        ("adamw/weight/exp_avg", "adamw", "weight", "exp_avg")
    ]
    with pytest.raises(UserError, match=r"'weight' of 'adamw', which this model lacks"):
        list(stored.states({"adamw": None}, {"bias": torch.zeros(2)}))
    with pytest.raises(UserError, match=r"'weight' of 'adamw', which this model lacks"):
        list(stored.states({"muon": None}, {"weight": torch.zeros(2, 3)}))


def test_the_best_checkpoint_stays(folder):
    """And the newest two; a checkpoint without a validation of its own is no candidate."""
    model = nn.Linear(3, 2)
    for step, loss in ((5, 2.5), (10, 2.0), (15, None), (20, 2.25), (25, 2.1)):
        folder.log({"step": step, "val_loss": loss} if loss else {"step": step, "loss": 0.5})
        folder.save(step, model, {}, {})
    assert folder.steps() == [10, 20, 25] and folder.best() == 10
    folder.log({"step": 30, "val_loss": 1.5})
    folder.save(30, model, {}, {})
    assert folder.steps() == [25, 30] and folder.best() == 30
    assert RunFolder.create(folder.path.parent / "other", CONFIG, CORPUS).best() is None


def test_what_is_not_committed_is_not_there(folder):
    fill(folder, 5, 10)
    (folder.path / "step-00000010" / "commit.json").unlink()
    assert folder.steps() == [5] and folder.load().step == 5
    folder.forget_after(5)
    assert "step-00000010" not in names(folder.path)


def test_folders_that_are_taken(folder, tmp_path):
    with pytest.raises(UserError, match="already holds this run; add --resume"):
        RunFolder.create(folder.path, replace(CONFIG, name="renamed"), CORPUS)
    other = replace(CONFIG, seed=7, train=TrainConfig(lr=0.5))
    for make in (RunFolder.create, RunFolder.resume):
        with pytest.raises(
            UserError, match=r"another run \(train\.lr 0\.001 there, 0\.5 given; seed 0 there, 7 given\)"
        ):
            make(folder.path, other, CORPUS)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    for taken in (tmp_path / "notes", tmp_path / "notes" / "mine.txt"):
        with pytest.raises(UserError, match="not a run folder"):
            RunFolder.create(taken, CONFIG, CORPUS)
    with pytest.raises(UserError, match="cannot be made"):
        RunFolder.create(tmp_path / "notes" / "mine.txt" / "deeper", CONFIG, CORPUS)
    assert names(tmp_path / "notes") == {"mine.txt"}


def test_a_difference_in_options_is_told(tmp_path):
    made = replace(CONFIG, model=replace(MODEL, mechanisms=("mla",)))
    RunFolder.create(tmp_path, made, CORPUS)
    with pytest.raises(UserError, match=r"model\.options \{\} there, \{'mla': \{'kv_rank': 8\}\} given"):
        RunFolder.resume(tmp_path, replace(made, model=replace(made.model, options={"mla": {"kv_rank": 8}})), CORPUS)


def test_resume_needs_the_same_text(folder):
    assert RunFolder.resume(folder.path, CONFIG, CORPUS).config == CONFIG
    changed = data.from_text("to be or not to be, that is the question\n" * 21, "mine")
    with pytest.raises(UserError, match="text of 'mine' is not what"):
        RunFolder.resume(folder.path, CONFIG, changed)


def test_folders_that_are_no_runs(folder, tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        RunFolder.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no run\.json"):
        RunFolder.open(tmp_path)
    about = folder.path / "run.json"
    held = json.loads(about.read_text())
    for content, said in (
        ({**held, "format": 2}, "format 2, but this version reads format 1"),
        ([], "must be an object with fields"),
        ({"format": 1}, "it lacks key"),
        ({**held, "config": {**held["config"], "sead": 1}}, "'sead'.*'seed'"),
    ):
        about.write_text(json.dumps(content))
        with pytest.raises(UserError, match=said):
            RunFolder.open(folder.path)
    about.write_text('{"format": 1, "conf')
    with pytest.raises(UserError, match=r"run\.json is not readable JSON"):
        RunFolder.open(folder.path)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["half", "empty", "missing", "noise"])
def test_a_damaged_checkpoint_is_named_and_so_is_the_way_out(folder, file, damage):
    fill(folder, 5, 10)
    path = folder.path / "step-00000010" / file
    content = path.read_bytes()
    path.write_bytes({"half": content[: len(content) // 2], "noise": b"\xff" * len(content)}.get(damage, b""))
    if damage == "missing":
        path.unlink()
    with pytest.raises(UserError, match=rf"step-00000010/{file} is damaged .*delete the folder step-00000010 .*step 5"):
        folder.load()
    shutil.rmtree(path.parent)
    assert folder.load().step == 5
    (folder.path / "step-00000005" / file).write_bytes(b"")
    with pytest.raises(UserError, match="there is no earlier one"):
        folder.load()


def test_a_save_that_fails_leaves_nothing(folder, monkeypatch):
    fill(folder, 5)
    write = checkpoint.write_file

    def full(path: Path, content: bytes) -> None:
        if path.name == "state.json":
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(checkpoint, "write_file", full)
    with pytest.raises(UserError, match=r"cannot write .*step-00000010: the disk is full; free space"):
        fill(folder, 10)
    assert names(folder.path) == {"run.json", "tokenizer.json", "step-00000005"}
    monkeypatch.setattr(checkpoint, "write_file", lambda path, content: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fill(folder, 10)
    assert names(folder.path) == {"run.json", "tokenizer.json", "step-00000005"}


def test_a_folder_that_cannot_be_begun_is_not_there(tmp_path, monkeypatch):
    write = run_folder.write_json

    def full(path: Path, content: dict, indent: int | None = 1) -> Path:
        if path.name == "run.json":
            raise UserError("the disk is full")
        return write(path, content, indent)

    monkeypatch.setattr(run_folder, "write_json", full)
    (tmp_path / "mine").mkdir()
    for path in (tmp_path / "new", tmp_path / "mine"):
        with pytest.raises(UserError, match="full"):
            RunFolder.create(path, CONFIG, CORPUS)
    assert names(tmp_path) == {"mine"} and not names(tmp_path / "mine")
    (tmp_path / "mine" / "tokenizer.json").touch()  # as after a kill between the two files
    monkeypatch.undo()
    assert RunFolder.create(tmp_path / "mine", CONFIG, CORPUS).tokenizer().chars == CORPUS.tokenizer.chars


LIMITED = """
import resource, signal, sys, torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write past the limit fails as on a full disk
from attnlab.runs.folder import RunFolder
folder = RunFolder.open(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    folder.save(10, torch.nn.Linear(100, 100), {}, {})
except ValueError as error:
    print(error)
try:
    for step in range(10_000):
        folder.log({"step": step})
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of a file")
def test_a_disk_that_is_really_full(folder):
    fill(folder, 5)
    command = [sys.executable, "-c", LIMITED, str(folder.path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == 2 and all("disk is full; free space" in line for line in said)
    assert names(folder.path) == {"run.json", "tokenizer.json", "step-00000005", "metrics.jsonl"}
    folder.forget_after(5)  # the line that was cut short
    assert [record["step"] for record in folder.metrics()] == [0, 1, 2, 3, 4, 5]
