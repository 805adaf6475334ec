"""Mechanisms of other packages that end the process, raise or print while they are imported harm no other command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnlab import UserError, attention, plugins

MODULES = {
    "leaves": "import os\nos._exit(0)\n",
    "exits": "raise SystemExit(0)\n",
    "fails": "print('noise')\nraise RuntimeError('no such thing\\nat all')\n",
    "half": "print('noise')\nConfig = 3\n",
    "stops": "raise KeyboardInterrupt\n",
    "noisy": "print('noise')\nfrom attnlab.attention.mha import Attention, Config\n",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with packages that are installed, as far as Python's metadata is concerned."""
    site = tmp_path_factory.mktemp("site")
    (site / "strangers-1.0.dist-info").mkdir()
    points = "\n".join(f"{name} = stranger_{name}" for name in MODULES)
    (site / "strangers-1.0.dist-info/entry_points.txt").write_text(f"[attnlab.attention]\n{points}\n")
    (site / "strangers-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: strangers\nVersion: 1.0\n")
    for name, content in MODULES.items():
        (site / f"stranger_{name}.py").write_text(content)
    return site


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv(plugins.TRIED, "")
    for kept in (plugins.plugins, plugins.plugin, attention.declared, attention._own, attention._others):
        kept.cache_clear()
    yield
    monkeypatch.undo()
    for kept in (plugins.plugins, plugins.plugin, attention.declared, attention._own, attention._others):
        kept.cache_clear()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("leaves", "ends the process"),
        ("exits", "SystemExit"),
        ("fails", "no such thing"),
        ("half", "does not define"),
        ("stops", "KeyboardInterrupt"),
    ],
)
def test_one_that_breaks_is_one_sentence(name: str, words: str, installed: None) -> None:
    with pytest.raises(UserError, match=words) as error:
        attention.module(name)
    assert name in str(error.value) and f"stranger_{name}" in str(error.value) and "\n" not in str(error.value)


def test_it_is_left_out_where_all_are_meant(installed: None, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    found = attention.usable(said.append)
    assert {"noisy", "mha", "mla"} <= set(found) and not ({*MODULES} - {"noisy"}) & set(found)
    assert [line.split("'")[1] for line in said] == ["exits", "fails", "half", "leaves", "stops"]
    assert "noise" not in capsys.readouterr().out, "stdout is for results"
    assert "noisy=" in os.environ[plugins.TRIED], "it is not tried again by the processes that this one starts"


def test_commands_that_do_not_use_it_go_on(site: Path) -> None:
    line = [sys.executable, "-m", "attnlab", "list", "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    records = {record["name"]: record for record in json.loads(run.stdout)}
    assert all("error" in records[name] for name in ("leaves", "exits", "fails", "half"))
    assert "error" not in records["mha"] and "error" not in records["noisy"]
