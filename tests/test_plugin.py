"""A package that attnlab has never heard of adds a mechanism through an entry point, and every command knows it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="hatchling builds the package: pip install 'attnlab[test]'")

ROOT = Path(__file__).parents[1]
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "somebodys-attention"
version = "0.3"

[project.entry-points."attnlab.attention"]
shared_kv = "somebodys_attention.shared_kv"
absent = "somebodys_attention.absent"
"""
SHORT = ["--train.steps", "4", "--train.eval-every", "2", "--train.eval-batches", "1", "--train.precision", "fp32"]
SESSION = """
import contextlib, io, json, sys
from attnlab.cli import main as cli

said = []
for words in json.load(sys.stdin):
    sys.argv = ["attnlab", *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main()
    said.append([code, out.getvalue(), err.getvalue()])
json.dump(said, sys.stdout)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the package."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    package = source / "somebodys_attention"
    package.mkdir()
    (source / "pyproject.toml").write_text(PROJECT)
    (package / "__init__.py").write_text("")
    readme = (ROOT / "README.md").read_text("utf-8")
    mechanism = re.search(r"<!-- file: shared_kv.py -->\n```python\n(.*?)```", readme, re.DOTALL)
    assert mechanism
    (package / "shared_kv.py").write_text(mechanism.group(1))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    command = [*pip, "--no-deps", "--no-build-isolation", "--target", str(site), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return site


@pytest.fixture(scope="module")
def said(site: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Every command, one after the other, in a process that sees the package."""
    commands = {
        "list": ["list", "--json"],
        "markdown": ["list", "--markdown"],
        "audit": ["audit", "shared_kv"],
        "train": ["train", "quick", "--mechanism", "shared_kv", "--out", "run", *SHORT],
        "hybrid": ["train", "quick", "--mechanism", "sliding,shared_kv", "--out", "hybrid", *SHORT],
        "sample": ["sample", "run", "--prompt", "ROMEO:", "--prompt", "A", "--tokens", "6", "--json"],
        "compare": [
            "compare",
            "quick",
            "--mechanisms",
            "shared_kv,latent_lookup",
            "--seeds",
            "1",
            "--jobs",
            "1",
            *SHORT,
        ],
        "bench": ["bench", "decode", "--mechanisms", "mha,shared_kv", "--context", "9", "--repeats", "1", "--json"],
        "absent": ["train", "quick", "--mechanism", "absent", "--out", "none"],
    }
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    run = subprocess.run(
        [sys.executable, "-c", SESSION],
        input=json.dumps([*commands.values()]),
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path_factory.mktemp("work"),
    )
    assert run.returncode == 0, run.stderr
    return {name: tuple(answer) for name, answer in zip(commands, json.loads(run.stdout), strict=True)}


def test_it_is_audited(said: dict[str, tuple[int, str, str]]) -> None:
    code, out, err = said["audit"]
    assert code == 0, out + err
    assert "shared_kv obeys all" in out


def test_it_trains_and_decodes(said: dict[str, tuple[int, str, str]]) -> None:
    for name in ("train", "hybrid", "sample"):
        assert said[name][0] == 0, said[name]
    assert [len(text) for text in json.loads(said["sample"][1])["texts"]] == [6, 6]


def test_it_is_compared_and_measured(said: dict[str, tuple[int, str, str]]) -> None:
    code, out, err = said["compare"]
    assert code == 0, err
    assert "shared_kv" in out
    mha, own = json.loads(said["bench"][1])
    assert not own["error"]
    assert own["cache_bytes"] * 2 == mha["cache_bytes"]


def test_it_is_listed_as_somebody_elses(said: dict[str, tuple[int, str, str]]) -> None:
    records = {r["name"]: r for r in json.loads(said["list"][1])}
    assert records["shared_kv"]["package"] == "somebodys_attention"
    assert records["shared_kv"]["floats_per_token"] == 12 * 64
    assert "shared_kv" not in said["markdown"][1], "our documents are about our mechanisms"


def test_an_entry_point_that_leads_nowhere_is_one_sentence(said: dict[str, tuple[int, str, str]]) -> None:
    code, _, err = said["absent"]
    assert code == 2 and err.count("\n") == 1
    assert "somebodys_attention.absent" in err
    records = {r["name"]: r for r in json.loads(said["list"][1])}
    assert "somebodys_attention.absent" in records["absent"]["error"]
