"""Every fault of benchmarks/faults.py is survived: there are the scenarios, and what survival means."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
pytest.register_assert_rewrite("faults")
faults: ModuleType = importlib.import_module("faults")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the faults are made with /proc and fork")
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="the fault is a signal to g++")
# what starts processes, or many of them
LONG = ("kill -9", "compilation", "torchrun", "max-restarts", "workers", "two processes in one", "imports")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[faults.Lab]:
    lab = faults.Lab(tmp_path_factory.mktemp("faults"))
    yield lab
    lab.close()


def marks(name: str) -> list[pytest.MarkDecorator]:
    slow = [pytest.mark.slow] if any(word in name for word in LONG) else []
    return slow + ([COMPILER] if "compilation" in name else [])


# compiling once is enough here, with the harder of two faults
TRIED = [name for name in faults.FAULTS if name != "SIGTERM during compilation"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in TRIED])
def test_it_survives(lab: faults.Lab, name: str) -> None:
    try:
        outcome = faults.FAULTS[name](lab)
    except faults.NotPossible as error:
        pytest.skip(f"{error}; 'no space' is tried with a limit on the size of files")
    assert outcome.words
