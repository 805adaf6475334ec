"""Folders of models: their files lie inside them, their numbers are numbers, and they are written whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PANGRAM
from safetensors.torch import load_file, save_file

from attnlab import data, pretrained
from attnlab.cli import main as cli
from attnlab.config import ModelConfig
from attnlab.errors import UserError
from attnlab.model import Decoder
from attnlab.pretrained import folders

SHAPE: dict[str, Any] = {"context": 16, "n_layers": 1, "d_model": 16, "n_heads": 2, "norm": "rms", "ff": "swiglu"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that reads characters."""
    tokenizer = data.from_text(PANGRAM).tokenizer
    torch.manual_seed(0)
    model = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, **SHAPE)).eval()
    folder = tmp_path_factory.mktemp("written") / "llama"
    return pretrained.save(pretrained.Loaded(model, tokenizer, "mine", "run"), folder, family="llama")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "llama"))


def commands(folder: Path) -> list[list[str]]:
    """Every command that reads a model's weights."""
    text = folder.parent / "text.txt"
    text.write_text(40 * PANGRAM)
    source, out = str(folder), str(folder.parent / "out")
    return [
        ["infer", source, "--tokens", "2"],
        ["eval", source, "--data", f"text:{text}"],
        ["heads", source, "--sequences", "2", "--no-ablation"],
        ["convert", source, "--to", "mla", "--data", f"text:{text}", "--calibrate", "1", "--out", out],
        ["patch", source, "--mechanism", "mla", "--out", out],
        ["export", source, "--out", out],
        ["heal", source, "--steps", "1", "--data", f"text:{text}", "--out", out],
    ]


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *said: str) -> None:
    for words in commands(folder):
        capsys.readouterr()
        assert cli.main(words) == 2, words
        err = capsys.readouterr().err
        assert err.count("attnlab: ") == 1 and all(word in err for word in said), (words, err)
        assert not (folder.parent / "out").exists(), words


def scattered(folder: Path, name: Any) -> Path:
    """Put the weights where an index says that they are: `name`."""
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    return index


@pytest.mark.parametrize("name", ["../out.safetensors", "sub/../../out.safetensors", "{absolute}", "..", "a\x00b"])
def test_an_index_names_files_of_its_own_folder(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    outside = folder.parent / "out.safetensors"
    shutil.copy(folder / "model.safetensors", outside)
    scattered(folder, name.format(absolute=outside))
    refused(folder, capsys, "index.json names ", "which is no file in its own folder")


@pytest.mark.parametrize(
    "held", [None, [], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 5, "b": "x"}}]
)
def test_an_index_that_is_none_is_refused(held: Any, folder: Path) -> None:
    scattered(folder, "part.safetensors").write_text(json.dumps(held))
    with pytest.raises(UserError, match="has no weight_map of tensor names and their files"):
        pretrained.load(folder)


def test_an_index_of_its_own_files_is_read(folder: Path, written: Path) -> None:
    (folder / "sub").mkdir()
    scattered(folder, "sub/part.safetensors")
    (folder / "part.safetensors").rename(folder / "part")
    (folder / "sub" / "part.safetensors").symlink_to("../part")  # as in the cache of the hub
    a, b = (pretrained.load(each).model.state_dict() for each in (folder, written))
    assert all(torch.equal(a[name], b[name]) for name in b)


def change(folder: Path, name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: make(tensors[name])}, folder / "model.safetensors", {"format": "pt"})


def last(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def make(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return make


DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.norm.weight"
WRONG: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "one NaN": (DOWN, last(float("nan")), "NaN or infinity in"),
    "minus infinity": (NORM, last(float("-inf")), "NaN or infinity in"),
    "infinity in half precision": (DOWN, lambda t: last(float("inf"))(t.half()), "NaN or infinity in"),
    "whole numbers": (DOWN, lambda t: t.to(torch.int16), "floating-point numbers"),
    "truth values": (NORM, lambda t: t > 0, "floating-point numbers"),
    "another shape": (NORM, lambda t: t[:-1].clone(), "[15]"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_tensor_is_named_by_every_command(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    name, make, said = WRONG[kind]
    change(folder, name, make)
    refused(folder, capsys, said, name)


def test_weights_that_are_too_large_are_said_to_be(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(folder, DOWN, lambda tensor: torch.full_like(tensor, 3e38))
    change(folder, "model.layers.0.mlp.up_proj.weight", lambda tensor: torch.full_like(tensor, 3e38))
    for words in commands(folder)[:4]:
        assert cli.main(words) == 2, words
        assert "the model computes NaN or infinity" in capsys.readouterr().err, words


@pytest.mark.skipif(os.name != "posix", reason="other systems have no modes of this kind")
def test_all_exported_files_have_the_modes_of_new_files(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (folder / "tokenizer.json").chmod(0o400)  # patch copies it
    before = os.umask(0o027)
    try:
        assert cli.main(["export", str(folder), "--out", str(tmp_path / "a")]) == 0
        assert cli.main(["patch", str(folder), "--mechanism", "gqa", "--out", str(tmp_path / "b")]) == 0
    finally:
        os.umask(before)
    for out in (tmp_path / "a", tmp_path / "b"):
        assert stat.S_IMODE(out.stat().st_mode) == 0o750
        assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o640}, out


KILLED = """
import os, signal, sys
from attnlab.cli import main as cli
honest, left = os.fsync, [int(sys.argv[1])]
def fsync(handle):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    honest(handle)
os.fsync = fsync
raise SystemExit(cli.main(sys.argv[2:]))
"""


@pytest.mark.skipif(os.name != "posix", reason="Windows has no locks of this kind")
def test_a_killed_conversion_leaves_nothing_that_the_next_does_not_remove(folder: Path, tmp_path: Path) -> None:
    words = next(words for words in commands(folder) if words[0] == "convert")
    before = {path.name for path in tmp_path.iterdir()}
    done = subprocess.run([sys.executable, "-c", KILLED, "6", *words], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = {path.name for path in tmp_path.iterdir()} - before
    assert left.startswith(".out.attnlab-")
    assert cli.main(words) == 0
    assert {path.name for path in tmp_path.iterdir()} - before == {"out"}
    assert json.loads((tmp_path / "out" / "certificate.json").read_text())["target"] == "mla"


def test_a_grid_that_fails_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly")
    from attnlab.report import conversion

    def fail(*_: Any, **__: Any) -> None:
        raise UserError("the page cannot be made")

    monkeypatch.setattr(conversion, "write_grid", fail)
    words = next(words for words in commands(folder) if words[0] == "convert")
    before = {path.name for path in tmp_path.iterdir()}
    assert cli.main([*words, "--grid", "0.5"]) == 2
    assert {path.name for path in tmp_path.iterdir()} == before


def test_numbers_of_eight_bits_are_looked_at(tmp_path: Path) -> None:
    whole = torch.ones(3).to(torch.float8_e5m2)
    assert folders.LazyTensor((3,), lambda: whole).floating
    from attnlab.runs.tensors import finite_weights

    assert finite_weights("x", whole, "mine") is whole
    with pytest.raises(UserError, match="mine has NaN or infinity in x"):
        finite_weights("x", torch.tensor([1.0, float("inf")]).to(torch.float8_e5m2), "mine")
    for fine in (torch.empty(0), torch.ones(2, device="meta")):
        assert finite_weights("x", fine, "mine") is fine
    assert finite_weights("calls", torch.tensor(3), "mine", floating=False) == 3
